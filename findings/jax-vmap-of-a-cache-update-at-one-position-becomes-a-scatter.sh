#!/usr/bin/env bash
# jax 0.12.0.1, libtpu 0.0.50.1: under vmap a dynamic_update_slice at a position that all examples share becomes a scatter.
#
# Guessed: `jax.vmap` over caches and new keys, with the position not mapped, is one
# `dynamic_update_slice` of the whole batch, as it is one written by hand. Seen: JAX
# makes a scatter that clips its indices, for any mapping. XLA turns that back into a
# write in place, but reads the old rows first and selects by whether the index was
# inside: on a v5e the compiler estimates 4 to 5 times the cycles of the batched write
# (a CPU's and a GPU's program have the same select).
# For LoRA in JAX: serving a batch with an adapter for each sequence maps the model over
# sequences, caches too; the write of keys and values is not that of the base model then.
# Where it counts, return the new keys and values and write them outside of the map.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1 libtpu==0.0.50.1
TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu \
  "$folder/venv/bin/python" - 2>"$folder/log" <<'PY' || { cat "$folder/log" >&2; exit 1; }
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

BATCH, HEADS, LENGTH, DIM = 16, 8, 1024, 128


def of_one(cache, new, position):
    return lax.dynamic_update_slice(cache, new[:, None], (0, position, 0))


def of_all(cache, new, position):
    return lax.dynamic_update_slice(cache, new[:, :, None], (0, 0, position, 0))


mapped = jax.vmap(of_one, (0, 0, None))
chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
place = SingleDeviceSharding(chip)
shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype, sharding=place)
cache = shape(jnp.bfloat16, BATCH, HEADS, LENGTH, DIM)
args = cache, shape(jnp.bfloat16, BATCH, HEADS, DIM), shape(jnp.int32)


def primitives(fn):
    return [eqn.primitive.name for eqn in jax.make_jaxpr(fn)(*args).eqns]


def cycles(fn):
    text = jax.jit(fn, donate_argnums=0).lower(*args).compile().as_text()
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))


random = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
same = jnp.array_equal(
    mapped(random, random[:, :, 0], 4), of_all(random, random[:, :, 0], 4)
)
by_map, at_once = cycles(mapped), cycles(of_all)
print(
    f"mapped: {'a scatter' if 'scatter' in primitives(mapped) else 'no scatter'}, "
    f"{by_map} estimated cycles; at once: {primitives(of_all)[-1]}, {at_once}"
)
assert same
assert "scatter" in primitives(mapped) and "scatter" not in primitives(of_all)
assert by_map > 3 * at_once, (by_map, at_once)
PY

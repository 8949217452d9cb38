#!/usr/bin/env bash
# jax 0.12.0.1, libtpu 0.0.50.1: the topology of v4 chips has two devices for each chip, with half of its memory each.
#
# Guessed: `get_topology_desc(platform="tpu", topology_name="v4:2x2x1")` has the devices
# that `jax.devices()` has on such a host: four, a v4's two cores being one device. Seen:
# eight, of which each has 15.25 GiB for a program. With `chip_config_name="megacore"`
# there are four of 30.75 GiB. (v5p:2x2x1 has four without being asked.)
# For LoRA in JAX: a step of a sharded base that is compiled ahead of time for a v4 slice
# is refused for want of memory, or cut for twice the devices, unless the megacore is
# asked for.
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
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def seen(**config):
    """The number of devices of four chips, and the GiB that a program may take of one."""
    found = topologies.get_topology_desc(platform="tpu", topology_name="v4:2x2x1", **config)
    one = NamedSharding(Mesh(np.array(found.devices[:1]), "d"), PartitionSpec())
    large = jax.ShapeDtypeStruct((1 << 19, 1 << 18), jnp.bfloat16, sharding=one)
    try:
        jax.jit(jnp.sum).lower(large).compile()
    except jax.errors.JaxRuntimeError as error:
        return len(found.devices), float(re.search(r"available HBM \(([\d.]+)G\)", str(error))[1])
    raise SystemExit("256 GiB fit")


halves, whole = seen(), seen(chip_config_name="megacore")
print(f"v4:2x2x1: {halves[0]} devices of {halves[1]} GiB; with the megacore {whole[0]} of {whole[1]}")
assert halves[0] == 8 and whole[0] == 4, (halves, whole)
assert halves[1] < 16 < whole[1], (halves, whole)
PY

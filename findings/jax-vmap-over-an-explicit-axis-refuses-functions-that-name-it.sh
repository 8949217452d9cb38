#!/usr/bin/env bash
# jax 0.12.0.1: `jax.vmap` over an axis sharded over an Explicit mesh axis refuses functions that name it.
#
# Guessed: a model that lays its activations out (`reshard(h, P("data", None))`) can be
# mapped over its batch, each example being on its own device. Seen: the mapped axis keeps
# "data", the name occurs twice, and DuplicateSpecError is raised while tracing.
# For LoRA in JAX: one adapter for each example, by `vmap`, fails on models that are
# written for Explicit meshes, unless the example axis has a mesh axis of another name.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

jax.set_mesh(jax.make_mesh((4,), ("data",)))


def model(rows):
    return jax.sharding.reshard(2 * rows, P("data", None)).sum(-1)


batch = jax.device_put(jnp.ones((8, 5)), P("data"))
assert jax.jit(model)(batch).shape == (8,)
try:
    jax.jit(jax.vmap(model))(batch[:, None])
except Exception as error:
    assert type(error).__name__ == "DuplicateSpecError", error
else:
    raise SystemExit("vmap takes a function that names the mapped mesh axis now")
print("a model that names its mesh axis works on the batch and raises under vmap over it")
PY

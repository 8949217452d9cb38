#!/usr/bin/env bash
# jax 0.12.0.1: `ragged_dot` on a mesh with Explicit axes cannot be differentiated.
#
# Guessed: what needs `out_sharding=` forward, and has it, has a gradient too. Seen: the
# forward pass works, the derivative rule leaves the sharding out, and `jax.grad` raises
# NotImplementedError, by the rows and by the kernels alike.
# For LoRA in JAX: experts on Explicit meshes need derivatives written by hand.
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

jax.set_mesh(jax.make_mesh((2, 2), ("data", "model")))
rows, sizes = jnp.ones((8, 16)), jnp.array([2, 2, 3, 1])
kernels = jax.device_put(jnp.ones((4, 16, 24)), P(None, None, "model"))


def product(kernels, rows):
    return jax.lax.ragged_dot(rows, kernels, sizes, out_sharding=P(None, "model"))


assert jax.jit(product)(kernels, rows).shape == (8, 24)
for argnum in (0, 1):
    gradient = jax.grad(lambda *args: product(*args).sum(), argnum)
    try:
        jax.jit(gradient)(kernels, rows)
    except NotImplementedError as error:
        assert "out_sharding" in str(error), error
    else:
        raise SystemExit(f"the gradient by argument {argnum} is there now")
print("ragged_dot with out_sharding: forward works, both gradients raise NotImplementedError")
PY

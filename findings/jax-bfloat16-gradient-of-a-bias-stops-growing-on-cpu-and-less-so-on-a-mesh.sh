#!/usr/bin/env bash
# jax 0.12.0.1: on CPU the gradient of a bfloat16 bias over (batch, length) is a quarter of
# the right one, and twice that, or right, where the batch is sharded.
#
# Guessed: a gradient exactly twice as large on an Auto mesh as without a mesh, by the size
# of an axis, is added up twice by the partitioner. Seen, on CPU devices: the mesh is
# nearer to the truth. The transpose of broadcasting a bfloat16 value is a bfloat16 sum, and
# one over several axes may round each partial sum: 256 + 1 = 256, so it stops growing
# early. Each device stops by itself, and the all-reduce adds what they reached. In float32,
# or where the sum runs over one axis, nothing is lost; jnp.sum adds in float32.
# jax 0.10.2 does the same. `jax_allow_f16_reductions=False` refuses such sums.
# For LoRA in JAX: a bfloat16 run on CPU is no reference for gradients that pass through
# such sums, and differs from one on a mesh: broadcast in float32, or run both in float32.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 "$folder/venv/bin/python" - 2>/dev/null <<'PY'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def gradient(devices, shape=(64, 64, 8), dtype=jnp.bfloat16):
    """Each entry is the number of rows, 4096, exact in bfloat16."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    put = lambda value: jax.device_put(value, NamedSharding(mesh, P("data")))
    loss = lambda bias, rows, weights: jnp.sum((rows + bias).astype(jnp.float32) * weights)
    weights = np.ones(shape, np.float32)  # an argument, so that no constant is folded
    got = jax.jit(jax.grad(loss))(jnp.zeros(8, dtype), put(jnp.zeros(shape, dtype)), put(weights))
    (value,) = set(np.asarray(got, np.float32).tolist())
    return value


found = {devices: gradient(devices) for devices in (1, 2, 4, 8)}
print("4096 is right; bfloat16, rows (64, 64), on 1, 2, 4, 8 devices:", found)
assert found == {1: 1024.0, 2: 1024.0, 4: 2048.0, 8: 4096.0}
assert all(gradient(n, dtype=jnp.float32) == gradient(n, (4096, 8)) == 4096.0 for n in found)
print("float32, or rows (4096,): 4096 on each")
try:
    with jax.allow_f16_reductions(False):
        gradient(1)
except ValueError as error:
    print("refused:", error)
else:
    raise AssertionError("jax_allow_f16_reductions=False no longer refuses the sum")
PY

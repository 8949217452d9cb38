#!/usr/bin/env bash
# jax 0.12.0.1: where models are mapped over a leading axis and scan over their layers, each call copies all of their weights twice on a CPU; with the mapped axis behind the one of layers it copies nothing.
#
# Guessed: `jax.vmap(f, in_axes=0)` over weights of shape (models, layers, d, d) costs
# nothing but the work of all models: the axis is a matter of strides, which XLA chooses.
# Seen: the scan slices along layers, so that JAX turns the first two axes of the whole
# stack, and XLA, which takes arguments as they lie, writes it anew before the loop: once
# with jax 0.10.2, twice with 0.12.0.1, at every call. Its gradient is turned back after.
# With weights of shape (layers, models, d, d) and `in_axes=1` there is no such array.
# For LoRA in JAX: several adapters that are trained at once hold as much as their base
# where there are many. Stack them behind the axis of layers, moments of optimizers too.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp

MODELS, LAYERS, D = 5, 6, 256


def model(x, layers):
    step = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(step, x, layers)[0]


def copies(axis):
    """How many times all weights fit into what one call needs beside its arguments."""
    sizes = [MODELS, LAYERS] if axis == 0 else [LAYERS, MODELS]
    weights = jax.ShapeDtypeStruct((*sizes, D, D), jnp.float32)
    x = jax.ShapeDtypeStruct((MODELS, 2, D), jnp.float32)
    program = jax.jit(jax.vmap(model, (0, axis))).lower(x, weights).compile()
    whole = 4 * MODELS * LAYERS * D * D
    return program.memory_analysis().temp_size_in_bytes / whole


in_front, behind = copies(0), copies(1)
print(f"jax {jax.__version__}: {in_front:.2f} copies; behind the layers {behind:.2f}")
# Beside them one layer of all models, a sixth of the weights, may be sliced out.
expected = {(0, 10): 1, (0, 12): 2}[jax.__version_info__[:2]]
assert expected <= round(in_front, 2) < expected + 0.5, in_front
assert behind < 0.5, behind
PY
for version in 0.10.2 0.12.0.1; do
  "$python" -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "jax==$version" "jaxlib==$version"
  JAX_PLATFORMS=cpu "$folder/$version/bin/python" "$folder/run.py"
done

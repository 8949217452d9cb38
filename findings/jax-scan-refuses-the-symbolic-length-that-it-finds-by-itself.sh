#!/usr/bin/env bash
# jax 0.12.0.1: under `jax.export` `lax.scan` takes a symbolic length from its inputs and refuses it as `length=`.
#
# Guessed: `length=xs.shape[0]` says what scan finds out by itself. Seen: with a symbolic
# size the call without it is exported, and the one with it raises
# InconclusiveDimensionOperation.
# For LoRA in JAX: whoever emits a scan again from its equation, which has the length,
# must leave it out where it is symbolic.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.12.0.1 jaxlib==0.12.0.1
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 "$folder/venv/bin/python" - <<'PY'
import jax
import jax.numpy as jnp
from jax import export, lax

(size,) = export.symbolic_shape("t")
rows = jax.ShapeDtypeStruct((size,), jnp.float32)
step = lambda total, row: (total + row, None)
by_itself = lambda xs: lax.scan(step, 0.0, xs)[0]
told = lambda xs: lax.scan(step, 0.0, xs, length=xs.shape[0])[0]
assert export.export(jax.jit(by_itself))(rows).out_avals[0].shape == ()
try:
    export.export(jax.jit(told))(rows)
except Exception as error:
    assert type(error).__name__ == "InconclusiveDimensionOperation", error
else:
    raise SystemExit("scan takes a symbolic length now")
print("scan over a symbolic axis is exported; with length= of that axis it raises")
PY

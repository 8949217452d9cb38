#!/usr/bin/env bash
# jax 0.12.0.1: on a CPU the gradient of a tall, thin matrix takes several times as long as its transpose, which is as much work.
#
# Guessed: `x.T @ g` and `(g.T @ x).T` are one product; whichever is written, XLA takes
# the order that suits the CPU.
# Seen: for `x` of 2,048 columns and `g` of 16, over 1,024 rows, what `jax.grad` makes of
# `x @ a` takes three to five times as long as `g.T @ x`. To transpose the small result of
# that gives nothing back: XLA folds the transpose into the product, which is the slow one
# again. Only with a barrier before the transpose it stays fast.
# For LoRA in JAX: both gradients of factors are such products, so that plain autodiff
# spends more on them on a CPU than their FLOPs tell.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jax==0.12.0.1" "jaxlib==0.12.0.1"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import time

import jax
import jax.numpy as jnp
import numpy as np

ROWS, COLUMNS, RANK = 1024, 2048, 16
keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (ROWS, COLUMNS))
g = jax.random.normal(keys[1], (ROWS, RANK))
a = jax.random.normal(keys[2], (COLUMNS, RANK))

loss = lambda a, x, g: jnp.sum((x @ a) * g)
ways = {
    "by jax.grad": lambda a, x, g: jax.grad(loss)(a, x, g),
    "transposed back": lambda a, x, g: (g.T @ x).T,
    "transposed back, a barrier before": lambda a, x, g: jax.lax.optimization_barrier(
        g.T @ x
    ).T,
    "as the transpose": lambda a, x, g: g.T @ x,
}
compiled = {name: jax.jit(way) for name, way in ways.items()}
expected = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
for name, run in compiled.items():
    found = np.asarray(run(a, x, g))
    found = found.T if name == "as the transpose" else found
    assert np.allclose(found, expected, atol=1e-2), name

best = dict.fromkeys(ways, float("inf"))
for _ in range(60):
    for name, run in compiled.items():
        start = time.perf_counter()
        run(a, x, g).block_until_ready()
        best[name] = min(best[name], time.perf_counter() - start)
for name, seconds in best.items():
    print(f"{name}: {1e3 * seconds:.2f} ms")
fast = best["as the transpose"]
assert best["by jax.grad"] > 2 * fast, best
assert best["transposed back"] > 2 * fast, best
assert best["transposed back, a barrier before"] < 1.7 * fast, best
PY

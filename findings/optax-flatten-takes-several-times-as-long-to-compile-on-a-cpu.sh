#!/usr/bin/env bash
# optax 0.2.8 with jax 0.12.0.1: `optax.flatten`, made for many small leaves, takes several times as long to compile on a CPU.
#
# Guessed: one vector in place of hundreds of leaves is a smaller program, and compiles
# faster; optax's page says that it spares the overhead of many small variables.
# Seen: with AdamW over 200 leaves the program has a quarter of the equations and takes
# six to eight times as long to compile, over 400 leaves too. It is not the joining: to
# join 200 leaves alone takes a few tenths of a second, and to cut a vector into 200
# takes about as long as the whole flattened step.
# For LoRA in JAX: an adapter is hundreds of small leaves, for which the wrapper looks
# made; in notebooks and tests on a CPU the wait before the first step is what grows.
set -euo pipefail
python=${PYTHON:-python3.12}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "optax==0.2.8" "jax==0.12.0.1" "jaxlib==0.12.0.1"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import time

import jax
import jax.numpy as jnp
import optax


def leaves_of(count):
    shape = lambda i: jax.ShapeDtypeStruct((64 + 8 * (i % 4), 16), jnp.float32)
    return [shape(i) for i in range(count)]


def seconds(function, *args):
    """Seconds to compile, and the equations of the program."""
    traced = jax.jit(function).trace(*args)
    lowered, start = traced.lower(), time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start, len(traced.jaxpr.eqns)


def step_of(optimizer, count):
    params = leaves_of(count)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return seconds(step, params, jax.eval_shape(optimizer.init, params), params)


def join(leaves):
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


def cut(vector):
    pieces, start = [], 0
    for leaf in leaves_of(200):
        pieces.append(2 * vector[start : start + leaf.size].reshape(leaf.shape))
        start += leaf.size
    return pieces


step_of(optax.adamw(1e-4), 3)  # what the first compilation of a process takes besides
for count in (200, 400):
    plain, own = step_of(optax.adamw(1e-4), count)
    flat, fewer = step_of(optax.flatten(optax.adamw(1e-4)), count)
    print(
        f"{count} leaves: AdamW {own:,} equations, {plain:.1f} s; flattened "
        f"{fewer:,} equations, {flat:.1f} s, {flat / plain:.1f} times as long"
    )
    assert fewer < own and flat > 2 * plain, (own, fewer, plain, flat)
joining, _ = seconds(join, leaves_of(200))
cutting, _ = seconds(cut, jax.eval_shape(join, leaves_of(200)))
print(f"200 leaves: joined alone {joining:.1f} s, cut alone {cutting:.1f} s")
assert cutting > 5 * joining, (joining, cutting)
PY

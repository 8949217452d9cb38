"""A quantised base learns as well as the one that it was made from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jlora

pytest.importorskip("qwix")

WIDTH, ROWS, STEPS = 64, 2048, 300
Tree = Any


def model(params: Tree, x: jax.Array) -> jax.Array:
    """A network of two hidden layers."""
    for name in ("first", "second"):
        x = jnp.tanh(x @ params[name])
    return x @ params["last"]


def data(seed: int, shift: float) -> tuple[jax.Array, jax.Array]:
    """Rows, and waves in them, of which a part is noise that no one can learn."""
    key, noise = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(key, (ROWS, 8))
    waves = jnp.sin(2 * x[:, :4] + shift) * jnp.cos(x[:, 4:] - shift)
    return x, waves + 0.3 * jax.random.normal(noise, waves.shape)


def trained(
    loss: Callable[..., jax.Array], start: Tree, rate: float, *args: Any
) -> tuple[Tree, jax.Array]:
    """What Adam makes of it in a few hundred steps, and its loss."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, STEPS))

    def step(both: tuple[Tree, Any], _: None) -> tuple[tuple[Tree, Any], None]:
        tree, state = both
        updates, state = tx.update(jax.grad(loss)(tree, *args), state)
        return (optax.apply_updates(tree, updates), state), None

    @jax.jit
    def run(tree: Tree) -> tuple[Tree, jax.Array]:
        (tree, _), _ = jax.lax.scan(step, (tree, tx.init(tree)), None, length=STEPS)
        return tree, loss(tree, *args)

    return run(start)


def test_four_bits_learn_within_two_percent():
    shapes = {"first": (8, WIDTH), "second": (WIDTH, WIDTH), "last": (WIDTH, 4)}
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda k, shape: jax.random.normal(k, shape) / shape[0] ** 0.5
    start = {n: draw(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    error = lambda out, y: jnp.mean((out - y) ** 2)
    params, _ = trained(
        lambda p, x, y: error(model(p, x), y), start, 1e-2, *data(1, 0.0)
    )

    lora = jlora.lora(model, jlora.LoraConfig(rank=4, alpha=8.0))
    x, y = data(2, 0.4)
    adapter = lora.init(jax.random.key(3), params, x)
    loss = lambda a, p, x, y: error(lora.apply(p, a, x), y)
    found = {}
    for name in ("plain", "nf4"):
        base = params
        if name == "nf4":
            base = jlora.quantize(params, lora.plan(params, x), "nf4")
        before = loss(adapter, base, x, y)
        _, found[name] = trained(loss, adapter, 1e-2, base, x, y)
        assert found[name] < 0.8 * before
        print(name, before, found[name])
    assert found["nf4"] != found["plain"]
    assert found["nf4"] <= 1.02 * found["plain"]

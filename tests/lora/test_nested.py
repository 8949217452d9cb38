"""A second adapter beside a first one that stays frozen, on the same kernels."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from case import randomized
from oracle import assert_close

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")


def model(params: Any, x: jax.Array) -> jax.Array:
    """Siblings, and layers of a scan."""
    h = jnp.tanh(x @ params["q"]) * (x @ params["k"])
    step = lambda h, w: (jnp.tanh(h @ w), None)
    return jax.lax.scan(step, h, params["layers"])[0]


def given() -> tuple[Any, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"q": (8, 6), "k": (8, 6), "layers": (3, 6, 6)}
    pairs = zip(shapes.items(), keys, strict=False)
    params = {n: jax.random.normal(key, s) / 2 for (n, s), key in pairs}
    return params, jax.random.normal(keys[3], (5, 8))


@pytest.mark.parametrize(
    ("of_first", "of_second"),
    [({"backward": "autodiff"}, {}), ({}, {"materialize": "allow"})],
    ids=["factored", "formed"],
)
def test_both_changes_add_up(of_first: Any, of_second: Any) -> None:
    params, x = given()
    first = jlora.lora(model, jlora.LoraConfig(rank=2, alpha=3.0), **of_first)
    frozen = randomized(first.init(jax.random.key(1), params, x), jax.random.key(2))
    fn = lambda params, x: first.apply(params, frozen, x)
    second = jlora.lora(fn, jlora.LoraConfig(rank=3, alpha=5.0), **of_second)
    adapter = randomized(second.init(jax.random.key(3), params, x), jax.random.key(4))
    loss = lambda y: jnp.sum(y**2)
    ours = lambda adapter: loss(second.apply(params, adapter, x))
    merged = jlora.merge(params, frozen)
    theirs = lambda adapter: loss(model(jlora.merge(merged, adapter), x))
    found, wanted = (jax.value_and_grad(one)(adapter) for one in (ours, theirs))
    assert_close(found, wanted, 1e-4)


def test_the_error_says_what_to_do() -> None:
    params, x = given()
    first = jlora.lora(model, jlora.LoraConfig(rank=2))
    frozen = first.init(jax.random.key(1), params, x)
    fn = lambda params, x: first.apply(params, frozen, x)
    second = jlora.lora(fn, jlora.LoraConfig(rank=3))
    with pytest.raises(jlora.MaterializationError, match='materialize="allow"'):
        second.init(jax.random.key(3), params, x)

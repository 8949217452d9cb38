"""Keywords of the function that are named like arguments of jlora's own methods."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from oracle import assert_close

import jlora
import jlora.linen
import jlora.nnx

# The names that `plan`, `init`, `apply`, `apply_mixed` and `inputs` give their own.
NAMES = ("self", "params", "adapter", "key", "stacked", "index", "args", "variables")
each_name = pytest.mark.parametrize(
    "name", [*NAMES, "state", "rngs", "model", "config"]
)

W, X = jax.random.normal(jax.random.key(0), (5, 7)), jnp.ones((2, 5))
CONFIG = jlora.LoraConfig("w", rank=2, alpha=3.0)


def fn(tree: Any, x: jax.Array, **given: jax.Array) -> jax.Array:
    (value,) = given.values()
    return (x + value) @ tree["w"]


def with_b(adapter: Any) -> Any:
    """The adapter with random arrays, so that ΔW is not zero."""
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return treedef.unflatten([jax.random.normal(k, v.shape) for k, v in pairs])


@each_name
def test_every_method_passes_it_on(name: str) -> None:
    lora, value = jlora.lora(fn, CONFIG), {name: jnp.asarray(2.0)}
    params = {"w": W}
    assert len(lora.plan(params, X, **value).targets) == 1
    adapter = with_b(lora.init(jax.random.key(1), params, X, **value))
    wanted = fn(jlora.merge(params, adapter), X, **value)
    assert_close(lora.apply(params, adapter, X, **value), wanted, 1e-5)
    stacked = jlora.stack([adapter, with_b(adapter)])
    mixed = lora.apply_mixed(
        params, stacked, jnp.array([0, 1]), X, in_axes={name: None}, **value
    )
    assert_close(mixed, wanted, 1e-5)
    moment = lora.inputs(params, X, **value)["w"].moment
    assert_close(moment, 9.0 * X.T @ X, 1e-5)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, params: Any, adapter: Any, key: Any) -> Any:
        return nn.Dense(7, name="w")(x + params + adapter + key)


def test_linen_passes_them_on() -> None:
    value = {name: jnp.ones(()) for name in ("params", "adapter", "key")}
    model = jlora.linen.wrap(Linen(), CONFIG)
    variables = model.init(jax.random.key(0), X, **value)
    assert len(model.plan(variables, X, **value).targets) == 1
    adapter = model.init_adapter(jax.random.key(1), variables, X, **value)
    variables = {**variables, "lora": with_b(adapter)}
    wanted = Linen().apply(model.merge(variables), X, **value)
    assert_close(model.apply(variables, X, **value), wanted, 1e-5)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nnx.Linear(5, 7, rngs=rngs)

    def __call__(self, x: jax.Array, **given: jax.Array) -> jax.Array:
        (value,) = given.values()
        return self.w(x + value)


@pytest.mark.parametrize("name", ["params", "adapter", "rest", "model", "config"])
def test_nnx_passes_it_on(name: str) -> None:
    model, value = Nnx(nnx.Rngs(0)), {name: jnp.ones(())}
    lora, params, adapter, rest = jlora.nnx.wrap(model, CONFIG, X, **value)
    adapter = with_b(adapter)
    out, _ = lora.apply(params, adapter, rest, X, **value)
    wanted = jlora.nnx.merge_into(model, adapter)(X, **value)
    assert_close(out, wanted, 1e-5)

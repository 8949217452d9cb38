"""Symbolic sizes of `jax.export`: plans, forms and programs for all of them at once.

What is exported is called with sizes that it was not traced with.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax
from surface import config

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")

BATCH, TIME = export.symbolic_shape("b, t")
X = jax.ShapeDtypeStruct((BATCH, TIME, 6), jnp.float32)
SIZES = (5, 3)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["v"]


def lookup(params: Any, x: jax.Array) -> jax.Array:
    return params["e"][jnp.argmax(x, -1)] @ params["w"][:, :6].T


def tied(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["w"].T


def conv(params: Any, x: jax.Array) -> jax.Array:
    dims = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x, params["k"], (1,), "SAME", dimension_numbers=dims
    )


def ragged(params: Any, x: jax.Array) -> jax.Array:
    sizes = jnp.array([1, 0, 2, 0], jnp.int32)
    return lax.ragged_dot(x.reshape(-1, 6), params["experts"], sizes)


def over_layers(params: Any, x: jax.Array) -> jax.Array:
    step = lambda x, w: (jnp.tanh(x @ w), None)
    return lax.scan(step, x, params["layers"])[0]


def over_time(params: Any, x: jax.Array) -> jax.Array:
    step = lambda h, x: (jnp.tanh(x @ params["w"] + h), None)
    start = jnp.zeros((x.shape[0], 10))
    return lax.scan(step, start, jnp.swapaxes(x, 0, 1))[0]


def branches(params: Any, x: jax.Array) -> jax.Array:
    one, other = lambda x: x @ params["w"], lambda x: jnp.tanh(x) @ params["w"]
    return lax.cond(x.sum() > 0, one, other, x)


MODELS = [mlp, lookup, tied, conv, ragged, over_layers, over_time, branches]
SHAPES = {
    "w": (6, 10),
    "v": (10, 4),
    "e": (6, 6),
    "k": (3, 6, 8),
    "experts": (4, 6, 8),
    "layers": (3, 6, 6),
}
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda fn: fn.__name__)


def values(*shape: int, seed: int = 0) -> jax.Array:
    normal = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(0.3 * normal, jnp.float32)


def case(model: Callable[..., Any], **settings: Any) -> tuple[Any, Any, Any]:
    """The adapted model, the params that it uses, and an adapter that is not zero."""
    used = {
        "mlp": "wv",
        "lookup": "ew",
        "conv": "k",
        "ragged": ["experts"],
        "over_layers": ["layers"],
    }.get(model.__name__, "w")
    params = {name: values(*SHAPES[name], seed=i) for i, name in enumerate(used)}
    how = {"contraction": settings.pop("contraction", "factored")}
    lora = jlora.lora(model, config(".*", **settings), **how)
    adapter = lora.init(jax.random.key(0), params, X)
    moved = jax.tree.map(lambda v: v + values(*v.shape, seed=9), adapter)
    return lora, params, moved


def exported(fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """A function as it is after export with symbolic sizes."""
    leaves, treedef = jax.tree.flatten(args)
    whole = export.export(jax.jit(lambda *v: fn(*treedef.unflatten(v))))(*leaves)
    return lambda *args: whole.call(*jax.tree.leaves(args))


def check(fn: Callable[..., Any], *args: Any) -> None:
    """What `fn` gives after export is what it gives for known sizes."""
    found = exported(fn, *args, X)(*args, x := values(*SIZES, 6, seed=7))
    wanted = jax.jit(fn)(*args, x)
    compare = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(compare, jax.tree.leaves(found), jax.tree.leaves(wanted))


@each_model
@pytest.mark.parametrize("contraction", ["factored", "merged", "auto", "fused"])
def test_values_and_gradients(model: Any, contraction: str):
    lora, params, adapter = case(model, contraction=contraction)
    loss = lambda adapter, x: (lora.apply(params, adapter, x) ** 2).sum()
    check(jax.value_and_grad(loss), adapter)


@each_model
def test_inputs(model: Any):
    lora, params, _ = case(model)
    check(lora.inputs, params)


@pytest.mark.parametrize("model", [mlp, tied, over_time], ids=lambda fn: fn.__name__)
def test_with_a_magnitude(model: Any):
    lora, params, adapter = case(model, dora=True)
    check(lambda adapter, x: lora.apply(params, adapter, x), adapter)


@pytest.mark.parametrize("model", [mlp, lookup], ids=lambda fn: fn.__name__)
def test_quantised(model: Any):
    lora, params, adapter = case(model)
    params = jlora.quantize(params, lora.plan(params, X), "nf4", tile=2)
    assert str(lora.plan(params, X))
    leaves, treedef = jax.tree.flatten(params)
    apply = lambda leaves, x: lora.apply(treedef.unflatten(leaves), adapter, x)
    check(apply, leaves)


def test_a_mixed_batch():
    lora, params, adapter = case(mlp)
    stacked = jlora.stack([adapter, jlora.scale(adapter, -1.0)])
    run = lambda index, x: lora.apply_mixed(params, stacked, index, x)
    shape = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    index, x = jnp.array([0, 1, -1, 1, 0]), values(*SIZES, 6)
    found = exported(run, shape, X)(index, x)
    np.testing.assert_allclose(found, jax.jit(run)(index, x), atol=1e-5)


@each_model
def test_a_plan_prints(model: Any):
    lora, params, _ = case(model, contraction="auto")
    plan = lora.plan(params, X)
    assert "b*t" in plan.cost()
    assert "b*t" in str(plan)
    assert "b*t" in plan._repr_html_()
    assert np.isnan(plan.flops.ratio)
    memory = plan.memory(optimizer=optax.adam(1e-3), batch=X)
    assert "24*b*t B" in str(memory)
    assert "24*b*t B" in memory._repr_html_()


def test_the_flops_of_a_known_size_are_those_of_the_symbols():
    lora, params, _ = case(mlp)
    known = lora.plan(params, values(*SIZES, 6)).flops
    symbols = lora.plan(params, X).flops
    assert int(symbols.step // (BATCH * TIME)) * 15 == known.step
    assert int(symbols.full // (BATCH * TIME)) * 15 == known.full

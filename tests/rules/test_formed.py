"""Kernels that reach a product only through an operation without a rule."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from oracle import assert_close

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")

Op = Callable[[jax.Array], jax.Array]


@jax.custom_vjp
def rounded(w: jax.Array) -> jax.Array:
    """As training for quantised kernels rounds: with the gradient of no rounding."""
    return jnp.round(8 * w) / 8


rounded.defvjp(lambda w: (rounded(w), None), lambda kept, g: (g,))

MASK = jnp.triu(jnp.ones((5, 7)), -1) > 0
OPS: dict[str, tuple[Op, str]] = {
    "where": (lambda w: jnp.where(MASK, w, 0), "select_n"),
    "mask": (lambda w: w * MASK, "mul"),
    "tril": (jnp.tril, "select_n"),
    "relu": (jax.nn.relu, "custom_jvp_call"),
    "softplus": (jax.nn.softplus, "custom_jvp_call"),
    "silu": (jax.nn.silu, "logistic"),
    "exp": (jnp.exp, "exp"),
    "square": (lambda w: w**2, "(integer_pow|square)"),
    "clip": (lambda w: jnp.clip(w, -0.5, 0.5), "(max|min|clamp)"),
    "softmax": (lambda w: jax.nn.softmax(w, 0), "reduce_max"),
    "cumsum": (lambda w: jnp.cumsum(w, 0), "cumsum"),
    "straight through": (rounded, "custom_vjp_call"),
    "standardised": (lambda w: (w - w.mean(0)[None]) / w.std(0)[None], "reduce_sum"),
    "several": (
        lambda w: jnp.tanh(jnp.where(MASK, w, 0)).T.reshape(7, 5).T,
        "select_n",
    ),
}
AXES = jlora.KernelAxes((), (0,), (1,))
# What is formed, and how a product follows: params, input and the roles of "w".
FOLLOWED: dict[str, tuple[Any, tuple[int, ...], jlora.KernelAxes]] = {
    "dense": (lambda w, x: x @ w, (3, 5), AXES),
    "transposed": (lambda w, x: x @ w.T, (3, 7), jlora.KernelAxes((), (1,), (0,))),
    "remat": (jax.checkpoint(lambda w, x: x @ w), (3, 5), AXES),
    "scan": (
        lambda w, x: lax.scan(lambda c, row: (c, row @ w), 0.0, x)[1],
        (3, 5),
        AXES,
    ),
    "vmap": (lambda w, x: jax.vmap(lambda row: row @ w)(x), (3, 5), AXES),
    "conv": (
        lambda w, x: lax.conv_general_dilated(
            x, w[None], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (2, 4, 5),
        AXES,
    ),
    "ragged": (
        lambda w, x: lax.ragged_dot(x, w[None], jnp.array([3], jnp.int32)),
        (3, 5),
        AXES,
    ),
}
W = jax.random.normal(jax.random.key(0), (5, 7))


def random_like(adapter: Any) -> Any:
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return treedef.unflatten([0.3 * jax.random.normal(k, v.shape) for k, v in pairs])


@pytest.mark.parametrize("followed", FOLLOWED)
@pytest.mark.parametrize("name", OPS)
def test_it_is_a_kernel_with_the_roles_of_the_product(name: str, followed: str) -> None:
    op, primitive = OPS[name]
    use, shape, axes = FOLLOWED[followed]
    fn = lambda p, x: use(op(p["w"]), x)
    params, x = {"w": W}, jax.random.normal(jax.random.key(1), shape)
    config = jlora.LoraConfig("w", rank=2, alpha=3.0)
    with pytest.raises(
        jlora.MaterializationError, match=rf"'w' \(5, 7\) reaches {primitive}\b"
    ):
        jlora.lora(fn, config).plan(params, x)
    lora = jlora.lora(fn, config, materialize="allow")
    (target,) = lora.plan(params, x).targets
    assert target.axes == axes
    assert any(not used.factored for used in target.uses)
    adapter = random_like(lora.init(jax.random.key(2), params, x))
    if name == "softmax" or followed == "dense":  # all pairs are analysed alike
        loss = lambda a: jnp.sum(jnp.sin(lora.apply(params, a, x)))
        merged = lambda a: jnp.sum(jnp.sin(fn(jlora.merge(params, a), x)))
        assert_close(
            lora.apply(params, adapter, x), fn(jlora.merge(params, adapter), x), 1e-4
        )
        assert_close(jax.grad(loss)(adapter), jax.grad(merged)(adapter), 1e-4)


@pytest.mark.parametrize("name", OPS)
def test_all_linear_means_it_too(name: str) -> None:
    """A config without a target says what stands in its way, as for other kernels."""
    op, _ = OPS[name]
    fn = lambda p, x: x @ op(p["w"])
    with pytest.raises(jlora.MaterializationError, match=r"'w' \(5, 7\) reaches"):
        jlora.lora(fn, jlora.LoraConfig(rank=2)).plan({"w": W}, jnp.ones((3, 5)))


def test_a_table_that_is_formed_is_looked_up() -> None:
    fn = lambda p, ids: jnp.tanh(p["w"])[ids]
    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=2), materialize="allow")
    (target,) = lora.plan({"w": W}, jnp.array([1, 3])).targets
    assert target.axes == AXES


def test_experts_behind_a_mask() -> None:
    fn = lambda p, x: jnp.einsum("etd,edf->etf", x, jnp.where(p["w"] > 0, p["w"], 0))
    params = {"w": jax.random.normal(jax.random.key(0), (2, 5, 7))}
    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=2), materialize="allow")
    (target,) = lora.plan(params, jnp.ones((2, 3, 5))).targets
    assert target.axes == jlora.KernelAxes((0,), (1,), (2,))


NO_KERNELS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "bias": lambda v, x: x + jnp.tanh(v),
    "gate": lambda v, x: x * jnp.exp(v),
    "gate of keys": lambda v, x: (x * jnp.exp(v)) @ x.T,
    "position table": lambda v, x: (x + jax.nn.relu(v)) @ x.T,
    "norm": lambda v, x: (x * (1 + jnp.tanh(v[:1]))) @ x.T,
    "select": lambda v, x: jnp.where(x > 0, jnp.tanh(v), x) @ x.T,
    "penalty": lambda v, x: x + jnp.square(v).sum(),
    "gram": lambda v, x: x * (jnp.tanh(v).T @ jnp.tanh(v)).sum(),
    "queries": lambda v, x: jnp.tanh(jnp.tanh(v) @ jnp.ones((5, 5))) @ x.T,
}


@pytest.mark.parametrize("use", NO_KERNELS.values(), ids=NO_KERNELS)
def test_what_is_no_kernel_stays_none(use: Any) -> None:
    fn = lambda p, x: (x @ p["w"], use(p["v"], x))
    params, x = {"v": jnp.ones((3, 5)), "w": W}, jnp.ones((3, 5))
    for materialize in ("error", "allow"):
        config = jlora.LoraConfig(rank=2)
        plan = jlora.lora(fn, config, materialize=materialize).plan(params, x)
        assert [target.path for target in plan.targets] == ["w"]


def test_votes_of_the_kernel_itself_come_first() -> None:
    fn = lambda p, x: x @ p["w"] + (x @ jnp.exp(p["w"]).T)
    params, x = {"w": jnp.ones((5, 5))}, jnp.ones((3, 5))
    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=2), materialize="allow")
    assert lora.plan(params, x).targets[0].axes == AXES

"""Kernels joined, padded or stacked along any axis, of size one too, then used.

The reference forms `W + s·a·b` of each kernel and joins these.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax
from oracle import assert_close

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")


def normal(seed: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(seed), shape)


def dense(w: Array) -> Array:
    """Contracts the first axis; the others are outputs."""
    return jnp.einsum("bi,i...->b...", normal(7, 3, w.shape[0]), w)


def conv(w: Array) -> Array:
    x, layout = normal(7, 2, 6, 7, w.shape[2]), ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=layout)


def depthwise(w: Array) -> Array:
    channels = w.shape[2] * w.shape[3]
    layout = ("NHWC", "HWIO", "NHWC")
    groups = w.shape[3] if w.shape[2] == 1 else 1
    x = normal(7, 2, 6, 7, channels if groups > 1 else w.shape[2])
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


def ragged(w: Array) -> Array:
    sizes = jnp.asarray([2, *[1] * (w.shape[0] - 1)])
    return lax.ragged_dot(normal(7, w.shape[0] + 1, w.shape[1]), w, sizes)


def lookup(w: Array) -> Array:
    return w[jnp.asarray([w.shape[0] - 1, 0, 0])]


USES = {
    "dense": (dense, [(1, 5), (5, 1), (5, 1, 4)]),
    "conv": (conv, [(1, 3, 1, 4), (3, 1, 2, 1)]),
    "depthwise": (depthwise, [(1, 3, 1, 4)]),
    "ragged": (ragged, [(1, 5, 4), (2, 1, 4), (2, 5, 1)]),
    "lookup": (lookup, [(7, 1), (1, 5)]),
}


def along(axis: int, ndim: int, amounts: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [amounts if i == axis else (0,) * len(amounts) for i in range(ndim)]


JOINS: dict[str, Callable[[Any, int], Array]] = {
    "concatenate": lambda p, i: jnp.concatenate([p["q"], p["k"]], i),
    "scaled": lambda p, i: jnp.concatenate([p["q"] * 0.5, p["k"], p["q"]], i),
    "pad": lambda p, i: jnp.pad(p["q"], along(i, p["q"].ndim, (2, 1))),
    "pad_between": lambda p, i: lax.pad(p["q"], 0.0, along(i, p["q"].ndim, (1, 0, 2))),
    "twice": lambda p, i: jnp.pad(
        jnp.concatenate([p["q"], p["k"]], i), along(i, p["q"].ndim, (0, 1))
    ),
    "one_frozen": lambda p, i: jnp.concatenate([p["v"], p["q"]], i),
}
CASES = [
    pytest.param(use, shape, axis, id=f"{name}-{'x'.join(map(str, shape))}-{axis}")
    for name, (use, shapes) in USES.items()
    for shape in shapes
    for axis in range(len(shape))
]


def check(fn: Callable[[Any], Array], params: Any, dtypes: dict[str, str]) -> None:
    """Values and gradients are those of the merged kernels."""
    used = [
        name
        for name in dtypes
        if jnp.any(jax.grad(lambda p: fn(p).sum())(params)[name] != 0)
    ]
    configs = [jlora.LoraConfig(n, rank=1, alpha=3, dtype=dtypes[n]) for n in used]
    lora = jlora.lora(fn, configs)
    adapter = lora.init(jax.random.key(1), params)
    adapter = jax.tree.map(lambda v: normal(v.size, *v.shape).astype(v.dtype), adapter)
    tolerance = 1e-4 if set(dtypes.values()) == {"float32"} else 2e-2

    def both(apply: Callable[[Any], Array]) -> Any:
        loss = lambda adapter: (jnp.sin(y := apply(adapter)).sum(), y)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)

    (_, y), grads = both(lambda adapter: lora.apply(params, adapter))
    (_, wanted), wanted_grads = both(lambda adapter: fn(jlora.merge(params, adapter)))
    assert_close(y, wanted, tolerance, "output")
    assert_close(grads, wanted_grads, tolerance, "gradient")


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("use, shape, axis", CASES)
def test_joined_along_any_axis(use: Any, shape: Any, axis: int, join: str) -> None:
    params = {name: normal(i, *shape) for i, name in enumerate("qkv")}
    fn = lambda p: use(JOINS[join](p, axis))
    check(fn, params, {"q": "float32", "k": "float32"})


@pytest.mark.parametrize("use, shape, axis", CASES[::2])
def test_factors_of_two_dtypes(use: Any, shape: Any, axis: int) -> None:
    params = {name: normal(i, *shape) for i, name in enumerate("qk")}
    fn = lambda p: use(JOINS["scaled"](p, axis))
    check(fn, params, {"q": "bfloat16", "k": "float32"})


STACKS: dict[str, tuple[Callable[[Array], Array], tuple[int, ...], int]] = {
    "experts": (ragged, (5, 4), 0),
    "taps": (lambda w: conv(w[:, None]), (5, 4), 0),
    "heads": (dense, (5, 4), 1),
    "heads_merged": (lambda w: dense(w.reshape(5, -1)), (5, 4), 1),
    "heads_merged_last": (lambda w: dense(w.reshape(5, -1)), (5, 4), 2),
    "scaled": (lambda w: dense(w * normal(9, 1, 1, 4)), (5, 4), 1),
    "one_of_them": (lambda w: dense(w[1]), (5, 4), 0),
    "each_in_turn": (
        lambda w: lax.scan(lambda n, one: (n, dense(one)), 0, w)[1],
        (5, 4),
        0,
    ),
    "batched": (lambda w: jnp.einsum("ebi,eio->ebo", normal(7, 2, 3, 5), w), (5, 4), 0),
    "inputs_merged": (lambda w: dense(w.reshape(-1, 4)), (5, 4), 0),
    "joined_again": (lambda w: dense(jnp.concatenate([w, -w], 1)), (5, 4), 1),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacked(name: str, dtype: str) -> None:
    use, shape, axis = STACKS[name]
    params = {name: normal(i, *shape) for i, name in enumerate("qk")}
    fn = lambda p: use(jnp.stack([p["q"], p["k"]], axis))
    check(fn, params, {"q": "float32", "k": dtype})


@pytest.mark.parametrize("name", ["heads_merged", "heads_merged_last", "inputs_merged"])
def test_no_kernel_is_formed_where_a_stacked_axis_is_merged(name: str) -> None:
    """Nothing of the size of the kernel times the rank, either."""
    use, _, axis = STACKS[name]
    params = {name: normal(i, 50, 40) for i, name in enumerate("qk")}
    use = {
        "heads_merged": lambda w: dense(w.reshape(50, -1)),
        "heads_merged_last": lambda w: dense(w.reshape(50, -1)),
        "inputs_merged": lambda w: dense(w.reshape(-1, 40)),
    }[name]
    fn = lambda p: use(jnp.stack([p["q"], p["k"]], axis))
    lora = jlora.lora(fn, jlora.LoraConfig("q|k", rank=3))
    adapter = lora.init(jax.random.key(1), params)
    loss = lambda adapter, params: lora.apply(params, adapter).sum()
    program = jax.make_jaxpr(jax.grad(loss))(adapter, params)
    size = lambda eqn: max((v.aval.size for v in eqn.outvars), default=0)
    moves = ("concatenate", "reshape", "broadcast_in_dim", "stack", "transpose", "jit")
    formed = [
        e for e in program.eqns if size(e) >= 2000 and e.primitive.name not in moves
    ]
    assert not formed, formed

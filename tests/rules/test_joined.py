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
# What is added to all inputs, so that they are activations.
ZERO = jnp.float32(0)


def normal(seed: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(seed), shape)


def dense(w: Array, x: Array) -> Array:
    """Contracts the first axis; the others are outputs."""
    return jnp.einsum("bi,i...->b...", x + normal(7, 3, w.shape[0]), w)


def conv(w: Array, x: Array) -> Array:
    x, layout = x + normal(7, 2, 6, 7, w.shape[2]), ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=layout)


def depthwise(w: Array, x: Array) -> Array:
    channels = w.shape[2] * w.shape[3]
    layout = ("NHWC", "HWIO", "NHWC")
    groups = w.shape[3] if w.shape[2] == 1 else 1
    x = x + normal(7, 2, 6, 7, channels if groups > 1 else w.shape[2])
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


def ragged(w: Array, x: Array) -> Array:
    sizes = jnp.asarray([2, *[1] * (w.shape[0] - 1)])
    return lax.ragged_dot(x + normal(7, w.shape[0] + 1, w.shape[1]), w, sizes)


def lookup(w: Array, x: Array) -> Array:
    return w[jnp.flip(jnp.arange(w.shape[0])) + x.astype(int)]


USES = {
    "dense": (dense, [(1, 5), (5, 1), (5, 1, 4)]),
    "conv": (conv, [(1, 3, 1, 4), (3, 1, 2, 1)]),
    "depthwise": (depthwise, [(1, 3, 1, 4)]),
    "ragged": (ragged, [(1, 5, 4), (2, 1, 4), (2, 5, 1)]),
    "lookup": (lookup, [(7, 1)]),
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


def check(fn: Callable[[Any, Array], Array], params: Any, dtypes: Any) -> None:
    """Values and gradients are those of the merged kernels."""
    slopes = jax.grad(lambda p: jnp.square(fn(p, ZERO)).sum())(params)
    used = [name for name in dtypes if jnp.any(slopes[name] != 0)]
    configs = [jlora.LoraConfig(n, rank=1, alpha=3, dtype=dtypes[n]) for n in used]
    lora = jlora.lora(fn, configs)
    adapter = lora.init(jax.random.key(1), params, ZERO)
    adapter = jax.tree.map(lambda v: normal(v.size, *v.shape).astype(v.dtype), adapter)
    tolerance = 1e-4 if set(dtypes.values()) == {"float32"} else 2e-2

    def both(apply: Callable[[Any], Array]) -> Any:
        loss = lambda adapter: (jnp.sin(y := 0.1 * apply(adapter)).sum(), y)
        return jax.jit(jax.grad(loss, has_aux=True))(adapter)

    actual = both(lambda adapter: lora.apply(params, adapter, ZERO))
    wanted = both(lambda adapter: fn(jlora.merge(params, adapter), ZERO))
    assert_close(actual, wanted, tolerance)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("use, shape, axis", CASES)
def test_joined_along_any_axis(use: Any, shape: Any, axis: int, join: str) -> None:
    params = {name: normal(i, *shape) for i, name in enumerate("qkv")}
    fn = lambda p, x: use(JOINS[join](p, axis), x)
    check(fn, params, {"q": "float32", "k": "float32"})


@pytest.mark.parametrize("use, shape, axis", CASES[::2])
def test_factors_of_two_dtypes(use: Any, shape: Any, axis: int) -> None:
    params = {name: normal(i, *shape) for i, name in enumerate("qk")}
    fn = lambda p, x: use(JOINS["scaled"](p, axis), x)
    check(fn, params, {"q": "bfloat16", "k": "float32"})


STACKS: dict[str, tuple[Callable[[Array, Array], Array], int]] = {
    "experts": (ragged, 0),
    "taps": (lambda w, x: conv(w[:, None], x), 0),
    "heads": (dense, 1),
    "heads_merged": (lambda w, x: dense(w.reshape(5, -1), x), 1),
    "heads_merged_last": (lambda w, x: dense(w.reshape(5, -1), x), 2),
    "one_of_them": (lambda w, x: dense(w[1], x), 0),
    "each_in_turn": (lambda w, x: lax.scan(lambda n, v: (n, dense(v, x)), 0, w)[1], 0),
    "batched": (
        lambda w, x: jnp.einsum("ebi,eio->ebo", x + normal(7, 2, 3, 5), w),
        0,
    ),
    "inputs_merged": (lambda w, x: dense(w.reshape(-1, 4), x), 0),
    "joined_again": (lambda w, x: dense(jnp.concatenate([w, 2 * w], 1), x), 1),
}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacked(name: str, dtype: str) -> None:
    use, axis = STACKS[name]
    params = {name: normal(i, 5, 4) for i, name in enumerate("qk")}
    fn = lambda p, x: use(jnp.stack([p["q"], p["k"]], axis), x)
    check(fn, params, {"q": "float32", "k": dtype})


@pytest.mark.parametrize("name", ["heads_merged", "heads_merged_last", "inputs_merged"])
def test_no_kernel_is_formed_where_a_stacked_axis_is_merged(name: str) -> None:
    """Nothing of the size of the kernel times the rank, either."""
    _, axis = STACKS[name]
    params = {name: normal(i, 50, 40) for i, name in enumerate("qk")}
    sizes = (-1, 40) if name == "inputs_merged" else (50, -1)
    use = lambda w, x: dense(w.reshape(sizes), x)
    fn = lambda p, x: use(jnp.stack([p["q"], p["k"]], axis), x)
    lora = jlora.lora(fn, jlora.LoraConfig("q|k", rank=3))
    adapter = lora.init(jax.random.key(1), params, ZERO)
    loss = lambda adapter, params: lora.apply(params, adapter, ZERO).sum()
    program = jax.make_jaxpr(jax.grad(loss))(adapter, params)
    size = lambda eqn: max((v.aval.size for v in eqn.outvars), default=0)
    moves = ("concatenate", "reshape", "broadcast_in_dim", "stack", "transpose", "jit")
    formed = [
        e for e in program.eqns if size(e) >= 2000 and e.primitive.name not in moves
    ]
    assert not formed, formed

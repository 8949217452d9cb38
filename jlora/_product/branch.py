"""The low-rank branch alone, `y + s·(drop(x)·a)·b`, with a hand-derived backward pass.

With dropout each target has an input of its own, so the branch is a product apart from
the base product and from its siblings. The residuals are `x`, `a`, `b` and the key: the
masked input is made again in the backward pass.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._jax.dots import as_type_of
from .._jax.dtypes import workable
from .._jax.versions import manual_axes, vary
from .dropout import Dropout, drop
from .forms import expand, shrink, side_by_side
from .gate import factor_through, through
from .group import GroupDims, Layout, Operands, compute_dtype


class Static(NamedTuple):
    """What is static about a branch.

    Attributes:
        dims: the product, as a group of one.
        kernel: shape and dtype of the kernel.
        dropout: rate and implementation; None for a branch without dropout.
    """

    dims: GroupDims
    kernel: jax.ShapeDtypeStruct
    dropout: Dropout | None


class Arrays(NamedTuple):
    """The arrays of a branch; `words` is the state of its keys, if it has dropout.

    `gate` is as in `Operands.gates`.
    """

    x: Any  # an array; of an integer there is no gradient
    a: jax.Array
    b: jax.Array
    words: jax.Array | None
    gate: jax.Array | None = None


def add_branch(
    static: Static, arrays: Arrays, y: jax.Array, *, derive: str
) -> jax.Array:
    """Returns `y + s·(drop(x)·a)·b`, in the dtype and layout of `y`."""
    varying = frozenset().union(*map(manual_axes, jax.tree.leaves((arrays, y))))
    arrays, y = jax.tree.map(lambda array: vary(array, varying), (arrays, y))
    run = _branch if derive == "custom" else _evaluate
    return run(static, arrays, y)


def _dropped(static: Static, arrays: Arrays, value: jax.Array) -> jax.Array:
    """Masks `x`, or its cotangent, which has the same mask."""
    if static.dropout is None or arrays.words is None:
        return value
    return drop(value, arrays.words, static.dropout, static.dims.batch)


def _operands(static: Static, arrays: Arrays) -> Operands:
    # Widened first: dropout divides by what it keeps.
    dtype = compute_dtype(static.dims, arrays.x, (static.kernel,))
    x = _dropped(static, arrays, workable(arrays.x, dtype))
    return Operands(x, (static.kernel,), (arrays.a,), (arrays.b,), (arrays.gate,))


def _evaluate(static: Static, arrays: Arrays, y: jax.Array) -> jax.Array:
    operands, one = _operands(static, arrays), static.dims.kernels[0]
    h = shrink(static.dims, operands)
    return expand(static.dims, one, one.scaling * h, arrays.b, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branch(static: Static, arrays: Arrays, y: jax.Array) -> jax.Array:
    return _evaluate(static, arrays, y)


def _forward(static: Static, arrays: Arrays, y: jax.Array) -> tuple[jax.Array, Arrays]:
    return _branch(static, arrays, y), arrays


def _backward(static: Static, arrays: Arrays, dy: jax.Array) -> tuple[Arrays, Any]:
    """As in `low_rank`, with the masked input: `dx` is masked as the input was."""
    dims, operands = static.dims, _operands(static, arrays)
    one, x, b = dims.kernels[0], operands.x, arrays.b
    a, h = side_by_side(dims, operands), shrink(dims, operands)
    layout = Layout.of(dims, one, x, static.kernel)
    g = one.scaling * layout.shrink_cotangent(dy, b.astype(h.dtype), h.dtype)
    g = through(g, arrays.gate)
    da = factor_through(layout.grad_a(x, g, arrays.a.dtype), arrays.gate)
    da = as_type_of(da, arrays.a)
    db = factor_through(layout.grad_b(one.scaling * h, dy, b), arrays.gate)
    if not jnp.issubdtype(arrays.x.dtype, jnp.inexact):
        return Arrays(None, da, db, None, None), dy
    dx = _dropped(static, arrays, layout.grad_x_of_delta(g, a, x))
    return Arrays(as_type_of(dx, arrays.x), da, db, None, None), dy


_branch.defvjp(_forward, _backward)

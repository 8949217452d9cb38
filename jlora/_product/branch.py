"""The low-rank branch alone, `y + s·(drop(x)·a)·b`, with a hand-derived backward pass.

For a kernel of several parts that are no one pair of matrices: each is added to the
base product by itself. The residuals are `x`, `a`, `b` and the key of a dropout.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._jax.dots import as_type_of
from .._jax.versions import manual_axes, vary
from .forms import expand
from .gate import factor_through
from .group import GroupDims, Operands
from .skinny import grad_x_of_deltas, gradients, shrink, shrink_cotangents


class Static(NamedTuple):
    """What is static about a branch.

    Attributes:
        dims: the product, as a group of one.
        kernel: shape and dtype of the kernel.
    """

    dims: GroupDims
    kernel: jax.ShapeDtypeStruct


class Arrays(NamedTuple):
    """The arrays of a branch, each as in `Operands`."""

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


def _operands(static: Static, arrays: Arrays) -> Operands:
    x, a, b, words, gate = arrays
    return Operands(x, (static.kernel,), (a,), (b,), (gate,), (words,))


def _evaluate(static: Static, arrays: Arrays, y: jax.Array) -> jax.Array:
    one, h = static.dims.kernels[0], shrink(static.dims, _operands(static, arrays))
    return expand(static.dims, one, h, arrays.b, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branch(static: Static, arrays: Arrays, y: jax.Array) -> jax.Array:
    return _evaluate(static, arrays, y)


def _forward(static: Static, arrays: Arrays, y: jax.Array) -> tuple[jax.Array, Arrays]:
    return _branch(static, arrays, y), arrays


def _backward(static: Static, arrays: Arrays, dy: jax.Array) -> tuple[Arrays, Any]:
    """As in `low_rank`, but for what the kernel adds to the gradient of `x`."""
    dims, operands = static.dims, _operands(static, arrays)
    h, g = shrink(dims, operands), shrink_cotangents(dims, operands, [dy])
    found = gradients("separate", dims, operands, h, g, [dy])
    da, db = (factor_through(one, arrays.gate) for one in found)
    da = as_type_of(da, arrays.a)
    if not jnp.issubdtype(arrays.x.dtype, jnp.inexact):
        return Arrays(None, da, db, None, None), dy
    dx = as_type_of(grad_x_of_deltas(dims, operands, g), arrays.x)
    return Arrays(dx, da, db, None, None), dy


_branch.defvjp(_forward, _backward)

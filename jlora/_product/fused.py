"""The sum `Σ x·w + h·b` of arrays that are whole: by one kernel, or by XLA.

XLA:TPU puts one product in a fusion: to add `h·b` to `x·w` it reads and writes the
result once more. There `[x, h]·[w; b]` is one product, whose contracted axis is joined
in the fusion itself, forward and backward.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.dots import dot
from . import tpu_kernel
from .hopper_kernel import LARGEST, sum_of_products
from .hopper_tiles import apart, fits

# Tokens from which on TPUs gain by one joined product.
_LEAST_JOINED = 8192
# Terms that one kernel sums: each takes room among its arguments.
_SUMMED = 8


class Terms(NamedTuple):
    """The arrays of `Σ x·w + h·b: (*rows, *out)`.

    Attributes:
        xs: each `(*rows, *inner)`, with inner axes of its own.
        ws: each `(*inner, *out)`, or `(*out, *inner)` where the sum is turned.
        h: `(*rows, rank)`.
        b: `(*out, rank)`.
    """

    xs: tuple[jax.Array, ...]
    ws: tuple[jax.Array, ...]
    h: jax.Array
    b: jax.Array

    @property
    def rows(self) -> int:
        """How many axes of rows there are."""
        return self.h.ndim - 1


class Product(NamedTuple):
    """The arrays of `x·w + s·(x·a)·b: (*rows, *out)`.

    Attributes:
        x: `(*rows, *inner)`.
        w: `(*inner, *out)`.
        a: `(*inner, rank)`.
        b: `(*out, rank)`, as `a` in any float dtype.
    """

    x: jax.Array
    w: jax.Array
    a: jax.Array
    b: jax.Array

    @property
    def xs(self) -> tuple[jax.Array, ...]:
        """As of `Terms`."""
        return (self.x,)

    @property
    def rows(self) -> int:
        """How many axes of rows there are."""
        return self.x.ndim + 1 - self.a.ndim


def in_parts(terms: Terms, ranks: Sequence[int]) -> list[Terms]:
    """Splits a sum of many terms, of which each has its part of the rank."""
    parts, at = [], 0
    for start in range(0, len(terms.xs), _SUMMED):
        of = slice(start, start + _SUMMED)
        end = at + sum(ranks[of])
        h, b = terms.h[..., at:end], terms.b[..., at:end]
        parts.append(Terms(terms.xs[of], terms.ws[of], h, b))
        at = end
    return parts


def joining_pays(tokens: int) -> bool:
    """Whether TPUs gain by one joined product, for the tokens of a device.

    By the estimates of the compiler (libtpu 0.0.50.1) for 2048 to 5632 features, over
    the base product: with 8192 tokens 1.14 beside 1.57 on a v5e, and 1.37 (copied)
    beside 2.06 on a v6e; with 4096 and fewer the sum of two products is ahead.
    """
    return tokens >= _LEAST_JOINED


class How(NamedTuple):
    """How a sum is computed.

    Attributes:
        turned: whether kernels are `(*out, *inner)`, as in the backward pass.
        precision: of the products, where XLA computes them.
        scaling: of `x·a`, where that is made with the sum.
    """

    turned: bool = False
    precision: Any = None
    scaling: float = 1.0


def sum_whole(terms: Terms, how: How) -> jax.Array:
    """Returns the sum of arrays that are whole, by the kernel where its tiles fit."""
    xs, ws, h, b = _matrices(terms, how.turned)
    n, outputs = h.shape[0], b.shape[1]
    if all(fits(n, x.shape[1], outputs) for x in xs):
        y = _sum_by_kernel(xs, ws, h, b, how)
    else:
        y = _sum_of_dots(xs, ws, h, b, how, jnp.float32)
    return y.reshape(*terms.h.shape[:-1], *terms.b.shape[:-1])


def sum_grouped(terms: Terms, how: How) -> jax.Array:
    """Returns the sum for several adapters, each with rows of its own.

    Their axis is the first one of all rows, and of `b: (adapters, *out, rank)`.
    """
    count, *out, rank = terms.b.shape
    outputs = math.prod(out)
    xs, ws, h = _rows_and_kernels(terms, how.turned, outputs)
    b = jnp.swapaxes(terms.b.reshape(count, outputs, rank), 1, 2)
    n = h.shape[0]
    each = n // count
    if rank <= LARGEST and all(apart(n, x.shape[1], outputs, each) for x in xs):
        y = _sum_by_kernel(xs, ws, h, b, how)
    else:
        base = _sum_of_bases(xs, ws, how, jnp.float32)
        pairs = (((2,), (1,)), ((0,), (0,)))
        settings = {"precision": how.precision, "preferred_element_type": jnp.float32}
        delta = lax.dot_general(h.reshape(count, -1, rank), b, pairs, **settings)
        y = (base + delta.reshape(base.shape)).astype(h.dtype)
    return y.reshape(*terms.h.shape[:-1], *out)


def sum_by_xla(terms: Terms, how: How) -> jax.Array:
    """Returns the same, each product rounded as the plain one is."""
    xs, ws, h, b = _matrices(terms, how.turned)
    y = _sum_of_dots(xs, ws, h, b, how, h.dtype)
    return y.reshape(*terms.h.shape[:-1], *terms.b.shape[:-1])


def product_by_xla(product: Product, how: How) -> jax.Array:
    """Returns the same, with its `x·a`."""
    x, w = product.x, product.w
    a, b = (factor.astype(x.dtype) for factor in (product.a, product.b))
    contract = range(product.rows, x.ndim), range(a.ndim - 1)
    h = how.scaling * dot(x, a, contract, ((), ()), x.dtype, how.precision)
    return sum_by_xla(Terms((x,), (w,), h, b), how)


def sum_joined(terms: Terms, how: How, copied: bool = False) -> jax.Array:
    """Returns the same, the delta in the product of the first term.

    What is joined is contracted and never sliced: a slice of a result is a copy.

    Args:
        terms: the arrays.
        how: how the sum is computed.
        copied: whether the joined kernel is copied first, where that costs less than
            a fusion that reads two arrays along one axis.
    """
    xs, ws, h, b = _matrices(terms, how.turned)
    axis = 1 if how.turned else 0
    kernel = lax.concatenate([ws[0], b.T if how.turned else b], axis)
    if copied:
        kernel = lax.optimization_barrier(kernel)
    rows = [lax.concatenate([xs[0], h], 1), *xs[1:]]
    y = _sum_of_bases(rows, [kernel, *ws[1:]], how, h.dtype)
    return y.reshape(*terms.h.shape[:-1], *terms.b.shape[:-1])


def sum_tiled(terms: Terms, how: How) -> jax.Array:
    """Returns the same by the kernel for TPUs where it fits, else joined."""
    xs, ws, h, b = _matrices(terms, how.turned)
    sizes = h.shape[0], [x.shape[1] for x in xs], b.shape[1]
    if h.dtype != jnp.bfloat16 or not tpu_kernel.tiles(*sizes):
        return sum_joined(terms, how)
    y = tpu_kernel.sum_of_products(xs, ws, h, b, turned=how.turned)
    return y.reshape(*terms.h.shape[:-1], *terms.b.shape[:-1])


def _matrices(
    terms: Terms, turned: bool
) -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
    outputs, rank = math.prod(terms.b.shape[:-1]), terms.b.shape[-1]
    b = terms.b.reshape(outputs, rank).T
    return *_rows_and_kernels(terms, turned, outputs), b


def _rows_and_kernels(
    terms: Terms, turned: bool, outputs: int
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    n = math.prod(terms.h.shape[:-1])
    inner = [math.prod(x.shape[terms.rows :]) for x in terms.xs]
    xs = [x.reshape(n, k) for x, k in zip(terms.xs, inner, strict=True)]
    # The inner axes of `w` are those of `x`.
    shapes = [(outputs, k) if turned else (k, outputs) for k in inner]
    ws = [w.reshape(shape) for w, shape in zip(terms.ws, shapes, strict=True)]
    return xs, ws, terms.h.reshape(n, terms.h.shape[-1])


def _sum_by_kernel(
    xs: Sequence[jax.Array],
    ws: Sequence[jax.Array],
    h: jax.Array,
    b: jax.Array,
    how: How,
) -> jax.Array:
    # Where a scan keeps the result for its backward pass, XLA:GPU would write it
    # there by a second run of the kernel (jax 0.11.2): hence the barrier.
    return lax.optimization_barrier(sum_of_products(xs, ws, h, b, turned=how.turned))


def _sum_of_dots(
    xs: Sequence[jax.Array],
    ws: Sequence[jax.Array],
    h: jax.Array,
    b: jax.Array,
    how: How,
    dtype: Any,
) -> jax.Array:
    """Sums products that are given in a dtype: the widest takes part in each."""
    base = _sum_of_bases(xs, ws, how, dtype)
    delta = lax.dot(h, b, precision=how.precision, preferred_element_type=dtype)
    return (base + delta).astype(h.dtype)


def _sum_of_bases(
    xs: Sequence[jax.Array], ws: Sequence[jax.Array], how: How, dtype: Any
) -> jax.Array:
    """Returns `Σ x·w`."""
    pairs = (((1,), (1 if how.turned else 0,)), ((), ()))
    settings = {"precision": how.precision, "preferred_element_type": dtype}
    products = [
        lax.dot_general(x, w, pairs, **settings) for x, w in zip(xs, ws, strict=True)
    ]
    return functools.reduce(jnp.add, products)

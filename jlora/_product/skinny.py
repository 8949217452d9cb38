"""The skinny products of a group: `s·x·a`, `dy·bᵀ`, and the gradients of factors.

They are those of all forms, see `_product.forms`.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .._jax.dots import dot
from .._jax.dtypes import workable
from .group import (
    Form,
    GroupDims,
    KernelDims,
    Layout,
    Operands,
    compute_dtype,
    concatenate,
    dropped,
    per_kernel,
    through_gates,
)
from .partitioned import apart

# Forms in which the sharding of a factor says nothing of activations.
APART = ("partitioned", "ruled")


def side_by_side(dims: GroupDims, operands: Operands) -> jax.Array:
    """Returns the concatenated `a`, in the dtype of the skinny products."""
    dtype = compute_dtype(dims, operands.x, operands.kernels)
    return concatenate([a.astype(dtype) for a in operands.a])


def shrink(dims: GroupDims, operands: Operands, form: Form = "separate") -> jax.Array:
    """Returns `h = s·x·a` of all kernels, with the rank last, through their gates."""
    a = side_by_side(dims, operands)
    a = apart(a) if form in APART else a
    x = workable(operands.x, a.dtype)
    n_batch = len(dims.batch)
    contract = (dims.contract, range(n_batch, a.ndim - 1))
    batch = (dims.batch, range(n_batch))

    def product(x: jax.Array, a: jax.Array) -> jax.Array:
        return dot(x, a, contract, batch, a.dtype, dims.kernels[0].precision)

    if operands.drops:
        each = enumerate(per_kernel(a, operands.ranks))
        pieces = [product(dropped(dims, operands, i, x), a) for i, a in each]
        h = concatenate(pieces)
    else:
        h = product(x, a)
    return through_gates(operands, scaled(dims, h, operands.ranks))


def scaled(dims: GroupDims, value: jax.Array, ranks: Sequence[int]) -> jax.Array:
    """Returns a rank-sized value of all kernels, each piece times its scaling."""
    scalings = [one.scaling for one in dims.kernels]
    if len({*scalings}) == 1:
        return scalings[0] * value
    pieces = zip(scalings, per_kernel(value, ranks), strict=True)
    return concatenate([scaling * piece for scaling, piece in pieces])


def grad_x_of_deltas(
    dims: GroupDims, operands: Operands, g: jax.Array, form: Form = "separate"
) -> jax.Array:
    """Returns `Σ g·aᵀ` in the layout of `x`, each summand through its dropout."""
    layout = Layout.of(dims, dims.kernels[0], operands.x, operands.kernels[0])
    a = side_by_side(dims, operands)
    if not operands.drops:
        return layout.grad_x_of_delta(g, a, operands.x)
    a, ranks = apart(a) if form in APART else a, operands.ranks
    pairs = zip(per_kernel(g, ranks), per_kernel(a, ranks), strict=True)
    deltas = [layout.grad_x_of_delta(*pair, operands.x) for pair in pairs]
    return total([dropped(dims, operands, i, dx) for i, dx in enumerate(deltas)])


def gradients(
    form: Form,
    dims: GroupDims,
    operands: Operands,
    h: jax.Array,
    g: jax.Array,
    cotangents: Sequence[jax.Array],
) -> list[jax.Array]:
    """Returns `da = xᵀ·g` of all kernels, concatenated, and each `db = hᵀ·dy`."""
    layout = Layout.of(dims, dims.kernels[0], operands.x, operands.kernels[0])
    x, dtype = operands.x, operands.a[0].dtype
    if operands.drops:
        x, pieces = workable(x, g.dtype), enumerate(per_kernel(g, operands.ranks))
        of_one = lambda i, g: layout.grad_a(dropped(dims, operands, i, x), g, dtype)
        found = [concatenate([of_one(i, g) for i, g in pieces])]
    else:
        found = [layout.grad_a(x, g, dtype)]
    rows = each_kernel(dims, operands, cotangents)
    pairs = zip(rows, per_kernel(h, operands.ranks), strict=True)
    found += [layout.grad_b(h, dy, b) for (_, layout, _, b, dy), h in pairs]
    return [apart(value) for value in found] if form in APART else found


def each_kernel(
    dims: GroupDims, operands: Operands, cotangents: Sequence[jax.Array]
) -> list[tuple[KernelDims, Layout, jax.Array, jax.Array, jax.Array]]:
    """Returns what the gradients need of each kernel: dims, layout, W, b and dy."""
    rows = zip(dims.kernels, operands.kernels, operands.b, cotangents, strict=True)
    layout = lambda one, w: Layout.of(dims, one, operands.x, w)
    return [(one, layout(one, w), w, b, dy) for one, w, b, dy in rows]


def shrink_cotangents(
    dims: GroupDims,
    operands: Operands,
    cotangents: Sequence[jax.Array],
    form: Form = "separate",
) -> jax.Array:
    """Returns `s·dy·bᵀ` of each kernel, concatenated along the rank, through gates."""
    dtype = compute_dtype(dims, operands.x, operands.kernels)
    parts = []
    for _, layout, _, b, dy in each_kernel(dims, operands, cotangents):
        b = apart(b) if form in APART else b
        parts.append(layout.shrink_cotangent(dy, b.astype(dtype), dtype))
    g = scaled(dims, concatenate(parts), operands.ranks)
    return through_gates(operands, g)


def total(parts: Sequence[jax.Array]) -> jax.Array:
    """Returns the sum of some arrays, in their order."""
    return functools.reduce(jnp.add, parts)

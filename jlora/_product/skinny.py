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
APART = ("partitioned", "ruled", "ruled_few")


def _is_joined(operands: Operands, form: Form) -> bool:
    """Whether siblings share one product: not with masks of their own, nor on CPUs."""
    return not operands.drops and form != "singly"


def _factors(dims: GroupDims, operands: Operands, form: Form) -> list[jax.Array]:
    """Returns each `a` in the dtype of the skinny products, or one for all, joined."""
    dtype = compute_dtype(dims, operands.x, operands.kernels)
    each = [a.astype(dtype) for a in operands.a]
    each = [concatenate(each)] if _is_joined(operands, form) else each
    return [apart(a) for a in each] if form in APART else each


def shrink(dims: GroupDims, operands: Operands, form: Form = "separate") -> jax.Array:
    """Returns `h = s·x·a` of all kernels, with the rank last, through their gates."""
    factors = _factors(dims, operands, form)
    x = workable(operands.x, factors[0].dtype)
    n_batch = len(dims.batch)
    contract = (dims.contract, range(n_batch, factors[0].ndim - 1))
    batch = (dims.batch, range(n_batch))

    def product(x: jax.Array, a: jax.Array) -> jax.Array:
        return dot(x, a, contract, batch, a.dtype, dims.kernels[0].precision)

    each = enumerate(factors)
    pieces = [product(dropped(dims, operands, i, x), a) for i, a in each]
    return through_gates(operands, _scaled_pieces(dims, pieces, operands.ranks, form))


def _scaled_pieces(
    dims: GroupDims, pieces: list[jax.Array], ranks: Sequence[int], form: Form
) -> jax.Array:
    """Returns rank-sized values side by side, times their scalings.

    Where each is used singly it is scaled first: XLA sees that a piece which is cut
    out again is the one that was put in.
    """
    if form == "singly":
        return _each_scaled(dims, pieces)
    return scaled(dims, concatenate(pieces), ranks)


def scaled(dims: GroupDims, value: jax.Array, ranks: Sequence[int]) -> jax.Array:
    """Returns a rank-sized value of all kernels, each piece times its scaling."""
    scalings = {one.scaling for one in dims.kernels}
    if len(scalings) == 1:
        return scalings.pop() * value
    return _each_scaled(dims, per_kernel(value, ranks))


def _each_scaled(dims: GroupDims, pieces: Sequence[jax.Array]) -> jax.Array:
    """Returns the pieces side by side, each times the scaling of its kernel."""
    pairs = zip(dims.kernels, pieces, strict=True)
    return concatenate([one.scaling * piece for one, piece in pairs])


def grad_x_of_deltas(
    dims: GroupDims, operands: Operands, g: jax.Array, form: Form = "separate"
) -> jax.Array:
    """Returns `Σ g·aᵀ` in the layout of `x`, each summand through its dropout."""
    layout = Layout.of(dims, dims.kernels[0], operands.x, operands.kernels[0])
    factors = _factors(dims, operands, form)
    pieces = [g] if _is_joined(operands, form) else per_kernel(g, operands.ranks)
    pairs = zip(pieces, factors, strict=True)
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
    if _is_joined(operands, form):
        found = [layout.grad_a(x, g, dtype)]
    else:
        x = workable(x, g.dtype) if operands.drops else x
        of_one = lambda i, g: layout.grad_a(dropped(dims, operands, i, x), g, dtype)
        pieces = enumerate(per_kernel(g, operands.ranks))
        found = [concatenate([of_one(i, g) for i, g in pieces])]
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
    g = _scaled_pieces(dims, parts, operands.ranks, form)
    return through_gates(operands, g)


def total(parts: Sequence[jax.Array]) -> jax.Array:
    """Returns the sum of some arrays, in their order."""
    return functools.reduce(jnp.add, parts)

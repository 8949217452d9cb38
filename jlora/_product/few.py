"""The deltas of siblings by one product, for a few rows on GPUs.

There each kernel of a program takes the time of its launch, and little more. XLA:GPU
joins the base products of siblings, which share `x`, but cuts `h` in pieces for the
product of each with its own `b`. With every `b` in a block of a diagonal the pieces
stay together: `y_i = x·W_i + (h·B)_i`, the cut made where the two are added.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.dots import dot
from .._jax.dtypes import summands_in
from .group import GroupDims, Operands

# The features that there are for each rank of all siblings. With fewer, the zeros
# beside the blocks cost more than the products that they save.
_FEATURES_A_RANK = 4


def on_a_diagonal(
    dims: GroupDims, operands: Operands, bases: Sequence[jax.Array]
) -> bool:
    """Whether the deltas of a group are to be one product, of what is alike in it."""
    features = math.prod(operands.x.shape[i] for i in dims.contract)
    pairs = zip(bases, dims.kernels, strict=True)
    alike = {(y.dtype, one.precision) for y, one in pairs}
    small = _FEATURES_A_RANK * sum(operands.ranks) <= features
    return len(bases) > 1 and len(alike) == 1 and small


def with_deltas(
    dims: GroupDims, b: Sequence[jax.Array], h: jax.Array, bases: Sequence[jax.Array]
) -> list[jax.Array]:
    """Returns `y + h_i·b_i` of each base product `y`, in its dtype and shape.

    Args:
        dims: the group, without batch axes.
        b: of each kernel, `(*outputs, rank)`.
        h: `s·x·a` of all kernels, `(*rows, Σ rank)`.
        bases: the base products, `(*rows, *outputs)`.
    """
    diagonal = _diagonal([each.astype(h.dtype) for each in b])
    contract, wide = ((h.ndim - 1,), (1,)), summands_in(bases[0].dtype, h.dtype)
    delta = dot(h, diagonal, contract, ((), ()), wide, dims.kernels[0].precision)
    sizes = [each.size // each.shape[-1] for each in b]
    parts = lax.split(delta, sizes, axis=delta.ndim - 1)
    add = lambda y, part: (y.astype(wide) + part.reshape(y.shape)).astype(y.dtype)
    return list(map(add, bases, parts))


def _diagonal(blocks: Sequence[jax.Array]) -> jax.Array:
    """Returns `(Σ outputs, Σ rank)` with each `(*outputs, rank)` in its place.

    >>> _diagonal([jnp.ones((1, 2)), jnp.full((2, 1), 5)])
    Array([[1., 1., 0.],
           [0., 0., 5.],
           [0., 0., 5.]], dtype=float32)
    """
    ranks = [b.shape[-1] for b in blocks]
    rows = []
    for i, b in enumerate(blocks):
        around = sum(ranks[:i]), sum(ranks[i + 1 :])
        rows.append(jnp.pad(b.reshape(-1, ranks[i]), ((0, 0), around)))
    return jnp.concatenate(rows)

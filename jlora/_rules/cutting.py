"""Operations that cut a value: slices, which may take single entries, and splits."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._params.axes import Shape
from .._params.quantized import Quantized
from .rows import RowLayout
from .rule import AxisMap, CarryRule, each_factor, present, same_axes
from .tiles import Moved, apart


def _slice(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Cuts a factor along the axes it has."""
    params = eqn.params
    strides = params["strides"] or (1,) * len(shape)
    starts, limits, steps = [], [], []
    for axis, n in enumerate(factor.shape[:-1]):
        here = present(factor, axis, shape)
        starts.append(params["start_indices"][axis] if here else 0)
        limits.append(params["limit_indices"][axis] if here else n)
        steps.append(strides[axis] if here else 1)
    rank = factor.shape[-1]
    return lax.slice(factor, (*starts, 0), (*limits, rank), (*steps, 1))


def _dynamic_slice(
    eqn: Any, factor: jax.Array, shape: Shape, starts: list
) -> jax.Array:
    """Cuts a factor along the axes it has, at the same places."""
    sizes, where = [], []
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        here = present(factor, axis, shape)
        sizes.append(size if here else 1)
        where.append(starts[axis] if here else jnp.zeros_like(starts[axis]))
    zero = jnp.zeros_like(starts[0])
    return lax.dynamic_slice(factor, [*where, zero], [*sizes, factor.shape[-1]])


def _split(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    """Splits the factors that have the axis; all pieces share the others."""
    (value,) = operands
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]

    def pieces(factor: jax.Array) -> Sequence[jax.Array]:
        if not present(factor, axis, value.base.shape):
            return [factor] * len(bases)
        return lax.split(factor, sizes, axis=axis)

    leaves, treedef = jax.tree.flatten(value.with_base(None))
    cut = [pieces(leaf) for leaf in leaves]
    return [
        treedef.unflatten([leaf[i] for leaf in cut]).with_base(base)
        for i, base in enumerate(bases)
    ]


def _unstack_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """The axes of the operand without the one that is taken apart."""
    ndim, axis = eqn.invars[0].aval.ndim, eqn.params["axis"]
    kept = [frozenset([i]) for i in range(ndim) if i != axis]
    return [kept for _ in eqn.outvars]


def _unstack(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    """Takes the factors that have the axis apart; all entries share the others."""
    (value,) = operands
    axis = eqn.params["axis"]

    def entry(factor: jax.Array, i: int) -> jax.Array:
        here = present(factor, axis, value.base.shape)
        return lax.index_in_dim(factor, i if here else 0, axis, keepdims=False)

    return [
        value.moved(base, functools.partial(entry, i=i)) for i, base in enumerate(bases)
    ]


def _single(eqn: Any, sizes: Sequence[int]) -> RowLayout | None:
    """Returns the axes along which one entry is taken, where there are any."""
    shape = eqn.invars[0].aval.shape
    single = [i for i, n in enumerate(sizes) if n == 1 and shape[i] != 1]
    return RowLayout(tuple(single), (), tuple(range(len(shape)))) if single else None


def _slice_rows(eqn: Any) -> RowLayout | None:
    pairs = zip(eqn.params["start_indices"], eqn.params["limit_indices"], strict=True)
    return _single(eqn, [limit - start for start, limit in pairs])


def _dynamic_slice_rows(eqn: Any) -> RowLayout | None:
    return _single(eqn, eqn.params["slice_sizes"])


# --- tiles ---


def _cut(
    q: Quantized, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]
) -> Quantized | None:
    """Cuts the arrays along the axes that they have."""
    shape, fits = q.shape, True

    def bounds(array: Any) -> list[tuple[int, int, int]]:
        nonlocal fits
        found = []
        rows = zip(shape, array.shape, starts, limits, strides, strict=True)
        for n, tiles, start, limit, stride in rows:
            tile = n // tiles
            if tiles == 1 or (start, limit, stride) == (0, n, 1):
                found.append((0, tiles, 1))
            elif tile == 1:
                found.append((start, limit, stride))
            else:
                fits &= stride == 1 and start % tile == 0 and limit % tile == 0
                found.append((start // tile, limit // tile, 1))
        return found

    q.each(bounds)
    return (
        q.each(lambda v: lax.slice(v, *zip(*bounds(v), strict=True))) if fits else None
    )


def _slice_tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    params = eqn.params
    strides = params["strides"] or (1,) * q.ndim
    found = _cut(q, params["start_indices"], params["limit_indices"], strides)
    return None if found is None else [found]


def _pieces(
    q: Quantized, axis: int, sizes: Sequence[int]
) -> Sequence[Quantized] | None:
    found, start = [], 0
    for size in sizes:
        starts, limits = [0] * q.ndim, list(q.shape)
        starts[axis], limits[axis] = start, start + size
        found.append(_cut(q, starts, limits, (1,) * q.ndim))
        start += size
    pieces = [piece for piece in found if piece is not None]
    return pieces if len(pieces) == len(found) else None


def _split_tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    return _pieces(q, eqn.params["axis"], eqn.params["sizes"])


def _unstack_tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    axis = eqn.params["axis"]
    pieces = _pieces(q, axis, (1,) * q.shape[axis])
    if pieces is None:
        return None
    return [piece.each(lambda v: lax.squeeze(v, (axis,))) for piece in pieces]


def _dynamic_slice_tiles(eqn: Any, q: Quantized, starts: list[Any]) -> Moved:
    sizes = eqn.params["slice_sizes"]
    cut = [i for i, n in enumerate(sizes) if n != q.shape[i]]
    if not all(apart(q, i) for i in cut):
        return None

    def move(array: jax.Array) -> jax.Array:
        here = [i in cut and array.shape[i] != 1 for i in range(q.ndim)]
        zeros = [jnp.zeros_like(start) for start in starts]
        where = [s if h else z for s, z, h in zip(starts, zeros, here, strict=True)]
        each = zip(sizes, array.shape, here, strict=True)
        return lax.dynamic_slice(array, where, [n if h else m for n, m, h in each])

    return [q.each(move)]


CARRY = {
    "slice": CarryRule(
        same_axes, each_factor(_slice), rows=_slice_rows, tiles=_slice_tiles
    ),
    "dynamic_slice": CarryRule(
        same_axes,
        each_factor(_dynamic_slice),
        rows=_dynamic_slice_rows,
        tiles=_dynamic_slice_tiles,
    ),
    "split": CarryRule(same_axes, _split, tiles=_split_tiles),
    "unstack": CarryRule(_unstack_axes, _unstack, tiles=_unstack_tiles),
}

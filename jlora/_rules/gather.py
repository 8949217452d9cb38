"""Gathers: rows taken along some axes, the other axes whole.

Embedding lookups, experts chosen per example, and layers indexed in a loop are all of
this form; whether a gather is a lookup (the rows are what is wanted) or only carries
the kernel to a product is for the analysis to say.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._params.axes import Shape
from .._params.quantized import Quantized
from .adapted import Adapted, complete
from .rows import RowLayout, where_found
from .rule import CarryRule, each_factor
from .tiles import Moved, apart


def _layout(eqn: Any) -> RowLayout | None:
    """Returns the layout of a gather, or None where it takes anything but rows."""
    dims, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    sizes, collapsed = eqn.params["slice_sizes"], set(dims.collapsed_slice_dims)
    batching = tuple(map(int, dims.operand_batching_dims))
    indexed = []
    for axis, (size, full) in enumerate(zip(sizes, shape, strict=True)):
        if axis in batching or (size == full and axis not in collapsed):
            continue
        if size != 1 or axis not in dims.start_index_map:
            return None
        indexed.append(axis)
    # A start index along a whole axis is clipped to zero; filling would look at it.
    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if not indexed or (fills and set(dims.start_index_map) != set(indexed)):
        return None
    offsets = [i for i in range(len(shape)) if i not in (*collapsed, *batching)]
    pairs = zip(dims.start_indices_batching_dims, batching, strict=True)
    where = {int(index_axis): axis for index_axis, axis in pairs}
    batches = [where.get(i) for i in range(eqn.invars[1].aval.ndim - 1)]
    offset_dims = set(map(int, dims.offset_dims))
    sources = [
        (offsets if i in offset_dims else batches).pop(0)
        for i in range(eqn.outvars[0].aval.ndim)
    ]
    return RowLayout(tuple(indexed), batching, tuple(sources))


def _axes(eqn: Any, operand: int) -> list[list[frozenset[int]]] | None:
    """The axis map: index axes come from the indexed axes, others from themselves."""
    layout = _layout(eqn)
    if layout is None:
        return None
    origins = []
    for source in layout.sources:
        single = source in layout.indexed  # not collapsed: an axis of size one is left
        known = frozenset() if single else frozenset([source])
        origins.append(frozenset(layout.indexed) if source is None else known)
    return [origins]


def _take(
    eqn: Any, factor: jax.Array, shape: Shape, others: list[Any], fill: Any = 0
) -> jax.Array:
    """Takes the rows of an aligned factor that the gather takes of the value.

    The delta of a row that is out of bounds is zero, whatever the base is there.
    """
    layout = _layout(eqn)
    if layout is None:  # the analysis has let only such gathers pass
        raise AssertionError("a gather that takes no rows")
    if _lacks_rows(eqn, factor):
        return _without_indexed(factor, layout)
    factor = complete(factor, [*layout.indexed, *layout.batching], shape)
    single = (*layout.indexed, *layout.batching)
    sizes = [1 if i in single else n for i, n in enumerate(factor.shape)]
    dims, params = eqn.params["dimension_numbers"], eqn.params
    dims = dims._replace(offset_dims=(*dims.offset_dims, len(layout.sources)))
    return lax.gather(
        factor,
        others[0],
        dims,
        tuple(sizes),
        unique_indices=params["unique_indices"],
        indices_are_sorted=params["indices_are_sorted"],
        mode=params["mode"],
        fill_value=fill,
    )


def _mask(eqn: Any, shape: Shape, indices: jax.Array) -> jax.Array | None:
    """Returns which rows of a gather are inside of the value; None if it fills none.

    What comes back to a row that was filled in belongs to nobody, and may be NaN: a
    selection by this mask drops it, as JAX's own transpose of a gather does, where a
    product with a row of zeros would not.

    Args:
        eqn: the gather.
        shape: the shape of the value.
        indices: the indices.

    Returns:
        A mask laid out as the result, of size one along the axes that are whole.
    """
    params, dims = eqn.params, eqn.params["dimension_numbers"]
    if params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return None
    found = jnp.ones(indices.shape[:-1], bool)
    for i, axis in enumerate(map(int, dims.start_index_map)):
        index, last = lax.index_in_dim(indices, i, axis=-1, keepdims=False), shape[axis]
        if isinstance(last, int):  # else it is a symbol, and the indices are wide
            last = min(last, int(jnp.iinfo(indices.dtype).max))
        found &= (index >= 0) & (index < last)
    return jnp.expand_dims(found, dims.offset_dims)


def _lacks_rows(eqn: Any, factor: jax.Array) -> bool:
    """Returns whether an aligned factor has none of the axes that are indexed."""
    layout = _layout(eqn)
    return layout is not None and all(factor.shape[i] == 1 for i in layout.indexed)


def _without_indexed(factor: jax.Array, layout: RowLayout) -> jax.Array:
    """Lays a factor that lacks the indexed axes out as the rows that were taken."""
    sources = [i for i in layout.sources if i is not None]
    dropped = [i for i in range(factor.ndim - 1) if i not in sources]
    kept = [i for i in range(factor.ndim) if i not in dropped]
    factor = jnp.squeeze(factor, dropped)
    factor = jnp.transpose(factor, (*map(kept.index, sources), factor.ndim - 1))
    return jnp.expand_dims(factor, layout.index_axes)


def _tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    layout = _layout(eqn)
    if layout is None or not all(
        apart(q, i) for i in (*layout.indexed, *layout.batching)
    ):
        return None
    shape = q.shape
    if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        rows = lambda v: _take(eqn, v[..., None], shape, others)[..., 0]
        return [q.each(rows)]
    return _filled(eqn, q, others, layout)


def _filled(eqn: Any, q: Quantized, others: list[Any], layout: RowLayout) -> Moved:
    """Rows out of bounds get the code of one, and NaN as their scale.

    Any other number would be changed by a cast or a factor that came before.
    """
    floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    if not floating or eqn.params["fill_value"] is not None or q.zero_point is not None:
        return None
    sizes = list(q.scale.shape)
    for axis in layout.indexed:
        sizes[axis] = q.shape[axis]
    scale = jnp.broadcast_to(q.scale, sizes)
    take = lambda v, fill: _take(eqn, v[..., None], q.shape, others, fill)[..., 0]
    one = 15 if q.qtype == "nf4" else 1
    return [Quantized(take(q.qvalue, one), take(scale, jnp.nan), None, q.qtype)]


def _take_rows(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Adapted]:
    """Takes rows; those that are filled in have no scale."""
    (rows,) = _take_factors(eqn, operands, bases)
    if rows.scale is None:
        return [rows]
    found = _found(eqn, operands)
    return [dataclasses.replace(rows, scale=where_found(found, rows.scale, 1))]


_take_factors = each_factor(_take)


def _found(eqn: Any, operands: list[Any]) -> jax.Array | None:
    value, indices = operands
    return _mask(eqn, value.base.shape, indices)


def _gather(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    """Takes rows; a factor that all rows share is zero for those that are filled in.

    So its gradient leaves them out, as that of a factor with rows of its own does.
    """
    (rows,), found = _take_rows(eqn, operands, bases), _found(eqn, operands)
    parts = []
    for old, part in zip(operands[0].parts, rows.parts, strict=True):
        shared = [name for name in "ab" if _lacks_rows(eqn, getattr(old, name))]
        new = {name: where_found(found, getattr(part, name), 0) for name in shared}
        parts.append(dataclasses.replace(part, **new))
    return [dataclasses.replace(rows, parts=tuple(parts))]


def _filled_in(eqn: Any) -> frozenset[int]:
    """Returns the axes along which rows may be filled in, which have no scale."""
    layout = _layout(eqn)
    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if layout is None or not fills:
        return frozenset()
    picked = (None, *layout.batching)
    return frozenset(i for i, s in enumerate(layout.sources) if s in picked)


CARRY = {
    "gather": CarryRule(
        _axes,
        _gather,
        rows=_layout,
        found=_found,
        take=_take_rows,
        scale_varies=_filled_in,
        tiles=_tiles,
    )
}

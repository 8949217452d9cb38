"""The carry rule of `gather`: rows taken along some axes, the other axes whole.

Embedding lookups, experts chosen per example, and layers indexed in a loop are all of
this form; whether a gather is a lookup (the rows are what is wanted) or only carries
the kernel to a product is for the analysis to say.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.dots import as_laid_out
from .adapted import complete

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How a gather takes rows.

    Attributes:
        indexed: the operand axes along which single entries are taken.
        batching: the operand axes that go along with axes of the indices.
        sources: per output axis, the operand axis it is (or None for an index axis).
    """

    indexed: tuple[int, ...]
    batching: tuple[int, ...]
    sources: tuple[int | None, ...]

    @property
    def index_axes(self) -> list[int]:
        """The output axes that come from the indices."""
        return [i for i, source in enumerate(self.sources) if source is None]


def row_layout(eqn: Any) -> RowLayout | None:
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


def gather_axes(eqn: Any, operand: int) -> list[list[frozenset[int]]] | None:
    """The axis map: index axes come from the indexed axes, others from themselves."""
    layout = row_layout(eqn)
    if layout is None:
        return None
    origins = []
    for source in layout.sources:
        single = source in layout.indexed  # not collapsed: an axis of size one is left
        known = frozenset() if single else frozenset([source])
        origins.append(frozenset(layout.indexed) if source is None else known)
    return [origins]


def gather_rows(
    eqn: Any, factor: jax.Array, shape: Shape, others: list[Any], fill: Any = 0
) -> jax.Array:
    """Takes the rows of an aligned factor that the gather takes of the value.

    The delta of a row that is out of bounds is zero, whatever the base is there.
    """
    layout = row_layout(eqn)
    if layout is None:  # the analysis has let only such gathers pass
        raise AssertionError("a gather that takes no rows")
    if lacks_rows(eqn, factor):
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


def found_rows(eqn: Any, shape: Shape, indices: jax.Array) -> jax.Array | None:
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


def select(found: jax.Array | None, rows: jax.Array, other: Any) -> jax.Array:
    """Returns `rows` where they were found, and `other` where they were filled in.

    Args:
        found: what `found_rows` returns.
        rows: what is laid out as the result, perhaps with the rank behind.
        other: a number.
    """
    if found is None:
        return rows
    found = found.reshape(*found.shape, *[1] * (rows.ndim - found.ndim))
    shape = jnp.broadcast_shapes(found.shape, rows.shape)
    rows = jnp.broadcast_to(rows, shape)
    return jnp.where(as_laid_out(jnp.broadcast_to(found, shape), rows), rows, other)


def lacks_rows(eqn: Any, factor: jax.Array) -> bool:
    """Returns whether an aligned factor has none of the axes that are indexed."""
    layout = row_layout(eqn)
    return layout is not None and all(factor.shape[i] == 1 for i in layout.indexed)


def _without_indexed(factor: jax.Array, layout: RowLayout) -> jax.Array:
    """Lays a factor that lacks the indexed axes out as the rows that were taken."""
    sources = [i for i in layout.sources if i is not None]
    dropped = [i for i in range(factor.ndim - 1) if i not in sources]
    kept = [i for i in range(factor.ndim) if i not in dropped]
    factor = jnp.squeeze(factor, dropped)
    factor = jnp.transpose(factor, (*map(kept.index, sources), factor.ndim - 1))
    return jnp.expand_dims(factor, layout.index_axes)


def indexed_axes(eqn: Any) -> list[int]:
    """Returns the axes of the operand along which single entries are taken."""
    shape, params = eqn.invars[0].aval.shape, eqn.params
    if eqn.primitive.name == "gather":
        layout = row_layout(eqn)
        return [] if layout is None else list(layout.indexed)
    if eqn.primitive.name == "dynamic_slice":
        sizes = params["slice_sizes"]
    elif eqn.primitive.name == "slice":
        pairs = zip(params["start_indices"], params["limit_indices"], strict=True)
        sizes = [limit - start for start, limit in pairs]
    else:
        return []
    return [i for i, n in enumerate(sizes) if n == 1 and shape[i] != 1]

"""The parts of an adapted kernel, as a use takes them: two matrices, an input."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from .._jax.dtypes import common, is_workable, summed_in
from .._jax.sharding import beside
from .._jax.versions import source_line
from .._params.axes import free_axes, ordered
from .._product.dropout import drop
from .adapted import Part, complete, times_place


def times(value: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns a value times a scale in the scale's precision, in its own dtype.

    They have as many axes; on an Explicit mesh the scale is laid out as the value.
    """
    scale = beside(scale, value)
    wide = common(summed_in(value.dtype), summed_in(scale.dtype))
    return (value.astype(wide) * scale.astype(wide)).astype(value.dtype)


def contracted_first(
    part: Part, contract: Sequence[int], free: Sequence[int]
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the factor without free axes and the one without contracted axes."""
    for first, second in ((part.a, part.b), (part.b, part.a)):
        lacks_free = all(first.shape[i] == 1 for i in free)
        if lacks_free and all(second.shape[i] == 1 for i in contract):
            return _placed_in(part, first, second, contract, free)
    return None


def _placed_in(
    part: Part,
    first: jax.Array,
    second: jax.Array,
    contract: Sequence[int],
    free: Sequence[int],
) -> tuple[jax.Array, jax.Array] | None:
    """Multiplies each place into the factor of its side; None if one is of both."""
    for place in part.places:
        along = {i for i, n in enumerate(place.shape) if n != 1}
        if not along & {*contract}:
            second = times_place(second, place)
        elif along & {*free}:
            return None
        else:
            first = times_place(first, place)
    return first, second


def factor_matrix(
    factor: jax.Array, axes: Sequence[int], shape: tuple[int, ...]
) -> jax.Array:
    """Returns a factor with just `axes`, in that order and whole, and the rank."""
    factor = complete(factor, axes, shape)
    if absent := free_axes(len(shape), axes):
        factor = lax.squeeze(factor, absent)
    return ordered(factor, sorted(axes), axes)


def part_words(part: Part, batch: Sequence[int]) -> jax.Array | None:
    """Returns the state of a part's keys for the batch axes of a product.

    Along any other axis the first key serves for all.
    """
    if part.key is None:
        return None
    shape = [max(part.key.shape[i], part.a.shape[i]) for i in range(part.key.ndim - 1)]
    others = free_axes(len(shape), batch)
    first = part.key
    for axis in others:
        first = lax.slice_in_dim(first, 0, 1, axis=axis)
    return factor_matrix(first, batch, tuple(shape))


def dropped_input(
    part: Part, x: jax.Array, words: jax.Array | None, batch: Sequence[int]
) -> jax.Array:
    """Returns the input of a part's branch, with dropout if it has any."""
    if part.dropout is None or words is None:
        return x
    return drop(x, words, part.dropout, batch)


def branch_dtype(result: Any, computed: Any) -> Any:
    """The dtype of a branch: that of the result, unless it is one of eight bits."""
    return result if is_workable(result) else computed


def split_join(eqn: Any, w: Any, use: str) -> str:
    """Says that an axis of joined kernels lies on both sides of a use."""
    return (
        f"a kernel of shape {w.shape} that was joined from several {use} at "
        f"{source_line(eqn)}, where the axis along which they were joined is split "
        "into an input and an output axis; join them along one of these"
    )

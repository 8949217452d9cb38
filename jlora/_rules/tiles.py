"""Operations that move and cut axes, done to the arrays of a quantised value.

Each takes `(eqn, value, other operands)` and returns the value of each output, or None
where a tile would be cut or torn apart.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .._jax.sharding import names_of_entry
from .._jax.versions import rebind
from .._params.axes import Shape, reshape_groups
from .._params.quantized import Quantized
from .gather import RowLayout, gather_rows, row_layout

Moved = Sequence[Quantized] | None


# --- axes moved ---


def apart(q: Quantized, axis: int) -> bool:
    """Returns whether each array has all of an axis, or nothing of it."""
    found: list[bool] = []
    q.each(lambda v: found.append(v.shape[axis] in (1, q.shape[axis])))
    return all(found)


def _each(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    """The operation itself, on each array: it does not look at axes."""
    return [q.each(lambda v: rebind(eqn, [v])[0])]


def _transpose(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    return [q.each(lambda v: lax.transpose(v, eqn.params["permutation"]))]


def _squeeze(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    return [q.each(lambda v: lax.squeeze(v, eqn.params["dimensions"]))]


def _broadcast(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    """New axes of size one."""
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    new = [i for i in range(len(shape)) if i not in dims]
    same = q.shape == tuple(shape[i] for i in dims)
    if not same or any(shape[i] != 1 for i in new):
        return None
    return [q.each(lambda v: lax.expand_dims(v, new))]


def _reshape(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    new = tuple(eqn.params["new_sizes"])
    if eqn.params.get("dimensions") is not None or 0 in q.shape:
        return None
    groups = reshape_groups(q.shape, new)
    sizes: dict[Shape, Shape] = {}

    def plan(array: Any) -> None:
        found = [1] * len(new)
        for took, gave in groups:
            old = [q.shape[i] for i in took], [array.shape[i] for i in took]
            blocks = _blocks(*old, [new[j] for j in gave])
            if blocks is None:
                return
            for j, size in zip(gave, blocks, strict=True):
                found[j] = size
        sizes[tuple(array.shape)] = tuple(found)

    q.each(plan)
    shapes = {tuple(v.shape) for v in jax.tree.leaves(q)}
    if shapes != set(sizes):
        return None
    return [q.each(lambda v: v.reshape(sizes[tuple(v.shape)]))]


def _blocks(
    old: Sequence[int], tiles: Sequence[int], new: Sequence[int]
) -> list[int] | None:
    """Returns the tiles along the axes that axes are split into or joined to.

    That works where a tile is a run of neighbouring values in both.

    >>> _blocks([21], [3], [3, 7]), _blocks([3, 4], [3, 2], [12])
    ([3, 1], [6])
    """
    if not _is_run(old, tiles):
        return None
    block, found = math.prod(old) // math.prod(tiles), []
    for size in reversed(new):
        if block >= size and block % size == 0:
            found.append(1)
            block //= size
        elif size % block == 0:
            found.append(size // block)
            block = 1
        else:
            return None
    return found[::-1] if block == 1 else None


def _is_run(old: Sequence[int], tiles: Sequence[int]) -> bool:
    """Whether tiles are whole along the last axes, part of one, single before it."""
    partial = False
    for size, count in zip(reversed(old), reversed(tiles), strict=True):
        if partial and count != size:
            return False
        partial = partial or count != 1
    return True


# --- axes cut ---


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


def _slice(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
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


def _split(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    return _pieces(q, eqn.params["axis"], eqn.params["sizes"])


def _unstack(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    axis = eqn.params["axis"]
    pieces = _pieces(q, axis, (1,) * q.shape[axis])
    if pieces is None:
        return None
    return [piece.each(lambda v: lax.squeeze(v, (axis,))) for piece in pieces]


def _dynamic_slice(eqn: Any, q: Quantized, starts: list[Any]) -> Moved:
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


def _gather(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    layout = row_layout(eqn)
    if layout is None or not all(
        apart(q, i) for i in (*layout.indexed, *layout.batching)
    ):
        return None
    shape = q.shape
    if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        rows = lambda v: gather_rows(eqn, v[..., None], shape, others)[..., 0]
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
    take = lambda v, fill: gather_rows(eqn, v[..., None], q.shape, others, fill)[..., 0]
    one = 15 if q.qtype == "nf4" else 1
    return [Quantized(take(q.qvalue, one), take(scale, jnp.nan), None, q.qtype)]


def _constrain(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    """The codes have the shape that the sharding is for; XLA lays the scales out."""
    return [dataclasses.replace(q, qvalue=rebind(eqn, [q.qvalue])[0])]


def _reshard(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    """Each array is laid out as the value, whole along axes that do not divide."""
    place = eqn.params["dst_sharding"]
    shards = lambda entry: math.prod(place.mesh.shape[n] for n in names_of_entry(entry))

    def move(array: jax.Array) -> jax.Array:
        pairs = zip(place.spec, array.shape, strict=False)
        fit = [None if n % shards(entry) else entry for entry, n in pairs]
        return jax.sharding.reshard(array, place.update(spec=PartitionSpec(*fit)))

    return [q.each(move)]


MOVES: dict[str, Callable[[Any, Quantized, list[Any]], Moved]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "split": _split,
    "unstack": _unstack,
    "rev": lambda eqn, q, others: [
        q.each(lambda v: lax.rev(v, eqn.params["dimensions"]))
    ],
    "sharding_constraint": _constrain,
    "reshard": _reshard,
    "pvary": _each,
    "pcast": _each,
}

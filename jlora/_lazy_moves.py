"""What keeps a lazy value lazy: operations that move, cut, join, cast or scale it.

Where it can be, axes are moved and cut on the quantised arrays themselves, so that of
a stack of layers only the layer in use is made dense, and of a table only the rows that
are looked up. Elsewhere the operation is remembered, and done when the value is made.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ._axes import Shape, reshape_groups
from ._compat import rebind
from ._gather import RowLayout, gather_rows, row_layout
from ._lazy import Applied, Dequantize, Entry, Lazy, is_lazy
from ._quantized import Quantized
from ._sharding import names_of_entry

Moved = Sequence[Quantized] | None


def carried(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluates an equation that carries a value; of lazy values the result is lazy."""
    if not is_lazy(values):
        return rebind(eqn, list(values))
    name, first = eqn.primitive.name, values[0]
    if name == "optimization_barrier":
        return _barrier(eqn, values)
    if name in _MOVES and isinstance(first, Lazy):
        others = list(values[1:])
        found = _moved(first, lambda q: _MOVES[name](eqn, q, others), name)
        if found is not None:
            return found
    along = _entrywise(name, values)
    outputs = range(len(eqn.outvars))
    return [Lazy(tuple(values), Applied(eqn, i, along)) for i in outputs]


def stays_small(eqn: Any, values: Sequence[Any]) -> bool:
    """Whether what a lazy value must remember is less than the value itself."""
    if eqn.primitive.name not in ("mul", "div"):
        return True
    others = [jnp.size(v) for v in values if not isinstance(v, Lazy)]
    return sum(others) < eqn.outvars[0].aval.size


def _entrywise(name: str, values: Sequence[Any]) -> int | None:
    """Returns the operand that an operation changes entry by entry, if it does."""
    if name not in _ENTRYWISE:
        return None
    (index, *others) = [i for i, v in enumerate(values) if jnp.ndim(_shaped(v))] or [0]
    return index if not others and isinstance(values[index], Lazy) else None


def _shaped(value: Any) -> Any:
    return jax.ShapeDtypeStruct(value.shape, value.dtype) if is_lazy([value]) else value


def _barrier(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """A value that is not made yet needs no barrier: it has one where it is made."""
    where = [i for i, v in enumerate(values) if not isinstance(v, Lazy)]
    held = iter(lax.optimization_barrier([values[i] for i in where]) if where else ())
    return [next(held) if i in where else v for i, v in enumerate(values)]


def _moved(
    value: Lazy, move: Callable[[Quantized], Moved], name: str
) -> list[Lazy] | None:
    """Moves the axes of what a value is made from, if they are its own."""
    if isinstance(value.how, Dequantize):
        found = move(value.inputs[0])
        return None if found is None else [Lazy((q,), value.how) for q in found]
    along = getattr(value.how, "along", None)
    if along is None:
        return None
    inner = _moved(value.inputs[along], move, name)
    if inner is None:
        return None
    before, behind = value.inputs[:along], value.inputs[along + 1 :]
    return [Lazy((*before, v, *behind), value.how) for v in inner]


# --- slices of a scan ---


@dataclasses.dataclass(frozen=True)
class Slices:
    """A lazy value whose entries along the first axis are wanted, one by one.

    Attributes:
        whole: the value, as `entry` needs it.
        by_arrays: whether the entries are those of its quantised arrays.
    """

    whole: Lazy
    by_arrays: bool

    @classmethod
    def of(cls, value: Lazy) -> "Slices":
        """Finds out how a value is cut."""
        cut = _moved(value, _whole_along_first, "scan")
        return cls(value, False) if cut is None else cls(cut[0], True)

    def scanned(self) -> list[jax.Array]:
        """Returns the arrays to scan over."""
        length = self.whole.shape[0]
        if not self.by_arrays:
            return [jnp.arange(length)]
        arrays = jax.tree.leaves(self.whole)
        return [v for v in arrays if jnp.ndim(v) and v.shape[0] == length]

    def entry(self, row: Sequence[jax.Array]) -> Lazy:
        """Returns one entry, given those of the arrays."""
        if not self.by_arrays:
            return Lazy((self.whole, row[0]), Entry())
        length, rest = self.whole.shape[0], iter(row)
        leaves, treedef = jax.tree.flatten(self.whole)

        def one(array: jax.Array) -> jax.Array:
            if not jnp.ndim(array):  # a scalar that the value is multiplied by
                return array
            return next(rest) if array.shape[0] == length else array[0]

        return treedef.unflatten([one(v) for v in leaves])


def _whole_along_first(q: Quantized) -> Moved:
    """Each array must have the first axis as a whole, or not at all."""
    return [q] if q.shape and _apart(q, 0) else None


# --- pieces of a shard_map ---


def lazy_specs(value: Lazy, spec: PartitionSpec, mesh: Any) -> Lazy | None:
    """Returns the specs of what a value is made from, in its structure.

    None if a piece of the value is not made from pieces of the arrays.
    """

    def specs(q: Quantized) -> Moved:
        fits = [_spec_fits(q, axis, entry, mesh) for axis, entry in enumerate(spec)]
        follow: Any = lambda v: PartitionSpec(
            *(e if v.shape[i] != 1 else None for i, e in enumerate(spec))
        )
        return [q.each(follow)] if all(fits) else None

    found = _moved(value, specs, "shard_map")
    if found is None:
        return None
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    whole = lambda leaf: leaf if is_spec(leaf) else PartitionSpec()
    return jax.tree.map(whole, found[0], is_leaf=is_spec)


def _spec_fits(q: Quantized, axis: int, entry: Any, mesh: Any) -> bool:
    """Whether the tiles along an axis are divided as the axis is."""
    parts = math.prod(mesh.shape[name] for name in names_of_entry(entry))
    found: list[bool] = []
    q.each(lambda v: found.append(v.shape[axis] == 1 or v.shape[axis] % parts == 0))
    return all(found)


# --- axes moved ---


def _apart(q: Quantized, axis: int) -> bool:
    """Returns whether no tile takes a part of an axis."""
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

    >>> _blocks([21], [3], [3, 7]), _blocks([3, 4], [3, 2], [12]), _blocks([6], [3], [4])
    ([3, 1], [6], None)
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
    if not all(_apart(q, i) for i in cut):
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
        _apart(q, i) for i in (*layout.indexed, *layout.batching)
    ):
        return None
    shape = q.shape
    if eqn.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        rows = lambda v: gather_rows(eqn, v[..., None], shape, others)[..., 0]
        return [q.each(rows)]
    return _filled(eqn, q, others, layout)


def _filled(eqn: Any, q: Quantized, others: list[Any], layout: RowLayout) -> Moved:
    """Rows out of bounds get the code of one, and as their scale what they are to be."""
    if eqn.params["fill_value"] is not None or q.zero_point is not None:
        return None  # but for NaN, a cast or factor that came before would change it
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


_MOVES: dict[str, Callable[[Any, Quantized, list[Any]], Moved]] = {
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
    "pvary": _each,
    "pcast": _each,
}
_ENTRYWISE = (
    "convert_element_type",
    "mul",
    "div",
    "neg",
    "reduce_precision",
    "copy",
    "copy_p",
    "name",
)

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
from jax.sharding import PartitionSpec

from .._jax.sharding import names_of_entry
from .._params.lazy import Applied, Dequantize, Entry, Lazy, is_lazy
from .._params.quantized import Quantized
from .tiles import Moved, TilesMove, apart


def remembered(
    eqn: Any,
    values: Sequence[Any],
    *,
    tiles: TilesMove | None = None,
    entrywise: bool = False,
) -> list[Any]:
    """Does an equation to values of which some are lazy, and so are its outputs.

    Args:
        eqn: the equation.
        values: its operands.
        tiles: what does it to quantised arrays, if anything.
        entrywise: whether each entry comes from the entries at its place alone.
    """
    first = values[0]
    if tiles is not None and isinstance(first, Lazy):
        others = list(values[1:])
        moved = _moved(first, lambda q: tiles(eqn, q, others))
        if moved is not None:
            return moved
    along = _changed(values) if entrywise else None
    outputs = range(len(eqn.outvars))
    return [Lazy(tuple(values), Applied(eqn, i, along)) for i in outputs]


def stays_small(eqn: Any, values: Sequence[Any]) -> bool:
    """Whether the scale that a lazy value must remember is less than the value."""
    others = [jnp.size(v) for v in values if not isinstance(v, Lazy)]
    return sum(others) < eqn.outvars[0].aval.size


def _changed(values: Sequence[Any]) -> int | None:
    """Returns the operand that is changed entry by entry, if the others are scalars."""
    (index, *others) = [i for i, v in enumerate(values) if jnp.ndim(_shaped(v))] or [0]
    return index if not others and isinstance(values[index], Lazy) else None


def _shaped(value: Any) -> Any:
    return jax.ShapeDtypeStruct(value.shape, value.dtype) if is_lazy([value]) else value


def _moved(value: Lazy, move: Callable[[Quantized], Moved]) -> list[Lazy] | None:
    """Moves the axes of what a value is made from, if they are its own."""
    if isinstance(value.how, Dequantize):
        found = move(value.inputs[0])
        return None if found is None else [Lazy((q,), value.how) for q in found]
    along = getattr(value.how, "along", None)
    if along is None:
        return None
    inner = _moved(value.inputs[along], move)
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
        cut = _moved(value, _whole_along_first)
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
    return [q] if q.shape and apart(q, 0) else None


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

    found = _moved(value, specs)
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

"""Shardings of rank-sized values on meshes with Explicit axes.

On an Auto mesh XLA chooses and nothing here returns a sharding. On an Explicit mesh
each product says how its result is laid out; the rank axis is never sharded.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .versions import explicit_mesh


def explicit_sharding(array: jax.Array) -> NamedSharding | None:
    """Returns the sharding of `array` if its mesh has Explicit axes, else None."""
    return None if explicit_mesh(array) is None else jax.typeof(array).sharding


def set_sharding(array: Any) -> NamedSharding | None:
    """Returns the Explicit sharding of `array` if its mesh is set, else None.

    Only then can arrays be made with that sharding.
    """
    is_set = not jax.sharding.get_abstract_mesh().empty
    return explicit_sharding(array) if is_set else None


def on_set_mesh(scalar: jax.Array) -> jax.Array:
    """Returns a scalar of a region whose axes JAX has made Auto on the mesh around it.

    A lookup with `out_sharding` is such a region on an Explicit mesh.
    """
    around, own = jax.sharding.get_abstract_mesh(), jax.typeof(scalar).sharding.mesh
    if around.empty or own.empty or own.axis_types == around.axis_types:
        return scalar
    return jax.sharding.reshard(scalar, NamedSharding(around, PartitionSpec()))


def names_of_entry(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes that one entry of a spec names: none, one or several."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def spec_of(array: jax.Array) -> tuple[Any, ...]:
    """Returns the partition spec of `array`, one entry per axis."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    return spec + (None,) * (array.ndim - len(spec))


def whole_along(array: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Returns `array` with none of these axes sharded, on an Explicit mesh."""
    sharding, spec = explicit_sharding(array), spec_of(array)
    if sharding is None or not any(spec[i] for i in axes):
        return array
    return jax.sharding.reshard(array, without_axes(sharding, spec, axes))


def beside(array: jax.Array, other: jax.Array) -> jax.Array:
    """Returns `array` so that it and `other` may be added or multiplied.

    On an Explicit mesh an axis may lie along more mesh axes than that of `other` does,
    as factors that are spread do, or along one that another axis of `other` lies along;
    it is gathered then. Axes of size one are broadcast, and stay whole.
    """
    sharding, own = explicit_sharding(array), spec_of(array)
    wanted = _on_axes_of(array.shape, spec_of(other), other.shape)
    fits = all(e is None or e == w for e, w in zip(own, wanted, strict=True))
    if sharding is None or fits:
        return array
    return jax.sharding.reshard(array, sharding.update(spec=PartitionSpec(*wanted)))


def without_axes(
    sharding: Any, spec: Sequence[Any], axes: Sequence[int]
) -> NamedSharding | None:
    """Returns a sharding with nothing along some axes of its spec; None of None."""
    if sharding is None:
        return None
    kept = [None if i in axes else entry for i, entry in enumerate(spec)]
    return sharding.update(spec=PartitionSpec(*kept))


def factor_spec(
    spec: Any, factor: tuple[int, ...], value: tuple[int, ...]
) -> PartitionSpec:
    """Returns the spec of an aligned factor: that of the value on the axes it has.

    >>> tuple(factor_spec(PartitionSpec("data", "model"), (12, 1, 8), (12, 6)))
    ('data', None, None)
    """
    entries = [*spec, *[None] * (len(value) - len(spec))]
    return PartitionSpec(*_on_axes_of(factor, entries, value), None)


def _on_axes_of(
    shape: Sequence[int], spec: Sequence[Any], value: Sequence[int]
) -> list[Any]:
    """Returns the entries of a value on the axes that `shape` has, not those of one."""
    return [e if shape[i] == value[i] else None for i, e in enumerate(spec)]


def place_of_axes(array: jax.Array, axes: Sequence[int]) -> NamedSharding | None:
    """Returns how axes of an array lie, in this order, if its mesh is Explicit."""
    mesh = explicit_mesh(array)
    if mesh is None:
        return None
    spec = spec_of(array)
    return NamedSharding(mesh, PartitionSpec(*(spec[i] for i in axes)))


def dot_sharding(lhs: jax.Array, rhs: jax.Array, dims: Any) -> NamedSharding | None:
    """Returns how the result of a `dot_general` follows its operands.

    The contracting axes vanish (with a reduction where they were sharded); a mesh axis
    that would occur twice is kept where it occurs first.
    """
    mesh = explicit_mesh(lhs, rhs)
    if mesh is None:
        return None
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dims
    left, right = spec_of(lhs), spec_of(rhs)
    entries = [left[i] or right[j] for i, j in zip(lhs_batch, rhs_batch, strict=True)]
    entries += _without(left, (*lhs_contract, *lhs_batch))
    entries += _without(right, (*rhs_contract, *rhs_batch))
    return NamedSharding(mesh, PartitionSpec(*_once(entries)))


def _without(spec: tuple[Any, ...], axes: tuple[int, ...]) -> list[Any]:
    return [entry for i, entry in enumerate(spec) if i not in axes]


def _once(entries: list[Any]) -> list[Any]:
    """Drops an entry that names a mesh axis which an earlier entry already names."""
    seen: set[str] = set()
    kept: list[Any] = []
    for entry in entries:
        names = names_of_entry(entry)
        kept.append(None if seen.intersection(names) else entry)
        seen.update(names)
    return kept


def joined_along(array: jax.Array, axis: int) -> jax.Array:
    """Returns an array with its first axis merged into another, which comes after it.

    Args:
        array: an array with neither of the two axes sharded.
        axis: the place of the other axis in the result.
    """
    moved = jnp.moveaxis(array, 0, axis)
    sizes, spec = list(moved.shape), list(spec_of(moved))
    sizes[axis : axis + 2], spec[axis : axis + 2] = (
        [sizes[axis] * sizes[axis + 1]],
        [None],
    )
    sharding = explicit_sharding(moved)
    place = None if sharding is None else sharding.update(spec=PartitionSpec(*spec))
    return lax.reshape(moved, sizes, out_sharding=place)


def split_along(array: jax.Array, axis: int, count: int) -> jax.Array:
    """Returns an array with an axis split in two, the outer one first of all axes.

    Undoes `joined_along`.

    Args:
        array: an array with that axis not sharded.
        axis: the place of the axis.
        count: the size of the first one.
    """
    sizes, spec = list(array.shape), list(spec_of(array))
    sizes[axis : axis + 1] = [count, sizes[axis] // count]
    spec[axis : axis + 1] = [None, None]
    sharding = explicit_sharding(array)
    place = None if sharding is None else sharding.update(spec=PartitionSpec(*spec))
    return jnp.moveaxis(lax.reshape(array, sizes, out_sharding=place), axis, 0)

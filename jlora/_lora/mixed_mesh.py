"""The examples of a mixed batch on a mesh with Explicit axes.

`jax.vmap` wants all that it maps over laid out alike, and the axis of the examples is
none that the function of one example sees. A function that names its mesh axis all the
same (`out_sharding=P("data", None)`) cannot be traced there: an axis of one example is
not divided by two. For it the mesh is *split*: "data" gets the size 1, and an axis of
another name its size, over which the examples are then sharded. No value changes its
place by that, but for params that are sharded over "data" too: they are gathered.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from .._jax.sharding import explicit_sharding, names_of_entry, spec_of
from .._jax.versions import explicit_mesh

_SUFFIX = ":examples"


@dataclasses.dataclass(frozen=True)
class Examples:
    """Where the examples are.

    Attributes:
        mesh: the Explicit mesh of the arguments; None if there is none.
        entry: the mesh axes that the examples are sharded over, as a spec has them.
    """

    mesh: Any
    entry: Any

    @classmethod
    def of(cls, pairs: Sequence[tuple[Any, int]], arrays: Sequence[Any]) -> "Examples":
        """Finds the first array that is sharded along its examples.

        Args:
            pairs: each array that has examples, with their axis.
            arrays: all arrays.
        """
        mesh = explicit_mesh(*arrays)
        entries = [spec_of(array)[axis] for array, axis in pairs] if mesh else []
        return cls(mesh, next((entry for entry in entries if entry), None))

    @property
    def names(self) -> tuple[str, ...]:
        """The mesh axes that the examples are sharded over."""
        return names_of_entry(self.entry)

    def laid_out(self, array: Any, axis: int) -> Any:
        """Returns an array whose examples are where all others are."""
        return array if self.mesh is None else self._moved(array, axis, lambda n: n)

    @property
    def devices(self) -> int:
        """The number of devices that the examples are sharded over, as types say it."""
        return math.prod(self.mesh.shape[name] for name in self.names)

    def whole_across(self, array: jax.Array) -> jax.Array:
        """Returns an array that is not sharded over the mesh axes of the examples."""
        if self.mesh is None:
            return array
        entries = [_without(entry, self.names) for entry in spec_of(array)]
        place = NamedSharding(_abstract(self.mesh), PartitionSpec(*entries))
        return jax.sharding.reshard(array, place)

    def split(self) -> "Examples":
        """Returns the examples on a mesh on which no function can have named theirs."""
        sizes: dict[str, int] = {}
        for name, size in self.mesh.shape.items():
            own = {name: 1, name + _SUFFIX: size}
            sizes.update(own if name in self.names else {name: size})
        kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        types = tuple(kinds[name.removesuffix(_SUFFIX)] for name in sizes)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), types)
        return Examples(mesh, tuple(name + _SUFFIX for name in self.names))

    def onto_split(self, array: Any, axis: int | None) -> Any:
        """Returns an array on the mesh of `split`; `axis` is that of its examples."""
        return self.split()._moved(array, axis, lambda name: name)

    def from_split(self, array: Any) -> Any:
        """Returns an output, whose examples are along axis 0, on the mesh itself."""
        return self._moved(array, 0, lambda n: None if n in self.names else n)

    def _moved(
        self, array: Any, axis: int | None, kept: Callable[[str], str | None]
    ) -> Any:
        """Lays an array out with its examples at `axis`, whole along what is not kept.

        A mesh axis that the examples take is dropped elsewhere.
        """
        entries: list[Any] = []
        for i, entry in enumerate(spec_of(array)):
            free = [n for n in names_of_entry(entry) if kept(n) is not None]
            taken = [n for n in free if axis is None or n not in self.names]
            here = axis is not None and i == axis % array.ndim
            entries.append(self.entry if here else _entry(taken))
        return jax.sharding.reshard(
            array, NamedSharding(self.mesh, PartitionSpec(*entries))
        )


def _entry(names: Sequence[str]) -> Any:
    return tuple(names) if len(names) > 1 else (names[0] if names else None)


def take_rows(stacked: Any, index: jax.Array, examples: Examples) -> Any:
    """Returns the rows of every array for the examples, along axis 0."""
    return _taken(stacked, index, examples, [examples.entry])


def take_row(stacked: Any, index: jax.Array, examples: Examples) -> Any:
    """Returns one row of every array, laid out as `take_rows` lays out each."""
    return _taken(stacked, index, examples, [])


def _taken(stacked: Any, index: jax.Array, examples: Examples, first: list[Any]) -> Any:
    def of(leaf: jax.Array) -> jax.Array:
        place = None
        if examples.mesh is not None:
            others = [_without(e, examples.names) for e in spec_of(leaf)[1:]]
            spec = PartitionSpec(*first, *others)
            place = NamedSharding(_abstract(examples.mesh), spec)
        return leaf.at[index].get(mode="promise_in_bounds", out_sharding=place)

    return jax.tree.map(of, stacked)


def _without(entry: Any, names: Sequence[str]) -> Any:
    return _entry([n for n in names_of_entry(entry) if n not in names])


def _abstract(mesh: Any) -> Any:
    return getattr(mesh, "abstract_mesh", mesh)


def whole_along(array: jax.Array, axis: int) -> jax.Array:
    """Returns an array that is not sharded along an axis, which goes.

    Even where its mesh axis has the size 1: JAX does not take such an axis back in the
    backward pass (0.12).
    """
    spec, sharding = spec_of(array), explicit_sharding(array)
    if sharding is None or spec[axis] is None:
        return array
    entries = [None if i == axis % array.ndim else e for i, e in enumerate(spec)]
    return jax.sharding.reshard(array, sharding.update(spec=PartitionSpec(*entries)))

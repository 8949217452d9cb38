"""The layout of params by path, read from arrays, shardings, specs or Flax's boxes."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding
from jax.tree_util import keystr, tree_flatten_with_path

from .._jax.sharding import names_of_entry
from .axes import KernelAxes, Shape
from .paths import PyTree, is_box, is_quantized

AnyMesh: TypeAlias = Mesh | AbstractMesh
MeshAxes: TypeAlias = str | tuple[str, ...] | None
Rules: TypeAlias = Sequence[tuple[str, MeshAxes]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The layout of params by path, read from whatever says it.

    Attributes:
        nodes: what says the layout, by path; a path may be that of a subtree.
        mesh: the mesh for what does not name its own; None if there is none.
        rules: the mesh axes of logical names.
    """

    nodes: Mapping[str, Any]
    mesh: AnyMesh | None
    rules: Rules

    @classmethod
    def of(
        cls,
        params: PyTree,
        *,
        mesh: AnyMesh | None = None,
        rules: Rules | None = None,
    ) -> "Layout":
        """Reads the layout of `params`, as `shardings` takes them.

        Without `rules` those that Flax has in force count.
        """
        is_leaf = lambda n: (
            n is None or is_box(n) or is_quantized(n) or isinstance(n, _SAYS)
        )
        flat, _ = tree_flatten_with_path(params, is_leaf=is_leaf)
        nodes = {keystr(path, simple=True, separator="/"): node for path, node in flat}
        traced = [p for p, n in nodes.items() if isinstance(unboxed(n), Tracer)]
        if traced:
            raise TypeError(
                f"the shardings of {traced[:3]} are not known while they are traced; "
                "call `jlora.shardings` outside of `jax.jit`"
            )
        rules = _rules_in_force() if rules is None else rules
        return cls(nodes, mesh or _mesh_of(nodes.values()), rules)

    def sharding(self, path: str, ndim: int) -> Sharding:
        """Returns the sharding of the leaf at `path`.

        Raises:
            ValueError: if nothing says it, or what says it does not fit.
        """
        node = self._node(path)
        own = _own_sharding(node)
        if isinstance(own, NamedSharding) or (self.mesh is None and own is not None):
            return own
        if own is not None and not own.is_fully_replicated:
            raise ValueError(
                f"{path!r} has a {type(own).__name__}, whose axes have no names; put "
                "it on the mesh with a `NamedSharding`"
            )
        if self.mesh is None:
            raise ValueError(
                f"{path!r} has no sharding, and there is no mesh to replicate it on; "
                "pass `mesh=`, or call `jax.set_mesh` before"
            )
        return NamedSharding(self.mesh, _spec(path, node, ndim, self.mesh, self.rules))

    def _node(self, path: str) -> Any:
        """Returns what says the layout of `path`: itself, or the nearest above it."""
        above = path
        while above not in self.nodes:
            if not above:
                raise ValueError(
                    f"`params` has no leaf at {path!r}, nor a sharding above it"
                )
            above, _, _ = above.rpartition("/")
        return self.nodes[above]


_SAYS = (Sharding, PartitionSpec, jax.ShapeDtypeStruct)


def unboxed(node: Any) -> Any:
    """Returns what a box holds; anything else is returned as it is.

    A quantised kernel counts as a box of its codes, which have its shape and sharding.
    """
    leaves = jax.tree.leaves(node) if is_box(node) or is_quantized(node) else [node]
    return leaves[0] if leaves else None


def _own_sharding(node: Any) -> Sharding | None:
    inner = unboxed(node)
    if isinstance(inner, Sharding):
        return inner
    own = getattr(inner, "sharding", None)
    return own if isinstance(own, Sharding) else None


def _mesh_of(nodes: Iterable[Any]) -> AnyMesh | None:
    """Returns the mesh of the first sharding that names one, or the one that is set."""
    for node in nodes:
        own = _own_sharding(node)
        mesh = own.mesh if isinstance(own, NamedSharding) else None
        mesh = getattr(node, "mesh", None) if mesh is None and is_box(node) else mesh
        if isinstance(mesh, Mesh | AbstractMesh) and not mesh.empty:
            return mesh
    for mesh in (jax.sharding.get_mesh(), jax.sharding.get_abstract_mesh()):
        if not mesh.empty:
            return mesh
    return None


def _spec(
    path: str, node: Any, ndim: int, mesh: AnyMesh, rules: Rules
) -> PartitionSpec:
    """Returns the spec that a node without a sharding of its own says."""
    inner = unboxed(node)
    if isinstance(inner, PartitionSpec):
        spec = inner
    elif is_box(node):
        names, rules = _names_of(node, rules)
        _check_known(path, names, rules, mesh)
        spec = PartitionSpec(*_on_mesh(names, rules, mesh))
    else:
        spec = PartitionSpec()
    unknown = {n for e in spec for n in names_of_entry(e)} - set(mesh.axis_names)
    if unknown or len(spec) > ndim:
        raise ValueError(
            f"{path!r} of {ndim} axes has the spec {spec}, but the mesh has the axes "
            f"{tuple(mesh.axis_names)}; give one entry per axis at most, of these names"
        )
    return spec


def _names_of(box: Any, rules: Rules) -> tuple[tuple[Any, ...], Rules]:
    """Returns the names of a Flax box, one per axis, and the rules that hold for it.

    As in Flax, rules of its own stand in place of others, or in NNX before them.
    """
    if hasattr(box, "get_partition_spec"):  # nn.Partitioned, nn.LogicallyPartitioned
        own = getattr(box, "rules", None)
        return tuple(box.get_partition_spec()), own or rules
    metadata = box.get_metadata() if hasattr(box, "get_metadata") else {}
    names = metadata.get("out_sharding")
    if isinstance(names, NamedSharding):
        names = names.spec
    return tuple(names or ()), (*(metadata.get("sharding_rules") or ()), *rules)


def _rules_in_force() -> Rules:
    """Returns the rules of `logical_axis_rules`, if Flax has been imported at all.

    There are no boxes of Flax where it has not.
    """
    for name in ("flax.core.spmd", "flax.linen.spmd"):
        get = getattr(sys.modules.get(name), "get_logical_axis_rules", None)
        if get is not None:
            return tuple(get() or ())
    return ()


def _check_known(path: str, names: Sequence[Any], rules: Rules, mesh: AnyMesh) -> None:
    """Raises if a box has a name that is no axis of the mesh and has no rule."""
    ruled = {alias for alias, _ in rules}
    unruled = [name for name in names if name not in ruled]
    used = {one for name in unruled for one in names_of_entry(name)}
    if unknown := sorted(map(str, used - set(mesh.axis_names))):
        raise ValueError(
            f"{path!r} has the axes {tuple(names)}, of which {unknown} are neither "
            f"axes of the mesh {tuple(mesh.axis_names)} nor named by a rule. Pass "
            '`rules=[("embed", "fsdp"), ...]`, call `jlora.shardings` within Flax\'s '
            "`logical_axis_rules(...)`, or give a name the rule None to replicate it"
        )


def _on_mesh(names: Sequence[Any], rules: Rules, mesh: AnyMesh) -> list[MeshAxes]:
    """Returns the mesh axes of logical names; each mesh axis is given away once.

    As in Flax, rules are tried in their order, and a rule whose mesh axes are taken is
    passed over. A name without a rule is that of a mesh axis.
    """
    ruled = {alias for alias, _ in rules}
    found = {
        i: name
        for i, name in enumerate(names)
        if name not in ruled and set(names_of_entry(name)) <= set(mesh.axis_names)
    }
    taken = {name for entry in found.values() for name in names_of_entry(entry)}
    for alias, axes in rules:
        for i, name in enumerate(names):
            free = i not in found and not taken & set(names_of_entry(axes))
            if name == alias and free:
                found[i] = axes if axes is None or isinstance(axes, str) else (*axes,)
                taken.update(names_of_entry(axes))
    return [found.get(i) for i in range(len(names))]


def following(kernel: Sharding, axes: Sequence[int | None], shape: Shape) -> Sharding:
    """Returns the sharding of an array whose axes follow these axes of a kernel.

    An axis that follows none, or that its mesh axes do not divide, is replicated.
    """
    if not isinstance(kernel, NamedSharding):
        return kernel
    spec = tuple(kernel.spec)
    entries = [spec[i] if i is not None and i < len(spec) else None for i in axes]
    fits = [
        entry if size % _parts(kernel.mesh, entry) == 0 else None
        for entry, size in zip(entries, shape, strict=True)
    ]
    return NamedSharding(kernel.mesh, PartitionSpec(*_short(fits)))


def spread(
    place: Sharding, kernel: Sharding, axes: Sequence[int | None], shape: Shape
) -> Sharding:
    """Returns a sharding over those mesh axes too that the rest of a kernel lies along.

    Args:
        place: how the array lies, as `following` gives it.
        kernel: the sharding of the kernel.
        axes: the axis of the kernel that each axis of the array may be cut along with;
            None for those that are left as they are.
        shape: the array's.

    Each mesh axis that only the kernel uses cuts the axis whose parts are largest, of
    those that it divides; if there is none, it is left out.
    """
    if not isinstance(place, NamedSharding) or not isinstance(kernel, NamedSharding):
        return place
    mesh, entries = kernel.mesh, [*place.spec]
    entries += [None] * (len(shape) - len(entries))
    named = lambda spec: [name for entry in spec for name in names_of_entry(entry)]
    part = lambda i: shape[i] // _parts(mesh, entries[i])
    for name in named(kernel.spec):
        fits = [
            i
            for i, axis in enumerate(axes)
            if axis is not None and part(i) % mesh.shape[name] == 0
        ]
        if fits and name not in named(entries):
            most = max(fits, key=part)
            own = (*names_of_entry(entries[most]), name)
            entries[most] = own if len(own) > 1 else name
    return NamedSharding(mesh, PartitionSpec(*_short(entries)))


def fitting(kernel: Sharding, shape: Shape) -> Sharding:
    """Returns the sharding of an array with the axes of a kernel, such as its scales.

    An axis that its mesh axes do not divide is replicated.
    """
    return following(kernel, range(len(shape)), shape)


def factor_shardings(
    kernel: Sharding, axes: KernelAxes, a: Shape, b: Shape
) -> tuple[Sharding, Sharding]:
    """Returns the shardings of factors of the shapes `a` and `b`, from the kernel's."""
    along_a, along_b = axes.along_factors()
    return following(kernel, along_a, a), following(kernel, along_b, b)


def _short(entries: Sequence[MeshAxes]) -> tuple[MeshAxes, ...]:
    """Returns the entries of a spec without Nones at the end.

    So XLA names the shardings of results: to jit the two names would be two layouts.
    """
    entries = tuple(entries)
    while entries and entries[-1] is None:
        entries = entries[:-1]
    return entries


def _parts(mesh: AnyMesh, entry: MeshAxes) -> int:
    """Returns into how many parts an entry of a spec divides an axis."""
    parts = 1
    for name in names_of_entry(entry):
        parts *= mesh.shape[name]
    return parts

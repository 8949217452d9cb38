"""The arguments and outputs of a mixed batch: where the examples are in each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._params.paths import PyTree, is_array
from .mixed_mesh import whole_along

Axes = Any  # an int, None, or a tree of them that is a prefix of another


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of all examples, and which of them an example sees a part of.

    Attributes:
        leaves: the leaves of `(args, kwargs)`, each single PRNG key split.
        treedef: their structure.
        axes: the axis of the examples of each leaf, None for one without.
        keys: which leaves were a single PRNG key.
    """

    leaves: list[Any]
    treedef: Any
    axes: list[Any]
    keys: frozenset[int]

    @classmethod
    def of(
        cls, in_axes: Axes, args: tuple[Any, ...], kwargs: Any, examples: int
    ) -> "Arguments":
        """Returns the arguments; raises where they have not one entry per example."""
        axes = _argument_axes(in_axes, args, kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        pairs = enumerate(zip(axes, leaves, strict=True))
        keys = frozenset(i for i, (axis, v) in pairs if axis is not None and _is_key(v))
        for i in keys:
            leaves[i], axes[i] = split_key(leaves[i], examples), 0
        _check_sizes(axes, treedef.unflatten(leaves), examples)
        return cls(leaves, treedef, axes, keys)

    @property
    def _places(self) -> list[int]:
        return [i for i, axis in enumerate(self.axes) if axis is not None]

    @property
    def mapped(self) -> list[Any]:
        """The leaves with one entry for each example."""
        return [self.leaves[i] for i in self._places]

    @property
    def mapped_axes(self) -> list[int]:
        """The axes of the examples of these leaves."""
        return [self.axes[i] for i in self._places]

    def each(self, move: Callable[[Any, int | None], Any]) -> "Arguments":
        """Returns the arguments with every array moved."""
        pairs = zip(self.leaves, self.axes, strict=True)
        moved = [move(v, axis) if is_array(v) else v for v, axis in pairs]
        return dataclasses.replace(self, leaves=moved)

    def of_one(self, own: Sequence[jax.Array]) -> Any:
        """Returns the `(args, kwargs)` of an example, from its entries of `mapped`."""
        filled = list(self.leaves)
        for i, entry in zip(self._places, own, strict=True):
            single = i in self.keys
            filled[i] = entry if single else jnp.expand_dims(entry, self.axes[i])
        return self.treedef.unflatten(filled)


def _is_key(leaf: Any) -> bool:
    """Whether a leaf is one typed PRNG key, which has no axis for examples."""
    typed = is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return typed and leaf.ndim == 0


def split_key(key: jax.Array, examples: int) -> jax.Array:
    """Returns a key for each example, of one key, typed or legacy."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if key.ndim != (0 if typed else 1):
        raise ValueError(
            "`lora_dropout_key` is one PRNG key, which is split into one for each "
            f"example; got an array of keys of shape {key.shape}"
        )
    return jax.random.split(key, examples)


def _argument_axes(in_axes: Axes, args: tuple[Any, ...], kwargs: Any) -> list[Any]:
    """Returns the axis of the examples of every leaf, None for one without."""
    by_name = dict.fromkeys(kwargs, 0)
    if in_axes is None or _is_axis(in_axes):
        positional = [in_axes] * len(args)
        by_name = dict.fromkeys(kwargs, in_axes)
    elif isinstance(in_axes, Mapping):
        known = [*range(len(args)), *kwargs]
        if unknown := [key for key in in_axes if key not in known]:
            raise ValueError(
                f"`in_axes` names {unknown}, which are no arguments; these are {known}"
            )
        positional = [in_axes.get(i, 0) for i in range(len(args))]
        by_name = {name: in_axes.get(name, 0) for name in kwargs}
    elif isinstance(in_axes, list | tuple) and len(in_axes) == len(args):
        positional = list(in_axes)
    else:
        raise ValueError(
            "`in_axes` is an axis, one for each positional argument after the index "
            f"({len(args)} here), or a dict from position or name; got {in_axes!r}"
        )
    axes = _spread("in_axes", (tuple(positional), by_name), (args, kwargs))
    leaves = jax.tree.leaves((args, kwargs))
    rows = zip(axes, leaves, strict=True)
    return [axis if is_array(leaf) else None for axis, leaf in rows]


def _is_axis(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _spread(name: str, prefix: Axes, tree: PyTree) -> list[Any]:
    """Returns one axis for every leaf, of a tree of axes that is a prefix of `tree`."""
    axes: list[Any] = []

    def add(axis: Any, subtree: PyTree) -> None:
        if axis is not None and not _is_axis(axis):
            raise TypeError(f"`{name}` holds {axis!r}; an axis is an int or None")
        axes.extend([axis] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(add, prefix, tree, is_leaf=lambda v: v is None)
    except ValueError as error:
        raise ValueError(f"`{name}` {prefix!r} is no prefix: {error}") from error
    return axes


def _check_sizes(axes: Sequence[Any], arguments: PyTree, examples: int) -> None:
    """Raises with every array that has not one entry for each example."""
    wrong = []
    flat = jax.tree_util.tree_leaves_with_path(arguments)
    for axis, (path, leaf) in zip(axes, flat, strict=True):
        if axis is None:
            continue
        size = leaf.shape[axis] if -leaf.ndim <= axis < leaf.ndim else None
        if size != examples:
            inner = jax.tree_util.keystr(path[2:])
            where = f"{getattr(path[1], 'idx', getattr(path[1], 'key', ''))!r}{inner}"
            wrong.append(f"argument {where} of shape {leaf.shape}: axis {axis}")
    if wrong:
        raise ValueError(
            f"`index` is for {examples} examples, which these are not (with "
            "`in_axes={argument: None}` all examples see an argument whole):\n"
            + "\n".join(wrong)
        )


class Outputs:
    """The outputs of an example: without their axis of one, and put together again."""

    def __init__(self, axes: Axes) -> None:
        self.prefix = axes

    def strip(self, out: PyTree) -> list[jax.Array]:
        """Returns the arrays without their example axis, and keeps all else."""
        flat, self.treedef = jax.tree_util.tree_flatten_with_path(out)
        self.axes = _spread("out_axes", self.prefix, out)
        self.static = [None if is_array(leaf) else leaf for _, leaf in flat]
        self.traced = [is_array(leaf) for _, leaf in flat]
        wrong, arrays = [], []
        for i, (path, leaf) in enumerate(flat):
            if not self.traced[i]:
                continue
            axis = self.axes[i]
            if axis is not None and not _is_single(leaf, axis):
                name = jax.tree_util.keystr(path)
                wrong.append(f"output {name} of shape {leaf.shape}: axis {axis}")
            elif axis is not None:
                self.axes[i] = axis % leaf.ndim
                leaf = jnp.squeeze(whole_along(leaf, axis), axis)
            arrays.append(leaf)
        if wrong:
            raise ValueError(
                "one example must give outputs of size 1 along the axis of the "
                "examples; `out_axes=None` stacks outputs without such an axis:\n"
                + "\n".join(wrong)
            )
        return arrays

    def rebuild(self, arrays: Sequence[jax.Array]) -> PyTree:
        """Returns the outputs of all examples in their structure."""
        rows = iter(arrays)
        kept = zip(self.axes, self.traced, self.static, strict=True)
        found = [
            jnp.moveaxis(next(rows), 0, axis or 0) if traced else leaf
            for axis, traced, leaf in kept
        ]
        return self.treedef.unflatten(found)


def _is_single(leaf: Any, axis: int) -> bool:
    return -leaf.ndim <= axis < leaf.ndim and leaf.shape[axis] == 1

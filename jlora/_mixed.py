"""One batch whose examples use different adapters: the body of `Lora.apply_mixed`.

Every example gets its own row of the stacked adapter and is mapped over by `jax.vmap`,
which leaves the base, mapped over by nothing, one operand of one product. What that
takes on a mesh with Explicit axes is in `_mixed_mesh`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._errors import UnsupportedFeatureError
from ._factors import Adapter, LoraFactors, PyTree
from ._mixed_mesh import Examples, take_rows, whole_along
from ._paths import FlatParams
from ._stackable import count_of
from ._trace import is_array

Axes = Any  # an int, None, or a tree of them that is a prefix of another


def run_mixed(
    apply: Callable[..., Any],
    params: PyTree,
    stacked: Mapping[str, Any],
    index: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dropout_key: jax.Array | None,
    in_axes: Axes,
    out_axes: Axes,
) -> Any:
    """Returns `apply(params, adapter, *args, **kwargs)` with an adapter per example."""
    count = count_of(stacked)
    index = _checked(index, count)
    arguments = _Arguments.of(in_axes, args, kwargs, index.shape[0])
    keys = None if dropout_key is None else _split(dropout_key, index.shape[0])
    call = _Call(apply, params, dict(stacked), index, arguments, keys)
    outputs = _Outputs(out_axes)
    return outputs.rebuild(_on_any_mesh(call, outputs))


class _Call(NamedTuple):
    """A call, all arrays of which may be moved to another mesh."""

    apply: Callable[..., Any]
    params: PyTree
    stacked: dict[str, Any]
    index: Any
    arguments: "_Arguments"
    keys: Any

    @property
    def pairs(self) -> list[tuple[Any, int]]:
        """The arrays that have one entry for each example, with the axis of these."""
        arguments = zip(self.arguments.mapped, self.arguments.mapped_axes, strict=True)
        keys = [] if self.keys is None else [(self.keys, 0)]
        return [*arguments, (self.index, 0), *keys]

    def each(self, move: Callable[[Any, int | None], Any]) -> "_Call":
        """Returns the call with every array moved; those of all examples at None."""
        whole = lambda tree: jax.tree.map(
            lambda v: move(v, None) if is_array(v) else v, tree
        )
        return self._replace(
            params=whole(self.params),
            stacked=whole(self.stacked),
            index=move(self.index, 0),
            arguments=self.arguments.each(move),
            keys=None if self.keys is None else move(self.keys, 0),
        )


def _on_any_mesh(call: _Call, outputs: "_Outputs") -> list[jax.Array]:
    """Maps over the examples; on a split mesh if the function names that of theirs."""
    arrays = jax.tree.leaves((call.params, call.stacked))
    arrays += [array for array, _ in call.pairs]
    examples = Examples.of(call.pairs, list(filter(is_array, arrays)))
    if not examples.names:
        return _mapped(call, outputs, examples)
    try:
        return _mapped(call, outputs, examples)
    except ValueError as error:
        try:
            return _mapped_on_split(call, outputs, examples)
        except Exception as other:
            raise error from other


def _mapped(call: _Call, outputs: "_Outputs", examples: Examples) -> list[jax.Array]:
    """Returns the outputs of all examples, along axis 0 of each array."""
    count, arguments = count_of(call.stacked), call.arguments
    base = FlatParams.of(call.params).by_path()

    def one(
        index: jax.Array, row: Adapter, own: Sequence[jax.Array], key: Any
    ) -> list[jax.Array]:
        args, kwargs = arguments.of_one(own)
        adapter = _picked(row, index, count, base)
        out = call.apply(call.params, adapter, *args, lora_dropout_key=key, **kwargs)
        return outputs.strip(out)

    mapped = [examples.laid_out(*pair) for pair in call.pairs]
    keys = None if call.keys is None else mapped.pop()
    index = jnp.asarray(mapped.pop())
    rows = take_rows(call.stacked, jnp.clip(index, 0, count - 1), examples)
    # Out axes are known once `one` has been traced: put where they belong afterwards.
    each = jax.vmap(one, in_axes=(0, 0, arguments.mapped_axes, 0))
    return each(index, rows, mapped, keys)


def _mapped_on_split(
    call: _Call, outputs: "_Outputs", examples: Examples
) -> list[jax.Array]:
    """The same on a split mesh, which a compiled program alone can turn to."""
    arrays: list[Any] = []
    call.each(lambda array, axis: arrays.append(array))

    @jax.jit
    def run(arrays: list[Any]) -> list[jax.Array]:
        split, rest = examples.split(), iter(arrays)
        with jax.sharding.use_abstract_mesh(split.mesh):
            moved = call.each(lambda _, axis: examples.onto_split(next(rest), axis))
            found = _mapped(moved, outputs, split)
        return [examples.from_split(array) for array in found]

    return run(arrays)


def _picked(
    row: Adapter, index: jax.Array, count: int, base: Mapping[str, Any]
) -> Adapter:
    """Returns one adapter; below 0 one that changes nothing, from `count` on NaNs.

    Out of range `row` is the nearest one.
    """
    inside = (index >= 0) & (index < count)
    fill = jnp.where(index < 0, 0.0, jnp.nan)
    adapter = dict(row)
    for path, entry in row.items():
        if isinstance(entry, LoraFactors):
            # Both zero: the nearest row, which is read below 0, may hold NaNs in a.
            a = jnp.where(index < 0, 0, entry.a).astype(entry.a.dtype)
            b = jnp.where(inside, entry.b, fill.astype(entry.b.dtype))
            adapter[path] = LoraFactors(a, b, entry.axes, entry.scaling)
        elif path in base:  # if it is not, `apply` says so
            own = jnp.asarray(base[path])
            other = jnp.where(index < 0, own, jnp.nan)
            adapter[path] = jnp.where(inside, entry.astype(own.dtype), other)
    return adapter


def _checked(index: Any, count: int) -> Any:
    """Returns the indices as an array; concrete ones must be below `count`."""
    index = index if isinstance(index, Tracer | jax.Array) else np.asarray(index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            "`index` is a whole number for each example, of shape (examples,); got "
            f"shape {index.shape} of {index.dtype}. One adapter for all is "
            "`lora.apply(params, jlora.take(stacked, index), ...)`"
        )
    traced = isinstance(index, Tracer)
    if traced or not getattr(index, "is_fully_addressable", True):
        return index
    values = np.asarray(index)
    wrong = [f"{values[i]} for example {i}" for i in np.flatnonzero(values >= count)]
    if wrong:
        raise IndexError(
            f"there are {count} adapters, from 0 (negative is none); got "
            f"{', '.join(wrong)}"
        )
    return index


def refuse_ragged(uses: Sequence[Any]) -> None:
    """Raises if kernels reach a ragged product, which JAX cannot map; names all."""
    paths = {u.path for u in uses if u.primitive == "ragged_dot_general"}
    if paths:
        raise UnsupportedFeatureError(
            f"{sorted(paths)} reach a ragged product, which JAX cannot compute with an "
            "adapter for each example. Call `lora.apply(params, jlora.take(stacked, "
            "i), ...)` with the examples of adapter i"
        )


# --- where the examples are ---


@dataclasses.dataclass(frozen=True)
class _Arguments:
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
    ) -> "_Arguments":
        """Returns the arguments; raises where they have not one entry per example."""
        axes = _argument_axes(in_axes, args, kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        pairs = enumerate(zip(axes, leaves, strict=True))
        keys = frozenset(i for i, (axis, v) in pairs if axis is not None and _is_key(v))
        for i in keys:
            leaves[i], axes[i] = _split(leaves[i], examples), 0
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

    def each(self, move: Callable[[Any, int | None], Any]) -> "_Arguments":
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


def _split(key: jax.Array, examples: int) -> jax.Array:
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


class _Outputs:
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

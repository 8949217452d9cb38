"""Whether an adapter belongs to a params tree."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from .._errors import AdapterError
from .._jax.versions import manual_axes, vary
from .._params.axes import Shape
from .._params.given import described, listed
from .._params.paths import FlatParams, is_array, nearest
from .entries import given_shapes, wanted_shapes
from .instead import check_order, likely
from .variants import variant_of_entry


def check_adapter(params: FlatParams, adapter: Mapping[str, Any]) -> None:
    """Raises if an entry of the adapter does not fit the leaf of its path.

    Raises:
        TypeError: if the adapter is no mapping.
        AdapterError: with every entry that does not fit.
    """
    leaves = params.by_path()
    check_order(params.tree, adapter)
    problems = [_problem(path, entry, leaves) for path, entry in adapter.items()]
    found = [problem for problem in problems if problem]
    if found:
        raise AdapterError(
            "the adapter does not fit the params:\n"
            + listed(found)
            + likely(adapter, leaves)
        )


def _problem(path: str, entry: Any, leaves: Mapping[str, Any]) -> str | None:
    if path not in leaves:
        if list(leaves) == [""]:
            what = described(leaves[""])
            return f"{path!r} is no path of the params, which are {what}"
        near = ", ".join(map(repr, nearest(path, list(leaves))))
        return f"{path!r} is no path of the params. Nearest: {near}"
    if not is_array(leaves[path]):
        return f"{path!r} is no array but a {type(leaves[path]).__name__}"
    variant = variant_of_entry(entry)
    if not (variant.has_roles or is_array(entry)):
        return f"{path!r} holds a {type(entry).__name__}, not factors or an array"
    shape = tuple(leaves[path].shape)
    problem = (variant.problem or _misshapen)(entry, shape)
    return f"{path!r} {shape} {problem}" if problem else None


def _misshapen(entry: Any, shape: Shape) -> str | None:
    kind = type(entry).__name__
    if entry.axes.ndim != len(shape) or entry.kernel_shape != shape:
        return f"has {kind} of a kernel {entry.kernel_shape}"
    wanted, given = wanted_shapes(entry, shape), given_shapes(entry)
    return None if given == wanted else f"needs {wanted} in its {kind}, got {given}"


def as_varying(params: FlatParams, adapter: Mapping[str, Any]) -> FlatParams:
    """Returns params whose leaves vary along the shard_map axes of their entries.

    A function that is traced over them sees the types that the adapted leaves have.
    """
    leaves = []
    for path, leaf in zip(params.paths, params.leaves, strict=True):
        arrays = jax.tree.leaves(adapter.get(path))
        axes = frozenset().union(*map(manual_axes, arrays))
        spread = functools.partial(vary, axes=axes)
        leaves.append(jax.tree.map(spread, leaf) if axes else leaf)
    return dataclasses.replace(params, leaves=tuple(leaves))

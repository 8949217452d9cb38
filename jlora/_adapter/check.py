"""Whether an adapter belongs to a params tree."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from .._errors import AdapterError
from .._jax.versions import manual_axes, vary
from .._params.paths import FlatParams, is_array, nearest
from .entries import Special
from .factors import LoraFactors


def check_adapter(params: FlatParams, adapter: Mapping[str, Any]) -> None:
    """Raises if an entry of the adapter does not fit the leaf of its path.

    Raises:
        TypeError: if the adapter is no mapping.
        AdapterError: with every entry that does not fit.
    """
    if not isinstance(adapter, Mapping):
        raise TypeError(
            "an adapter is a dict from path to `LoraFactors` or array, got "
            f"{type(adapter).__name__}"
        )
    leaves = params.by_path()
    problems = [_problem(path, entry, leaves) for path, entry in adapter.items()]
    found = [problem for problem in problems if problem]
    if found:
        raise AdapterError("the adapter does not fit the params:\n" + "\n".join(found))


def _problem(path: str, entry: Any, leaves: Mapping[str, Any]) -> str | None:
    if path not in leaves:
        near = ", ".join(map(repr, nearest(path, list(leaves))))
        return f"{path!r} is no path of the params. Nearest: {near}"
    if not is_array(leaves[path]):
        return f"{path!r} is no array but a {type(leaves[path]).__name__}"
    shape = tuple(leaves[path].shape)
    if isinstance(entry, Special):
        return _special_problem(path, entry, shape)
    if not isinstance(entry, LoraFactors):
        if not is_array(entry):
            return f"{path!r} holds a {type(entry).__name__}, not factors or an array"
        if tuple(entry.shape) != shape:
            given = tuple(entry.shape)
            return f"{path!r} {shape} is trained whole by an array of shape {given}"
        return None
    return _factor_problem(path, entry, shape)


def _special_problem(path: str, entry: Special, shape: tuple[int, ...]) -> str | None:
    kind = type(entry).__name__
    if entry.axes.ndim != len(shape) or entry.kernel_shape != shape:
        return f"{path!r} {shape} has {kind} of a kernel {entry.kernel_shape}"
    wanted = entry.wanted(shape)
    given = {name: tuple(getattr(entry, name).shape) for name in wanted}
    if given == wanted:
        return None
    return f"{path!r} {shape} needs {wanted} in its {kind}, got {given}"


def _factor_problem(
    path: str, factors: LoraFactors, shape: tuple[int, ...]
) -> str | None:
    given = f"a {tuple(factors.a.shape)} and b {tuple(factors.b.shape)}"
    if factors.axes.ndim != len(shape):
        return f"{path!r} {shape} has {len(shape)} axes, its factors {factors.axes}"
    wanted = factors.axes.factor_shapes(shape, factors.rank)
    if wanted == (tuple(factors.a.shape), tuple(factors.b.shape)):
        return _magnitude_problem(path, factors, shape)
    hint = ""
    if factors.kernel_shape == shape[::-1]:
        hint = "; they look transposed"
    return (
        f"{path!r} {shape} needs a {wanted[0]} and b {wanted[1]} "
        f"(roles {factors.axes}), got {given}{hint}"
    )


def _magnitude_problem(
    path: str, factors: LoraFactors, shape: tuple[int, ...]
) -> str | None:
    if factors.magnitude is None:
        return None
    wanted = factors.axes.magnitude_shape(shape)
    given = tuple(factors.magnitude.shape)
    if wanted == given:
        return None
    return f"{path!r} {shape} needs a magnitude {wanted} of DoRA, got {given}"


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

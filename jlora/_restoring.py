"""What a saved adapter is restored as: compared with what is wanted, and placed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from ._entries import Factored, SlicedFactors
from ._errors import AdapterError
from ._factors import LoraFactors
from ._layout import unboxed
from ._record import Entry, Record, arrays_of, entry_with

# By the place of the entry and the name of the array, as they are on disk.
Arrays = dict[str, dict[str, Any]]


def targets(record: Record, like: Any, shardings: Any, place: str) -> Arrays:
    """Returns what each array is to be read as.

    That is a `jax.ShapeDtypeStruct`, without a sharding if it is not bound to devices.

    Args:
        record: the record of the saved adapter.
        like: an adapter that it must be like, or None.
        shardings: a tree of shardings, one sharding, or None.
        place: where the adapter is, for messages.

    Raises:
        TypeError: if `like` or `shardings` is no dict by path.
        AdapterError: with every difference.
    """
    for name, given in (("like", like), ("shardings", shardings)):
        if not isinstance(given, Mapping | Sharding | None):
            kind = type(given).__name__
            raise TypeError(f"`{name}` is a dict by path as an adapter is, got {kind}")
    problems = _unlike(record.adapter, like) if like is not None else []
    found: Arrays = {}
    if not problems:
        for i, entry in enumerate(record.entries):
            where = _shardings_of(entry, like, shardings, problems)
            found[str(i)] = {
                name: _target(f"{entry.path!r}, {name}", array, where[name], problems)
                for name, array in arrays_of(entry.value).items()
            }
    if problems:
        raise AdapterError(
            f"the adapter in {place} is not as it is wanted:\n" + "\n".join(problems)
        )
    return found


def _unlike(saved: Mapping[str, Any], like: Mapping[str, Any]) -> list[str]:
    """Returns a line for each difference between what was saved and what is wanted."""
    lines = [f"{p!r} is missing in it" for p in sorted(like.keys() - saved.keys())]
    lines += [f"{p!r} is not wanted" for p in sorted(saved.keys() - like.keys())]
    for path in sorted(saved.keys() & like.keys()):
        ours, wanted = _static(saved[path]), _static(like[path])
        lines += [
            f"{path!r}: {key} is {ours.get(key)}, and {wanted.get(key)} is wanted"
            for key in {**ours, **wanted}
            if ours.get(key) != wanted.get(key)
        ]
    return lines


def _static(entry: Any) -> dict[str, Any]:
    """Returns what two entries must have in common, by what it is called."""
    static: dict[str, Any] = {}
    arrays = {name: unboxed(array) for name, array in arrays_of(entry).items()}
    entry = entry_with(entry, arrays)
    for name, array in arrays.items():
        static[f"shape of {name}"] = tuple(array.shape)
        static[f"dtype of {name}"] = np.dtype(array.dtype).name
    if isinstance(entry, Factored):
        fields = [f.name for f in dataclasses.fields(entry) if f.metadata]
        static |= {_CALLED.get(name, name): getattr(entry, name) for name in fields}
    if isinstance(entry, LoraFactors | SlicedFactors):
        static["rank"] = entry.rank
    return static


_CALLED = {"axes": "roles"}


def _shardings_of(
    entry: Entry, like: Any, shardings: Any, problems: list[str]
) -> dict[str, Sharding | None]:
    """Returns where the arrays of an entry go; None is the default device."""
    names = arrays_of(entry.value)
    if shardings is None:
        wanted = arrays_of(like[entry.path]) if like is not None else {}
        return {name: _sharding(wanted.get(name)) for name in names}
    if isinstance(shardings, Sharding):
        return dict.fromkeys(names, shardings)
    found = arrays_of(shardings.get(entry.path))
    if found.keys() != names.keys():
        problems.append(f"{entry.path!r} has no place in `shardings`")
        return dict.fromkeys(names)
    return found


def _sharding(leaf: Any) -> Sharding | None:
    """Returns where a leaf is, unless it may be moved to wherever it is used."""
    leaf = unboxed(leaf)
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _target(
    what: str, array: jax.ShapeDtypeStruct, where: Any, problems: list[str]
) -> Any:
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        problems.append(f"{what} is {array.dtype}, which needs `jax_enable_x64`")
    if where is None:
        return array
    try:
        where.shard_shape(array.shape)
        if where.device_set:  # raises if its mesh is abstract
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)
    except (AttributeError, ValueError) as error:
        problems.append(f"{what} {array.shape} cannot be laid out as {where}: {error}")
        return None

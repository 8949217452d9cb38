"""What a saved adapter is restored as: compared with what is wanted, and placed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from .._adapter.entries import arrays_of, axes_of, entry_with
from .._adapter.variants import variant_of_entry
from .._errors import AdapterError
from .._params.layout import unboxed
from .._params.paths import is_array, nearest
from .record import Entry, Record

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
    kinds = {"like": (like, Mapping), "shardings": (shardings, Mapping | Sharding)}
    for name, (given, kind) in kinds.items():
        if not isinstance(given, kind | None):
            got = type(given).__name__
            raise TypeError(f"`{name}` is a dict by path as an adapter is, got {got}")
    problems = _unlike(record.adapter, like) if like is not None else []
    found: Arrays = {}
    if not problems:
        problems += _unplaced(record.adapter, shardings)
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


def _unplaced(saved: Mapping[str, Any], shardings: Any) -> list[str]:
    """Returns a line for each path of `shardings` that nothing was saved under."""
    given = shardings if isinstance(shardings, Mapping) else ()
    return [_unknown(path, "`shardings`", saved) for path in given if path not in saved]


def _unlike(saved: Mapping[str, Any], like: Mapping[str, Any]) -> list[str]:
    """Returns a line for each difference between what was saved and what is wanted."""
    lines = [_unknown(path, "`like`", saved) for path in like if path not in saved]
    lines += [f"{p!r} is not wanted" for p in sorted(saved.keys() - like.keys())]
    for path in sorted(saved.keys() & like.keys()):
        if odd := _no_arrays(like[path]):
            lines.append(f"{path!r} in `like` holds a {odd}, not factors or an array")
            continue
        ours, wanted = _static(saved[path]), _static(like[path])
        lines += [
            f"{path!r}: {key} is {ours.get(key)}, and {wanted.get(key)} is wanted"
            for key in {**ours, **wanted}
            if ours.get(key) != wanted.get(key)
        ]
    return lines


def _unknown(path: Any, where: str, saved: Mapping[str, Any]) -> str:
    near = ", ".join(map(repr, nearest(str(path), list(saved))))
    return f"{path!r} is missing in it, and {where} has it; the nearest: {near}"


def _no_arrays(entry: Any) -> str | None:
    """Returns the kind of what is no array, of an entry that should hold arrays."""
    variant = variant_of_entry(entry)
    held = variant.arrays(entry)
    if variant.has_roles:  # what every entry has may be None by mistake
        needed = [name for name in variant.names if name not in variant.optional]
        held |= {name: getattr(entry, name) for name in needed}
    odd = [type(x).__name__ for x in held.values() if not is_array(unboxed(x))]
    return odd[0] if odd else None


def _static(entry: Any) -> dict[str, Any]:
    """Returns what two entries must have in common, by what it is called."""
    static: dict[str, Any] = {}
    arrays = {name: unboxed(array) for name, array in arrays_of(entry).items()}
    entry = entry_with(entry, arrays)
    for name, array in arrays.items():
        static[f"shape of {name}"] = tuple(array.shape)
        static[f"dtype of {name}"] = np.dtype(array.dtype).name
    if axes_of(entry) is not None:
        fields = [f.name for f in dataclasses.fields(entry) if f.metadata]
        static |= {_CALLED.get(name, name): getattr(entry, name) for name in fields}
    if variant_of_entry(entry).rank is not None:
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

"""Folders that Orbax has written, with the params of Qwix or `nnx.LoRA` in them.

Found without Orbax, by the names in its `_METADATA`; and what is checked before Orbax
reads them.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .._errors import AdapterError, CorruptFileError
from .._files.format import Format
from .._files.safetensors import MAX_BYTES
from .._files.untrusted import VALUES_LIMIT, check_regular, parse_json, read_file
from .._torch.alone import tree_of
from .qwix import LORA, in_doubt

METADATA = "_METADATA"
LIMIT = 64 << 20  # bytes; a leaf takes about 400 of them
ITEM = "model_params"  # the name that Tunix gives it


def holds(path: Path) -> bool:
    """Returns whether a path is a state of Orbax's with factors, a step or a run."""
    if not path.is_dir():
        return False
    steps = [p for p in path.iterdir() if p.name.isdecimal() and p.is_dir()]
    return any(_with_factors(place) for place in (path, *steps))


def state_in(step: Any, item: str | None = None) -> Any:
    """Returns the folder of a state with factors, in that of a step.

    Args:
        step: the folder of a step, or of a state itself; local, or of a store.
        item: the name of the state among the items of the step.

    Raises:
        FileNotFoundError: if there is none of that name, or none with factors.
        AdapterError: if there are several.
    """
    if item is not None:
        if not (step / item / METADATA).exists():
            raise FileNotFoundError(
                f"{step} has no item {item!r} that Orbax has written"
            )
        return step / item
    found = _with_factors(step)
    if not found:
        raise FileNotFoundError(
            f"{step} has no state of Orbax's with leaves called lora_a and lora_b, or "
            "ending so"
        )
    if ITEM in found:
        return found[ITEM]
    if len(found) > 1:
        raise AdapterError(
            f"{step} has several states with factors, {sorted(found)}; say which one: "
            "`item=...`"
        )
    return next(iter(found.values()))


def _with_factors(place: Any) -> dict[str, Any]:
    """Returns the states with factors in a folder by their names, it itself as ""."""
    if (place / METADATA).exists():
        return {"": place} if _has_factors(place) else {}
    inside = [p for p in place.iterdir() if (p / METADATA).exists()]
    return {p.name: p for p in inside if _has_factors(p)}


def _has_factors(state: Any) -> bool:
    try:
        return any(map(_is_factor, _names(state)))
    except CorruptFileError:
        return False


def _names(state: Any) -> list[list[str]]:
    """Returns the names on the way to each leaf of a state.

    Raises:
        CorruptFileError: if its `_METADATA` is not what Orbax writes.
    """
    file = state / METADATA
    if "://" in os.fspath(file):
        with file.open("rb") as opened:
            # One byte more than is allowed is enough to be refused.
            data = opened.read(LIMIT + 1)
    else:
        data = read_file(Path(file), LIMIT)
    values = parse_json(data, str(file), limit=LIMIT, strict=False)
    tree = values.get("tree_metadata") if isinstance(values, dict) else None
    if not isinstance(tree, dict):
        raise CorruptFileError(f"{file} has no `tree_metadata`")
    return [_keys(entry, file) for entry in tree.values()]


def _keys(entry: Any, file: Any) -> list[str]:
    keys = entry.get("key_metadata") if isinstance(entry, dict) else None
    if not isinstance(keys, list) or not all(isinstance(k, dict) for k in keys):
        raise CorruptFileError(f"{file} has a leaf without `key_metadata`")
    return [str(key.get("key")) for key in keys]


def _is_factor(keys: list[str]) -> bool:
    path = "/".join(keys).removesuffix("/value")
    return bool(LORA.fullmatch(path))


# --- what is checked ---


def check_files(state: Any) -> None:
    """Raises if anything in a local folder is no regular file, such as a link.

    Raises:
        UnsafeFormatError: if something is a link or a special file.
        CorruptFileError: if the metadata is not what Orbax writes.
    """
    _names(state)
    if "://" in os.fspath(state):
        return
    for above, folders, files in os.walk(state):
        for name in folders:
            place = Path(above, name)
            if place.is_symlink():
                check_regular(place)
        for name in files:
            check_regular(Path(above, name))


def check_sizes(leaves: Mapping[str, Any], where: str) -> None:
    """Raises if the factors of a state are no arrays, or too large to be read.

    Args:
        leaves: what Orbax says of each, by path.
        where: the name of the state, for messages.

    Raises:
        CorruptFileError: with those that are none.
    """
    total, wrong = 0, []
    for path, leaf in leaves.items():
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        if shape is None or dtype is None or math.prod(shape) > VALUES_LIMIT:
            wrong.append(path)
            continue
        storage = getattr(leaf, "storage", None)
        # A chunk is made whole, whatever part of it the array has.
        chunk = getattr(storage, "chunk_shape", None) or shape
        values = max(math.prod(shape), math.prod(max(n, 1) for n in chunk))
        total += values * dtype.itemsize
    if wrong:
        raise CorruptFileError(f"{where}: {wrong[:5]} are no arrays that can be read")
    if total > MAX_BYTES:
        raise CorruptFileError(
            f"{where} claims factors of {total:,} bytes, more than the {MAX_BYTES:,} "
            "that jlora reads"
        )


# --- the format ---


def format_of(
    restore: Callable[..., tuple[Any, dict[str, Any]]],
    leaves_in: Callable[[Path], Mapping[str, Any]],
) -> Format:
    """Returns the format, from the functions of the door to Orbax.

    Args:
        restore: as `jlora.tunix.restore`.
        leaves_in: what Orbax says of the leaves of a state, by path.
    """

    def read(
        path: Path,
        *,
        ignore: Any = (),
        alpha: float | None = None,
        params: Mapping[str, tuple[int, ...]] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        shapes = None if params is None else tree_of(params)
        return restore(path, shapes, alpha=alpha)

    def told_in_part(path: Path, *, ignore: Any = ()) -> str | None:
        found = in_doubt(leaves_in(path))
        if not found:
            return None
        return (
            f"{path} has no kernels beside its factors, {found[:3]}, and Qwix keeps "
            "these with flat inputs and outputs: give the shapes of params, --params "
            "shapes.json, or call `jlora.tunix.restore(path, params, alpha=...)`"
        )

    return Format(
        "Tunix",
        holds,
        read,
        None,
        placing=("alpha", "params"),
        told_in_part=told_in_part,
    )

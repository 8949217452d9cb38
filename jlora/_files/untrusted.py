"""Reading files that a stranger wrote: every claim is checked before it is believed."""

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .._errors import CorruptFileError, UnsafeFormatError

JSON_LIMIT = 1 << 20  # bytes; an adapter_config.json has a few kilobytes
DEPTH_LIMIT = 32
VALUES_LIMIT = 1 << 40  # of one tensor
HEADER_LIMIT = 100_000_000  # bytes, as the safetensors library has it

# Formats that run code when they are opened, or that jlora has no reader for.
UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".msgpack")

# bits of a value, by the name that safetensors gives a dtype
BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8,
    "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16,
    "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64,
    "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# A snapshot in the cache of the Hugging Face Hub is a folder of such links.
_HUB_LINK = re.compile(r"(\.\./)+blobs/[0-9a-f]{40,64}")


def read_file(path: Path, limit: int) -> bytes:
    """Returns the bytes of a regular file of at most `limit` bytes.

    Raises:
        FileNotFoundError: if there is none.
        UnsafeFormatError: if it is a pickle by its name, a link or a special file.
        CorruptFileError: if it is longer than `limit`.
    """
    with open(check_regular(path), "rb") as file:
        # Memory is taken for what is asked for, and the file may grow meanwhile.
        size = os.fstat(file.fileno()).st_size
        data = file.read(size) if size <= limit else b""
    if size > limit:
        raise CorruptFileError(
            f"{path} has {size:,} bytes, more than the {limit:,} that jlora reads"
        )
    return data


def check_regular(path: Path) -> Path:
    """Returns a path that is known to lead to a regular file.

    Links are refused but for those of the Hugging Face Hub's cache.

    Raises:
        FileNotFoundError: if there is none.
        UnsafeFormatError: if it is a pickle by its name, a link or a special file.
    """
    if path.suffix.lower() in UNSAFE:
        raise UnsafeFormatError(
            f"{path} may run code when it is opened, and jlora does not read its "
            "format; convert it to safetensors where you trust it"
        )
    if path.is_symlink() and not _HUB_LINK.fullmatch(os.readlink(path)):
        raise UnsafeFormatError(
            f"{path} is a link to {os.readlink(path)!r}; jlora does not follow it: "
            "copy the file, or give the folder that it is in"
        )
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise FileNotFoundError(f"there is no file {path}") from error
        raise UnsafeFormatError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        raise UnsafeFormatError(f"{path} is no regular file")
    return path


def parse_json(
    data: bytes, where: str, *, limit: int = JSON_LIMIT, strict: bool = True
) -> Any:
    """Returns the value of a JSON text.

    Args:
        data: the text.
        where: the name of the file, for messages.
        limit: the most bytes that it may have.
        strict: whether NaN and infinities, which JSON has not, are refused.

    Raises:
        CorruptFileError: if it is no UTF-8 or no JSON, too long or too deep, names a
            key twice, or holds NaN or infinities.
    """
    if len(data) > limit:
        raise CorruptFileError(f"{where} has {len(data):,} bytes, more than {limit:,}")
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        return json.loads(
            text,
            object_pairs_hook=_without_twins,
            parse_constant=_no_constant if strict else float,
            parse_float=_finite if strict else float,
        )
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{where} is no strict JSON: {error}") from error


def _check_depth(text: str) -> None:
    # Before parsing: the parser itself recurses. A string that does not end is taken to
    # the end of the text, so that no character is looked at twice.
    depth = deepest = 0
    for found in re.finditer(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', text, re.DOTALL):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        deepest = max(deepest, depth)
    if deepest > DEPTH_LIMIT:
        raise ValueError(f"it is nested {deepest} deep, more than {DEPTH_LIMIT}")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key(s) {twice[:5]} occur twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def check_header(data: bytes, where: str, size: int | None = None) -> dict[str, Any]:
    """Returns the header of a safetensors file, after checking every claim in it.

    The library that reads the tensors checks most of this again; here it is checked
    before anything is allocated, and duplicate keys are found, which it drops.

    Args:
        data: the file, or as much of it as begins with the whole header.
        where: its name, for messages.
        size: the bytes of the whole file; those of `data` by default.

    Returns:
        The dtype, shape and data_offsets of each tensor by name, and `__metadata__`.

    Raises:
        CorruptFileError: if a claim does not hold.
    """
    size = len(data) if size is None else size
    end = header_end(data, where, size)
    text = data[8:end]
    if not text.startswith(b"{"):
        raise CorruptFileError(f"{where}: the header does not begin with '{{'")
    header = parse_json(text, f"the header of {where}", limit=HEADER_LIMIT)
    metadata = header.pop("__metadata__", {})
    metadata = (
        {} if metadata is None else metadata
    )  # as MLX has it, where there is none
    if not (isinstance(metadata, dict) and _all_strings(metadata.values())):
        raise CorruptFileError(f"{where}: `__metadata__` does not map text to text")
    spans = [_span(where, name, entry) for name, entry in header.items()]
    _check_spans(where, sorted(spans), size - end)
    return {**header, "__metadata__": metadata}


def header_end(data: bytes, where: str, size: int) -> int:
    """Returns where the header of a safetensors file ends, as its first bytes claim.

    Raises:
        CorruptFileError: if that is beyond the file, or beyond what is allowed.
    """
    if len(data) < 8:
        raise CorruptFileError(f"{where} is truncated: it has {len(data)} bytes")
    length = int.from_bytes(data[:8], "little")
    if length > min(HEADER_LIMIT, size - 8):
        raise CorruptFileError(
            f"{where} claims a header of {length:,} bytes; the file has {size:,}, and "
            f"{HEADER_LIMIT:,} is the most that is allowed"
        )
    return 8 + length


def _all_strings(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _span(where: str, name: str, entry: Any) -> tuple[int, int]:
    problem = _entry_problem(entry)
    if problem:
        raise CorruptFileError(f"{where}: tensor {name[:200]!r} {problem}")
    begin, end = entry["data_offsets"]
    return begin, end


def _entry_problem(entry: Any) -> str | None:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        return f"has no entry of exactly {sorted(keys)}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"has the dtype {str(dtype)[:50]!r}, which is none of {sorted(BITS)}"
    if not _sizes(shape) or len(shape) > 8:
        return f"has the shape {str(shape)[:200]}, which is none of at most 8 axes"
    if not _sizes(offsets) or len(offsets) != 2:
        return f"has the offsets {str(offsets)[:200]}"
    # An axis of zero does not excuse the others: NumPy multiplies them, too.
    if math.prod(max(size, 1) for size in shape) > VALUES_LIMIT:
        return f"claims the shape {str(shape)[:200]}, more than {VALUES_LIMIT:,} values"
    values = math.prod(shape)
    if 8 * (offsets[1] - offsets[0]) != values * BITS[dtype]:
        return f"{dtype} {shape} does not fit its offsets {offsets}"
    return None


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    )


def _check_spans(where: str, spans: list[tuple[int, int]], size: int) -> None:
    """Raises unless the tensors fill the file without holes and overlaps."""
    position = 0
    for begin, end in spans:
        if begin != position:
            raise CorruptFileError(
                f"{where}: a tensor begins at byte {begin:,} of the data, where "
                f"{position:,} is next; holes and overlaps are not allowed"
            )
        position = end
    if position != size:
        raise CorruptFileError(
            f"{where}: its tensors take {position:,} bytes and the file has {size:,}"
        )

"""GGUF files: read with every claim checked before memory is taken, and written."""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import AdapterError, CorruptFileError, UnsupportedFeatureError
from .untrusted import VALUES_LIMIT, read_file

MAGIC = b"GGUF"
TEXT_LIMIT = 1 << 20  # bytes of all fields and names: those of an adapter have few
TENSORS_LIMIT = 1 << 16
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_AXES = 4

# Values of one number, by the number of their type; then the two that are not.
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_UINT32, _FLOAT32, _BOOL, _TEXT, _ARRAY = 4, 6, 7, 8, 9
# Tensors whose values are plain numbers; those of any other type are codes.
_DTYPES = {0: np.dtype("<f4"), 1: np.dtype("<f2"), 30: np.dtype(jnp.bfloat16)}


def read_gguf(
    file: Path, max_bytes: int, types: Mapping[int, str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the fields of a small file, and its tensors in NumPy's order of axes.

    Args:
        file: the file.
        max_bytes: the most bytes that it may have.
        types: what the types of tensors are called, for messages.

    Raises:
        CorruptFileError: if the file is not what it claims.
        UnsupportedFeatureError: if tensors are quantised; all are named.
    """
    data, where = read_file(file, max_bytes), str(file)
    head = _Head(data, where)
    counts = head.opening()
    fields = head.fields(counts[1])
    entries = head.entries(counts[0])
    quantised = [n for n, (_, kind, _) in entries.items() if kind not in _DTYPES]
    if quantised:
        told = [f"{n!r} ({types.get(entries[n][1], entries[n][1])})" for n in quantised]
        raise UnsupportedFeatureError(
            f"{where} has factors that are no F32, F16 or BF16: {', '.join(told[:10])}"
            f" ({len(told)} in all). Convert the adapter again, unquantised"
        )
    align = _alignment(fields, where)
    return fields, _tensors(data, entries, _up(head.place, align), align, where)


class _Head:
    """What comes before the data of tensors, read from its beginning."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.place = data, where, 0

    def problem(self, told: str) -> CorruptFileError:
        return CorruptFileError(f"{self.where}: {told}")

    def take(self, size: int) -> bytes:
        end = self.place + size
        if size > TEXT_LIMIT or end > len(self.data):
            raise self.problem(
                f"at byte {self.place:,} it claims {size:,} more, of {len(self.data):,}"
                f" in all; {TEXT_LIMIT:,} is the most that jlora reads there"
            )
        found, self.place = self.data[self.place : end], end
        return found

    def number(self, kind: str = "<u8") -> Any:
        return np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0].item()

    def text(self) -> str:
        try:
            return self.take(self.number()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.problem(f"a text is no UTF-8: {error}") from error

    def name(self) -> str:
        found = self.text()
        if not found or len(found) > 512 or not found.isprintable():
            raise self.problem(f"{found[:80]!r} is no name")
        return found

    def opening(self) -> tuple[int, int]:
        if self.take(4) != MAGIC:
            raise self.problem("it does not begin with 'GGUF'")
        version = self.number("<u4")
        if version not in _VERSIONS:
            big = " (it is for machines of the other byte order)"
            told = big if not version & 0xFFFF else ""
            raise self.problem(f"it is of version {version}{told}, and not {_VERSIONS}")
        counts = self.number(), self.number()
        # An entry of a tensor has at least 24 bytes, and a field 13.
        least = 24 * counts[0] + 13 * counts[1]
        if counts[0] > TENSORS_LIMIT or least > len(self.data):
            raise self.problem(f"it claims {counts[0]} tensors and {counts[1]} fields")
        return counts

    def fields(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self.name()
            if name in found:
                raise self.problem(f"the field {name!r} occurs twice")
            found[name] = self.value(self.number("<u4"))
            if self.place > TEXT_LIMIT:
                raise self.problem(f"its fields have more than {TEXT_LIMIT:,} bytes")
        return found

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self.array(self.number("<u4"), self.number())
        if kind not in _NUMBERS:
            raise self.problem(f"a field is of the type {kind}, which is unknown")
        found = self.number(_NUMBERS[kind])
        if kind == _BOOL and found > 1:
            raise self.problem(f"a field of yes or no is {found}")
        return bool(found) if kind == _BOOL else found

    def array(self, kind: int, count: int) -> Any:
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self.take(dtype.itemsize * count), dtype)
        # A text has at least 8 bytes.
        if kind != _TEXT or 8 * count > TEXT_LIMIT:
            raise self.problem(f"it claims an array of {count:,} of the type {kind}")
        return [self.text() for _ in range(count)]

    def entries(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Returns the shape, the type and the offset of each tensor."""
        found = {}
        for _ in range(count):
            name, n_axes = self.name(), self.number("<u4")
            if name in found:
                raise self.problem(f"the tensor {name!r} occurs twice")
            if not 1 <= n_axes <= _AXES:
                raise self.problem(f"{name!r} has {n_axes} axes, and not 1 to {_AXES}")
            shape = tuple(self.number() for _ in range(n_axes))[::-1]
            if math.prod(max(size, 1) for size in shape) > VALUES_LIMIT:
                raise self.problem(f"{name!r} claims the shape {shape}")
            found[name] = shape, self.number("<u4"), self.number()
        return found


def _alignment(fields: Mapping[str, Any], where: str) -> int:
    align = fields.get(_ALIGNMENT, 32)
    fits = isinstance(align, int) and 1 <= align <= TEXT_LIMIT
    if not fits or align & (align - 1):
        raise CorruptFileError(f"{where}: its alignment is {str(align)[:50]}")
    return align


def _up(place: int, align: int) -> int:
    return -(-place // align) * align


def _tensors(
    data: bytes,
    entries: Mapping[str, tuple[tuple[int, ...], int, int]],
    start: int,
    align: int,
    where: str,
) -> dict[str, np.ndarray]:
    """Returns the tensors by name, which fill the file but for the alignment."""
    found, end = {}, 0
    for name, (shape, kind, offset) in sorted(entries.items(), key=lambda e: e[1][2]):
        dtype, size = _DTYPES[kind], math.prod(shape)
        if offset != _up(end, align):
            raise CorruptFileError(
                f"{where}: {name!r} begins at byte {offset:,} of the data, where "
                f"{_up(end, align):,} is next; holes and overlaps are not allowed"
            )
        end = offset + size * dtype.itemsize
        if start + end > len(data):
            raise CorruptFileError(
                f"{where}: {name!r} ends at byte {start + end:,}, and the file has "
                f"{len(data):,}"
            )
        values = np.frombuffer(data, dtype, size, start + offset)
        found[name] = values.reshape(shape)
    if entries and len(data) not in (start + end, start + _up(end, align)):
        raise CorruptFileError(
            f"{where}: its tensors end at byte {start + end:,} and it has {len(data):,}"
        )
    return {name: found[name] for name in sorted(found)}


# --- writing ---


def gguf_bytes(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """Returns a file, the same for the same fields and tensors.

    Args:
        fields: texts, floats, which are kept in 32 bits, and whole numbers.
        tensors: in float32, float16 or bfloat16, by name.

    Raises:
        AdapterError: if tensors have another dtype.
    """
    kinds = {dtype: kind for kind, dtype in _DTYPES.items()}
    odd = [f"{n!r} ({t.dtype})" for n, t in tensors.items() if t.dtype not in kinds]
    if odd:
        raise AdapterError(
            f"GGUF has factors in float32, float16 and bfloat16, and not {odd[:5]}"
        )
    head = [MAGIC, struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(fields))]
    for name, value in fields.items():
        head += [_text(name), _value(value)]
    place, body = 0, []
    for name, tensor in sorted(tensors.items()):
        shape = tensor.shape[::-1]
        head += [_text(name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        head.append(struct.pack("<IQ", kinds[tensor.dtype], place))
        raw = np.ascontiguousarray(tensor).tobytes()
        body.append(raw + bytes(-len(raw) % 32))
        place += len(body[-1])
    start = b"".join(head)
    return b"".join([start, bytes(-len(start) % 32), *body])


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<II", _UINT32, value)

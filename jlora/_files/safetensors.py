"""Safetensors files: read with every claim checked, written the same at each run."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save as _serialize
from safetensors.numpy import save_file

from .._errors import AdapterError, CorruptFileError, NonFiniteError
from .untrusted import check_header, read_file

MAX_BYTES = 4 << 30

_DTYPES = {
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}


def read_tensors(
    file: Path, max_bytes: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors of a small file by name, sorted, and its metadata.

    Raises:
        AdapterError: if the file is not what it claims, or too large.
    """
    data, where = read_file(file, max_bytes), str(file)
    header = check_header(data, where)
    metadata = header.pop("__metadata__")
    odd = sorted({entry["dtype"] for entry in header.values()} - set(_DTYPES))
    if odd:
        raise AdapterError(f"{where} has tensors of {odd}; adapters are {[*_DTYPES]}")
    if not jax.config.read("jax_enable_x64"):
        wide = [name for name, entry in header.items() if entry["dtype"] == "F64"]
        if wide:
            raise AdapterError(
                f"{where} has float64 tensors, {wide[:3]}; enable `jax_enable_x64`"
            )
    try:
        found = dict(deserialize(data))  # in an order of its own at each run
    except SafetensorError as error:
        raise CorruptFileError(f"{where} cannot be read: {error}") from error
    arrays = {
        name: np.frombuffer(t["data"], _DTYPES[t["dtype"]]).reshape(t["shape"])
        for name, t in found.items()
    }
    return {name: arrays[name] for name in sorted(arrays)}, metadata


def file_bytes(
    tensors: Mapping[str, np.ndarray], metadata: Callable[..., dict[str, str]]
) -> bytes:
    """Returns a file, the same for the same tensors.

    Args:
        tensors: the tensors by name.
        metadata: gives the metadata, of the tensors as they are written.
    """
    # The library writes what memory holds, whatever the strides say.
    dense = {n: np.ascontiguousarray(t).reshape(t.shape) for n, t in tensors.items()}
    data = _serialize(dense, metadata=metadata(dense))
    # It also writes the metadata in an order of its own at each run.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))}
    packed = json.dumps(
        {**ordered, **header}, separators=(",", ":"), ensure_ascii=False
    )
    head = packed.encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + data[end:]


@dataclasses.dataclass(frozen=True)
class Raw:
    """A tensor that is copied, not read.

    Attributes:
        dtype: what safetensors calls its dtype.
        shape: its shape.
        data: its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


def write_weights(
    tensors: Mapping[str, Any], file: Path, raw: Mapping[str, Raw] | None = None
) -> None:
    """Writes the weights of a torch model, however large.

    Args:
        tensors: arrays by name.
        file: the file.
        raw: tensors of dtypes that NumPy has not.
    """
    # The library writes what memory holds, whatever the strides say.
    dense = {n: np.ascontiguousarray(t).reshape(t.shape) for n, t in tensors.items()}
    save_file(dense, file, metadata={"format": "pt"})
    if raw:
        _append(file, raw)


def _append(file: Path, raw: Mapping[str, Raw]) -> None:
    """Writes a file again with more tensors behind those that it has."""
    beside = file.with_name(f".{file.name}")
    with open(file, "rb") as old, open(beside, "wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        end = file.stat().st_size - old.tell()
        for name, tensor in sorted(raw.items()):
            start, end = end, end + tensor.data.size
            header[name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        new.write(len(head).to_bytes(8, "little") + head)
        shutil.copyfileobj(old, new, 1 << 24)
        for _, tensor in sorted(raw.items()):
            new.write(tensor.data.data)
    beside.replace(file)


def check_finite(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Raises if tensors have NaNs or infinities.

    Raises:
        NonFiniteError: with the name of each, and where its first is.
    """
    bad = []
    for name, tensor in tensors.items():
        wrong = ~np.isfinite(tensor)
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            bad.append(f"{name!r} has {int(wrong.sum())}, the first at {first}")
    if bad:
        raise NonFiniteError(
            f"{where} has values that are NaN or infinite: {'; '.join(bad[:10])}"
        )

"""The weights of a model: files of safetensors, of which the headers alone are read."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import AdapterError, CorruptFileError, UnsupportedFeatureError
from .safetensors import Raw
from .untrusted import (
    HEADER_LIMIT,
    check_header,
    check_regular,
    header_end,
    parse_json,
    read_file,
)

_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
    "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64,
    "F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float64,
    "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu, "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz, "C64": np.complex64,
}  # fmt: skip
# Several values share a byte; such tensors are copied, not read.
_SHARED = {"F4": jnp.float4_e2m1fn, "F6_E2M3": np.uint8, "F6_E3M2": np.uint8}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
PIPELINE = "model_index.json"  # of diffusers: each part of a model has its folder
CONFIG_LIMIT = 16 << 20  # bytes


class Weights(Mapping[str, np.ndarray]):
    """Tensors by name, each mapped from its file when it is asked for.

    Attributes:
        files: the names of the tensors in each file.
    """

    def __init__(self, files: Mapping[Path, Mapping[str, Any]]) -> None:
        """Takes the checked headers by file, see `open_weights`."""
        self._entries = {
            n: (file, e) for file, h in files.items() for n, e in h.items()
        }
        self.files = {file: tuple(header) for file, header in files.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a tensor; its values are read as they are used.

        Raises:
            UnsupportedFeatureError: if several of its values share a byte.
        """
        file, entry = self._entries[name]
        if entry["dtype"] in _SHARED:
            raise UnsupportedFeatureError(
                f"{file}: {name!r} is of {entry['dtype']}, of which jlora does not "
                "read the values"
            )
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if begin == end:
            return np.zeros(shape, dtype)
        return np.memmap(file, dtype, "r", entry["start"] + begin, tuple(shape))

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Returns how many tensors there are."""
        return len(self._entries)

    def shape(self, name: str) -> jax.ShapeDtypeStruct:
        """Returns the shape and the dtype of a tensor, from the header alone."""
        _, entry = self._entries[name]
        dtype = {**_DTYPES, **_SHARED}[entry["dtype"]]
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), dtype)

    def is_shared(self, name: str) -> bool:
        """Returns whether several values of a tensor share a byte."""
        return self._entries[name][1]["dtype"] in _SHARED

    def raw(self, name: str) -> Raw:
        """Returns a tensor as the bytes that it is."""
        file, entry = self._entries[name]
        begin, end = entry["data_offsets"]
        data = np.zeros(0, np.uint8)
        if end > begin:
            place = entry["start"] + begin
            data = np.memmap(file, np.uint8, "r", place, (end - begin,))
        return Raw(entry["dtype"], tuple(entry["shape"]), data)


def weights_of(place: Path) -> Weights:
    """Returns the tensors of a file, or of a model's folder, see `open_weights`."""
    files = model_files(place) if place.is_dir() else [place]
    if not files:
        raise FileNotFoundError(f"{place} has no *.safetensors")
    headers = {file: weights_header(file) for file in files}
    names = [name for header in headers.values() for name in header]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise AdapterError(f"{place}: several files have the tensors {twice[:5]}")
    return Weights(headers)


def parts_of(folder: Path) -> dict[str, Path]:
    """Returns the folders of a pipeline's parts that have weights; none of a model."""
    if not (folder / PIPELINE).is_file():
        return {}
    places = sorted(path for path in folder.iterdir() if path.is_dir())
    return {p.name: p for p in places if any(p.glob("*.safetensors"))}


def tensor_names(place: Path) -> list[str]:
    """Returns the names of a model's tensors; a pipeline's begin with their part's."""
    if parts := parts_of(place):
        return [f"{n}.{t}" for n, part in parts.items() for t in weights_of(part)]
    return list(weights_of(place))


def model_files(folder: Path) -> list[Path]:
    """Returns the files of a model's weights, in the order of their names."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    values = parse_json(read_file(index, HEADER_LIMIT), str(index), limit=HEADER_LIMIT)
    homes = values.get("weight_map") if isinstance(values, dict) else None
    if (
        not isinstance(homes, dict)
        or not homes
        or not all(map(_is_plain, homes.values()))
    ):
        raise CorruptFileError(
            f"{index} has no `weight_map` from tensors to files `*.safetensors` of its "
            "folder"
        )
    files = [folder / name for name in sorted(set(homes.values()))]
    if missing := [file.name for file in files if not file.exists()]:
        raise FileNotFoundError(f"{index} names files that are missing: {missing[:5]}")
    return files


def model_config(folder: Path) -> dict[str, Any]:
    """Returns what the `config.json` of a model says; nothing if there is none.

    Raises:
        CorruptFileError: if it holds no object.
    """
    file = folder / CONFIG
    if not file.exists():
        return {}
    # One of an image model names thousands of labels, and transformers writes NaN.
    data = read_file(file, CONFIG_LIMIT)
    values = parse_json(data, str(file), limit=CONFIG_LIMIT, strict=False)
    if not isinstance(values, dict):
        raise CorruptFileError(f"{file} holds no object")
    return values


def _is_plain(name: Any) -> bool:
    """Whether a value is the name of a file of weights, and no path elsewhere."""
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        return False
    return not set(name) & set("/\\\0")


def keys_in(file: Path) -> list[str]:
    """Returns the names in a safetensors file; none if it is not one that is read."""
    if file.suffix != ".safetensors" or not file.is_file():
        return []
    try:
        return list(weights_header(file))
    except (AdapterError, OSError):
        return []


def weights_header(file: Path) -> dict[str, dict[str, Any]]:
    """Returns the checked header of a file, with where its tensors begin.

    Raises:
        AdapterError: if the file is not what it claims.
    """
    where, size = str(file), check_regular(file).stat().st_size
    with open(file, "rb") as opened:
        end = header_end(opened.read(8), where, size)
        opened.seek(0)
        header = check_header(opened.read(end), where, size)
    del header["__metadata__"]
    return {name: {**entry, "start": end} for name, entry in header.items()}

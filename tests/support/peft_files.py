"""Folders in PEFT's format made byte by byte, so that any byte of them can be wrong."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jlora
import jlora.peft
from jlora import LoraConfig
from jlora._peft.files import CONFIG, WEIGHTS

PREFIX = "base_model.model."
# The adapter of PEFT that these tests bend: two modules of rank 2.
RANK, ALPHA = 2, 6
SHAPES = {"q": (5, 7), "v": (5, 3)}
PARAMS = {"params": {n: {"kernel": np.ones(s, np.float32)} for n, s in SHAPES.items()}}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def model(params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """Uses both kernels."""
    return tuple(x @ params["params"][name]["kernel"] for name in SHAPES)


def tensors() -> dict[str, np.ndarray]:
    """The factors as torch has them, no two values alike."""
    shapes = {}
    for name, (fan_in, fan_out) in SHAPES.items():
        shapes[f"{PREFIX}{name}.lora_A.weight"] = (RANK, fan_in)
        shapes[f"{PREFIX}{name}.lora_B.weight"] = (fan_out, RANK)
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def layout(
    arrays: Mapping[str, np.ndarray], metadata: Any = None
) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file as a dict, and its data."""
    header: dict[str, Any] = {"__metadata__": metadata or {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        begin, data = len(data), data + array.tobytes()
        header[name] = {
            "dtype": DTYPES.get(array.dtype.name, array.dtype.name),
            "shape": list(array.shape),
            "data_offsets": [begin, len(data)],
        }
    return header, data


def pack(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of a header, as JSON or as bytes, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


def unpack(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a good safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def config(**changes: Any) -> dict[str, Any]:
    """What `adapter_config.json` says, with changes; `...` takes a field out."""
    values = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q", "v"],
    }
    return {k: v for k, v in {**values, **changes}.items() if v is not ...}


def encoded(value: Any) -> bytes:
    """JSON, unless it is bytes already."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def write(folder: Path, config_file: Any = None, weights: bytes | None = None) -> Path:
    """Writes both files as PEFT does, or those that are given."""
    folder.mkdir(parents=True, exist_ok=True)
    good = config() if config_file is None else config_file
    (folder / CONFIG).write_bytes(encoded(good))
    packed = pack(*layout(tensors())) if weights is None else weights
    (folder / WEIGHTS).write_bytes(packed)
    return folder


def written_by_jlora(folder: Path) -> Path:
    """Writes an adapter as jlora does: its modules differ in rank and in alpha."""
    configs = LoraConfig("q", rank=2, alpha=6.0), LoraConfig("v", rank=1, alpha=5.0)
    lora = jlora.lora(model, configs)
    adapter = lora.init(jax.random.key(0), PARAMS, np.ones((1, 5), np.float32))
    keys = iter(jax.random.split(jax.random.key(1), 8))
    filled = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), adapter)
    jlora.peft.save(folder, PARAMS, filled, configs)
    return folder

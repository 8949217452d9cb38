"""The files of a model, written with an adapter merged into its weights."""

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapter.merge import merge
from .._errors import NonFiniteError
from .._files.model_files import CONFIG, INDEX, SINGLE, Weights
from .._files.safetensors import write_weights
from .named_weights import Change
from .torch_base import Changes


def check_places(source: Path, target: Path) -> None:
    """Raises if a model is no folder, or something is where it is to be written."""
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} is there already; give another folder")
    if source.is_file():
        raise NotADirectoryError(
            f"{source} is a file, and a model is merged with all that is beside it; "
            f"give {source.parent}"
        )


# Weights, and indices of them: a folder may have the same ones in other formats.
_WEIGHT_FILES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth",
    ".gguf", ".h5", ".msgpack", ".onnx",
)  # fmt: skip


def copy_rest(source: Path, target: Path, taken: Collection[Path]) -> None:
    """Copies what is no weight: the config, the tokenizer, the index of `taken`."""
    for file in sorted(source.iterdir()):
        name = file.name.lower()
        is_index = name == INDEX and source / SINGLE not in taken
        if file.is_file() and (is_index or not name.endswith(_WEIGHT_FILES)):
            shutil.copyfile(file, target / file.name)


def write_merged(
    changes: Changes, folder: Path, progress: Callable[[int, int, str], None]
) -> None:
    """Writes the files one by one; of sums that overflow, all are looked for first.

    A tensor that is added is written beside the one whose values it begins with.

    Raises:
        NonFiniteError: with every weight whose sum is too large for its dtype.
    """
    weights, added = changes.weights.weights, changes.weights.added
    named, done, bad = changes.weights, 0, []
    by_name = named.changes(changes.entries)
    for file, names in weights.files.items():
        raw = {name: weights.raw(name) for name in names if weights.is_shared(name)}
        read = [name for name in names if name not in raw]
        tensors = {name: np.asarray(named.read(name)) for name in read}
        tensors |= {n: tensors[like] for n, like in added.items() if like in tensors}
        own = {n: by_name[n] for n in tensors if n in by_name}
        merged = _merged(tensors, own) if own else tensors
        bad += [p for n in own if (p := _overflow(n, tensors[n], merged[n]))]
        if not bad:
            write_weights(merged, folder / file.name, raw)
            _index(merged, weights, folder, file.name)
        done += len(names)
        progress(done, len(weights), file.name)
    if bad:
        raise NonFiniteError(
            f"merged, these weights are too large for their dtype: {'; '.join(bad)}. "
            "Merge into weights of a wider one, such as bfloat16 or float32"
        )
    if changes.config is not None:
        _write_json(dict(changes.config), folder / CONFIG)


def _index(
    tensors: Mapping[str, np.ndarray], old: Weights, folder: Path, file: str
) -> None:
    """Names the tensors of a file that are new in the index of a model."""
    new = [name for name in tensors if name not in old]
    more = sum(t.nbytes - _bytes(old, name) for name, t in tensors.items())
    if not (new or more) or not (folder / INDEX).exists():
        return
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["weight_map"] = dict(
        sorted({**index["weight_map"], **dict.fromkeys(new, file)}.items())
    )
    about = index.get("metadata")
    if isinstance(about, dict) and isinstance(about.get("total_size"), int):
        about["total_size"] += more
    _write_json(index, folder / INDEX)


def _bytes(weights: Weights, name: str) -> int:
    if name not in weights:
        return 0
    shape = weights.shape(name)
    return math.prod(shape.shape) * np.dtype(shape.dtype).itemsize


def _write_json(values: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _merged(
    tensors: Mapping[str, np.ndarray], own: Mapping[str, Sequence[Change]]
) -> dict[str, np.ndarray]:
    wide = any(tensors[name].dtype == np.float64 for name in own)
    # JAX would round the weight itself to float32 otherwise.
    with jax.enable_x64(wide or jax.config.read("jax_enable_x64")):
        new = {name: _changed(name, tensors[name], own[name]) for name in own}
    return {**tensors, **new}


def _changed(name: str, tensor: np.ndarray, changes: Sequence[Change]) -> np.ndarray:
    """Returns a tensor with some entries merged, each into its rows."""
    new = np.array(tensor)
    for rows, entry in changes:
        entries = {name: jax.tree.map(jnp.asarray, entry)}
        new[rows] = merge({name: new[rows]}, entries)[name]
    return new


def _overflow(name: str, before: np.ndarray, after: np.ndarray) -> str | None:
    """Returns what to say of a weight that was finite before the sum and is not now."""
    lost = ~np.isfinite(after) & np.isfinite(before)
    if not lost.any():
        return None
    first = tuple(int(i) for i in np.argwhere(lost)[0])
    return f"{name!r} ({after.dtype}) has {int(lost.sum())}, the first at {first}"

"""The weights of a Hugging Face model: a folder of safetensors, read and merged.

A second door to safetensors. `open_weights` gives a torch model's tensors by name
without reading them all, as `jlora.peft.params_from_torch` takes them; `merge_folder`
adds an adapter into such a folder, one file at a time.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._adapter.merge import merge
from ._errors import (
    AdapterError,
    CorruptFileError,
    NonFiniteError,
    UnsupportedFeatureError,
)
from ._files.safetensors import write_weights
from ._files.untrusted import (
    HEADER_LIMIT,
    check_header,
    check_regular,
    header_end,
    parse_json,
    read_file,
)
from ._params.axes import KernelAxes
from ._peft.files import read_files
from ._peft.read import AdapterFiles, adapter_of
from ._torch.modules import TorchModule
from ._torch.named_params import Base
from ._torch.names import Rule

_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
    "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64,
    "F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float64,
    "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
}  # fmt: skip
# Of these a weight can take a sum; the others are codes, or too coarse for one.
_SUMMED = frozenset(np.dtype(_DTYPES[name]) for name in ("F16", "BF16", "F32", "F64"))

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


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
        """Returns a tensor; its values are read as they are used."""
        file, entry = self._entries[name]
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
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), _DTYPES[entry["dtype"]])


def open_weights(path: Any) -> Weights:
    """Returns the tensors of a safetensors file, or of a model's folder, by name.

    A folder's are those that transformers loads, of `model.safetensors` or else of the
    files that its index names, and without either those of every file. What else lies
    there, such as Mistral's `consolidated.safetensors`, the same weights under other
    names, is left. Only the headers are read, and every claim in them is checked.

    Args:
        path: the file or the folder.

    Raises:
        FileNotFoundError: if there is none, or one that the index names is missing.
        UnsafeFormatError: if a file is a link or none of a file system's.
        CorruptFileError: if a header or the index is not what the format allows.
        AdapterError: if two files have a tensor of the same name.
    """
    place = Path(path)
    files = _model_files(place) if place.is_dir() else [place]
    if not files:
        raise FileNotFoundError(f"{place} has no *.safetensors")
    headers = {file: _header(file) for file in files}
    names = [name for header in headers.values() for name in header]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise AdapterError(f"{place}: several files have the tensors {twice[:5]}")
    return Weights(headers)


def _model_files(folder: Path) -> list[Path]:
    """Returns the files of a model's weights, in the order of their names."""
    single, index = folder / _SINGLE, folder / _INDEX
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


def _is_plain(name: Any) -> bool:
    """Whether a value is the name of a file of weights, and no path elsewhere."""
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        return False
    return not set(name) & set("/\\\0")


def _header(file: Path) -> dict[str, dict[str, Any]]:
    where, size = str(file), check_regular(file).stat().st_size
    with open(file, "rb") as opened:
        end = header_end(opened.read(8), where, size)
        opened.seek(0)
        header = check_header(opened.read(end), where, size)
    del header["__metadata__"]
    return {name: {**entry, "start": end} for name, entry in header.items()}


# --- merging ---


def merge_folder(
    base: Any,
    adapter: Any,
    out: Any,
    *,
    ignore: Collection[str] = (),
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> None:
    """Writes a Hugging Face model with a PEFT adapter merged into its weights.

    Each sum is formed in float32 (or the dtype of the weight, if wider) and rounded
    once to the dtype of the weight. Files are written one after the other, under the
    names of the base, with the other files of its folder, but for weights that
    `open_weights` does not take and their indices: they would not be merged. `out`
    appears when it is complete.

    Args:
        base: the folder of the model.
        adapter: the folder of the adapter.
        out: the folder to write, which must not exist.
        ignore: fields of the adapter's config to do without, as for `jlora.peft.load`.
        progress: called with the number of tensors written, of all, and the file.

    Raises:
        FileExistsError: if `out` exists.
        NotADirectoryError: if `base` is one file of a model.
        UnsupportedFeatureError: if weights that change are quantised: of another dtype
            than float16, bfloat16, float32 or float64. All are named.
        NonFiniteError: if sums are too large for the dtype of their weight. All are
            named.
        AdapterError: if the adapter does not fit the weights, or cannot be read.
    """
    source, target = Path(base), Path(out)
    _check_places(source, target)
    weights = open_weights(source)
    files = read_files(adapter, ignore=ignore)
    entries = adapter_of(files, torch_base(weights, files))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        _copy_rest(source, beside, weights.files)
        _write_merged(weights, entries, beside, progress)
        beside.chmod(0o755)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_places(source: Path, target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} is there already; give another folder")
    if source.is_file():
        raise NotADirectoryError(
            f"{source} is a file, and a model is merged with all that is beside it; "
            f"give {source.parent}"
        )


def torch_base(weights: Weights, files: AdapterFiles) -> Base:
    """Returns the weights as params under torch's own names and layouts.

    A weight is `(out, in, *window)` then, a table `(rows, features)`.

    Raises:
        UnsupportedFeatureError: if weights that the adapter changes are quantised.
        AdapterError: if the config selects weights that the file has no factors for.
    """
    # PEFT writes an adapted table along, which must be that of the base.
    copied = any(name.endswith(".base_layer.weight") for name in files.whole)
    tables = {f"{m}.weight" for m, t in files.modules.items() if t.is_table and copied}
    # `lora_bias` is added to the module's own bias.
    biases = {f"{m}.bias" for m in files.modules if files.config.lora_bias}
    leaves: dict[str, Any] = {
        name: weights[name] if name in tables | biases else weights.shape(name)
        for name in weights
    }
    _check_summed(leaves, files)
    _check_complete(leaves, files)
    chosen = files.config.selects_parameter
    rules, axes = [], {}
    for module, tensors in files.modules.items():
        name = module.replace(".base_layer.", ".")
        for leaf, step in _WEIGHTS.items():
            weight = f"{name}.{leaf}"
            if weight in leaves and not chosen(weight):
                steps = _steps(tensors, leaves, files)
                rules.append(Rule(re.escape(weight), name, f"{step}+{steps}"))
                axes[weight] = _axes(tensors, len(leaves[weight].shape), files)
    for name, fitting in _parameter_axes(leaves, files).items():
        rules.append(Rule(re.escape(name), name, "experts+same"))
        axes[name] = fitting
    rules.append(Rule(r"(?P<name>.*)", "{name}", "parameter"))
    return Base.of(leaves, rules, axes)


_WEIGHTS = {"weight": "same", "in_proj_weight": "mha"}


def _parameter_axes(
    leaves: Mapping[str, Any], files: AdapterFiles
) -> dict[str, KernelAxes]:
    """Returns the roles of the axes of adapted parameters, in the order of wrapping.

    Torch's modules define the input of a feed-forward layer before its output; whether
    experts are kept as `(experts, out, in)` or as `(experts, in, out)`, their factors
    tell, which are `(E·rank, in)` and `(out, rank·E)`.
    """
    named = [name for name in leaves if files.config.selects_parameter(name)]
    found = {}
    for name in sorted(named, key=lambda name: (name.endswith("down_proj"), name)):
        shape = leaves[name].shape
        owner = name.rpartition(".")[0]
        fans = {
            (tensors.a.shape[0], tensors.b.shape[1])
            for module, tensors in files.modules.items()
            if module.split(".base_layer")[0] == owner
        }
        batch = (0,) if len(shape) == 3 else ()
        plain = KernelAxes(batch, (len(batch) + 1,), (len(batch),))
        turned = KernelAxes(plain.batch, plain.out, plain.in_)
        fits = plain.fans(shape) in fans or turned.fans(shape) not in fans
        found[name] = plain if fits else turned
    return found


def _check_summed(leaves: Mapping[str, Any], files: AdapterFiles) -> None:
    """Raises if the adapter changes weights that are no plain numbers."""
    own = {module.replace(".base_layer.", ".") for module in files.modules}
    saved = {name.replace(".base_layer.", ".") for name in files.whole}
    beside = {"bias": "same"} if files.config.lora_bias else {}
    changed = saved | {f"{name}.{leaf}" for name in own for leaf in _WEIGHTS | beside}
    found = [
        f"{name!r} ({np.dtype(leaf.dtype).name})"
        for name, leaf in leaves.items()
        if name in changed or files.config.selects_parameter(name)
        if leaf.dtype not in _SUMMED
    ]
    if found:
        raise UnsupportedFeatureError(
            f"{files.where} cannot be merged into the quantised {', '.join(found)}: "
            "W + ΔW is not of their values. Merge into the float16, bfloat16, float32 "
            "or float64 weights that were quantised"
        )


def _check_complete(leaves: Mapping[str, Any], files: AdapterFiles) -> None:
    """Raises if the config selects weights that the file has no factors for."""
    config, present = files.config, {m.split(".base_layer")[0] for m in files.modules}
    saved = {name.rpartition(".")[0] for name in files.whole}
    missing = [
        module
        for name, leaf in leaves.items()
        if len(leaf.shape) > 1 and (module := name.removesuffix(".weight")) != name
        if config.selects(module) and module not in present | saved
    ]
    if missing and not config.all_linear:
        raise AdapterError(
            f"{files.where}: the config selects {missing[:5]}, and the file has no "
            "factors for them"
        )


def _steps(tensors: TorchModule, leaves: Mapping[str, Any], files: AdapterFiles) -> str:
    if not tensors.is_table:
        return "same"
    heads = [
        module
        for module, other in files.modules.items()
        if f"{module}.weight" not in leaves and other.a.shape == tensors.b.T.shape
    ]
    tied = files.config.ensure_weight_tying and heads
    return f"embedding+tied({heads[0]})" if tied else "embedding"


def _axes(tensors: TorchModule, ndim: int, files: AdapterFiles) -> KernelAxes:
    turned = files.fan_in_fan_out and not tensors.window
    if tensors.is_table or turned:
        return KernelAxes((), (0,), (1,))
    return KernelAxes((), tuple(range(1, ndim)), (0,))


# Weights, and indices of them: a folder may have the same ones in other formats.
_WEIGHT_FILES = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth",
    ".gguf", ".h5", ".msgpack", ".onnx",
)  # fmt: skip


def _copy_rest(source: Path, target: Path, taken: Collection[Path]) -> None:
    """Copies what is no weight: the config, the tokenizer, the index of `taken`."""
    for file in sorted(source.iterdir()):
        name = file.name.lower()
        is_index = name == _INDEX and source / _SINGLE not in taken
        if file.is_file() and (is_index or not name.endswith(_WEIGHT_FILES)):
            shutil.copyfile(file, target / file.name)


def _write_merged(
    weights: Weights,
    entries: Mapping[str, Any],
    folder: Path,
    progress: Callable[[int, int, str], None],
) -> None:
    """Writes the files one by one; of sums that overflow, all are looked for first.

    Raises:
        NonFiniteError: with every weight whose sum is too large for its dtype.
    """
    done, bad = 0, []
    for file, names in weights.files.items():
        tensors = {name: np.asarray(weights[name]) for name in names}
        own = {name: entries[name] for name in names if name in entries}
        merged = _merged(tensors, own) if own else tensors
        bad += [p for n in own if (p := _overflow(n, tensors[n], merged[n]))]
        if not bad:
            write_weights(merged, folder / file.name)
        done += len(names)
        progress(done, len(weights), file.name)
    if bad:
        raise NonFiniteError(
            f"merged, these weights are too large for their dtype: {'; '.join(bad)}. "
            "Merge into weights of a wider one, such as bfloat16 or float32"
        )


def _merged(tensors: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    wide = any(tensors[name].dtype == np.float64 for name in own)
    # JAX would round the weight itself to float32 otherwise.
    with jax.enable_x64(wide or jax.config.read("jax_enable_x64")):
        return merge(dict(tensors), jax.tree.map(jnp.asarray, dict(own)))


def _overflow(name: str, before: np.ndarray, after: np.ndarray) -> str | None:
    """Returns what to say of a weight that was finite before the sum and is not now."""
    lost = ~np.isfinite(after) & np.isfinite(before)
    if not lost.any():
        return None
    first = tuple(int(i) for i in np.argwhere(lost)[0])
    return f"{name!r} ({after.dtype}) has {int(lost.sum())}, the first at {first}"

"""Adapters in GGUF, as llama.cpp loads them, by the names of Hugging Face."""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import AdapterError, CorruptFileError, UnsupportedFeatureError
from .._files.atomic import write_files
from .._files.format import Format
from .._files.gguf import MAGIC, gguf_bytes, read_gguf
from .._files.model_files import model_config
from .._files.safetensors import MAX_BYTES, check_finite
from .._params.given import listed
from .._torch.alone import dropout_of, modules_alone, placed, scaling_of
from .._torch.keys import tensors_by_module
from .._torch.llama_cpp import (
    PERMUTED,
    architecture_of,
    is_rotated,
    reordered,
    text_config,
)
from .._torch.modules import TorchModule

# The modules of these architectures, among the many names that gguf's tables know.
_MODULE = re.compile(
    r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
    r"|model\.embed_tokens|lm_head"
)
_TABLE = "model.embed_tokens"
# gguf makes a table of all blocks, and no model has thousands.
_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,2})\.")
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,2})\.")
_ENDINGS = {"weight.lora_a": "a", "weight.lora_b": "b"}
_REFUSED = {"weight": "a weight that is trained whole"}
_ALPHA, _ARCHITECTURE = "adapter.lora.alpha", "general.architecture"
_TOKENS = "adapter.alora.invocation_tokens"


def holds(path: Path) -> bool:
    """Returns whether a path is a GGUF file, by its name or its first bytes."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _library() -> Any:
    """Returns the package that knows the names of tensors.

    Raises:
        ImportError: that says how to install it.
    """
    try:
        import gguf
    except ImportError as error:
        told = "files in GGUF need the package gguf: pip install gguf"
        raise ImportError(told) from error
    return gguf


# --- reading ---


def modules(
    path: Path, *, ignore: Sequence[str] = (), base: Any = None
) -> list[TorchModule]:
    """Returns the torch modules of a file.

    Args:
        path: the file.
        ignore: fields of the file to do without.
        base: the folder of the base, whose config has the numbers of heads. Without it
            the rows of queries and keys are in llama.cpp's order where that is another,
            see `told_in_part`.

    Raises:
        AdapterError: if the file is no adapter, contradicts itself, or is for another
            architecture than the base.
        UnsupportedFeatureError: if it has what jlora has not: quantised factors, …
    """
    architecture, found = _unnamed(path, ignore)
    if architecture not in PERMUTED:
        return found
    names = _torch_names(architecture, [module.name for module in found], str(path))
    found = [dataclasses.replace(m, name=names[m.name]) for m in found]
    heads = None if base is None else _config(Path(base), architecture)
    return [reordered(m, architecture, heads, np.argsort) for m in found]


def _unnamed(path: Path, ignore: Sequence[str]) -> tuple[str, list[TorchModule]]:
    """Returns the architecture, and the modules under GGUF's names."""
    where = str(path)
    types = {kind.value: kind.name for kind in _library().GGMLQuantizationType}
    fields, tensors = read_gguf(path, MAX_BYTES, types)
    kinds = (fields.get("general.type"), fields.get("adapter.type"))
    if kinds != ("adapter", "lora"):
        raise AdapterError(
            f"{where} is no LoRA adapter: `general.type` and `adapter.type` are "
            f"{str(kinds)[:100]}, and not ('adapter', 'lora')"
        )
    if _TOKENS in fields and _TOKENS not in ignore:
        raise UnsupportedFeatureError(
            f"{where} acts behind some tokens alone, `{_TOKENS}`, which jlora has not; "
            f"--ignore {_TOKENS} does without"
        )
    architecture, alpha = fields.get(_ARCHITECTURE), fields.get(_ALPHA, 0.0)
    if not isinstance(architecture, str) or not isinstance(alpha, float):
        told = {_ARCHITECTURE: architecture, _ALPHA: alpha}
        raise CorruptFileError(f"{where}: its fields are {str(told)[:200]}")
    check_finite(tensors, where)
    if packed := [name for name, tensor in tensors.items() if tensor.ndim > 2]:
        raise UnsupportedFeatureError(
            f"{where} has factors of more than two axes, {packed[:5]}; jlora reads "
            "those of matrices, not of packed experts"
        )
    by_module = tensors_by_module(tensors, _ENDINGS, _REFUSED, where)
    return architecture, [_module(n, o, alpha, where) for n, o in by_module.items()]


def _module(
    name: str, own: Mapping[str, np.ndarray], alpha: float, where: str
) -> TorchModule:
    """Returns a module; without an alpha, or one of 0, its scaling is 1."""
    a, b = own["a"], own["b"]
    is_table = name == "token_embd"  # whose `lora_a` is (rows, rank)
    module = TorchModule.of_torch(name, a.T if is_table else a, b, is_table=is_table)
    module.check_ranks()
    scaling = scaling_of(alpha, module, where) if alpha else 1.0
    return dataclasses.replace(module, scaling=scaling)


def _torch_names(architecture: str, names: Sequence[str], where: str) -> dict[str, str]:
    """Returns the names of modules at Hugging Face by those in GGUF.

    Raises:
        UnsupportedFeatureError: with every tensor that is none of these modules.
    """
    known: dict[str, list[str]] = defaultdict(list)
    for torch, (_, own) in _table(architecture, names, _BLOCK).items():
        if _MODULE.fullmatch(torch):
            known[own].append(torch)
    if odd := [f"{name}.weight" for name in names if len(known[name]) != 1]:
        raise UnsupportedFeatureError(
            f"{where} adapts {odd[:5]}, which are no attention's or feed-forward "
            f"layer's matrices, tables or heads of the architecture {architecture!r}"
        )
    return {name: known[name][0] for name in names}


def _table(
    architecture: str, names: Iterable[str], layer: re.Pattern[str]
) -> Mapping[str, tuple[Any, str]]:
    """Returns gguf's own table, from names of many libraries to those in GGUF."""
    gguf = _library()
    layers = [int(match[1]) for name in names if (match := layer.match(name))]
    (kind,) = [k for k, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture]
    return gguf.get_tensor_name_map(kind, max(layers, default=0) + 1).mapping


def _config(base: Path, architecture: str | None) -> Mapping[str, Any]:
    """Returns the config of a base, if it is of an architecture.

    Raises:
        AdapterError: if it is of another.
    """
    config = text_config(model_config(base))
    if architecture is not None and architecture_of(config) != architecture:
        raise AdapterError(
            f"{base} has `model_type` {str(config.get('model_type'))[:50]!r}, and the "
            f"adapter is for {architecture!r}"
        )
    return config


# --- the format ---


def read(
    path: Path,
    *,
    ignore: Sequence[str] = (),
    names: str | None = None,
    params: Mapping[str, tuple[int, ...]] | None = None,
    base: Any = None,
) -> tuple[Any, dict[str, Any]]:
    """Returns the configs and the adapter of a file.

    Args:
        path: the file.
        ignore: as for `modules`.
        names: as for `_formats.peft.read`.
        params: likewise.
        base: as for `modules`.

    Raises:
        AdapterError: as `modules`, or if the modules do not fit the params.
        UnsupportedFeatureError: if they have a place, and their rows are not known.
    """
    found = modules(path, ignore=ignore, base=base)
    if params is not None and base is None:
        if told := told_in_part(path, ignore=ignore):
            raise UnsupportedFeatureError(told)
    return placed(found, str(path), names, params)


def told_in_part(path: Path, *, ignore: Sequence[str] = ()) -> str | None:
    """Returns what a file does not tell of an adapter without its base."""
    architecture, found = _unnamed(path, ignore)
    if architecture not in PERMUTED:
        return (
            f"{path} is for the architecture {architecture[:50]!r}: which modules and "
            f"rows its tensors are jlora knows of {[*PERMUTED]} alone"
        )
    names = _torch_names(architecture, [module.name for module in found], str(path))
    if rotated := [n for n in names.values() if is_rotated(n, architecture)]:
        return (
            f"{path}: llama.cpp has the rows of queries and keys, {rotated[:2]}, in "
            "another order, which depends on the number of heads: give the folder of "
            "the base with its config.json, --base FOLDER"
        )
    return None


def write(
    path: Path,
    adapter: Mapping[str, Any],
    configs: Any,
    *,
    overwrite: bool = False,
    architecture: str | None = None,
    base: Any = None,
    convolutions: bool = False,
) -> None:
    """Writes a file.

    Args:
        path: the file.
        adapter: the entries by path.
        configs: not needed: the factors have scalings.
        overwrite: whether a file that is there may be replaced.
        architecture: llama.cpp's name of the model; by default that of the base.
        base: the folder of the base with its config, for the number of heads.
        convolutions: whether kernels of several input axes are those of convolutions.

    Raises:
        ValueError: if neither the architecture nor a base is given.
        UnsupportedFeatureError: if the format has no place for the adapter.
        AdapterError: if the base is of another architecture, or the rows of queries and
            keys are reordered and it is not given.
    """
    del configs
    if architecture is None and base is None:
        raise ValueError(
            "GGUF names the architecture of the base: give its folder, --base FOLDER, "
            f"or --architecture, one of {[*PERMUTED]}"
        )
    heads = None if base is None else _config(Path(base), architecture)
    architecture = (
        architecture_of(heads or {}) if architecture is None else architecture
    )
    if architecture not in PERMUTED:
        raise UnsupportedFeatureError(
            f"of the architecture {architecture!r} jlora does not know which rows "
            f"llama.cpp reorders; it is none of {[*PERMUTED]}"
        )
    found = modules_alone(adapter, convolutions=convolutions)
    names = _gguf_names(architecture, found)
    rotated = [m.name for m in found if is_rotated(m.name, architecture)]
    if rotated and heads is None:
        raise AdapterError(
            f"llama.cpp has the rows of {rotated[:2]} in another order, which depends "
            "on the number of heads: give the folder of the base, --base FOLDER"
        )
    alpha, found = _one_alpha(found)
    tensors: dict[str, np.ndarray] = {}
    for module in found:
        module = reordered(module, architecture, heads, lambda order: order)
        name = names[module.name]
        a = module.lora_a.T if module.is_table else module.lora_a
        tensors |= {f"{name}.weight.lora_a": a, f"{name}.weight.lora_b": module.lora_b}
    fields = {_ARCHITECTURE: architecture, "general.type": "adapter"}
    fields |= {"adapter.type": "lora", _ALPHA: alpha}
    write_files(
        path.parent, {path.name: gguf_bytes(fields, tensors)}, overwrite=overwrite
    )


def _gguf_names(architecture: str, found: Sequence[TorchModule]) -> dict[str, str]:
    """Returns GGUF's names of modules.

    Raises:
        UnsupportedFeatureError: with every module that it has no name for.
    """
    names = [module.name for module in found]
    table = _table(architecture, names, _LAYER)
    known = {n: table[n][1] for n in names if n in table and _MODULE.fullmatch(n)}
    odd = [m.name for m in found if m.name not in known]
    odd += [
        m.name for m in found if m.is_table != (m.name == _TABLE) and m.name in known
    ]
    if odd:
        raise UnsupportedFeatureError(
            f"GGUF's {architecture!r} has no place for factors of "
            f"{listed([repr(name) for name in odd])}\nThe modules are called as at "
            "Hugging Face: model.layers.0.self_attn.q_proj, …"
        )
    return known


def _one_alpha(found: Sequence[TorchModule]) -> tuple[float, list[TorchModule]]:
    """Returns the alpha of most modules, and all with it; `b` takes the difference."""
    alphas = Counter(float(np.float32(m.scaling * m.rank)) for m in found)
    (alpha, _), *_ = alphas.most_common()
    return alpha, [module.scaled_to(alpha / module.rank) for module in found]


FORMAT = Format(
    "GGUF",
    holds,
    read,
    write,
    suffix=".gguf",
    options=("architecture", "base", "convolutions"),
    placing=("names", "params", "base"),
    told_in_part=told_in_part,
    of_torch=True,
    modules=modules,
    dropped=dropout_of,
)

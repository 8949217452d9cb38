"""Diffusers' `pytorch_lora_weights.safetensors`: factors of a pipeline's parts."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import AdapterError, CorruptFileError, UnsupportedFeatureError
from .._files.atomic import write_files
from .._files.format import Format
from .._files.model_files import keys_in
from .._files.safetensors import MAX_BYTES, check_finite, file_bytes, read_tensors
from .._files.untrusted import parse_json
from .._peft.config import PeftConfig, exact_keys, exact_names
from .._peft.config_file import config_json, parse_config
from .._peft.keys import PREFIX
from .._torch.alone import dropout_of, modules_alone, placed
from .._torch.keys import has_endings, tensors_by_module
from .._torch.modules import TorchModule

NAME = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
# What keys end with: convolutions, and attentions of the unet and the text encoders.
_ENDINGS = {
    "lora_A.weight": "a", "lora_B.weight": "b",
    "lora.down.weight": "a", "lora.up.weight": "b",
    "lora_linear_layer.down.weight": "a", "lora_linear_layer.up.weight": "b",
}  # fmt: skip
_REFUSED = {
    "lora_magnitude_vector": "DoRA's magnitude",
    "lora_magnitude_vector.weight": "DoRA's magnitude",
    "lora_B.bias": "a bias of `lora_B`",
    "lora_embedding_A": "a table",
    "lora_embedding_B": "a table",
    **{
        f"{name}_lora.{side}.weight": "the names of old releases; load and save it anew"
        for name in ("to_q", "to_k", "to_v", "to_out")
        for side in ("down", "up")
    },
}
_PART = re.compile(r"(?:unet|transformer|text_encoder|prior|controlnet)(?:_\d)?")


def holds(path: Path) -> bool:
    """Returns whether a path is a file with diffusers' keys, or a folder of one."""
    keys = keys_in(_file(path))
    own = [key for key in keys if not key.startswith(PREFIX)]
    return has_endings(own, _ENDINGS) and len(own) == len(keys)


def _file(path: Path) -> Path:
    return path / NAME if path.is_dir() else path


def modules(
    path: Path, *, ignore: Sequence[str] = (), base: Any = None
) -> list[TorchModule]:
    """Returns the torch modules of a file, whose names begin with their part's.

    Args:
        path: the file, or its folder.
        ignore: fields of the configs in its metadata to do without.
        base: not needed: the names are in the file.

    Raises:
        AdapterError: if the file contradicts itself, or has what jlora has not.
    """
    del base
    file = _file(path)
    tensors, metadata = read_tensors(file, MAX_BYTES)
    check_finite(tensors, str(file))
    kinds = tensors_by_module(tensors, _ENDINGS, _REFUSED, str(file))
    configs = _configs(metadata, str(file), ignore)
    found = [TorchModule.of_torch(n, own["a"], own["b"]) for n, own in kinds.items()]
    return [_scaled(module, configs, str(file)) for module in found]


def _configs(
    metadata: Mapping[str, str], where: str, ignore: Sequence[str]
) -> dict[str, PeftConfig]:
    """Returns PEFT's config of each part; "" is that of a model that is none."""
    if METADATA not in metadata:
        return {}
    where = f"`{METADATA}` of {where}"
    values = parse_json(metadata[METADATA].encode(), where)
    if not isinstance(values, dict):
        raise CorruptFileError(f"{where} holds no object")
    by_part: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        part, _, field = key.rpartition(".")
        by_part.setdefault(part, {})[field] = value
    configs = {p: parse_config(v, where, ignore) for p, v in by_part.items()}
    if dora := [part for part, config in configs.items() if config.use_dora]:
        raise UnsupportedFeatureError(f"{where}: {dora} have DoRA, which jlora has not")
    return configs


def _scaled(
    module: TorchModule, configs: Mapping[str, PeftConfig], where: str
) -> TorchModule:
    """Returns a module with what its config says; without one alpha is the rank."""
    module.check_ranks()
    part, _, name = module.name.partition(".")
    config, name = (configs[part], name) if part in configs else ("", module.name)
    config = config or configs.get("")
    if config is None:
        return module
    rank = config.rank(name)
    if rank != module.rank and not config.decided_by_keys("r", "rank_pattern"):
        raise AdapterError(
            f"{where}: {module.name!r} has factors of rank {module.rank}, and its "
            f"metadata says {rank}"
        )
    if not config.selects(name):
        raise AdapterError(
            f"{where}: {module.name!r} has factors, and its metadata does not select it"
        )
    return dataclasses.replace(module, scaling=config.scaling(name, module.rank))


def read(
    path: Path,
    *,
    ignore: Sequence[str] = (),
    names: str | None = None,
    params: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Returns the configs and the adapter of a file, see `_formats.peft.read`."""
    return placed(modules(path, ignore=ignore), str(path), names, params)


def write(
    path: Path,
    adapter: Mapping[str, Any],
    configs: Any,
    *,
    overwrite: bool = False,
    prefix: str | None = None,
    convolutions: bool = False,
) -> None:
    """Writes a file, with the configs in its metadata.

    Args:
        path: the file.
        adapter: the entries by path.
        configs: not needed: the factors have scalings.
        overwrite: whether a file that is there may be replaced.
        prefix: the part of the pipeline, if the names do not begin with it.
        convolutions: whether kernels of several input axes are those of convolutions.

    Raises:
        ValueError: if the part of the pipeline is not known.
        AdapterError: if the adapter holds more than factors of modules.
    """
    del configs
    found = modules_alone(adapter, convolutions=convolutions)
    if prefix is not None:
        found = [dataclasses.replace(m, name=f"{prefix}.{m.name}") for m in found]
    by_part: dict[str, list[TorchModule]] = {}
    for module in found:
        by_part.setdefault(module.name.partition(".")[0], []).append(module)
    if odd := [part for part in by_part if not _PART.fullmatch(part)]:
        raise ValueError(
            f"names in diffusers' files begin with a part of the pipeline, and "
            f"{odd[:5]} are none: say which it is, --prefix unet"
        )
    if tables := [module.name for module in found if module.is_table]:
        raise UnsupportedFeatureError(f"diffusers' files have no tables, {tables[:5]}")
    said = {k: v for part, own in by_part.items() for k, v in _said(part, own)}
    tensors = {f"{m.name}.lora_A.weight": m.lora_a for m in found}
    tensors |= {f"{m.name}.lora_B.weight": m.lora_b for m in found}
    metadata = {"format": "pt", METADATA: json.dumps(said, indent=2, sort_keys=True)}
    data = file_bytes(tensors, lambda dense: metadata)
    write_files(path.parent, {path.name: data}, overwrite=overwrite)


def _said(part: str, own: Sequence[TorchModule]) -> list[tuple[str, Any]]:
    """Returns the fields of a part's config."""
    ranks = {m.name.partition(".")[2]: m.rank for m in own}
    alphas = {m.name.partition(".")[2]: m.scaling * m.rank for m in own}
    (rank, _), *_ = Counter(ranks.values()).most_common()
    (alpha, _), *_ = Counter(alphas.values()).most_common()
    config = PeftConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=exact_keys({n: r for n, r in ranks.items() if r != rank}),
        alpha_pattern=exact_keys({n: a for n, a in alphas.items() if a != alpha}),
        target_modules=exact_names([*ranks], []),
    )
    values = json.loads(config_json(config))
    return [(f"{part}.{field}", value) for field, value in values.items()]


FORMAT = Format(
    "diffusers",
    holds,
    read,
    write,
    suffix=".safetensors",
    options=("prefix", "convolutions"),
    placing=("names", "params"),
    of_torch=True,
    modules=modules,
    dropped=dropout_of,
)

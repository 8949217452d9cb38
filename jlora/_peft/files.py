"""A folder in PEFT's format, read; and the bytes of its weights."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import AdapterError
from .._files.hub import fetch, repository_of
from .._files.model_files import weights_header
from .._files.safetensors import MAX_BYTES, check_finite, file_bytes, read_tensors
from .._files.untrusted import JSON_LIMIT, check_regular, parse_json, read_file
from .config_file import parse_config
from .digest import check_seal, seal_of
from .keys import sort_keys
from .read import AdapterFiles
from .relatives import as_lora, is_relative
from .rows import KEY
from .sides import version_of

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def read_files(
    path: Any,
    *,
    ignore: Collection[str] = (),
    allow_nonfinite: bool = False,
    max_bytes: int = MAX_BYTES,
    revision: str | None = None,
) -> AdapterFiles:
    """Returns what a PEFT folder holds, by the names of torch's modules.

    Args:
        path: the folder, one of its two files, or a repository, as for `load`.
        ignore: as for `load`.
        allow_nonfinite: as for `load`.
        max_bytes: as for `load`.
        revision: as for `load`.

    Raises:
        AdapterError: as `load`, but for what concerns the params.
    """
    folder, values = opened(local(path, revision, max_bytes=max_bytes))
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    kind = "LORA"
    if is_relative(values):
        kind = values["peft_type"]
        tensors, metadata = read_tensors(weights_file, max_bytes)
        values, tensors = as_lora(values, tensors, str(folder), max_bytes)
        config = parse_config(values, str(config_file), ignore)
    else:
        config = parse_config(values, str(config_file), ignore)
        tensors, metadata = read_tensors(weights_file, max_bytes)
    scalings = check_seal(metadata, tensors, config, str(folder))
    if not allow_nonfinite:
        check_finite(tensors, str(weights_file))
    modules, others = sort_keys(tensors, str(weights_file))
    rows = {n.removesuffix(KEY): t for n, t in others.items() if n.endswith(KEY)}
    whole = {name: t for name, t in others.items() if not name.endswith(KEY)}
    turned = values.get("fan_in_fan_out") is True
    return AdapterFiles(
        config,
        modules,
        whole,
        str(weights_file),
        turned,
        rows,
        scalings,
        version_of(values.get("peft_version")),
        kind=kind,
    )


def opened(path: Path) -> tuple[Path, Any]:
    """Returns the folder of an adapter, which has both files, and its parsed config.

    Args:
        path: the folder, or one of its two files.

    Raises:
        AdapterError: if it is neither, or the config is no JSON.
        FileNotFoundError: if a file is missing.
    """
    folder = _folder(path)
    _check_present(folder)
    config_file = folder / CONFIG
    text = read_file(config_file, JSON_LIMIT)
    return folder, parse_json(text, str(config_file))


def local(
    path: Any, revision: str | None = None, *, max_bytes: int = MAX_BYTES
) -> Path:
    """Returns the path of an adapter on disk; one of the Hub is fetched first.

    Args:
        path: a file or a folder, or a repository `owner/name`, as for `load`.
        revision: as for `load`.
        max_bytes: as for `load`.

    Raises:
        HubError: if a repository cannot be had.
        ValueError: if there is a revision of what is on disk.
    """
    repository = repository_of(path, revision)
    if repository is None:
        return Path(path)
    return fetch(repository, revision, {CONFIG: JSON_LIMIT, WEIGHTS: max_bytes})


def _folder(path: Path) -> Path:
    """Returns the folder; one of its files will do."""
    if path.name in (CONFIG, WEIGHTS):
        return path.parent
    if path.suffix and not path.is_dir():
        check_regular(path)  # says so if it is a pickle
        if path.suffix == ".safetensors":
            weights_header(path)  # says so if it is corrupt
        raise AdapterError(
            f"{path} is neither a folder nor one of its files {CONFIG} and {WEIGHTS}"
        )
    return path


def _check_present(folder: Path) -> None:
    missing = [n for n in (CONFIG, WEIGHTS) if not os.path.lexists(folder / n)]
    if WEIGHTS in missing:
        for other in sorted(folder.glob("adapter_model.*")):
            check_regular(other)  # says so if it is a pickle
    if missing:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}")


def weights_bytes(
    tensors: Mapping[str, np.ndarray], scalings: Mapping[str, float]
) -> bytes:
    """Returns the file of an adapter's tensors, sealed with the scalings."""
    sealed = lambda dense: {"format": "pt", "jlora": seal_of(dense, scalings)}
    return file_bytes(tensors, sealed)

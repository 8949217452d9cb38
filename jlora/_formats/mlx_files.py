"""The two files of an MLX adapter, `adapters.safetensors` and `adapter_config.json`.

A linear layer and a table have `lora_a (in, rank)` and `lora_b (rank, out)`, experts
`lora_a (experts, rank, in)` and `lora_b (experts, out, rank)`, and `m` is DoRA's
magnitude. One rank and one scale are said for all of them, and the scale is what the
product of both is multiplied by: it is not divided by the rank.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import AdapterError, CorruptFileError, UnsupportedFeatureError
from .._files.safetensors import MAX_BYTES, check_finite, read_tensors
from .._files.untrusted import JSON_LIMIT, check_regular, parse_json, read_file
from .._params.given import listed
from .._torch.modules import TorchModule

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
A, B, M = "lora_a", "lora_b", "m"

# The file does not tell a table from a linear layer: mlx-lm's models call them so.
TABLES = re.compile(
    r"embed|embed_in|embed_tokens|embed_tokens_per_layer|embeddings?|(tok|token|word)_"
    r"embeddings|position_embedding_table|wte|wpe"
)


@dataclasses.dataclass(frozen=True)
class MlxFiles:
    """What the two files of a folder hold.

    Attributes:
        modules: linear layers and tables.
        experts: packed experts by name, as `(experts, in, rank)` and `(experts, rank,
            out)`.
        rank: that of all.
        scaling: that of all.
        dora: whether there are magnitudes.
        where: the name of the file, for messages.
    """

    modules: Sequence[TorchModule]
    experts: Mapping[str, tuple[np.ndarray, np.ndarray]]
    rank: int
    scaling: float
    dora: bool
    where: str


def holds(path: Path) -> bool:
    """Returns whether a path is a folder of MLX's, or one of its two files."""
    if path.name == WEIGHTS:
        return True
    folder = path.parent if path.name == CONFIG else path
    other = folder / "adapter_model.safetensors"  # then the config is PEFT's
    return (folder / WEIGHTS).exists() and not other.exists()


def read_files(path: Path, ignore: Collection[str] = ()) -> MlxFiles:
    """Returns what a folder holds.

    Raises:
        FileNotFoundError: if one of its files is missing.
        AdapterError: if they are not what they claim, or contradict each other.
        UnsupportedFeatureError: if they hold something else than low-rank factors.
    """
    folder = path.parent if path.name in (CONFIG, WEIGHTS) else path
    for name in (WEIGHTS, CONFIG):
        check_regular(folder / name)
    kind, rank, scaling = _said(folder / CONFIG, ignore)
    tensors, _ = read_tensors(folder / WEIGHTS, MAX_BYTES)
    where = str(folder / WEIGHTS)
    check_finite(tensors, where)
    modules, experts, problems = [], {}, []
    for name, own in sorted(_by_module(tensors, where).items()):
        if problem := _problem(name, own, kind, rank):
            problems.append(f"{name!r} {problem}")
        elif own[A].ndim == 3:
            experts[name] = own[A].swapaxes(1, 2), own[B].swapaxes(1, 2)
        else:
            is_table = bool(TABLES.fullmatch(name.rpartition(".")[2]))
            modules.append(
                TorchModule(
                    name, own[A], own[B], scaling, own.get(M), is_table=is_table
                )
            )
    if problems:
        raise AdapterError(f"{where} and {CONFIG} do not fit:\n{listed(problems)}")
    return MlxFiles(modules, experts, rank, scaling, kind == "dora", where)


def _said(file: Path, ignore: Collection[str]) -> tuple[str, int, float]:
    """Returns the kind of fine-tuning, the rank and the scale that a config says."""
    values = parse_json(read_file(file, JSON_LIMIT), str(file))
    own = values.get("lora_parameters") if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(own, dict):
        raise CorruptFileError(
            f"{file} has no `lora_parameters`, an object with `rank` and `scale`, as "
            "mlx-lm writes it"
        )
    kind = values.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedFeatureError(
            f"{file} says that `fine_tune_type` is {str(kind)[:50]!r}; jlora reads the "
            "factors of 'lora' and 'dora'. Whole weights are loaded as those of a model"
        )
    rank, scale = _number(own.get("rank")), _number(own.get("scale"))
    if rank < 1 or rank != int(rank):
        raise CorruptFileError(f"{file}: `rank` is {str(own.get('rank'))[:50]}")
    if scale <= 0:
        raise CorruptFileError(
            f"{file}: `scale` is {str(own.get('scale'))[:50]}, and must be a positive "
            "number"
        )
    if "alpha" in own and "alpha" not in ignore:
        raise UnsupportedFeatureError(
            f"{file} has an `alpha`, {str(own['alpha'])[:50]}, beside its `scale`: "
            "mlx-lm up to 0.14.0 multiplies by scale·alpha/rank, and later ones by the "
            "scale alone. If one of these wrote it, leave the alpha out of account: "
            "`ignore=['alpha']`, or --ignore alpha; else put scale·alpha/rank there"
        )
    return kind, int(rank), scale


def _number(value: Any) -> float:
    """Returns a number of moderate size as it is, and -1 for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return -1.0
    return float(value) if 1e-30 < value < 1e30 else -1.0


def _by_module(
    tensors: Mapping[str, np.ndarray], where: str
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the tensors of each module by their kind."""
    found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    others = []
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        if kind in (A, B, M) and name:
            found[name][kind] = tensor
        else:
            others.append(key)
    if others:
        raise UnsupportedFeatureError(
            f"{where} has {others[:5]}, {len(others)} in all, which are none of "
            f"{A}, {B} and {M} of a module"
        )
    if not found:
        raise AdapterError(f"{where} has no factors")
    return found


def _problem(
    name: str, own: Mapping[str, np.ndarray], kind: str, rank: int
) -> str | None:
    """Returns what is wrong with the tensors of a module, if something is."""
    wanted = {A, B, M} if kind == "dora" else {A, B}
    if own.keys() != wanted:
        return f"has {sorted(own)}, and {kind!r} has {sorted(wanted)}"
    a, b = own[A], own[B]
    shapes = f"has factors of the shapes {a.shape} and {b.shape}"
    if not (a.ndim == b.ndim and a.ndim in (2, 3) and a.size and b.size):
        return f"{shapes}, which are those of no layer"
    ranks = {a.shape[1], b.shape[0] if b.ndim == 2 else b.shape[2]}
    if ranks != {rank} or (a.ndim == 3 and a.shape[0] != b.shape[0]):
        return f"{shapes}, and the rank is {rank}"
    if a.dtype != b.dtype:
        return f"has factors of the dtypes {a.dtype} and {b.dtype}"
    if kind != "dora":
        return None
    if a.ndim == 3 or TABLES.fullmatch(name.rpartition(".")[2]):
        return "has magnitudes of rows or of experts, which jlora's DoRA has not"
    if own[M].shape != b.shape[1:]:
        return f"has {M} of the shape {own[M].shape}, and {b.shape[1]} outputs"
    return None

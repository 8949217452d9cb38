"""MLX's folder, which mlx-lm trains and loads: read, written, and as PEFT's files.

The modules have the names of mlx-lm's model, which for most models are those of the
torch checkpoint. `mlx_files.py` says what its two files hold.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._adapter.config import LoraConfig
from .._errors import AdapterError, UnsupportedFeatureError
from .._files.atomic import write_files
from .._files.format import Format
from .._files.safetensors import check_finite, file_bytes
from .._params.axes import KernelAxes
from .._peft.config import PeftConfig
from .._peft.read import AdapterFiles
from .._peft.write import commonest
from .._torch.alone import ParamsAlone, base_given, modules_alone, path_of
from .._torch.assemble import factors_of
from .._torch.configs import configs_of
from .._torch.families import names as family_names
from .._torch.modules import TorchModule
from .._torch.named_params import Base
from .mlx_experts import EXPERTS, is_packed, named_in, of_entry, of_module, with_experts
from .mlx_files import CONFIG, WEIGHTS, A, B, M, MlxFiles, holds, read_files

Configs = LoraConfig | tuple[LoraConfig, ...]

# --- reading ---


def read(
    path: Path,
    *,
    ignore: Collection[str] = (),
    names: str | None = None,
    params: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Configs, dict[str, Any]]:
    """Returns the configs and the adapter of a folder, on the host.

    Args:
        path: the folder, or one of its files.
        ignore: "alpha", for files whose alpha is to be left out of account.
        names: the family whose names the modules have, for a model with `params`.
        params: the shapes of the leaves of the model by path; without them the paths
            are the names of the modules.

    Raises:
        AdapterError: if the files contradict themselves, or do not fit the params.
        ValueError: if there are names without params.
    """
    files = read_files(path, ignore)
    base = base_given(params, names)
    base = _alone(files) if base is None else with_experts(base, files.experts)
    modules = [*files.modules]
    for name in files.experts:
        modules += of_module(name, files)
    entries = factors_of(modules, base, files.where)
    return configs_of(entries, base), {**entries}


def _alone(files: MlxFiles) -> Base:
    """Returns the params that have the names of the file."""
    params = ParamsAlone()
    for module in files.modules:
        params.add_module(module, module.name)
    axes: dict[str, KernelAxes] = {}
    for name, (a, b) in files.experts.items():
        path, shape = path_of(name, "kernel"), (*a.shape[:2], b.shape[2])
        params.add(path, shape, a.dtype, name, "experts")
        axes[path] = EXPERTS
    return params.base(axes)


# --- writing ---


def write(
    path: Path,
    adapter: Mapping[str, Any],
    configs: Any,
    *,
    overwrite: bool = False,
    names: str | None = None,
) -> None:
    """Writes a folder that mlx-lm loads.

    There is one rank and one scale: smaller ranks are padded with zeros, and `b` takes
    the difference of scalings. Both leave the deltas as they are.

    Args:
        path: the folder.
        adapter: the entries by path.
        configs: those of the adapter.
        overwrite: whether an adapter that is there may be replaced.
        names: the family whose names the modules have in torch, and in mlx-lm.

    Raises:
        FileExistsError: if the folder holds PEFT's files, or others that may not be
            replaced.
        UnsupportedFeatureError: if the adapter has more than mlx-lm has a place for.
    """
    if (path / "adapter_model.safetensors").exists():
        raise FileExistsError(f"{path} has an adapter of PEFT; give another folder")
    packed = {p: e for p, e in adapter.items() if is_packed(p, e)}
    plain = {p: e for p, e in adapter.items() if p not in packed}
    rules = None if names is None else family_names(names)
    modules = modules_alone(plain, rules)
    _check_modules(modules, bool(packed))
    apart = {_name(path): of_entry(entry) for path, entry in sorted(packed.items())}
    every = [*modules, *(one for each in apart.values() for one in each)]
    if not every:
        raise AdapterError("the adapter cannot be saved: it is empty")
    scaling = commonest((one.scaling for one in every), 1.0)
    rank = max(one.rank for one in every)
    alike = lambda one: one.scaled_to(scaling).padded_to(rank)
    tensors: dict[str, np.ndarray] = {}
    for module in map(alike, modules):
        own = {A: module.a, B: module.b, M: module.magnitude}
        tensors |= {f"{module.name}.{k}": t for k, t in own.items() if t is not None}
    for name, each in apart.items():
        tensors[f"{name}.{A}"] = np.stack([alike(one).a.T for one in each])
        tensors[f"{name}.{B}"] = np.stack([alike(one).b.T for one in each])
    check_finite(tensors, "the adapter")
    several = (configs,) if isinstance(configs, LoraConfig) else tuple(configs)
    parameters = {
        "rank": rank,
        "scale": scaling,
        "dropout": max((config.dropout for config in several), default=0.0),
        # Whole names: what is in the last `num_layers` layers has others there.
        "keys": sorted([m.name for m in modules] + [*apart]),
    }
    kind = "dora" if any(m.magnitude is not None for m in modules) else "lora"
    values = {"fine_tune_type": kind, "num_layers": -1, "lora_parameters": parameters}
    data = file_bytes(tensors, lambda dense: {"format": "mlx"})
    text = json.dumps(values, indent=2, sort_keys=True).encode()
    files = {WEIGHTS: data, CONFIG: text}
    write_files(path, files, overwrite=overwrite)


def _name(path: str) -> str:
    return path.removeprefix("params/").removesuffix("/kernel").replace("/", ".")


def _check_modules(modules: Sequence[TorchModule], has_experts: bool) -> None:
    """Raises for what mlx-lm has no layer for.

    Raises:
        UnsupportedFeatureError: with the names.
    """
    magnitudes = [m.name for m in modules if m.magnitude is not None]
    plain = [m.name for m in modules if m.magnitude is None]
    tables = [m.name for m in modules if m.magnitude is not None and m.is_table]
    kinds = {
        "has no factors of convolutions": [m.name for m in modules if m.window],
        "packs experts under other names": [m.name for m in modules if m.is_parameter],
        "has a magnitude of each row of a table": tables,
        "has magnitudes of all modules or of none": (
            magnitudes if plain or has_experts else []
        ),
    }
    wrong = [f"{kind}: {names[:5]}" for kind, names in kinds.items() if names]
    if wrong:
        raise UnsupportedFeatureError(f"mlx-lm {'; it '.join(wrong)}")


# --- on the way to others ---


def lost(path: Path, target: str, *, ignore: Collection[str] = ()) -> str | None:
    """Returns what another format would not keep of a folder, if there is something."""
    if target != "PEFT":
        return None
    files = read_files(path, ignore)
    if files.experts:
        return (
            f"{path} adapts the experts {sorted(files.experts)[:3]}, and what torch "
            "calls these the base tells alone: merge the adapter into the model by "
            "python -m jlora merge, whichever names that has"
        )
    tables = [m.name for m in files.modules if m.is_table]
    if not tables:
        return None
    return (
        f"{path} adapts the table(s) {tables}: where a model ties its head to it, MLX "
        "adapts the head too, and PEFT the lookup alone. The files do not tell whether "
        "it does: merge the adapter into the model, which python -m jlora merge looks "
        "at, or convert it to a checkpoint (--to checkpoint) and save that by "
        '`jlora.peft.save` with the rule "embedding" or "tied(lm_head)" for the table'
    )


def as_peft(
    path: Path, ignore: Collection[str] = (), names: Collection[str] = ()
) -> AdapterFiles:
    """Returns a folder as the files of PEFT that mean the same.

    Args:
        path: the folder.
        ignore: as for `read`.
        names: those of the base's tensors, which tell what it calls its experts.

    Raises:
        UnsupportedFeatureError: if there are experts in what torch has no name for.
    """
    files = read_files(path, ignore)
    modules = {module.name: module for module in files.modules}
    modules |= {one.name: one for one in named_in(names, files)}
    config = PeftConfig(
        r=files.rank,
        lora_alpha=files.scaling * files.rank,
        use_dora=files.dora,
        target_modules=tuple(modules),
        ensure_weight_tying=True,  # the factors of a tied table act in the head
    )
    scalings = dict.fromkeys(modules, files.scaling)
    return AdapterFiles(config, modules, {}, files.where, scalings=scalings)


FORMAT = Format(
    "MLX",
    holds,
    read,
    write,
    options=("names",),
    placing=("names", "params"),
    lost=lost,
)

"""PEFT's folder without the params that it was made for, as far as it tells itself."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._adapter.config import LoraConfig
from .._errors import UnsupportedFeatureError
from .._files.format import Format
from .._files.patterns import ends_of
from .._peft.files import CONFIG, WEIGHTS, read_files
from .._peft.read import AdapterFiles, configured_adapter
from .._peft.save import save
from .._peft.sides import NO_VERSION
from .._torch.alone import (
    ParamsAlone,
    base_given,
    in_doubt,
    kernels_alone,
    path_of,
    rules_alone,
)
from .._torch.families import names as family_names
from .._torch.modules import TorchModule
from .._torch.names import Names
from .peft_relatives import shown
from .peft_whole import add_whole

Configs = LoraConfig | tuple[LoraConfig, ...]
_OF_MLX = "adapters.safetensors"
_BIASES = (".bias", ".base_layer.bias")
_NO_SHAPES = (
    "how many inputs a module has its files do not tell, nor whether it is a "
    "convolution"
)


def holds(path: Path) -> bool:
    """Returns whether a path is a folder of PEFT's, whole or not, or a file of one."""
    if path.name == WEIGHTS or any(path.glob("adapter_model.*")):
        return True
    folder = path.parent if path.name == CONFIG else path
    others = (folder / _OF_MLX).exists()  # then the config is MLX's
    return (path.name == CONFIG or (path / CONFIG).exists()) and not others


def read(
    path: Path,
    *,
    ignore: Sequence[str] = (),
    names: str | None = None,
    params: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Configs, dict[str, Any]]:
    """Returns the configs and the adapter of a folder, on the host.

    Args:
        path: the folder.
        ignore: fields of its config to do without.
        names: the family whose names the modules have, for a model with `params`.
        params: the shapes of the leaves of the model by path; without them the paths
            are torch's names.

    Raises:
        AdapterError: if the files contradict themselves, or do not fit the params.
        ValueError: if there are names without params.
    """
    files, base = read_files(path, ignore=ignore), base_given(params, names)
    if base is not None:
        return configured_adapter(files, base)
    if files.kind != "LORA":
        raise UnsupportedFeatureError(f"{path} is of {files.kind}: {_NO_SHAPES}")
    sides = dict.fromkeys(_of_unknown_sides(files), False) | _exchanged(files)
    own = dataclasses.replace(files, whole=_trained_whole(files), exchanged=sides)
    return configured_adapter(own, params_alone(own).base())


def write(
    path: Path,
    adapter: Mapping[str, Any],
    configs: Any,
    *,
    overwrite: bool = False,
    names: str | None = None,
    base_model: str | None = None,
    profile: str = "peft",
    model_type: str | None = None,
    convolutions: bool = False,
) -> None:
    """Writes a folder.

    Args:
        path: the folder.
        adapter: the entries by path.
        configs: those of the adapter.
        overwrite: whether an adapter that is there may be replaced.
        names: the family whose names the modules have in torch.
        base_model: the name of the base.
        profile: "peft" or "vllm".
        model_type: the kind of the base, as its `config.json` has it.
        convolutions: whether kernels of several input axes are those of convolutions.

    Raises:
        UnsupportedFeatureError: if layouts are in doubt.
        FileExistsError: if the folder holds MLX's files, or others that may not be
            replaced.
    """
    if (path / _OF_MLX).exists():
        raise FileExistsError(f"{path} has an adapter of MLX; give another folder")
    if names is None:
        _check_layouts(adapter, convolutions)
        rules: Names = rules_alone(adapter, convolutions, model_type)
    else:
        rules = family_names(names)
    save(
        path,
        kernels_alone(adapter),
        adapter,
        configs,
        rules,
        profile=profile,
        model_type=model_type,
        base_model=base_model,
        overwrite=overwrite,
    )


def told_in_part(path: Path, *, ignore: Sequence[str] = ()) -> str | None:
    """Returns what the files of PEFT do not tell of an adapter without its params."""
    files, load = read_files(path, ignore=ignore), "`jlora.peft.load`"
    if files.kind != "LORA":
        return f"{_NO_SHAPES}; load them with their params by {load}"
    if files.rows:
        return (
            f"of {list(files.rows)[:5]} the files have some rows, and not how many the "
            f"tables have; load them with their params by {load}"
        )
    if _may_lack_biases(files):
        return (
            f"{path} says that the biases of adapted modules are trained, and has "
            "none: PEFT before 0.21 does not save those of `lora_only`, and whether "
            "the modules have biases no file tells. Load it with the params by "
            f"{load}, which knows, or do without them: --ignore bias"
        )
    if square := _of_unknown_sides(files):
        return (
            f"at which side of {square[:5]} their factors are the files do not tell: "
            f"{NO_VERSION}, or load them with their params by {load}"
        )
    return None


def lost(path: Path, target: str, *, ignore: Sequence[str] = ()) -> str | None:
    """Returns what MLX would not keep of the files of PEFT, if there is something."""
    if target != "MLX":
        return None
    files = read_files(path, ignore=ignore)
    tables = [name for name, module in files.modules.items() if module.is_table]
    if not tables or files.config.ensure_weight_tying:
        return None
    return (
        f"{path} adapts the table(s) {tables} for the lookup alone: MLX adapts the "
        "head too where a model ties it to its table, and no file tells whether it "
        "does. Merge the adapter into the model, python -m jlora merge"
    )


FORMAT = Format(
    "PEFT",
    holds,
    read,
    write,
    options=("names", "base_model", "profile", "model_type", "convolutions"),
    placing=("names", "params"),
    told_in_part=told_in_part,
    shown=shown,
    lost=lost,
    of_torch=True,
)


def _check_layouts(adapter: Mapping[str, Any], convolutions: bool) -> None:
    """Raises for what torch may keep in another layout than paths alone tell."""
    kernels = kernels_alone(adapter)
    found = [
        f"{p!r} ({_shape(kernels[p].shape)})" for p in in_doubt(adapter, convolutions)
    ]
    if found:
        raise UnsupportedFeatureError(
            f"{', '.join(found)}: a checkpoint does not tell whether these are dense "
            "kernels of several input axes, convolutions, or something else that PEFT "
            "keeps in another way. Give --names of a family that has them, "
            "--convolutions if they are, or call `jlora.peft.save` with a plan and "
            "rules"
        )


def _may_lack_biases(files: AdapterFiles) -> bool:
    """Returns whether trained biases may be missing, as PEFT forgets some of them."""
    told = files.config.bias == "lora_only" and not files.config.decided_by_keys("bias")
    saves = files.version is not None and files.version >= (0, 21, 0)
    ends = {f"{name}{end}" for name in files.modules for end in _BIASES}
    return told and not saves and bool(files.modules) and ends.isdisjoint(files.whole)


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def params_alone(files: AdapterFiles) -> ParamsAlone:
    """Returns kernels by path as the mechanical map has them, and the rules for them.

    Experts are `(experts, in, out)`. What is trained whole has the name that Flax gives
    it where there is one: a matrix is a `kernel (in, out)`, whatever it is for, and a
    vector a `scale`.
    """
    params = ParamsAlone()
    heads = _tied_heads(files)
    head_of = {table: head for head, table in reversed(heads.items())}
    packed = _parameters(files)
    for key, module in files.modules.items():
        if key not in heads and key.split(".base_layer")[0] not in packed:
            tied = f"tied({head_of[key]})" if key in head_of else None
            params.add_module(module, key.replace(".base_layer.", "."), tied)
    for owner, several in packed.items():
        for parameter, module in several:
            name = f"{owner}.{parameter}"
            n = module.rank // files.config.rank(name)
            fans = module.kernel_shape
            shape = (n, *(fans[::-1] if files.exchanged.get(name) else fans))
            params.add(path_of(name, "kernel"), shape, module.a.dtype, name, "experts")
    for name, values in files.rows.items():
        shape = (1 + max(_rows_of(name, files), default=0), values.shape[-1])
        params.add(path_of(name, "embedding"), shape, values.dtype, name, "embedding")
    for key, tensor in _trained_whole(files).items():
        add_whole(params, key, tensor)
    return params


def _rows_of(name: str, files: AdapterFiles) -> tuple[int, ...]:
    said = files.config.trainable_token_indices or ()
    if isinstance(said, Mapping):
        return next((said[end] for end in ends_of(name) if end in said), ())
    return said


def _trained_whole(files: AdapterFiles) -> dict[str, np.ndarray]:
    """Returns what is trained whole.

    PEFT may write a frozen weight of an adapted module along, of a table above all;
    there is nothing here to compare it with.
    """
    heads = _tied_heads(files)
    tied = {f"{module}.weight" for module in (*heads, *heads.values())}
    return {
        name: tensor
        for name, tensor in files.whole.items()
        if not name.endswith(".base_layer.weight") and name not in tied
    }


def _tied_heads(files: AdapterFiles) -> dict[str, str]:
    """Returns the heads whose factors repeat those of a table, with the table."""
    if not files.config.ensure_weight_tying:
        return {}
    return {
        head: table
        for table, rows in files.modules.items()
        for head, other in files.modules.items()
        if rows.is_table and not other.is_table
        if np.array_equal(other.a, rows.b.T) and np.array_equal(other.b, rows.a.T)
    }


def _exchanged(files: AdapterFiles) -> dict[str, bool]:
    """Returns whether `lora_A` is at the outputs of experts, where a pair tells.

    What goes into the first parameter of a feed-forward layer comes out of the last.
    """
    found = {}
    for owner, several in _parameters(files).items():
        if len(several) == 2:
            (_, up), (_, down) = several
            plain = up.a.shape[0] == down.b.shape[1]
            turned = up.b.shape[1] == down.a.shape[0]
            if plain != turned:
                found |= {f"{owner}.{tail}": turned for tail, _ in several}
    return found


def _of_unknown_sides(files: AdapterFiles) -> list[str]:
    """Returns the square parameters whose sides no pair and no release tells."""
    known = files.version is not None and files.version > (0, 19, 0)
    sides = _exchanged(files)
    return [
        name
        for owner, several in _parameters(files).items()
        for tail, module in several
        if (name := f"{owner}.{tail}") not in sides and not known
        if module.a.shape[0] == module.b.shape[1]
    ]


def _parameters(files: AdapterFiles) -> dict[str, list[tuple[str, TorchModule]]]:
    """Returns the adapted parameters of each module, innermost first.

    Torch's modules define the input of a feed-forward layer before its output.
    """
    chosen = files.config.target_parameters or ()
    found: dict[str, list[tuple[str, TorchModule]]] = {}
    owners = {module.split(".base_layer")[0] for module in files.modules}
    for owner in sorted(owners):
        tails = [p.rpartition(".")[2] for p in chosen]
        own = [t for t in tails if files.config.selects_parameter(f"{owner}.{t}")]
        own = sorted(set(own), key=lambda tail: (tail.endswith("down_proj"), tail))
        depths = [f"{owner}{'.base_layer' * n}" for n in range(len(own))][::-1]
        if own and all(depth in files.modules for depth in depths):
            pairs = zip(own, depths, strict=True)
            found[owner] = [(tail, files.modules[depth]) for tail, depth in pairs]
    return found

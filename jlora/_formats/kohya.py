"""The files of kohya's scripts: `lora_unet_….lora_down.weight`, with an `alpha` each.

The dots of modules' names are underscores there, which only the names of the base tell
apart from those that were ones before.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import AdapterError, UnsupportedFeatureError
from .._files.atomic import write_files
from .._files.format import Format
from .._files.model_files import keys_in, tensor_names
from .._files.patterns import ends_of
from .._files.safetensors import MAX_BYTES, check_finite, file_bytes, read_tensors
from .._params.given import listed
from .._params.paths import nearest
from .._torch.alone import (
    base_of_shapes,
    dropout_of,
    modules_alone,
    placed,
    scaling_of,
)
from .._torch.keys import has_endings, tensors_by_module
from .._torch.modules import TorchModule
from .._torch.named_params import Base

_ENDINGS = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha"}
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_REFUSED = {
    "lora_mid.weight": "LoCon's core of a convolution",
    "dora_scale": "DoRA's magnitude",
    **dict.fromkeys(_LOHA, "LoHa"),
    **dict.fromkeys((*_LOKR, "lokr_t2"), "LoKr"),
    **dict.fromkeys(("oft_blocks", "oft_diag"), "OFT"),
    **dict.fromkeys(("diff", "diff_b", "w_norm", "b_norm"), "a difference of weights"),
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "GLoRA"),
}
# The parts of a pipeline that a prefix may stand for; the first is what writes it.
_PARTS = {
    "lora_unet": ("unet", "transformer"),
    "lora_te": ("text_encoder",),
    "lora_te1": ("text_encoder",),
    "lora_te2": ("text_encoder_2",),
    "lora_te3": ("text_encoder_3",),
}
_PREFIX = re.compile(r"(lora_(?:unet|te\d?))_(.+)")
_NEEDS_BASE = (
    "names of modules have underscores for their dots, and only those of the base tell "
    "which: give its folder, --base FOLDER"
)


def holds(path: Path) -> bool:
    """Returns whether a path is a file with kohya's keys, of a kind that is read."""
    keys = keys_in(path)
    flat = all("." not in key.partition(".")[0] for key in keys)
    named = [key for key in keys if key.startswith(("lora_", "lycoris_"))]
    return flat and has_endings(named, {**_ENDINGS, **_REFUSED})


def modules(
    path: Path, *, ignore: Sequence[str] = (), base: Any = None
) -> list[TorchModule]:
    """Returns the torch modules of a file.

    Args:
        path: the file.
        ignore: not needed: the file has no config.
        base: what has the names: a folder or file of safetensors, a list of names, or a
            params tree or plan with torch's. Without it names have underscores.

    Raises:
        AdapterError: if the file contradicts itself, or names are not those of the
            base, or of several modules of it.
        UnsupportedFeatureError: if it has what jlora has not, such as LoHa.
    """
    del ignore
    where = str(path)
    tensors, _ = read_tensors(path, MAX_BYTES)
    check_finite(tensors, where)
    kinds = tensors_by_module(tensors, _ENDINGS, _REFUSED, where)
    found = [_module(name, own, where) for name, own in kinds.items()]
    if base is None:
        return found
    names = resolved([module.name for module in found], _names(base), where)
    return [dataclasses.replace(m, name=names[m.name]) for m in found]


def _module(name: str, own: Mapping[str, np.ndarray], where: str) -> TorchModule:
    module = TorchModule.of_torch(name, own["a"], own["b"])
    module.check_ranks()
    alpha = own.get("alpha")
    if alpha is None:  # it is the rank then
        return module
    if alpha.size != 1:
        raise AdapterError(
            f"{where}: the alpha of {name!r} has the shape {alpha.shape}"
        )
    scaling = scaling_of(float(alpha.reshape(())), module, where)
    return dataclasses.replace(module, scaling=scaling)


# --- the names ---


def _names(base: Any) -> list[str]:
    """Returns the names of the modules of a base."""
    if isinstance(base, str | Path):
        found: Iterable[str] = tensor_names(Path(base))
    elif isinstance(base, list | tuple | set | frozenset):
        found = base
    else:
        params = base if isinstance(base, Base) else Base.of(base, None)
        found = [n for path in params.bindings for _, n in params.names_of(path)]
    return sorted({re.sub(r"\.(?:weight|bias)$", "", name) for name in found})


def resolved(flat: Sequence[str], names: Sequence[str], where: str) -> dict[str, str]:
    """Returns names of modules by names with underscores for their dots.

    Args:
        flat: the names in a file, each with a prefix.
        names: those of the base.
        where: the name of the file, for messages.

    Raises:
        AdapterError: with every name that none or several of the base give, and where
            two give the same.

    Example:
        >>> resolved(["lora_unet_mid_to_q"], ["unet.mid.to_q", "unet.to_q"], "a file")
        {'lora_unet_mid_to_q': 'unet.mid.to_q'}
    """
    tails: dict[str, set[str]] = defaultdict(set)
    wholes: dict[str, set[str]] = defaultdict(set)
    for name in names:
        wholes[_flat(name)].add(name)
        for tail in ends_of(name):
            tails[_flat(tail)].add(name)
    heads = {name.partition(".")[0] for name in names}
    found = {own: _candidates(own, tails, wholes, heads) for own in flat}
    problems = [_unknown(own, several, names) for own, several in found.items()]
    single = {own: next(iter(c)) for own, c in found.items() if len(c) == 1}
    twice = [n for n, count in Counter(single.values()).items() if count > 1]
    problems += [f"{n!r} has factors under two names in the file" for n in twice]
    if any(problems):
        raise AdapterError(f"{where}:\n{listed([p for p in problems if p])}")
    return single


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _candidates(
    own: str,
    tails: Mapping[str, set[str]],
    wholes: Mapping[str, set[str]],
    heads: set[str],
) -> set[str]:
    """Returns the modules of a base that a name in a file may be.

    A prefix that is known stands for a part of the pipeline, if the base has parts.
    Any other prefix is before the whole name.
    """
    if match := _PREFIX.fullmatch(own):
        prefix, rest = match.groups()
        parts = [part for part in _PARTS.get(prefix, ()) if part in heads]
        exact = {n for part in parts for n in wholes.get(f"{part}_{rest}", ())}
        several = exact or wholes.get(rest) or tails.get(rest) or set()
        return {n for n in several if not parts or n.partition(".")[0] in parts}
    places = [i for i, letter in enumerate(own) if letter == "_"]
    return {n for i in places for n in wholes.get(own[i + 1 :], ())}


def _unknown(own: str, several: set[str], names: Sequence[str]) -> str:
    if len(several) == 1:
        return ""
    if several:
        return f"{own!r} may be any of {sorted(several)[:5]} of the base"
    _, rest = match.groups() if (match := _PREFIX.fullmatch(own)) else ("", own)
    near = nearest(rest.replace("_", "."), names[:20_000])
    return f"{own!r} is no module of the base; the nearest of its names: {near}"


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
        ignore: not needed.
        names: as for `_formats.peft.read`.
        params: likewise; their names resolve those of the file, if there is no base.
        base: as for `modules`.

    Raises:
        AdapterError: as `modules`, or if the modules do not fit the params.
    """
    if base is None and params is not None:
        base = base_of_shapes(params, names)
    return placed(modules(path, ignore=ignore, base=base), str(path), names, params)


def write(
    path: Path,
    adapter: Mapping[str, Any],
    configs: Any,
    *,
    overwrite: bool = False,
    prefix: str | None = None,
    convolutions: bool = False,
) -> None:
    """Writes a file.

    Args:
        path: the file.
        adapter: the entries by path.
        configs: not needed: each module has an alpha.
        overwrite: whether a file that is there may be replaced.
        prefix: what stands before the name of each module, such as "lora_unet"; by
            default that of the part of a pipeline that the name begins with.
        convolutions: whether kernels of several input axes are those of convolutions.

    Raises:
        ValueError: if the prefix is none, or the part of the pipeline is not known.
        AdapterError: if the adapter holds more than factors of modules, or the names of
            two are one without their dots.
    """
    del configs
    if prefix is not None and not re.fullmatch(r"lora_\w+", prefix):
        raise ValueError(
            f"a prefix of kohya's is `lora_unet` or the like, not {prefix!r}"
        )
    found = modules_alone(adapter, convolutions=convolutions)
    if tables := [module.name for module in found if module.is_table]:
        raise UnsupportedFeatureError(f"kohya's files have no tables, {tables[:5]}")
    names = _written([module.name for module in found], prefix)
    tensors: dict[str, np.ndarray] = {}
    for module in found:
        # The alpha is rounded to 32 bits; `b` takes the difference.
        alpha = np.float32(module.scaling * module.rank)
        module = module.scaled_to(float(alpha) / module.rank)
        own = {"a": module.lora_a, "b": module.lora_b, "alpha": np.array(alpha)}
        name = names[module.name]
        tensors |= {f"{name}.{ending}": own[kind] for ending, kind in _ENDINGS.items()}
    metadata = {"format": "pt", "ss_network_module": "networks.lora"}
    data = file_bytes(tensors, lambda dense: metadata)
    write_files(path.parent, {path.name: data}, overwrite=overwrite)


def _written(names: Sequence[str], prefix: str | None) -> dict[str, str]:
    """Returns what names become in a file."""
    parts = {name: name.partition(".") for name in names}
    several = any(part == "text_encoder_2" for part, _, _ in parts.values())
    prefixes = {own[0]: key for key, own in _PARTS.items() if key != "lora_te1"}
    prefixes["text_encoder"] = "lora_te1" if several else "lora_te"
    if prefix is not None:  # and the part that it stands for goes
        prefixes = dict.fromkeys(_PARTS.get(prefix, ()), prefix)
    found, odd = {}, []
    for name, (part, _, rest) in parts.items():
        if part in prefixes and rest:
            found[name] = f"{prefixes[part]}_{_flat(rest)}"
        elif prefix is not None:
            found[name] = f"{prefix}_{_flat(name)}"
        else:
            odd.append(name)
    if odd:
        raise ValueError(
            f"{odd[:5]} begin with none of {sorted(prefixes)}, parts of a pipeline "
            "that kohya's prefixes stand for: say what to write, --prefix lora_unet"
        )
    counts = Counter(found.values())
    if one := [name for name, own in found.items() if counts[own] > 1]:
        raise AdapterError(f"{one[:6]} have the same names without their dots")
    return found


def told_in_part(path: Path, *, ignore: Sequence[str] = ()) -> str | None:
    """Returns that the file does not tell the names of modules."""
    del ignore
    return f"{path}: {_NEEDS_BASE}"


def _dropped(configs: Any) -> str:
    told = dropout_of(configs)
    return "; ".join([*([told] if told else []), _NEEDS_BASE])


FORMAT = Format(
    "kohya",
    holds,
    read,
    write,
    suffix=".safetensors",
    options=("prefix", "convolutions"),
    placing=("names", "params", "base"),
    told_in_part=told_in_part,
    of_torch=True,
    modules=modules,
    dropped=_dropped,
)

"""Adapters of LoRA's relatives as PEFT's own files: LoHa, LoKr, VeRA, IA3."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .._adapter.config import LoraConfig
from .._adapter.factors import LoraFactors
from .._adapter.variants import variant_of_entry
from .._adapter.variants.vectors import random_sides
from .._errors import UnsupportedFeatureError
from .._params.given import listed
from .._torch.assemble import modules_of
from .._torch.layout import spread
from .._torch.modules import TorchModule
from .._torch.named_params import Base
from .config import PeftConfig
from .config_file import RELEASE
from .keys import PREFIX
from .scales import check_no_biases
from .write import config_of

Array = np.ndarray
Tensors = dict[str, Array]
Fields = dict[str, Any]


def own_files(
    kind: str, entries: Mapping[str, Any], configs: Sequence[LoraConfig], base: Base
) -> tuple[Tensors, Fields]:
    """Returns the tensors of an adapter under PEFT's keys, and what its config says.

    Args:
        kind: PEFT's name of the variant.
        entries: the entries by path, on the host.
        configs: those of the adapter.
        base: the params.

    Raises:
        UnsupportedFeatureError: if PEFT's files of this kind cannot hold it.
    """
    others = [p for p, e in entries.items() if variant_of_entry(e).peft != kind]
    if others:
        raise UnsupportedFeatureError(
            f'`kind="{kind}"` writes entries of that variant alone, and these are '
            f"something else: {others[:5]}"
        )
    if kind != "VERA" and any(config.dropout for config in configs):
        raise UnsupportedFeatureError(
            f"PEFT's {kind} has no dropout of inputs, and the configs have; save it "
            "with configs of none"
        )
    tensors, modules, own = _WRITERS[kind](entries, base)
    plain = [dataclasses.replace(config, rslora=False) for config in configs]
    said = config_of(modules, plain, base)
    fields: Fields = {
        **dict.fromkeys(_EMPTY),
        "inference_mode": True,
        "peft_type": kind,
        "peft_version": RELEASE,
        "target_modules": said.target_modules,
        **_FIELDS[kind](said),
        **own,
    }
    return {name: np.ascontiguousarray(t) for name, t in tensors.items()}, fields


_EMPTY = (
    "auto_mapping", "base_model_name_or_path", "modules_to_save", "revision",
    "task_type",
)  # fmt: skip
_LAYERS: Fields = {"layers_pattern": None, "layers_to_transform": None}


def own_json(fields: Fields, base_model: str | None, task_type: str | None) -> bytes:
    """Returns the bytes of the config."""
    given = {"base_model_name_or_path": base_model, "task_type": task_type}
    return json.dumps(
        {**fields, **given}, indent=2, sort_keys=True, default=list
    ).encode()


def _lycoris(said: PeftConfig) -> Fields:
    return {
        "alpha": said.lora_alpha,
        "alpha_pattern": said.alpha_pattern,
        **_LAYERS,
        "exclude_modules": None,
        "init_weights": True,
        "module_dropout": 0.0,
        "r": said.r,
        "rank_dropout": 0.0,
        "rank_pattern": said.rank_pattern,
        "use_effective_conv2d": False,
    }


def _vera_fields(said: PeftConfig) -> Fields:
    return {
        **_LAYERS,
        "bias": "none",
        "d_initial": 0.1,
        "fan_in_fan_out": False,
        "init_weights": True,
        "r": said.r,
        "save_projection": True,
        "vera_dropout": said.lora_dropout,
    }


# --- LoHa: two pairs of factors, each as LoRA's ---


def _loha(
    entries: Mapping[str, Any], base: Base
) -> tuple[Tensors, list[TorchModule], Fields]:
    pairs: list[dict[str, TorchModule]] = []
    for a, b in (("a", "b"), ("a2", "b2")):
        factors = {
            path: LoraFactors(getattr(e, a), getattr(e, b), e.axes, e.scaling)
            for path, e in entries.items()
        }
        factors = {path: spread(f, base.axes(path)) for path, f in factors.items()}
        pairs.append({module.name: module for module in modules_of(factors, base)})
    tensors: Tensors = {}
    both = [name for name in pairs[0] if name in pairs[1]]
    modules = []
    for name in both:
        rank = max(pair[name].rank for pair in pairs)
        one, two = (pair[name].padded_to(rank) for pair in pairs)
        modules.append(one)
        key = f"{PREFIX}{name}.hada"
        tensors |= {f"{key}_w1_a": one.b.T, f"{key}_w1_b": one.a.T}
        tensors |= {f"{key}_w2_a": two.b.T, f"{key}_w2_b": two.a.T}
    _check_plain("LOHA", modules, lambda module: True)
    return tensors, modules, {}


def _check_plain(
    kind: str, modules: Sequence[TorchModule], fits: Callable[[TorchModule], bool]
) -> None:
    """Refuses what PEFT has no such variant of: tables, parameters, attention."""
    steps = {"mha", "fan_in_fan_out", "tied", "experts"}
    odd = [
        m.name
        for m in modules
        if m.is_table or m.is_parameter or steps & {*m.steps} or not fits(m)
    ]
    if odd:
        raise UnsupportedFeatureError(
            f"PEFT's {kind} has no place for these modules, or another order of their "
            f"inputs or outputs: {listed(odd)}\nLeave `kind` out: the same change "
            "is written as factors of LoRA"
        )


# --- VeRA and LoKr: arrays of their own, where torch's order is jlora's ---


def _located(
    kind: str, entries: Mapping[str, Any], base: Base
) -> Iterator[tuple[TorchModule, Any, tuple[int, ...]]]:
    """Yields each module with its entry and its place in the batch axes.

    What is written as LoRA's factors are numbers of inputs and of outputs, so that each
    module shows which they are, and in what order.
    """
    probes = {}
    for path, entry in entries.items():
        axes, shape = entry.axes, entry.kernel_shape
        a_shape, b_shape = axes.factor_shapes(shape, 1)
        (fan_in, fan_out), n = axes.fans(shape), len(axes.batch)
        count = math.prod(b_shape[:n])
        a = np.broadcast_to(np.arange(1.0, fan_in + 1), (count, fan_in))
        b = np.arange(1.0, count * fan_out + 1)
        probe: Any = LoraFactors(a.reshape(a_shape), b.reshape(b_shape), axes, 1.0)  # type: ignore[arg-type]
        probes[path] = spread(probe, base.axes(path))
    found, places = modules_of(probes, base), {}
    for module in found:
        assert module.binding is not None
        entry = entries[module.binding.path]
        fan_in, fan_out = entry.axes.fans(entry.kernel_shape)
        start = int(module.b[0, 0]) - 1
        inputs, outputs = np.arange(fan_in), start + np.arange(fan_out)
        if (
            start % fan_out == 0
            and np.array_equal(module.a[:, 0] - 1, inputs)
            and np.array_equal(module.b[0] - 1, outputs)
        ):
            places[module.name] = start // fan_out
    _check_plain(kind, found, lambda m: m.name in places and not m.window)
    for module in found:
        assert module.binding is not None
        entry = entries[module.binding.path]
        batch = tuple(entry.kernel_shape[i] for i in entry.axes.batch)
        place = np.unravel_index(places[module.name], batch) if batch else ()
        yield module, entry, tuple(map(int, place))


def _same_of_all(kind: str, what: str, values: Mapping[str, Any]) -> Any:
    """Returns the one value that a config has room for."""
    if len({*values.values()}) > 1:
        raise UnsupportedFeatureError(
            f"PEFT's {kind} has one {what} for all modules, and these have several: "
            f"{dict(list(values.items())[:5])}"
        )
    return next(iter(values.values()))


def _setting(entry: Any) -> Any:
    """Returns the one setting of an entry that its variant has."""
    (value,) = variant_of_entry(entry).settings_of(entry).values()
    return value


def _as_module(module: TorchModule, entry: Any, scaling: float) -> TorchModule:
    """Returns a module whose config has the rank and the scaling of an entry."""
    a, b = (np.repeat(v, entry.rank, axis=i) for v, i in ((module.a, 1), (module.b, 0)))
    return dataclasses.replace(module, a=a, b=b, scaling=scaling)


def _bound(fan_in: int) -> np.float32:
    return np.float32(math.sqrt(6 / fan_in))


def _vera(
    entries: Mapping[str, Any], base: Base
) -> tuple[Tensors, list[TorchModule], Fields]:
    rank = _same_of_all("VERA", "rank", {p: e.rank for p, e in entries.items()})
    seeds = {path: _setting(entry) for path, entry in entries.items()}
    seed = _same_of_all("VERA", "seed", seeds)
    fans = [entry.axes.fans(entry.kernel_shape) for entry in entries.values()]
    widest = [max(sizes) for sizes in zip(*fans, strict=True)]
    inputs, outputs = widest
    a, b = (np.asarray(side) for side in random_sides(seed, inputs, outputs, rank))
    bound = _bound(inputs)
    tensors: Tensors = {}
    modules = []
    for module, entry, index in _located("VERA", entries, base):
        own = _bound(len(module.a)) / bound
        out = entry.b[index].reshape(-1)
        key, dtype = f"{PREFIX}{module.name}.vera_lambda", entry.d.dtype
        tensors[f"{key}_b"] = (entry.scaling * out).astype(dtype)
        tensors[f"{key}_d"] = (own * entry.d[index]).astype(dtype)
        modules.append(_as_module(module, entry, 1.0))
    beside = PREFIX.removesuffix("model.")
    tensors |= {f"{beside}vera_A": bound * a.T, f"{beside}vera_B": _bound(rank) * b.T}
    return tensors, modules, {"projection_prng_key": seed}


def _lokr(
    entries: Mapping[str, Any], base: Base
) -> tuple[Tensors, list[TorchModule], Fields]:
    factors = {path: _setting(entry) for path, entry in entries.items()}
    factor = _same_of_all("LOKR", "`decompose_factor`", factors)
    tensors: Tensors = {}
    modules = []
    for module, entry, index in _located("LOKR", entries, base):
        c, a, b = (v[index].T for v in (entry.c, entry.a, entry.b))
        key = f"{PREFIX}{module.name}.lokr"
        tensors[f"{key}_w1"] = c
        if entry.rank < max(len(b), a.shape[1]) / 2:
            tensors |= {f"{key}_w2_a": b, f"{key}_w2_b": a}
        else:  # as PEFT has it then
            tensors[f"{key}_w2"] = b @ a
        modules.append(_as_module(module, entry, entry.scaling))
    fields = {"decompose_both": False, "decompose_factor": factor}
    return tensors, modules, {**fields, "rank_dropout_scale": False}


def _ia3(
    entries: Mapping[str, Any], base: Base
) -> tuple[Tensors, list[TorchModule], Fields]:
    tensors: Tensors = {}
    modules, inputs, outputs = [], [], []
    for module, entry, index in _located("IA3", entries, base):
        scale, of_inputs = entry.scale[index].reshape(-1), _setting(entry) == "in"
        (inputs if of_inputs else outputs).append(module.name)
        tensors[f"{PREFIX}{module.name}.ia3_l"] = (
            scale[None] if of_inputs else scale[:, None]
        )
        modules.append(module)
    check_no_biases(outputs, base)
    ends = [name for name in outputs if name.endswith(tuple(inputs))]
    if inputs and ends:  # PEFT compares ends of names, without a dot before them
        raise UnsupportedFeatureError(
            f"PEFT would take the outputs that these scale for inputs: {listed(ends)}, "
            f"whose names end as those of {listed(inputs)} do"
        )
    # Whole names: what `target_modules` is shortened to may end those of both.
    return (
        tensors,
        modules,
        {
            "feedforward_modules": sorted(inputs),
            "target_modules": sorted([*inputs, *outputs]),
        },
    )


def _ia3_fields(_: PeftConfig) -> Fields:
    none = {"exclude_modules": None, "fan_in_fan_out": False}
    return {**none, "init_ia3_weights": True}


_WRITERS = {"LOHA": _loha, "LOKR": _lokr, "VERA": _vera, "IA3": _ia3}
_FIELDS = {"LOHA": _lycoris, "LOKR": _lycoris, "VERA": _vera_fields, "IA3": _ia3_fields}
KINDS = ("LORA", *_WRITERS)

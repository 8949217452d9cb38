"""PEFT's files of LoRA's relatives, LoHa, LoKr, VeRA and IA3, read as files of LoRA.

What each of them adds to a weight is a product of two factors, of a higher rank than
its own. So everything that reads LoRA's files reads these, in any layout of the params.
(IA3 multiplies a weight; see `scales.py` for what its factors stand for.)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .._errors import AdapterError, CorruptFileError, UnsupportedFeatureError
from .._torch.modules import TorchModule
from .._torch.named_params import Base, Home
from .config import PeftConfig, exact_keys
from .keys import PREFIX
from .scales import as_factors, fitted_scale, with_sides

Tensors = Mapping[str, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Relative:
    """What jlora knows of the files of one kind.

    Attributes:
        part: what the names of its tensors begin with, behind that of the module.
        inert: fields of its config without an effect on what the tensors mean.
        renamed: LoRA's name of a field that means the same.
        factors: `(out, rank)` and `(rank, in)` of a module, from its tensors by what is
            left of their names, and the bytes that they may take.
        scaled: whether its config has an alpha and ranks, as LoRA's has.
    """

    part: str
    inert: frozenset[str]
    renamed: Mapping[str, str]
    factors: Callable[[Tensors, int], Pair]
    scaled: bool = False


def is_relative(values: Any) -> bool:
    """Returns whether a parsed config is that of a relative of LoRA."""
    kind = values.get("peft_type") if isinstance(values, dict) else None
    return isinstance(kind, str) and kind in RELATIVES


def as_lora(
    values: Any, tensors: Tensors, where: str, max_bytes: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the config and the tensors of a relative as those of LoRA.

    Values that are not finite are left to whoever looks at all tensors.

    Args:
        values: the parsed config, of which `is_relative` holds.
        tensors: the tensors by their keys.
        where: the name of the folder, for messages.
        max_bytes: what the factors may take; small tensors make large ones.

    Raises:
        AdapterError: if tensors do not fit each other, or the factors are too large.
        UnsupportedFeatureError: if VeRA's projections are not in the file.
        CorruptFileError: if a rank or an alpha is none.
    """
    kind = values["peft_type"]
    relative = RELATIVES[kind]
    found_own, rest = by_module(tensors, relative.part)
    widen = lambda parts: {name: _widened(tensor) for name, tensor in parts.items()}
    own = {module: widen(parts) for module, parts in found_own.items()}
    if kind == "VERA":
        own = _with_projections(own, where)
    elif kind == "IA3":
        own = with_sides(own, values, where)
    strange = [key for key in rest if ".lora_" in key]
    if strange or not own:
        raise of_other_tensors(where, kind, strange or sorted(tensors))
    found, ranks, problems, left = {}, {}, [], max_bytes
    for module, parts in own.items():
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                b, a = relative.factors(parts, left)
        except (KeyError, ValueError) as error:
            shapes = {name: tensor.shape for name, tensor in parts.items()}
            problems.append(f"{module!r} has {shapes}: {error}")
            continue
        found |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        ranks[module.removeprefix(PREFIX)] = a.shape[0]
        left -= a.nbytes + b.nbytes
    if problems:
        raise AdapterError(f"{where}: " + "; ".join(problems[:20]))
    dropped = relative.inert | {"peft_type", *relative.renamed}
    plain = {key: value for key, value in values.items() if key not in dropped}
    plain |= {to: values[key] for key, to in relative.renamed.items() if key in values}
    plain |= _scalings(values, ranks, where) if relative.scaled else _ones(ranks)
    return {**plain, "peft_type": "LORA"}, {**rest, **found}


def fitted(
    module: TorchModule, kind: str, homes: Sequence[Home], base: Base
) -> TorchModule:
    """Returns a module in the shape that its kernel tells and its tensors do not.

    Those of LoHa and LoKr have the window of a convolution among their columns, VeRA's
    projection has the columns of the widest module, and IA3's scale has one side.
    """
    if kind == "LORA" or module.window:
        return module
    if kind == "IA3":
        return fitted_scale(module, homes, base)
    path = homes[0].path
    binding, shape = base.bindings[path], base.shape(path)
    axes = base.axes(path)
    if kind == "VERA":
        fan_in, _ = axes.fans(shape)
        return dataclasses.replace(module, a=module.a[:fan_in])
    window = binding.window(tuple(shape[i] for i in axes.in_))
    return dataclasses.replace(module, window=window)


def by_module(
    tensors: Tensors, part: str
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Returns the tensors of each module by what is left of their names, and others."""
    own: dict[str, dict[str, np.ndarray]] = {}
    rest = {}
    for key, tensor in tensors.items():
        module, dot, name = key.rpartition(f".{part}")
        if dot:
            own.setdefault(module, {})[name] = tensor
        else:
            rest[key] = tensor
    return own, rest


def of_other_tensors(where: str, kind: str, held: Sequence[str]) -> AdapterError:
    """Returns the error of a file whose tensors are not those of its kind."""
    return AdapterError(
        f"{where} is of {kind}, whose tensors have {RELATIVES[kind].part!r} in their "
        f"names, and holds {[*held][:3]}; `peft_type` in the config must be that of "
        "the tensors"
    )


def _widened(tensor: np.ndarray) -> np.ndarray:
    return tensor if tensor.dtype == np.float64 else tensor.astype(np.float32)


def _with_projections(own: Mapping[str, Tensors], where: str) -> dict[str, Tensors]:
    """Gives each module of VeRA the projections, which stand beside the modules."""
    beside = {module: parts for module, parts in own.items() if {*parts} <= {"A", "B"}}
    shared = [(name, t) for parts in beside.values() for name, t in parts.items()]
    if sorted(name for name, _ in shared) != ["A", "B"]:
        raise UnsupportedFeatureError(
            f"{where} holds {len(shared)} projections of VeRA, and not `vera_A` and "
            "`vera_B`; without them they are what torch draws. Save it in PEFT with "
            "`save_projection=True`"
        )
    modules = {module: parts for module, parts in own.items() if module not in beside}
    return {module: {**parts, **dict(shared)} for module, parts in modules.items()}


def scalings_said(values: Mapping[str, Any], where: str) -> PeftConfig:
    """Returns what the config of LoHa or LoKr says of ranks, alphas and scalings.

    Raises:
        CorruptFileError: if a rank or an alpha is none.
    """
    number = lambda v: isinstance(v, int | float) and not isinstance(v, bool)
    positive = lambda v: number(v) and 0 < v < 1e30
    given = {"r": values.get("r", 8), "alpha": values.get("alpha", 8)}
    fields = ("rank_pattern", "alpha_pattern")
    patterns: dict[str, Any] = {name: values.get(name) or {} for name in fields}
    fine = all(map(positive, given.values())) and all(
        isinstance(p, dict) and all(map(positive, p.values()))
        for p in patterns.values()
    )
    if not fine:
        raise CorruptFileError(f"{where}: {given} and {patterns} are no numbers")
    return PeftConfig(r=given["r"], lora_alpha=given["alpha"], **patterns)


def _scalings(
    values: Mapping[str, Any], ranks: Mapping[str, int], where: str
) -> dict[str, Any]:
    """Returns LoRA's fields for the scalings that the config gives each module."""
    said = scalings_said(values, where)
    scalings = {name: said.scaling(name, said.rank(name)) for name in ranks}
    alphas = {name: scalings[name] * rank for name, rank in ranks.items()}
    return {"rank_pattern": exact_keys(ranks), "alpha_pattern": exact_keys(alphas)}


def _ones(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Returns LoRA's fields for a scaling of one."""
    return {
        "rank_pattern": exact_keys(ranks),
        "alpha_pattern": exact_keys(
            {name: float(rank) for name, rank in ranks.items()}
        ),
    }


# --- the factors of a module ---


def _loha(parts: Tensors, limit: int) -> Pair:
    """`(a₁·b₁) ∘ (a₂·b₂)`: the products of columns, and of rows."""
    (a1, b1), (a2, b2) = (_pair(parts, number, limit) for number in "12")
    _check_size(len(a1), a1.shape[1] * a2.shape[1], b1.shape[1], limit)
    columns = np.einsum("oi,oj->oij", a1, a2).reshape(len(a1), -1)
    rows = np.einsum("in,jn->ijn", b1, b2).reshape(-1, b1.shape[1])
    return columns, rows


def _lokr(parts: Tensors, limit: int) -> Pair:
    """`C ⊗ (a·b)`, with the smaller side of `C` in a unit matrix."""
    if "w1" in parts:
        c = parts["w1"]
        _check_product(c, c.T)
    else:
        _check_product(parts["w1_a"], parts["w1_b"])
        _check_size(len(parts["w1_a"]), parts["w1_b"].shape[1], 0, limit)
        c = parts["w1_a"] @ parts["w1_b"]
    if "w2" in parts:  # its window among the columns
        whole = np.atleast_1d(parts["w2"])
        whole = whole.reshape(len(whole), -1)
        one = np.eye(min(whole.shape), dtype=whole.dtype)
        a, b = (one, whole) if len(one) == len(whole) else (whole, one)
    else:
        a, b = _pair(parts, "2", limit)
    rank = min(c.shape) * a.shape[1]
    _check_size(len(c) * len(a), rank, c.shape[1] * b.shape[1], limit)
    one = np.eye(min(c.shape), dtype=c.dtype)
    left, right = (c, one) if c.shape[0] >= c.shape[1] else (one, c)
    return np.kron(left, a), np.kron(right, b)


def _vera(parts: Tensors, limit: int) -> Pair:
    """`diag(λ_b)·B·diag(λ_d)·A`, of `B` as many rows as the module has outputs."""
    d, b, first, last = (parts[name] for name in ("lambda_d", "lambda_b", "A", "B"))
    _check_product(last, first)
    if d.shape != first.shape[:1] or b.ndim != 1 or len(b) > len(last):
        raise ValueError("they do not fit the projections")
    _check_size(len(b), len(d), first.shape[1], limit)
    return b[:, None] * last[: len(b)], d[:, None] * first


def _pair(parts: Tensors, number: str, limit: int) -> Pair:
    """Returns one of the low-rank matrices as two factors.

    In the Tucker form of a convolution (`use_effective_conv2d`) it is
    `W[o, i, …] = Σₚᵩ t[p, q, …]·a[p, o]·b[q, i]`. The sum over q is a matrix with the
    window among its columns, so that the rank stays.
    """
    a, b, core = parts[f"w{number}_a"], parts[f"w{number}_b"], parts.get(f"t{number}")
    if core is not None:
        if a.ndim != 2 or b.ndim != 2 or core.shape[:2] != (len(a), len(b)):
            raise ValueError(f"{core.shape} has no place between {a.shape}, {b.shape}")
        _check_size(0, len(a), b.shape[1] * math.prod(core.shape[2:]), limit)
        a, b = a.T, np.einsum("pq...,qi->pi...", core, b).reshape(len(a), -1)
    _check_product(a, b)
    return a, b


def _check_product(a: np.ndarray, b: np.ndarray) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"{a.shape} and {b.shape} have no product")


def _check_size(rows: int, rank: int, columns: int, limit: int) -> None:
    """Raises before factors are made that are too large."""
    size = (rows + columns) * rank * np.dtype(np.float64).itemsize
    if size > limit:
        raise ValueError(
            f"as factors of LoRA they take up to {size:,} bytes, and {limit:,} of "
            "`max_bytes` are left"
        )


_LYCORIS = frozenset({
    "r", "alpha", "init_weights", "use_effective_conv2d", "rank_pattern",
    "alpha_pattern", "decompose_both", "decompose_factor", "rank_dropout_scale",
})  # fmt: skip
_VERA = frozenset({"r", "d_initial", "init_weights", "save_projection"})
_VERA |= {"projection_prng_key"}
_IA3 = frozenset({"init_ia3_weights", "feedforward_modules"})
RELATIVES = {
    "LOHA": Relative("hada_", _LYCORIS, {}, _loha, scaled=True),
    "LOKR": Relative("lokr_", _LYCORIS, {}, _lokr, scaled=True),
    "VERA": Relative("vera_", _VERA, {"vera_dropout": "lora_dropout"}, _vera),
    "IA3": Relative("ia3_", _IA3, {}, lambda parts, _: as_factors(parts)),
}

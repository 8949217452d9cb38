"""States with the low-rank params of Qwix, Tunix and `nnx.LoRA`, as adapters.

Qwix keeps `<param>_lora_a` and `<param>_lora_b` beside a param: of a `dot_general` as
`(*batch, in, rank)` and `(*batch, rank, out)` with flat inputs and outputs, of an
einsum or a convolution as `(*batch, *in, rank)` and `(rank, *out)`. They act times
alpha/rank, and no alpha is kept. `nnx.LoRA` keeps `lora_a (in, rank)` and `lora_b
(rank, out)`, which act as they are. Neither says which axes of a kernel are inputs: its
shape does, or a plan.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._adapter.config import LoraConfig
from .._adapter.factors import LoraFactors
from .._errors import AdapterError
from .._files.safetensors import check_finite
from .._params.axes import KernelAxes
from .._params.given import listed
from .._params.paths import FlatParams, is_array, matching, nearest
from .._torch.alone import tree_of
from .._torch.configs import configs_of
from .._torch.named_params import Base
from .qwix_axes import axes_of_factors, laid_out, shape_alone

Configs = LoraConfig | tuple[LoraConfig, ...]
Alpha = float | Mapping[str, float] | None
Shape = tuple[int, ...]

_BASE = re.compile(r"(^|/)base_module/")
LORA = re.compile(r"(?:.*/)?(?:(?P<param>[^/]+)_)?lora_(?P<side>[ab])")


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two factors of one kernel, as a state has them.

    Attributes:
        owner: the path of their module.
        param: the name of the kernel in it, of Qwix's; "" of `nnx.LoRA`'s.
        sides: what there is of `a` and `b`.
    """

    owner: str
    param: str
    sides: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What both begin with, for messages."""
        return "/".join(filter(None, [self.owner, self.param and f"{self.param}_lora"]))

    @property
    def paths(self) -> list[str]:
        """The paths that the kernel may have, the likeliest first.

        `nnx.LoRALinear` has its factors in `lora` beside the kernel. Around a module
        `nnx.LoRA` has them beside `base_module`, which is the module itself in a model
        without LoRA.
        """
        at = lambda *parts: "/".join(filter(None, parts))
        if self.param:
            return [at(self.owner, self.param)]
        above, _, last = self.owner.rpartition("/")
        around = [self.owner, at(self.owner, "base_module")]
        owners = [above, *around] if last == "lora" else around
        return [at(owner, "kernel") for owner in owners]


def leaves_of(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a state by path, as its model has them.

    A state that Orbax has restored by itself has a level `value` below each variable.
    """
    leaves = FlatParams.of(tree).by_path()
    if not any(re.search(r"lora_[ab]/value$", path) for path in leaves):
        return leaves
    return {path.removesuffix("/value"): leaf for path, leaf in leaves.items()}


def pairs_of(leaves: Mapping[str, Any]) -> list[Pair]:
    """Returns the factors in a state, or what there is of both."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path, leaf in leaves.items():
        if match := LORA.fullmatch(path):
            owner = path.rpartition("/")[0]
            key = owner, match["param"] or ""
            found.setdefault(key, {})[match["side"]] = leaf
    return [Pair(*key, sides) for key, sides in found.items()]


def shapes_beside(leaves: Mapping[str, Any]) -> dict[str, Shape]:
    """Returns the shapes of the arrays that stand beside the factors, by path.

    Qwix has a quantised kernel as codes and scales: the codes have its shape.
    """
    found = {}
    for path, leaf in leaves.items():
        if not LORA.fullmatch(path) and hasattr(leaf, "shape"):
            plain = path.removesuffix("/qvalue").removesuffix("/array")
            if path.endswith("/qvalue") or "/array/" not in path:
                found[_BASE.sub(r"\1", plain)] = tuple(leaf.shape)
    return found


def adapter_of_leaves(
    leaves: Mapping[str, Any],
    where: str,
    params_or_plan: Any = None,
    alpha: Alpha = None,
) -> tuple[Configs, dict[str, Any]]:
    """Returns the configs and the adapter in a state, on the host.

    Args:
        leaves: arrays of the factors, and arrays or shapes of what stands beside them,
            by path.
        where: the name of the state, for messages.
        params_or_plan: the params of the model without LoRA, or their shapes, or a plan
            of them.
        alpha: that of Qwix's rules, or several by patterns of paths.

    Raises:
        AdapterError: if there are no factors, they do not fit, or an alpha is missing.
            All offenders are collected.
        ValueError: if an alpha is none, or nothing takes it.
    """
    pairs = pairs_of(leaves)
    if not pairs:
        raise AdapterError(
            f"{where} has no factors: no leaf is called lora_a or lora_b, or ends with "
            "_lora_a or _lora_b"
        )
    arrays = {f"{p.name}, {s}": x for p in pairs for s, x in p.sides.items()}
    _check_floating(arrays, where)
    check_finite({n: np.asarray(x) for n, x in arrays.items()}, where)
    given = _Given.of(params_or_plan, shapes_beside(leaves))
    scalings = _scalings(pairs, alpha, where)
    entries: dict[str, Any] = {}
    problems = []
    for pair in pairs:
        try:
            path, factors = _entry(pair, given, scalings[pair.name])
            if path in entries:
                raise AdapterError(f"{path!r} has factors under two names")
            entries[path] = factors
        except AdapterError as error:
            problems.append(str(error))
    if problems:
        raise AdapterError(f"{where} does not fit:\n{listed(problems)}")
    shapes = {**given.shapes, **{p: e.kernel_shape for p, e in entries.items()}}
    axes = {path: entry.axes for path, entry in entries.items()}
    return configs_of(entries, Base.of(tree_of(shapes), None, axes)), entries


def _check_floating(arrays: Mapping[str, Any], where: str) -> None:
    kinds = ("float16", "bfloat16", "float32", "float64")
    wrong = [
        n for n, x in arrays.items() if not is_array(x) or x.dtype.name not in kinds
    ]
    if wrong:
        raise AdapterError(f"{where}: {wrong[:5]} are no arrays of floating numbers")


@dataclasses.dataclass(frozen=True)
class _Given:
    """What is known of the kernels.

    Attributes:
        shapes: by path.
        axes: their roles by path, where a plan tells.
        is_whole: whether a kernel that is not there is none of the model.
    """

    shapes: Mapping[str, Shape]
    axes: Mapping[str, KernelAxes]
    is_whole: bool

    @classmethod
    def of(cls, params_or_plan: Any, beside: Mapping[str, Shape]) -> "_Given":
        if params_or_plan is None:
            return cls(beside, {}, False)
        # A plan is known by its fields: rooms of files know no plans.
        is_plan = hasattr(params_or_plan, "targets")
        targets = params_or_plan.targets if is_plan else ()
        flat = FlatParams.of(params_or_plan.params if is_plan else params_or_plan)
        leaves = {p: x for p, x in flat.by_path().items() if is_array(x)}
        if not leaves:
            got = type(params_or_plan).__name__
            raise TypeError(f"params, their shapes or a plan are wanted, got {got}")
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        axes = {t.path: t.axes for t in targets if t.axes is not None}
        return cls(shapes, axes, True)


def _entry(pair: Pair, given: _Given, scaling: float) -> tuple[str, LoraFactors]:
    """Returns the path of a kernel and its factors.

    Raises:
        AdapterError: if they do not fit, or fit in several ways.
    """
    if pair.sides.keys() != {"a", "b"}:
        raise AdapterError(f"{pair.name!r} has no {'b' if 'a' in pair.sides else 'a'}")
    a, b = (np.asarray(pair.sides[side]) for side in "ab")
    if a.ndim < 2 or b.ndim < 2 or not (a.size and b.size) or a.dtype != b.dtype:
        raise AdapterError(
            f"{pair.name!r} has factors of the shapes {a.shape} and {b.shape}, in "
            f"{a.dtype} and {b.dtype}, which are none of one kernel"
        )
    there = [path for path in pair.paths if path in given.shapes]
    if not there and given.is_whole:
        raise AdapterError(
            f"{pair.name!r}: the params have no {pair.paths[0]!r}; the nearest: "
            f"{nearest(pair.paths[0], given.shapes)}"
        )
    path = (there or pair.paths)[0]
    shape = given.shapes.get(path)
    if shape is None:
        shape, axes = shape_alone(pair.name, a.shape, b.shape)
    else:
        known = given.axes.get(path)
        axes = axes_of_factors(path, a.shape, b.shape, shape, known)
    made: Any = laid_out(a, b, shape, axes)
    return path, LoraFactors(*made, axes=axes, scaling=scaling)


# --- the scaling ---


def _scalings(pairs: list[Pair], alpha: Alpha, where: str) -> dict[str, float]:
    """Returns the scaling of each pair: alpha/rank of Qwix's, 1 of `nnx.LoRA`'s.

    Raises:
        AdapterError: if an alpha is missing.
        ValueError: if an alpha is none, or nothing takes it.
    """
    of_qwix = [pair for pair in pairs if pair.param]
    if alpha is not None and not of_qwix:
        raise ValueError(
            f"{where} holds factors of `nnx.LoRA`, which act as they are: leave the "
            "alpha out"
        )
    alphas = _alphas(of_qwix, alpha)
    missing = [pair.paths[0] for pair in of_qwix if pair.name not in alphas]
    if missing:
        raise AdapterError(
            f"{where} holds Qwix's factors of {len(missing)} kernels, {missing[:3]}, "
            "which act times alpha/rank, and Qwix stores no alpha: give the one that "
            "the rules of the `LoraProvider` had, `alpha=16.0`, or --alpha 16 on the "
            "command line; several by patterns of paths, `alpha={'attn': 16.0, ...}`"
        )
    return {
        pair.name: alphas[pair.name] / _rank(pair) if pair.param else 1.0
        for pair in pairs
    }


def _rank(pair: Pair) -> int:
    """Returns the rank of a pair; 1 if it has none, which is refused later."""
    a = pair.sides.get("a")
    shape = () if a is None else np.shape(a)
    return max(shape[-1], 1) if shape else 1


def _alphas(pairs: list[Pair], alpha: Alpha) -> dict[str, float]:
    if alpha is None:
        return {}
    several = alpha if isinstance(alpha, Mapping) else {".*": alpha}
    found: dict[str, float] = {}
    for pattern, value in several.items():
        if not _is_positive(value):
            raise ValueError(f"`alpha` is a positive number, got {value!r}")
        hit = matching(pattern, [pair.paths[0] for pair in pairs])
        if not hit:
            raise ValueError(f"`alpha`: no path matches {pattern!r}")
        for pair in pairs:
            if pair.paths[0] in hit:
                found.setdefault(pair.name, float(value))
    return found


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def in_doubt(leaves: Mapping[str, Any]) -> list[str]:
    """Returns the kernels whose shapes a state does not tell."""
    beside = shapes_beside(leaves)
    return [
        p.paths[0] for p in pairs_of(leaves) if p.param and p.paths[0] not in beside
    ]

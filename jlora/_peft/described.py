"""What PEFT's files of LoRA's relatives tell of each module, without its params.

The shapes of tensors tell it. Nothing is multiplied, so that products which would take
much memory, or which lack a factor, as VeRA without its projections, are described too.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from .._errors import AdapterError
from .._files.safetensors import MAX_BYTES, check_finite, read_tensors
from .files import WEIGHTS, opened
from .keys import sort_keys
from .relatives import (
    RELATIVES,
    by_module,
    is_relative,
    of_other_tensors,
    scalings_said,
)

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Kernel = tuple[int | None, ...]
_PROJECTIONS = ("vera_A", "vera_B")
_FROZEN = ".base_layer.weight"


@dataclasses.dataclass(frozen=True)
class Measure:
    """What the shapes of a module's tensors tell.

    Attributes:
        kernel: `(*window, in, out)`, with None for a size that they do not tell.
        ranks: those of its pairs of matrices; none if all of them are whole.
        form: how the module holds what it adds.
    """

    kernel: Kernel
    ranks: tuple[int, ...]
    form: str


@dataclasses.dataclass(frozen=True)
class Described:
    """A module, as its files describe it.

    Attributes:
        measure: what the shapes of its tensors tell.
        alpha: what the config says of it; None for VeRA and IA3, which have none.
        scaling: what the product is multiplied by.
        tensors: what is trained of it.
    """

    measure: Measure
    alpha: float | None
    scaling: float
    tensors: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Description:
    """An adapter of a relative of LoRA, as its files describe it.

    Attributes:
        kind: PEFT's name of the variant.
        modules: by name.
        whole: what is trained whole, by its key without PEFT's prefix.
        projections: VeRA's frozen ones, if the file has them.
    """

    kind: str
    modules: Mapping[str, Described]
    whole: Mapping[str, np.ndarray]
    projections: Mapping[str, np.ndarray]


def describe(path: Path) -> Description | None:
    """Returns what a folder tells of a relative of LoRA; None if it is of another kind.

    Fields of the config that say how it was trained are not asked for here.

    Args:
        path: the folder, or one of its two files.

    Raises:
        AdapterError: if a file is not what it claims, or tensors do not fit each other.
        FileNotFoundError: if a file is missing.
    """
    folder, values = opened(path)
    if not is_relative(values) or values["peft_type"] not in _MEASURES:
        return None
    kind, where = values["peft_type"], str(folder / WEIGHTS)
    tensors, _ = read_tensors(folder / WEIGHTS, MAX_BYTES)
    check_finite(tensors, where)
    projections, others = _apart(tensors, where) if kind == "VERA" else ({}, tensors)
    own, whole = _by_module(kind, others, where)
    measures = _measures(kind, own, projections, where)
    said = scalings_said(values, str(folder)) if RELATIVES[kind].scaled else None
    modules = {}
    for name, measure in measures.items():
        alpha = said.alpha(name) if said else None
        scaling = said.scaling(name, said.rank(name)) if said else 1.0
        modules[name] = Described(measure, alpha, scaling, tuple(own[name].values()))
    return Description(kind, modules, whole, projections)


def _apart(
    tensors: Mapping[str, np.ndarray], where: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns VeRA's projections, which stand beside the modules, and the others."""
    last = {key: key.rpartition(".")[2] for key in tensors}
    keys = [key for key in tensors if last[key] in _PROJECTIONS]
    if keys and sorted(last[key] for key in keys) != [*_PROJECTIONS]:
        raise AdapterError(
            f"{where} has the projections {keys[:5]} of VeRA; it needs one `vera_A` "
            "and one `vera_B`, or neither. Save it in PEFT with `save_projection=True`"
        )
    others = {key: tensor for key, tensor in tensors.items() if key not in keys}
    return {last[key]: tensors[key] for key in keys}, others


def _by_module(
    kind: str, tensors: Mapping[str, np.ndarray], where: str
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Returns the tensors of each module by what is left of their names, and others."""
    strange, others = sort_keys(tensors, where)
    own, rest = by_module(others, RELATIVES[kind].part)
    if strange or not own:
        raise of_other_tensors(where, kind, [*strange] or sorted(tensors))
    return own, {key: t for key, t in rest.items() if not key.endswith(_FROZEN)}


def _measures(
    kind: str,
    own: Mapping[str, Mapping[str, np.ndarray]],
    projections: Mapping[str, np.ndarray],
    where: str,
) -> dict[str, Measure]:
    """Returns what the shapes of each module tell."""
    found, problems = {}, []
    beside = {name: tensor.shape for name, tensor in projections.items()}
    for module, parts in own.items():
        shapes = {name: tensor.shape for name, tensor in parts.items()}
        try:
            found[module] = _MEASURES[kind]({**shapes, **beside})
        except KeyError as error:
            problems.append(f"{module!r} has {shapes}, and lacks {error}")
        except ValueError as error:
            problems.append(f"{module!r} has {shapes}: {error}")
    if problems:
        told = "; ".join(problems[:20])
        raise AdapterError(f"{where}: {told}. Save the adapter in PEFT again")
    return found


# --- the shapes of a module ---


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """One matrix of a module, and its rank if it is a product."""

    out: int
    in_: int
    window: Shape = ()
    rank: int | None = None
    form: str = "low rank"

    @property
    def columns(self) -> int:
        return self.in_ * math.prod(self.window)


def _loha(shapes: Shapes) -> Measure:
    one, two = (_product(shapes, number) for number in "12")
    if (one.out, one.columns) != (two.out, two.columns):
        raise ValueError(
            f"its two products are {one.out}×{one.columns} and {two.out}×{two.columns}"
        )
    kernel = one if one.window else two
    form = "two Tucker products" if kernel.window else "two products"
    return Measure((*kernel.window, kernel.in_, kernel.out), _ranks(one, two), form)


def _lokr(shapes: Shapes) -> Measure:
    one, two = (
        _whole(shapes[f"w{number}"])
        if f"w{number}" in shapes
        else _product(shapes, number)
        for number in "12"
    )
    if one.window:
        raise ValueError(f"`w1` is no matrix, {shapes.get('w1', shapes.get('t1'))}")
    kernel = (*two.window, one.in_ * two.in_, one.out * two.out)
    return Measure(kernel, _ranks(one, two), f"w1 {one.form}, w2 {two.form}")


def _vera(shapes: Shapes) -> Measure:
    d, b = shapes["lambda_d"], shapes["lambda_b"]
    if len(d) != 1 or len(b) != 1:
        raise ValueError("they are no vectors")
    first, last = (shapes.get(name) for name in _PROJECTIONS)
    if first is not None and last is not None:
        fits = len(first) == len(last) == 2 and d[0] == first[0] == last[1]
        if not fits or b[0] > last[0]:
            raise ValueError(f"they do not fit the projections {first} and {last}")
    return Measure((None, b[0]), d, "two vectors")


def _ia3(shapes: Shapes) -> Measure:
    """Of a convolution, and of one value, the shape does not tell the side."""
    scale = shapes["l"]
    if len(scale) < 2 or math.prod(scale) != max(scale[:2]):
        raise ValueError("a scale is of inputs, (1, in), or of outputs, (out, 1)")
    if len(scale) > 2 or math.prod(scale) == 1:
        return Measure((None, None), (), f"a scale of {math.prod(scale)}")
    if scale[0] == 1:
        return Measure((scale[1], None), (), "a scale of inputs")
    return Measure((None, scale[0]), (), "a scale of outputs")


def _product(shapes: Shapes, number: str) -> _Matrix:
    """Returns a product of two matrices, or of a core between them, Tucker's form."""
    a, b = shapes[f"w{number}_a"], shapes[f"w{number}_b"]
    core = shapes.get(f"t{number}")
    if len(a) != 2 or len(b) != 2 or (core is None and a[1] != b[0]):
        raise ValueError(f"{a} and {b} have no product")
    if core is None:
        return _Matrix(a[0], b[1], rank=a[1])
    if core[:2] != (a[0], b[0]):
        raise ValueError(f"{core} has no place between {a}, {b}")
    return _Matrix(a[1], b[1], core[2:], a[0], "Tucker")


def _whole(shape: Shape) -> _Matrix:
    """Returns a matrix that is no product, with the window of a convolution or not."""
    if len(shape) < 2:
        raise ValueError(f"{shape} is no matrix")
    return _Matrix(shape[0], shape[1], shape[2:], form="whole")


def _ranks(*matrices: _Matrix) -> tuple[int, ...]:
    """Returns the ranks, one for all that have the same."""
    return tuple(dict.fromkeys(m.rank for m in matrices if m.rank is not None))


_MEASURES: dict[str, Callable[[Shapes], Measure]] = {
    "LOHA": _loha,
    "LOKR": _lokr,
    "VERA": _vera,
    "IA3": _ia3,
}

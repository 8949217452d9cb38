"""What `python -m jlora inspect` prints of PEFT's folders of LoRA's relatives."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .._files.format import Shown
from .._peft.described import Described, Description, describe
from .._torch.alone import ParamsAlone, path_of
from .peft_whole import add_whole

HEAD = (
    "path",
    "kind",
    "kernel",
    "rank",
    "alpha",
    "scaling",
    "dtype",
    "values",
    "held as",
)
_OF_PAIRS = (
    "whether a kernel of two axes is that of a convolution, whose window is among its "
    "inputs then"
)
_OF_VERA = (
    "how many inputs a module has, as the file has the sizes of its outputs alone"
)
_OF_SCALES = (
    "how many features a kernel has on its other side, and of a convolution which side "
    "that is"
)


def shown(path: Path) -> Shown | None:
    """Returns what is printed of a folder; None if it is not of a relative of LoRA.

    Raises:
        AdapterError: if a file is not what it claims, or tensors do not fit each other.
        FileNotFoundError: if a file is missing.
    """
    told = describe(path)
    if told is None:
        return None
    rows = [_row(name, told.kind, module) for name, module in told.modules.items()]
    rows += _whole_rows(told)
    return Shown(HEAD, tuple(rows), _total(told, len(rows)), _untold(told))


def _row(name: str, kind: str, module: Described) -> tuple[str, ...]:
    measure, tensors = module.measure, module.tensors
    return (
        path_of(name, "kernel"),
        kind,
        _shape(measure.kernel),
        ", ".join(map(str, measure.ranks)) or "none",
        "" if module.alpha is None else f"{module.alpha:g}",
        f"{module.scaling:g}",
        ", ".join(sorted({tensor.dtype.name for tensor in tensors})),
        f"{_size(tensors):,}",
        measure.form,
    )


def _whole_rows(told: Description) -> list[tuple[str, ...]]:
    """Returns the lines of what is trained whole."""
    params = ParamsAlone()
    for key, tensor in told.whole.items():
        add_whole(params, key, tensor)
    return [
        (path, "full", _shape(x.shape), "", "", "", x.dtype.name, f"{x.size:,}", "")
        for path, x in params.shapes.items()
    ]


def _total(told: Description, targets: int) -> str:
    trained = [t for module in told.modules.values() for t in module.tensors]
    trained += told.whole.values()
    total = f"{targets} targets, {_size(trained):,} values, {_bytes(trained):,} bytes"
    if told.projections:
        frozen = [*told.projections.values()]
        total += f"; frozen projections of {_size(frozen):,} values beside them"
    return total


def _untold(told: Description) -> str | None:
    if told.kind == "IA3":
        return _OF_SCALES
    if told.kind != "VERA":
        kernels = [module.measure.kernel for module in told.modules.values()]
        return _OF_PAIRS if any(len(kernel) == 2 for kernel in kernels) else None
    if told.projections:
        widest = told.projections["vera_A"].shape[1]
        return f"{_OF_VERA}; the widest has {widest}, those of the projection"
    return (
        f"{_OF_VERA}; nor the projections, which torch draws where the config has "
        "`save_projection=False`"
    )


def _size(tensors: Iterable[np.ndarray]) -> int:
    return sum(tensor.size for tensor in tensors)


def _bytes(tensors: Iterable[np.ndarray]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _shape(shape: Sequence[int | None]) -> str:
    return "×".join("?" if n is None else str(n) for n in shape) or "scalar"

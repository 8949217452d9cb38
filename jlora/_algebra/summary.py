"""The lines that `python -m jlora inspect` prints, one for each leaf of an adapter."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._adapter.entries import kernel_shape
from .._adapter.factors import LoraFactors
from .._adapter.variants import variant_of_entry
from . import compare
from .spectrum import effective_rank, singular_values

HEAD = (
    "path",
    "kernel",
    "rank",
    "scaling",
    "dtype",
    "‖a‖",
    "‖b‖",
    "‖ΔW‖",
    "σ₁",
    "99 %",
)


def row(path: str, entry: Any) -> tuple[str, ...]:
    """Returns what is said of an entry, in the columns of `HEAD`."""
    factors = compare.told(entry)
    if not isinstance(factors, LoraFactors):
        norm = f"{compare.norm(factors):.4g}"
        note = variant_of_entry(entry).note(entry)
        shape, dtype = shape_of(kernel_shape(entry)), str(factors.dtype)
        return (path, shape, note, "", dtype, norm, "", "", "", "")
    entry = factors
    values = singular_values(compare.on_host(entry))
    return (
        path,
        shape_of(entry.kernel_shape),
        f"{entry.rank}{variant_of_entry(entry).note(entry)}",
        f"{entry.scaling:g}",
        str(entry.a.dtype),
        f"{compare.norm(entry.a):.4g}",
        f"{compare.norm(entry.b):.4g}",
        f"{np.linalg.norm(values):.4g}",
        f"{values.max():.4g}",
        str(effective_rank(values).max()),
    )


def shape_of(shape: Sequence[int]) -> str:
    """Returns a shape as text.

    >>> shape_of((2, 3)), shape_of(())
    ('2×3', 'scalar')
    """
    return "×".join(map(str, shape)) or "scalar"

"""What differs between two entries of adapters, on the host."""

from typing import Any

import jax
import numpy as np

from .._adapter.entries import SlicedFactors, TrainedRows
from .._adapter.factors import LoraFactors
from .spectrum import distance, singular_values


def difference(one: Any, other: Any) -> tuple[str, str] | None:
    """Returns the relative distance of two entries, and what differs, if at all."""
    if isinstance(one, TrainedRows) != isinstance(other, TrainedRows):
        return "", "rows and a whole table"
    if isinstance(one, TrainedRows) and _rows(one) != _rows(other):
        return "", "rows"
    one, other = told(one), told(other)
    kinds = [isinstance(entry, LoraFactors) for entry in (one, other)]
    if kinds[0] != kinds[1]:
        return "", "factors and a whole leaf"
    if kinds[0] and (one.magnitude is None) != (other.magnitude is None):
        return "", "DoRA's magnitude"
    leaves = [jax.tree.leaves(entry) for entry in (one, other)]
    fields = ("rank", "scaling", "kernel_shape", "axes") if kinds[0] else ("shape",)
    what = [f for f in fields if getattr(one, f) != getattr(other, f)]
    pairs = list(zip(*leaves, strict=True))
    what += ["dtype"] if any(x.dtype != y.dtype for x, y in pairs) else []
    if not what and all(np.array_equal(x, y) for x, y in pairs):
        return None
    return _relative(one, other), ", ".join(what) or "values"


def _rows(entry: TrainedRows) -> Any:
    """Returns which rows of what table are trained."""
    return entry.rows, entry.kernel_shape, entry.axes


def _relative(one: Any, other: Any) -> str:
    if not isinstance(one, LoraFactors):
        if one.shape != other.shape:
            return ""
        own, apart = norm(one), norm(np.subtract(one, other, dtype=np.float64))
    elif one.axes != other.axes or one.kernel_shape != other.kernel_shape:
        return ""
    else:
        one, other = on_host(one), on_host(other)
        own = float(np.linalg.norm(singular_values(one)))
        apart = distance(one, other)
    return f"{apart / own:.3g}" if own else f"{apart:.3g} (of zero)"


def told(entry: Any) -> Any:
    """Returns slices as the factors they stand for, and rows as their values."""
    if isinstance(entry, SlicedFactors):
        return entry.lowered()
    return entry.values if isinstance(entry, TrainedRows) else entry


def on_host(factors: LoraFactors) -> LoraFactors:
    """Returns factors of NumPy arrays, whose spectrum is one in float64."""
    return jax.tree.map(np.asarray, factors)


def norm(array: Any) -> float:
    """Returns the Frobenius norm, in float64."""
    return float(np.linalg.norm(np.asarray(array, np.float64)))

"""What differs between two entries of adapters, on the host."""

from typing import Any

import jax
import numpy as np

from .._adapter.entries import static_of
from .._adapter.factors import LoraFactors
from .._adapter.variants import variant_of_entry
from .spectrum import distance, singular_values


def difference(one: Any, other: Any) -> tuple[str, str] | None:
    """Returns the relative distance of two entries, and what differs, if at all."""
    variants = variant_of_entry(one), variant_of_entry(other)
    pairs = zip(variants, (one, other), strict=True)
    apart = [variant for variant, entry in pairs if variant.reads(entry)]
    if apart and variants[0] is not variants[1]:
        return "", f"{apart[0].name} and a whole {apart[0].leaf}"
    if apart and static_of(one) != static_of(other):
        return "", apart[0].name
    if apart and _names(one) != _names(other):
        return "", ", ".join(sorted(_names(one) ^ _names(other)))
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


def _names(entry: Any) -> set[str]:
    return set(variant_of_entry(entry).arrays(entry))


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
    """Returns the factors that an entry stands for, or its values if the kernel tells.

    >>> told(np.ones(3))
    array([1., 1., 1.])
    """
    variant = variant_of_entry(entry)
    if not variant.reads(entry):
        return variant.lowered(entry, None)
    values = list(variant.arrays(entry).values())
    flat = lambda: np.concatenate([np.ravel(value) for value in values])
    return values[0] if len(values) == 1 else flat()


def on_host(factors: LoraFactors) -> LoraFactors:
    """Returns factors of NumPy arrays, whose spectrum is one in float64."""
    return jax.tree.map(np.asarray, factors)


def norm(array: Any) -> float:
    """Returns the Frobenius norm, in float64."""
    return float(np.linalg.norm(np.asarray(array, np.float64)))

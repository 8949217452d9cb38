"""The merge, the chain rule and the comparison, in float64 by NumPy alone."""

from typing import Any

import numpy as np

import jlora


def factor_gradients(name: str, entry: Any, kernel: Any) -> dict[str, Any]:
    """The gradients of a and b from the kernel's, and the sizes of their terms."""
    kernel, a, b = (np.asarray(v, np.float64) for v in (kernel, entry.a, entry.b))
    to_a, to_b = letters(entry.axes)
    full = "abcdefgh"[: kernel.ndim]
    found = {}
    for side, spec, other in (
        ("a", f"{full},{to_b}->{to_a}", b),
        ("b", f"{full},{to_a}->{to_b}", a),
    ):
        value = entry.scaling * np.einsum(spec, kernel, other)
        terms = entry.scaling * np.einsum(spec, np.abs(kernel), np.abs(other))
        found[f"gradient of {side} of {name}"] = value, largest(terms)
    return found


def largest(x: Any) -> float:
    """The largest absolute value that is no NaN."""
    x = np.abs(np.asarray(x, np.complex128))
    return float(x[~np.isnan(x)].max(initial=0.0))


def apart(actual: Any, expected: Any, scale: float) -> float:
    """The largest difference by the scale, where neither is NaN."""
    x, y = (np.asarray(v).astype(np.complex128) for v in (actual, expected))
    there = ~np.isnan(x) & ~np.isnan(y)
    return float(np.abs(x - y)[there].max(initial=0.0) / max(scale, 1e-3))


def difference(
    name: str, actual: Any, expected: Any, scale: float, allowed: float
) -> list[str]:
    """A line if two arrays differ; a gradient may be NaN where plain JAX's is."""
    x, y = (np.isnan(np.asarray(v).astype(np.complex128)) for v in (actual, expected))
    if (x & ~y).any():
        return [f"{name} is NaN where it should not be"]
    if name.startswith("output") and (y & ~x).any():
        return [f"{name} is not NaN where it should be"]
    error = apart(actual, expected, scale)
    return [] if error <= allowed else [f"{name} is off by {error:.1e}"]


def letters(axes: jlora.KernelAxes) -> tuple[str, str]:
    """The letters of a and b, those of the kernel being a, b, c, ...; r is the rank."""
    names = "abcdefgh"
    batch, in_, out = (
        "".join(names[i] for i in group) for group in (axes.batch, axes.in_, axes.out)
    )
    return f"{batch}{in_}r", f"{batch}r{out}"


def delta(entry: jlora.LoraFactors) -> np.ndarray:
    """`s·a·b` in float64, in the layout of the kernel."""
    a, b = letters(entry.axes)
    kernel = "abcdefgh"[: entry.axes.ndim]
    factors = (np.asarray(v, np.float64) for v in (entry.a, entry.b))
    return entry.scaling * np.einsum(f"{a},{b}->{kernel}", *factors)

"""Sums of what adapters change, each times a number."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapter.factors import LoraFactors
from .._jax.dtypes import widest
from .._jax.sharding import beside
from .._params.paths import PyTree
from .changes import Factored, Valued, summable
from .matrices import Array, common_dtype

Entries = Mapping[str, Any]

# --- numbers ---


def check_number(told: str, factor: Any) -> float | Array:
    """Returns a Python float, or the scalar array that may be traced.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(factor, jax.Array | np.ndarray):
        if factor.shape == () and jnp.issubdtype(factor.dtype, jnp.number):
            return factor
        raise ValueError(
            f"`{told}` must be a number or a scalar array; got an array of shape "
            f"{factor.shape} and dtype {factor.dtype}"
        )
    if isinstance(factor, int | float | np.number) and math.isfinite(factor):
        return float(factor)
    raise ValueError(f"`{told}` must be a finite number; got {factor!r}")


def scaled(factors: LoraFactors, factor: float | Array) -> LoraFactors:
    """Returns factors of `factor·ΔW`: of another scaling, or of another, wide `b`."""
    if isinstance(factor, float):
        if _is_one(factor):
            return factors
        return dataclasses.replace(factors, scaling=factors.scaling * factor)
    return dataclasses.replace(factors, b=_times(factors.b, factor))


def _is_one(factor: float | Array) -> bool:
    return isinstance(factor, float) and factor == 1.0


def _times(b: Array, factor: float | Array) -> Array:
    """Returns a product in float32 at least, in which a factor loses nothing."""
    wide, xp = widest(b), _namespace(b, factor)
    return b.astype(wide) * xp.asarray(factor, wide)


def _namespace(*arrays: Any) -> Any:
    """Returns NumPy if the arrays among these are all on the host, else JAX's."""
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


# --- sums ---


def joined(
    caller: str, adapters: Sequence[Entries], params: PyTree = None
) -> dict[str, Any]:
    """Returns the sum of adapters, in the name of the function that was called."""
    if not adapters:
        raise ValueError(f"`{caller}` needs at least one adapter")
    changes = summable(caller, adapters, params)
    return weighted(changes, [1.0] * len(adapters))


def weighted(
    changes: Mapping[str, Factored | Valued], numbers: Sequence[float | Array]
) -> dict[str, Any]:
    """Returns the sum of what adapters change, each times a number."""
    return {path: summed(change, numbers) for path, change in changes.items()}


def summed(change: Factored | Valued, numbers: Sequence[float | Array]) -> Any:
    """Returns the sum of what adapters change in one leaf, each times a number."""
    if isinstance(change, Valued):
        return _moved(change, numbers)
    terms = [[scaled(f, numbers[i]) for f in own] for i, own in change.parts.items()]
    return change.rejoined([_sum(list(own)) for own in zip(*terms, strict=True)])


def _moved(change: Valued, numbers: Sequence[float | Array]) -> Any:
    """Returns an entry whose values are as far from the origin as numbers say."""
    values, origin = change.values, change.origin
    (first, *others), wide = values, widest(*values.values())
    if not others and _is_one(numbers[first]):
        return change.rejoined(values[first])
    xp = _namespace(origin, *values.values(), *numbers)
    start = xp.asarray(origin).astype(wide)
    far = lambda v: beside(xp.asarray(v).astype(wide), start) - start
    moves = [_times(far(v), numbers[i]) for i, v in values.items()]
    return change.rejoined(sum(moves, start))


def _sum(entries: list[LoraFactors]) -> LoraFactors:
    first = entries[0]
    if len(entries) == 1:
        return first
    alike = all(factors.scaling == first.scaling for factors in entries)
    bs = [f.b if alike else _times(f.b, f.scaling) for f in entries]
    a = _concatenated([f.a for f in entries], axis=-1)
    b = _concatenated(bs, axis=len(first.axes.batch))
    return LoraFactors(a, b, first.axes, first.scaling if alike else 1.0)


def _concatenated(arrays: list[Array], axis: int) -> Array:
    dtype = common_dtype(*arrays)
    host = all(isinstance(x, np.ndarray) for x in arrays)
    return (np if host else jnp).concatenate([x.astype(dtype) for x in arrays], axis)

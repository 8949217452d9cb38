"""Adapters as vectors: scaled, added, subtracted, and cut to a rank.

Each function acts on the deltas ΔW of an adapter by way of their factors, and forms
none of them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._adapter.factors import LoraFactors
from .._jax.dtypes import widest
from .matrices import (
    Array,
    by_path,
    check_factors,
    common_dtype,
    matrices,
    with_matrices,
)
from .spectrum import check_energy, effective_rank, product_svd, singular_values

Factored = Mapping[str, LoraFactors]


def scale(adapter: Factored, factor: float | jax.Array) -> dict[str, LoraFactors]:
    """Returns the adapter whose every ΔW is `factor` times as large.

    A Python number changes the static scaling and no array. A scalar array, which may
    be traced, is multiplied into `b`, so that another value compiles nothing anew; that
    is done in float32 at least, in which a 16-bit `b` then stays, for rounded back it
    would lose a factor near 1.

    Args:
        adapter: the factors by path.
        factor: a number, of either sign.

    Returns:
        A new adapter.

    Raises:
        UnsupportedFeatureError: for a leaf that is trained whole, or with a magnitude.
        ValueError: if `factor` is no finite number and no scalar.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = jlora.LoraFactors(jnp.ones((5, 2)), jnp.ones((2, 3)), axes, 4.0)
        >>> jlora.scale({"w": factors}, -0.5)["w"].scaling
        -2.0

    References:
        Ilharco et al., Editing Models with Task Arithmetic,
        <https://arxiv.org/abs/2212.04089>, 2022, section 2.
    """
    check_factors("jlora.scale", adapter)
    factor = check_number("jlora.scale(factor=...)", factor)
    return {path: scaled(factors, factor) for path, factors in adapter.items()}


def add(*adapters: Factored) -> dict[str, LoraFactors]:
    """Returns the adapter whose ΔW are the sums of those of the adapters.

    The sum is exact: `[a₁, a₂]·[b₁; b₂]` with the factors side by side along the rank,
    so ranks add up (`truncate` cuts them again). A path need not be in all adapters.
    Where all have the same scaling it is kept; else each is folded into its `b`, then
    in float32 at least, and the scaling of the sum is 1.

    Args:
        *adapters: the factors by path, for the same kernels; ranks may differ.

    Returns:
        A new adapter, with the paths of all.

    Raises:
        AdapterError: with every path whose kernels differ in shape or axes.
        UnsupportedFeatureError: for leaves that are trained whole, or with a magnitude.
        ValueError: if no adapter is given.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = jlora.LoraFactors(jnp.ones((5, 2)), jnp.ones((2, 3)), axes, 0.5)
        >>> total = jlora.add({"w": factors}, {"w": factors, "v": factors})
        >>> total["w"].rank, total["v"].rank, float(jlora.delta(total["w"])[0, 0])
        (4, 2, 2.0)

    References:
        Ilharco et al., Editing Models with Task Arithmetic,
        <https://arxiv.org/abs/2212.04089>, 2022, section 2.
    """
    return joined("jlora.add", adapters)


def subtract(one: Factored, other: Factored) -> dict[str, LoraFactors]:
    """Returns the adapter whose ΔW are those of `one` less those of `other`.

    The sum of `one` and the negative of `other`, as `add` forms it: equal scalings are
    kept, and a path that only `other` has is there with its negative.

    Args:
        one: the factors by path.
        other: the factors by path, for the same kernels; ranks may differ.

    Returns:
        A new adapter, with the paths of both.

    Raises:
        AdapterError: with every path whose kernels differ in shape or axes.
        UnsupportedFeatureError: for leaves that are trained whole, or with a magnitude.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = jlora.LoraFactors(jnp.ones((5, 2)), jnp.ones((2, 3)), axes, 0.5)
        >>> gone = jlora.subtract({"w": factors}, {"w": factors})
        >>> float(jnp.abs(jlora.delta(gone["w"])).max())
        0.0

    References:
        Ilharco et al., Editing Models with Task Arithmetic,
        <https://arxiv.org/abs/2212.04089>, 2022, section 2.
    """
    check_factors("jlora.subtract", one, other)
    negative = {p: dataclasses.replace(f, b=-f.b) for p, f in other.items()}
    return joined("jlora.subtract", (one, negative))


def truncate(
    adapter: Factored, rank: int | None = None, *, energy: float | None = None
) -> dict[str, LoraFactors]:
    """Returns the adapter of the best approximations of each ΔW of a smaller rank.

    No matrix of that rank is nearer to ΔW, by the spectral or the Frobenius norm. ΔW is
    not formed: QR of both factors leaves a matrix of rank × rank to decompose. Both
    new factors hold the root of each singular value of `a·b`, and the scaling is kept,
    so that training may go on. Dtypes and shardings are those of the old factors.

    Args:
        adapter: the factors by path.
        rank: the largest rank of each target; a ΔW of a smaller one is kept whole.
        energy: instead of `rank`, the share of the squared singular values to keep,
            such as 0.99: each target gets the least rank that does, at least 1. Layers
            of a stack and experts share a rank: the largest that one of them needs.

    Returns:
        A new adapter.

    Raises:
        UnsupportedFeatureError: for a leaf that is trained whole, or with a magnitude.
        TypeError: for `energy` under `jax.jit`, where a rank cannot depend on values.
        ValueError: if not one of `rank` and `energy` is given, or it is out of range.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = jlora.LoraFactors(jnp.ones((5, 4)), jnp.ones((4, 3)), axes, 0.5)
        >>> small = jlora.truncate({"w": factors}, energy=0.99)["w"]
        >>> small.rank, bool(jnp.allclose(jlora.delta(small), jlora.delta(factors)))
        (1, True)

    References:
        Eckart and Young, The approximation of one matrix by another of lower rank,
        Psychometrika 1, 1936.
    """
    check_factors("jlora.truncate", adapter)
    if (rank is None) == (energy is None):
        raise ValueError(
            "`jlora.truncate` takes either `rank` or `energy`; got "
            f"rank={rank!r} and energy={energy!r}"
        )
    if energy is not None:
        check_energy("jlora.truncate", energy)
        return {p: _truncated(f, _least_rank(p, f, energy)) for p, f in adapter.items()}
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"`jlora.truncate(rank=...)` must be an int of at least 1; got {rank!r}"
        )
    return {path: _truncated(factors, rank) for path, factors in adapter.items()}


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
        return dataclasses.replace(factors, scaling=factors.scaling * factor)
    return dataclasses.replace(factors, b=_times(factors.b, factor))


def _times(b: Array, factor: float | Array) -> Array:
    """Returns a product in float32 at least, in which a factor loses nothing."""
    wide = widest(b)
    host = isinstance(b, np.ndarray) and not isinstance(factor, jax.Array)
    return b.astype(wide) * (np if host else jnp).asarray(factor, wide)


# --- sums ---


def joined(caller: str, adapters: Sequence[Factored]) -> dict[str, LoraFactors]:
    """Returns the sum of adapters, in the name of the function that was called."""
    if not adapters:
        raise ValueError(f"`{caller}` needs at least one adapter")
    check_factors(caller, *adapters)
    several = by_path(caller, adapters)
    return {path: _sum(list(found.values())) for path, found in several.items()}


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


# --- ranks ---


def _least_rank(path: str, factors: LoraFactors, energy: float) -> int:
    values = singular_values(factors)
    if isinstance(values, Tracer):
        raise TypeError(
            f"the rank of {path!r} would depend on its values, which are not known "
            "under `jax.jit`; give `jlora.truncate` a `rank`, or call it outside"
        )
    return max(1, int(np.max(effective_rank(values, energy))))


def _truncated(factors: LoraFactors, rank: int) -> LoraFactors:
    u, s, v = product_svd(*matrices(factors))
    root = s[..., :rank] ** 0.5
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    return with_matrices(factors, a, b)

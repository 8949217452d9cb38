"""Adapters as vectors: scaled, added, subtracted, and cut to a rank.

Each function acts on the deltas ΔW of an adapter by way of their factors, and forms
none of them. Entries of other variants are lowered to factors first, in `changes`.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from .._adapter.factors import LoraFactors
from .._adapter.variants import variant_of_entry
from .._params.paths import PyTree
from .changes import Factored, Valued, factored, summable
from .matrices import Array, matrices, with_matrices
from .spectrum import check_energy, effective_rank, product_svd, singular_values
from .sums import Entries, check_number, joined, summed, weighted


def scale(
    adapter: Entries, factor: float | jax.Array, *, params: PyTree = None
) -> dict[str, Any]:
    """Returns the adapter whose every ΔW is `factor` times as large.

    A Python number changes the static scaling and no array, in entries of any variant
    that has one. A scalar array, which may
    be traced, is multiplied into `b`, so that another value compiles nothing anew; that
    is done in float32 at least, in which a 16-bit `b` then stays, for rounded back it
    would lose a factor near 1. Variants other than slices and layers become plain
    factors then. A scale `l` (IA3) becomes `1 + factor·(l - 1)`.

    Args:
        adapter: the entries by path.
        factor: a number, of either sign.
        params: the frozen params, for entries whose ΔW is counted from them: leaves
            and rows that are trained whole.

    Returns:
        A new adapter.

    Raises:
        UnsupportedFeatureError: with every entry that has no sum, such as DoRA's, or
            none without `params`.
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
    changes = summable("jlora.scale", [adapter], params)
    factor = check_number("jlora.scale(factor=...)", factor)
    kept = _with_scaling(adapter, factor)
    others = {path: each for path, each in changes.items() if path not in kept}
    return {**adapter, **kept, **weighted(others, [factor])}


def add(*adapters: Entries, params: PyTree = None) -> dict[str, Any]:
    """Returns the adapter whose ΔW are the sums of those of the adapters.

    The sum is exact: `[a₁, a₂]·[b₁; b₂]` with the factors side by side along the rank,
    so ranks add up (`truncate` cuts them again). A path need not be in all adapters.
    Where all have the same scaling it is kept; else each is folded into its `b`, then
    in float32 at least, and the scaling of the sum is 1.

    Slices of the same outputs, and the same layers of a stack, are added one by one and
    stay what they are; so do leaves trained whole, the same rows, and scales (IA3),
    whose distance from where they start is added. All else is lowered, and its sum is
    plain `LoraFactors`.

    Args:
        *adapters: the entries by path, for the same kernels; ranks and variants may
            differ.
        params: the frozen params, for entries whose ΔW is counted from them: leaves
            and rows that are trained whole.

    Returns:
        A new adapter, with the paths of all.

    Raises:
        AdapterError: with every path whose kernels differ in shape or axes, or whose
            entries have no form in common.
        UnsupportedFeatureError: with every entry that has no sum, such as DoRA's, or
            none without `params`.
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
    return joined("jlora.add", adapters, params)


def subtract(one: Entries, other: Entries, *, params: PyTree = None) -> dict[str, Any]:
    """Returns the adapter whose ΔW are those of `one` less those of `other`.

    The sum of `one` and the negative of `other`, as `add` forms it: equal scalings are
    kept, and a path that only `other` has is there with its negative.

    Args:
        one: the entries by path.
        other: the entries by path, for the same kernels; ranks may differ.
        params: the frozen params, for entries whose ΔW is counted from them: leaves
            and rows that are trained whole.

    Returns:
        A new adapter, with the paths of both.

    Raises:
        AdapterError: with every path whose kernels differ in shape or axes, or whose
            entries have no form in common.
        UnsupportedFeatureError: with every entry that has no sum, such as DoRA's, or
            none without `params`.

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
    changes = summable("jlora.subtract", (one, other), params)
    return {path: _difference(change) for path, change in changes.items()}


def truncate(
    adapter: Entries,
    rank: int | None = None,
    *,
    energy: float | None = None,
    params: PyTree = None,
) -> dict[str, Any]:
    """Returns the adapter of the best approximations of each ΔW of a smaller rank.

    No matrix of that rank is nearer to ΔW, by the spectral or the Frobenius norm. ΔW is
    not formed: QR of both factors leaves a matrix of rank × rank to decompose. Both
    new factors hold the root of each singular value of `a·b`, and the scaling is kept,
    so that training may go on. Dtypes and shardings are those of the old factors.
    Slices and layers stay what they are, each with the best factors of its own; entries
    of other variants become plain `LoraFactors`.

    Args:
        adapter: the entries by path.
        rank: the largest rank of each target; a ΔW of a smaller one is kept whole.
        energy: instead of `rank`, the share of the squared singular values to keep,
            such as 0.99: each target gets the least rank that does, at least 1. Layers
            of a stack, experts and slices share a rank: the largest that one of them
            needs.
        params: the frozen params, for rows that are trained: their ΔW is counted from
            them.

    Returns:
        A new adapter.

    Raises:
        UnsupportedFeatureError: with every entry that has no two factors: leaves that
            are trained whole, scales (IA3), those with a magnitude.
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
    changes = factored("jlora.truncate", [adapter], params)
    if (rank is None) == (energy is None):
        raise ValueError(
            "`jlora.truncate` takes either `rank` or `energy`; got "
            f"rank={rank!r} and energy={energy!r}"
        )
    if energy is not None:
        check_energy("jlora.truncate", energy)
        return {p: _truncated(c, _least_rank(p, c, energy)) for p, c in changes.items()}
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(
            f"`jlora.truncate(rank=...)` must be an int of at least 1; got {rank!r}"
        )
    return {path: _truncated(change, rank) for path, change in changes.items()}


# --- multiples ---


def _with_scaling(adapter: Entries, factor: float | Array) -> dict[str, Any]:
    """Returns the entries of which a number changes the scaling alone, scaled."""
    if not isinstance(factor, float):
        return {}
    return {
        path: dataclasses.replace(entry, scaling=entry.scaling * factor)
        for path, entry in adapter.items()
        if variant_of_entry(entry).rank is not None
    }


def _difference(change: Factored | Valued) -> Any:
    """Returns the change in the first of two adapters less that in the second."""
    if isinstance(change, Valued):
        return summed(change, [1.0, -1.0])
    # Negative factors, not a negative scaling: then both have one scaling.
    negative = lambda own: tuple(dataclasses.replace(f, b=-f.b) for f in own)
    parts = {i: negative(own) if i else own for i, own in change.parts.items()}
    return summed(change._replace(parts=parts), [1.0, 1.0])


# --- ranks ---


def _least_rank(path: str, change: Factored, energy: float) -> int:
    (parts,) = change.parts.values()
    several = [singular_values(factors) for factors in parts]
    if any(isinstance(values, Tracer) for values in several):
        raise TypeError(
            f"the rank of {path!r} would depend on its values, which are not known "
            "under `jax.jit`; give `jlora.truncate` a `rank`, or call it outside"
        )
    ranks = [int(np.max(effective_rank(values, energy))) for values in several]
    return max(1, *ranks)


def _truncated(change: Factored, rank: int) -> Any:
    (parts,) = change.parts.values()
    return change.rejoined([_best(factors, rank) for factors in parts])


def _best(factors: LoraFactors, rank: int) -> LoraFactors:
    u, s, v = product_svd(*matrices(factors))
    root = s[..., :rank] ** 0.5
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    return with_matrices(factors, a, b)

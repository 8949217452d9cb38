"""Singular values of a change ΔW, without forming it, and the ranks they tell.

With `a = Qa·Ra` and `bᵀ = Qb·Rb`, the singular values of `a·b` are those of `Ra·Rbᵀ`,
which is of rank × rank. In float32 on JAX's arrays, and in float64 on NumPy's.

References:
    Golub and Van Loan, Matrix Computations, 4th edition, 2013, section 5.2.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .._adapter.factors import LoraFactors
from .._params.paths import PyTree
from .changes import factored
from .matrices import Array, matrices


def spectrum(
    adapter: Mapping[str, Any], *, params: PyTree = None
) -> dict[str, jax.Array]:
    """Returns the singular values of every ΔW of an adapter, the largest first.

    ΔW is never formed. In float32, so that values of less than 1e-7 of the largest are
    noise; factors that are NumPy arrays are treated in NumPy, in float64. Entries of
    other variants, slices and layers are lowered to two factors of the whole kernel.

    Args:
        adapter: the entries by path.
        params: the frozen params, for rows that are trained: their ΔW is counted from
            them.

    Returns:
        A dict from path to values of shape `(*batch, rank)`: each layer of a stack and
        each expert has its own.

    Raises:
        UnsupportedFeatureError: with every entry that has no two factors: leaves that
            are trained whole, scales (IA3), those with a magnitude.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = jlora.LoraFactors(jnp.eye(4, 2), jnp.eye(2, 3), axes, 3.0)
        >>> jlora.spectrum({"w": factors})["w"].tolist()
        [3.0, 3.0]

    References:
        Golub and Van Loan, Matrix Computations, 4th edition, 2013, section 5.2.
    """
    changes = factored("jlora.spectrum", [adapter], params, whole=True)
    return {p: singular_values(change.parts[0][0]) for p, change in changes.items()}


def singular_values(factors: LoraFactors) -> Array:
    """Returns the singular values of ΔW, of shape `(*batch, rank)`, the largest first.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import KernelAxes
        >>> axes = KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = LoraFactors(jnp.eye(4, 2), jnp.eye(2, 3), axes, 3.0)
        >>> singular_values(factors).tolist()
        [3.0, 3.0]
    """
    return abs(factors.scaling) * _product_values(*matrices(factors))


def distance(one: LoraFactors, other: LoraFactors) -> float:
    """Returns ‖ΔW₁ − ΔW₂‖ by the Frobenius norm, of two kernels of the same axes.

    The difference is `[a₁, a₂]·[s₁·b₁; −s₂·b₂]`, a product of the rank of both.
    """
    (a1, b1), (a2, b2) = matrices(one), matrices(other)
    xp = a1.__array_namespace__()
    a = xp.concatenate([a1, a2], axis=-1)
    b = xp.concatenate([one.scaling * b1, -other.scaling * b2], axis=-2)
    return float(np.linalg.norm(_product_values(a, b)))


def product_svd(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Returns `u, s, v` with `a·b = u·diag(s)·v`, for `matrices` of some factors.

    As many triplets as the smallest of rank, inputs and outputs; `u` has orthonormal
    columns, `v` orthonormal rows, and `s` falls.
    """
    return _product_svd(a, b) if isinstance(a, np.ndarray) else _jitted_svd(a, b)


def _product_svd(a: Array, b: Array) -> tuple[Array, Array, Array]:
    linalg = a.__array_namespace__().linalg
    with jax.default_matmul_precision("highest"):
        qa, ra = linalg.qr(a)
        qb, rb = linalg.qr(b.mT)
        u, s, v = linalg.svd(ra @ rb.mT, full_matrices=False)
        return qa @ u, s, v @ qb.mT


def _product_values(a: Array, b: Array) -> Array:
    return _core_values(a, b) if isinstance(a, np.ndarray) else _jitted_values(a, b)


def _core_values(a: Array, b: Array) -> Array:
    xp = a.__array_namespace__()
    with jax.default_matmul_precision("highest"):
        inner = xp.linalg.qr(a, mode="r") @ xp.linalg.qr(b.mT, mode="r").mT
        values = xp.linalg.svd(inner, compute_uv=False)
    missing = a.shape[-1] - values.shape[-1]  # of a rank beyond the size of a side
    return xp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


_jitted_svd = jax.jit(_product_svd)
_jitted_values = jax.jit(_core_values)


# --- what a spectrum tells ---


def effective_rank(values: Any, energy: float = 0.99) -> Array:
    """Returns how many singular values hold a share of the energy Σσ².

    Args:
        values: singular values `(*batch, rank)`, the largest first: of `spectrum`.
        energy: the share of the squared singular values, above 0 and at most 1.

    Returns:
        Integers of shape `(*batch,)`; 0 for a ΔW of zero. A stack needs their maximum.

    Raises:
        ValueError: if `energy` is no such share.

    Example:
        >>> import numpy as np, jlora
        >>> jlora.effective_rank(np.array([[3.0, 0.1, 0.0], [2.0, 1.0, 1.0]])).tolist()
        [1, 3]
    """
    check_energy("jlora.effective_rank", energy)
    squares = _relative(values) ** 2
    held = squares.__array_namespace__().cumsum(squares, axis=-1)
    short = held < energy * held[..., -1:]
    return short.sum(axis=-1) + (held[..., -1] > 0).astype(int)


def energy_kept(values: Any, rank: int) -> Array:
    """Returns the share of the energy Σσ² that the first `rank` values hold.

    `1 - energy_kept` is the squared relative error of `jlora.truncate` to that rank, by
    the Frobenius norm.

    Args:
        values: singular values `(*batch, rank)`, the largest first: of `spectrum`.
        rank: how many of them are kept.

    Returns:
        Numbers of shape `(*batch,)`; 1 for a ΔW of zero, which loses nothing.

    Example:
        >>> import numpy as np, jlora
        >>> round(float(jlora.energy_kept(np.array([3.0, 1.0, 0.0]), 1)), 3)
        0.9

    References:
        Eckart and Young, The approximation of one matrix by another of lower rank,
        Psychometrika 1, 1936.
    """
    squares = _relative(values) ** 2
    total = squares.sum(axis=-1)
    lost = squares[..., rank:].sum(axis=-1)
    return 1 - lost / (total + (total == 0).astype(total.dtype))


def stable_rank(values: Any) -> Array:
    """Returns ‖ΔW‖²_F / ‖ΔW‖²₂ = Σσ² / σ₁², which small values hardly change.

    Args:
        values: singular values `(*batch, rank)`, the largest first: of `spectrum`.

    Returns:
        Numbers of shape `(*batch,)` between 1 and the rank; 0 for a ΔW of zero.

    Example:
        >>> import numpy as np, jlora
        >>> float(jlora.stable_rank(np.array([2.0, 1.0, 1.0])))
        1.5

    References:
        Rudelson and Vershynin, Sampling from large matrices: an approach through
        geometric functional analysis, <https://arxiv.org/abs/math/0503442>, 2007.
    """
    return (_relative(values) ** 2).sum(axis=-1)


def entropy_rank(values: Any) -> Array:
    """Returns exp(−Σ pᵢ log pᵢ) with pᵢ = σᵢ/Σσ: Roy and Vetterli's effective rank.

    Args:
        values: singular values `(*batch, rank)`, the largest first: of `spectrum`.

    Returns:
        Numbers of shape `(*batch,)` between 1 and the rank; 0 for a ΔW of zero.

    Example:
        >>> import numpy as np, jlora
        >>> round(float(jlora.entropy_rank(np.array([1.0, 1.0, 0.0]))), 6)
        2.0

    References:
        Roy and Vetterli, The effective rank: a measure of effective dimensionality,
        EUSIPCO, 2007, definition 1.
    """
    relative = _relative(values)
    xp = relative.__array_namespace__()
    total = relative.sum(axis=-1, keepdims=True)
    shares = relative / (total + (total == 0).astype(total.dtype))
    logs = xp.log(shares + (shares == 0).astype(shares.dtype))  # p·log p is 0 at 0
    some = (total[..., 0] > 0).astype(total.dtype)
    return xp.exp(-(shares * logs).sum(axis=-1)) * some


def check_energy(caller: str, energy: float) -> None:
    """Raises ValueError if `energy` is no share of a whole."""
    if not 0 < energy <= 1:
        raise ValueError(
            f"`{caller}(energy=...)` is a share of the squared singular values, above "
            f"0 and at most 1; got {energy!r}"
        )


def _relative(values: Any) -> Array:
    """Returns the values over the largest, so that no square underflows."""
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    largest = values[..., :1]
    return values / (largest + (largest == 0).astype(largest.dtype))

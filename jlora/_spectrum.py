"""Singular values of a change ΔW, and how far two changes are apart, in NumPy.

Neither forms ΔW: with `a = Qa·Ra` and `bᵀ = Qb·Rb`, the singular values of `a·b` are
those of `Ra·Rbᵀ`, which is of rank × rank.

References:
    Golub and Van Loan, Matrix Computations, 4th edition, 2013, section 5.2.
"""

import numpy as np

from ._factors import LoraFactors
from ._torch_layout import factor_matrices

Array = np.ndarray


def singular_values(factors: LoraFactors) -> Array:
    """Returns the singular values of ΔW, of shape `(*batch, rank)`, the largest first.

    Example:
        >>> import jax.numpy as jnp
        >>> from jlora import KernelAxes
        >>> axes = KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = LoraFactors(jnp.eye(4, 2), jnp.eye(2, 3), axes, 3.0)
        >>> singular_values(factors)
        array([3., 3.])
    """
    a, b = (matrix.astype(np.float64) for matrix in factor_matrices(factors))
    return abs(factors.scaling) * _core_values(a, b)


def distance(one: LoraFactors, other: LoraFactors) -> float:
    """Returns ‖ΔW₁ − ΔW₂‖ by the Frobenius norm, of two kernels of the same axes.

    The difference is `[a₁, a₂]·[s₁·b₁; −s₂·b₂]`, a product of the rank of both.
    """
    (a1, b1), (a2, b2) = factor_matrices(one), factor_matrices(other)
    a = np.concatenate([a1, a2], axis=-1, dtype=np.float64)
    b = np.concatenate([one.scaling * b1, -other.scaling * b2], -2, dtype=np.float64)
    return float(np.linalg.norm(_core_values(a, b)))


def _core_values(a: Array, b: Array) -> Array:
    inner = np.linalg.qr(a).R @ np.swapaxes(
        np.linalg.qr(np.swapaxes(b, -1, -2)).R, -1, -2
    )
    values = np.linalg.svd(inner, compute_uv=False)
    missing = a.shape[-1] - values.shape[-1]  # of a rank beyond the size of a side
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


def effective_rank(values: Array, energy: float = 0.99) -> int:
    """Returns how many singular values hold a share of the energy, at most over slices.

    >>> effective_rank(np.array([3.0, 0.1, 0.0]))
    1
    """
    squares = np.cumsum(values**2, axis=-1)
    share = squares < energy * squares[..., -1:]
    return int(share.sum(axis=-1).max() + (squares[..., -1:].max() > 0))

"""Low-rank decompositions of (batches of) matrices, in float32 and `jit`-able."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# More columns of the sketch than the rank: Halko et al. advise 5 to 10.
_OVERSAMPLING = 8


class Svd(NamedTuple):
    """`matrix = u · diag(s) · vt`, the largest singular values first."""

    u: jax.Array
    s: jax.Array
    vt: jax.Array

    def cut(self, columns: slice) -> "Svd":
        """Returns some of the singular values with their vectors."""
        return Svd(self.u[..., columns], self.s[..., columns], self.vt[..., columns, :])


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns `x @ y` at the highest precision: TPUs and GPUs round float32 else."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def transposed(matrix: jax.Array) -> jax.Array:
    """Returns the transpose of each matrix."""
    return jnp.swapaxes(matrix, -1, -2)


def svd(matrix: jax.Array) -> Svd:
    """Returns the thin singular value decomposition of each matrix."""
    return Svd(*jnp.linalg.svd(matrix, full_matrices=False))


def randomized_svd(key: jax.Array, matrix: jax.Array, rank: int, n_iter: int) -> Svd:
    """Returns the `rank` largest singular values, from a random projection.

    The range of `M` is found as that of `(M·Mᵀ)ⁿ·M·Ω` with a Gaussian `Ω` of a few
    columns more than the rank, made orthonormal after each product; then
    `M ≈ Q·(Qᵀ·M)`.

    References:
        Halko, Martinsson and Tropp, Finding Structure with Randomness,
        <https://arxiv.org/abs/0909.4061>, 2011, algorithms 4.4 and 5.1.
    """
    *batch, n_in, n_out = matrix.shape
    columns = min(rank + _OVERSAMPLING, n_in, n_out)
    omega = jax.random.normal(key, (*batch, n_out, columns), matrix.dtype)
    q = _range(matmul(matrix, omega))
    for _ in range(n_iter):
        q = _range(matmul(transposed(matrix), q))
        q = _range(matmul(matrix, q))
    small = svd(matmul(transposed(q), matrix))
    return Svd(matmul(q, small.u), small.s, small.vt).cut(slice(0, rank))


def _range(matrix: jax.Array) -> jax.Array:
    """Returns an orthonormal basis of the columns."""
    return jnp.linalg.qr(matrix).Q


def balanced(
    parts: Svd, scaling: float, top: jax.Array, spare: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns `a` and `b` with `scaling · a·b = u·diag(s)·vt`, `√s` in each of them.

    Where a singular value is zero both sides would be zero, a point that no gradient
    leaves. There `a` keeps its column of `spare` and `b` is zero, as in a new adapter.

    Args:
        parts: as many singular values as the rank.
        scaling: the scaling of the factors.
        top: the largest singular value of the whole matrix, `(*batch,)`.
        spare: a matrix of the shape of `a`.
    """
    u, s, vt = parts
    root = jnp.sqrt(s / scaling)
    floor = 10 * jnp.finfo(s.dtype).eps * top
    alive = s > floor[..., None]
    a = jnp.where(alive[..., None, :], u * root[..., None, :], spare.astype(u.dtype))
    b = jnp.where(alive[..., :, None], root[..., :, None] * vt, 0)
    return a, b

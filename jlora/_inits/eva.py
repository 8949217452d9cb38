"""EVA: `a` begins with the directions along which the inputs of a kernel vary most."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapter.factors import Adapter, LoraFactors
from .._algebra.matrices import with_matrices
from .._jax.linalg import matmul, svd, transposed
from .._params.input_stats import InputStats, projection
from .from_kernel import check_plain
from .moments import check_stats


def eva(
    adapter: Mapping[str, Any], stats: Mapping[str, InputStats], *, rho: float = 2.0
) -> Adapter:
    """Returns an adapter whose `a` spans the directions in which the inputs vary most.

    The columns of `a` are the right singular vectors of the inputs with the largest
    singular values (the eigenvectors of their second moment) and `b` is zero, so that
    nothing changes at the start. Ranks are shared out anew: of all components of all
    targets those that explain the largest share of their own inputs' energy are taken,
    as many as the ranks of `adapter` add up to, at most `rho` times its rank in each.
    Scalings stay, as with PEFT's `adjust_scaling_factors`. The moments are not centred.

    Call it outside of `jax.jit`: ranks are shapes. With `rho=1` ranks stay and it may
    be traced. A stack of layers or of experts has one rank, and counts with the mean
    share of its slices, as many times as it has slices.

    Args:
        adapter: a new adapter, as `lora.init` gives it. Leaves that are trained whole
            stay as they are.
        stats: what `lora.inputs` gives, summed over some batches.
        rho: by what factor a rank may grow; 1 keeps all ranks.

    Returns:
        An adapter with the targets that have got a rank of at least one. A target that
        has got none is left out: its base stays as it is.

    Raises:
        AdapterError: if `stats` lacks a target or has another shape.
        UnsupportedFeatureError: for an entry that is more than two factors.
        ValueError: if `rho` is less than 1.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig(rank=1))
        >>> params, x = {"w": jnp.ones((3, 4))}, jnp.diag(jnp.array([1.0, 5.0, 2.0]))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> adapter = jlora.eva(adapter, lora.inputs(params, x))
        >>> jnp.abs(adapter["w"].a[:, 0]).round(3).tolist()
        [0.0, 1.0, 0.0]

    References:
        Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained
        Variance Adaptation, <https://arxiv.org/abs/2410.07170>, 2024, algorithm 1.
    """
    if not rho >= 1:
        raise ValueError(f"`rho` must be at least 1, got {rho!r}")
    check_plain("eva", adapter)
    check_stats("eva", adapter, stats)
    targets = {p: e for p, e in adapter.items() if isinstance(e, LoraFactors)}
    found = {
        path: _components(path, stats[path].moment, _most(entry, rho))
        for path, entry in targets.items()
    }
    ranks = {path: entry.rank for path, entry in targets.items()}
    if rho > 1:
        shares = {path: share for path, (_, share) in found.items()}
        ranks = _shared_out(targets, shares)
    new = dict(adapter)
    for path, entry in targets.items():
        del new[path]
        if ranks[path]:
            vectors, _ = found[path]
            new[path] = _with_a(entry, vectors[..., : ranks[path]])
    return {path: new[path] for path in adapter if path in new}


def _most(entry: LoraFactors, rho: float) -> int:
    """Returns the largest rank that a target may get."""
    return min(round(rho * entry.rank), *entry.axes.fans(entry.kernel_shape))


def _with_a(entry: LoraFactors, vectors: jax.Array) -> LoraFactors:
    *batch, _, rank = vectors.shape
    fan_out = entry.axes.fans(entry.kernel_shape)[1]
    return with_matrices(entry, vectors, jnp.zeros((*batch, rank, fan_out)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _components(path: str, moment: jax.Array, count: int) -> tuple[jax.Array, Any]:
    """Returns the first eigenvectors, and each one's share of the energy."""
    *_, size, columns = moment.shape
    if columns == size:
        values, vectors = jnp.linalg.eigh((moment + transposed(moment)) / 2)
        total = jnp.trace(moment, axis1=-2, axis2=-1)
        values, vectors = values[..., ::-1], vectors[..., ::-1]
    else:
        omega = jnp.broadcast_to(projection(path, size, columns), moment.shape)
        vectors, values = _from_sketch(moment, omega)
        # For random orthonormal Ω the mean of tr(Ωᵀ·M·Ω) is k/n of the trace of M.
        total = size / columns * (omega * moment).sum((-2, -1))
    share = values[..., :count] / jnp.maximum(total, 1e-30)[..., None]
    return vectors[..., :count], jnp.maximum(share, 0)


def _from_sketch(sketch: jax.Array, omega: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns eigenvectors and eigenvalues of a second moment from `M·Ω`.

    Nyström's approximation `M·Ω·(Ωᵀ·M·Ω)⁻¹·(M·Ω)ᵀ`, with a small shift for stability.

    References:
        Tropp et al., Fixed-Rank Approximation of a Positive-Semidefinite Matrix from
        Streaming Data, <https://arxiv.org/abs/1706.05736>, 2017, algorithm 3.
    """
    size = sketch.shape[-2]
    eps = float(jnp.finfo(sketch.dtype).eps)
    shift = math.sqrt(size) * eps * jnp.linalg.norm(sketch, axis=(-2, -1))
    shift = jnp.maximum(shift, 1e-30)[..., None, None]
    shifted = sketch + shift * omega
    core = matmul(transposed(omega), shifted)
    root = jnp.linalg.cholesky((core + transposed(core)) / 2)
    half = jax.lax.linalg.triangular_solve(
        root, shifted, left_side=False, lower=True, transpose_a=True
    )
    found = svd(half)
    return found.u, jnp.maximum(found.s**2 - shift[..., 0], 0)


def _shared_out(
    targets: Mapping[str, LoraFactors], shares: Mapping[str, Any]
) -> dict[str, int]:
    """Gives the budget, the sum of all ranks, to the largest shares of all targets.

    A component of a stack costs one unit for each of its slices.
    """
    slices = {p: math.prod(e.a.shape[: len(e.axes.batch)]) for p, e in targets.items()}
    budget = sum(entry.rank * slices[path] for path, entry in targets.items())
    ranked = sorted(
        (-float(share), place, path)
        for path in targets
        for place, share in enumerate(_mean_over_slices(shares[path]))
    )
    ranks = dict.fromkeys(targets, 0)
    for _, place, path in ranked:
        # A target takes its components in order, so that ties leave no gap.
        if place == ranks[path] and slices[path] <= budget:
            ranks[path] += 1
            budget -= slices[path]
    return ranks


def _mean_over_slices(share: Any) -> np.ndarray:
    return np.asarray(share).reshape(-1, share.shape[-1]).mean(0)

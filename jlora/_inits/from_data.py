"""EVA, CorDA and LoRA-GA: initialisers that look at inputs or gradients.

`lora.inputs` gives the statistics of inputs; gradients are the user's `jax.grad`.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .._adapter.factors import Adapter, LoraFactors
from .._algebra.matrices import with_matrices
from .._errors import AdapterError
from .._jax.linalg import Svd, balanced, matmul, svd, transposed
from .._params.input_stats import InputStats, projection
from .._params.paths import PyTree
from .from_kernel import check_entries, check_plain, matrix_of_a, move

Matrices = tuple[jax.Array, jax.Array]
Direction = Literal["ArBr", "A2rBr", "ArB2r"]


# --- EVA ---


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
    _check_stats("eva", adapter, stats)
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


# --- CorDA ---


def corda(
    params: PyTree,
    adapter: Mapping[str, Any],
    stats: Mapping[str, InputStats],
    *,
    mode: Literal["knowledge", "instruction"] = "knowledge",
    damping: float = 0.01,
) -> tuple[PyTree, Adapter]:
    """Returns params and an adapter from a decomposition oriented by the inputs.

    With `C` the second moment of the inputs, `U·S·Vᵀ = svd(C·W)` and so
    `W = C⁻¹·U·S·Vᵀ`. In the mode "instruction" the adapter holds the `rank` largest
    parts (the inputs are those of the new task); in the mode "knowledge" the smallest
    ones (the inputs are those of what is to be kept). The rest stays in the kernel, so
    that the outputs are the old ones at the start.

    Args:
        params: the frozen params, as arrays.
        adapter: a new adapter, as `lora.init` gives it: its values are replaced.
        stats: what `lora.inputs` gives, without a sketch.
        mode: which part is trained.
        damping: what is added to the diagonal of `C`, as a share of its mean, so that
            it can be inverted. PEFT begins with 0.01 and doubles it until the inverse
            is good; here it is fixed, and solved rather than inverted.

    Returns:
        The moved params and the adapter, as `jlora.pissa` does.

    Raises:
        AdapterError: if the adapter or `stats` do not fit the params.
        UnsupportedFeatureError: for an entry that is more than two factors.
        ValueError: if `mode` is unknown or `damping` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig(rank=1))
        >>> params = {"w": jax.random.normal(jax.random.key(0), (3, 4))}
        >>> x = jax.random.normal(jax.random.key(1), (9, 3))
        >>> adapter = lora.init(jax.random.key(2), params, x)
        >>> rest, adapter = jlora.corda(params, adapter, lora.inputs(params, x))
        >>> bool(jnp.allclose(lora.apply(rest, adapter, x), x @ params["w"], atol=1e-5))
        True

    References:
        Yang et al., CorDA: Context-Oriented Decomposition Adaptation of Large Language
        Models, <https://arxiv.org/abs/2406.05223>, 2024, equations 2–5.
    """
    if mode not in ("knowledge", "instruction"):
        raise ValueError(f'`mode` must be "knowledge" or "instruction", got {mode!r}')
    if not damping > 0:
        raise ValueError(f"`damping` must be positive, got {damping!r}")
    check_entries("corda", params, adapter)
    _check_stats("corda", adapter, stats, whole=True)
    settings = {"minor": mode == "knowledge", "damping": float(damping)}
    extra = lambda path: (stats[path].moment,)
    return move(params, adapter, _oriented, settings, extra)


def _oriented(
    matrix: jax.Array,
    entry: LoraFactors,
    moment: jax.Array,
    *,
    minor: bool,
    damping: float,
) -> Matrices:
    moment = moment.astype(matrix.dtype)
    size = moment.shape[-1]
    mean = jnp.maximum(jnp.trace(moment, axis1=-2, axis2=-1) / size, 1e-30)
    # Of the order of one, whatever the number of rows; singular vectors do not care.
    scaled = moment / mean[..., None, None]
    scaled = (scaled + transposed(scaled)) / 2 + damping * jnp.eye(
        size, dtype=matrix.dtype
    ).reshape((1,) * (moment.ndim - 2) + (size, size))
    found = svd(matmul(scaled, matrix))
    first = found.s.shape[-1] - entry.rank if minor else 0
    part = found.cut(slice(first, first + entry.rank))
    u = jnp.linalg.solve(scaled, part.u)
    part = Svd(u, part.s, part.vt)
    return balanced(part, entry.scaling, found.s[..., 0], matrix_of_a(entry))


def _check_stats(
    name: str,
    adapter: Mapping[str, Any],
    stats: Mapping[str, Any],
    *,
    whole: bool = False,
) -> None:
    """Raises with every target whose statistics are missing or do not fit."""
    problems = []
    for path, entry in adapter.items():
        if not isinstance(entry, LoraFactors):
            continue
        size = entry.axes.fans(entry.kernel_shape)[0]
        wanted = (*entry.a.shape[: len(entry.axes.batch)], size)
        given = getattr(stats.get(path), "moment", None)
        if given is None:
            problems.append(f"{path!r} has no statistics of its inputs")
        elif given.shape[:-1] != wanted or given.shape[-1] > size:
            told = (*wanted, size)
            problems.append(f"{path!r} needs a moment {told}, got {given.shape}")
        elif whole and given.shape[-1] != size:
            problems.append(f"{path!r} has a sketch of its moment, not the whole")
        elif given.shape[-1] < entry.rank:
            problems.append(f"{path!r} has a sketch of fewer columns than its rank")
    if problems:
        raise AdapterError(
            f"`jlora.{name}` takes what `lora.inputs(params, ...)` gives:\n"
            + "\n".join(problems)
        )


# --- LoRA-GA ---


def lora_ga(
    params: PyTree,
    adapter: Mapping[str, Any],
    grads: Mapping[str, Any],
    *,
    direction: Direction = "ArB2r",
    gamma: float = 16.0,
) -> tuple[PyTree, Adapter]:
    """Returns params and an adapter whose first step is the nearest to full training's.

    With `G = U·S·Vᵀ` the gradient of a kernel `(in, out)`, `a` is made of left singular
    vectors and `b` of right ones, `rank` of them each from the `2·rank` largest:
    "ArB2r" takes the first for `a` and the next for `b`, "A2rBr" the reverse, "ArBr"
    the even and the odd ones. Both are scaled by `out^¼/√gamma`, so that the outputs
    are of the same order for all sizes and ranks; the new kernel is `W − scaling·a·b`.
    PEFT scales `b` alone, by `out^¼/√gamma` and by its singular values.

    Where a kernel has fewer than `2·rank` singular vectors each goes to one side, the
    columns of `a` or rows of `b` that are left are zero, and the first step is full
    training's own.

    Args:
        params: the frozen params, as arrays.
        adapter: a new adapter, as `lora.init` gives it: its values are replaced.
        grads: the gradients of the kernels, by path, in the kernels' layouts: of the
            mean loss over a few batches.
        direction: which singular vectors go where.
        gamma: how small the factors are; the paper's γ.

    Returns:
        The moved params and the adapter, as `jlora.pissa` does.

    Raises:
        AdapterError: if the adapter does not fit the params, a gradient is missing or
            of another shape, or a rank is larger than its kernel.
        UnsupportedFeatureError: for an entry that is more than two factors.
        ValueError: if `direction` is unknown or `gamma` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> loss = lambda p, x: (jnp.tanh(x @ p["w"]) ** 2).sum()
        >>> lora = jlora.lora(loss, jlora.LoraConfig(rank=1))
        >>> params = {"w": jax.random.normal(jax.random.key(0), (3, 4))}
        >>> x = jax.random.normal(jax.random.key(1), (9, 3))
        >>> adapter = lora.init(jax.random.key(2), params, x)
        >>> grads = jax.grad(loss)(params, x)
        >>> rest, adapter = jlora.lora_ga(params, adapter, grads)
        >>> bool(jnp.allclose(lora.apply(rest, adapter, x), loss(params, x), rtol=1e-4))
        True

    References:
        Wang et al., LoRA-GA: Low-Rank Adaptation with Gradient Approximation,
        <https://arxiv.org/abs/2407.05000>, 2024, theorem 3.1 and algorithm 1.
    """
    if direction not in ("ArBr", "A2rBr", "ArB2r"):
        raise ValueError(
            f'`direction` must be "ArBr", "A2rBr" or "ArB2r", got {direction!r}'
        )
    if not gamma > 0:
        raise ValueError(f"`gamma` must be positive, got {gamma!r}")
    check_entries("lora_ga", params, adapter)
    _check_grads(adapter, grads)
    settings = {"direction": direction, "gamma": float(gamma)}
    extra = lambda path: (grads[path],)
    return move(params, adapter, _along_gradient, settings, extra)


def _along_gradient(
    matrix: jax.Array,
    entry: LoraFactors,
    grad: jax.Array,
    *,
    direction: Direction,
    gamma: float,
) -> Matrices:
    found = svd(entry.axes.to_matrix(grad.astype(matrix.dtype)))
    of_a, of_b = _columns(direction, entry.rank)
    size = matrix.shape[-1] ** 0.25 / math.sqrt(gamma)
    a, b = found.u[..., of_a], found.vt[..., of_b, :]
    # Zeros at the end of one and at the start of the other: where a column of `a` and
    # its row of `b` are both zero, neither has a gradient.
    batch, rank = [(0, 0)] * (a.ndim - 2), entry.rank
    a = jnp.pad(a, [*batch, (0, 0), (0, rank - a.shape[-1])])
    b = jnp.pad(b, [*batch, (rank - b.shape[-2], 0), (0, 0)])
    return size * a, size * b


def _columns(direction: Direction, rank: int) -> tuple[slice, slice]:
    first, second = slice(0, rank), slice(rank, 2 * rank)
    if direction == "ArBr":
        first, second = slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)
    return (second, first) if direction == "A2rBr" else (first, second)


def _check_grads(adapter: Mapping[str, Any], grads: Mapping[str, Any]) -> None:
    problems = []
    for path, entry in adapter.items():
        if not isinstance(entry, LoraFactors):
            continue
        shape = entry.kernel_shape
        given = getattr(grads.get(path), "shape", None)
        if given is None or tuple(given) != shape:
            problems.append(f"{path!r} needs a gradient {shape}, got {given}")
    if problems:
        raise AdapterError(
            "`jlora.lora_ga` takes the gradients of the kernels by path:\n"
            + "\n".join(problems)
        )

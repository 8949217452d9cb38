"""LoRA-GA: the first step of the factors is that of full fine-tuning."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._adapter.factors import Adapter, LoraFactors
from .._errors import AdapterError
from .._jax.linalg import svd
from .._params.paths import PyTree
from .from_kernel import Matrices, check_entries, move

Direction = Literal["ArBr", "A2rBr", "ArB2r"]


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

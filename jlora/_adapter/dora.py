"""DoRA: the norm of each output of an adapted kernel, without forming `W + s·a·b`.

With the columns `w_j` of `W` and `b_j` of `b`,

    ‖w_j + s·a·b_j‖² = ‖w_j‖² + 2s·⟨b_j, aᵀw_j⟩ + s²·⟨b_j, (aᵀa)·b_j⟩,

in which everything but `‖w_j‖²` is of the size of a factor.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .._errors import UnsupportedFeatureError
from .._jax.dots import dot, wide_dot
from .._jax.dtypes import is_workable, summed_in
from .._jax.sharding import beside
from .._jax.versions import manual_axes
from .._params.axes import KernelAxes
from .factors import LoraFactors

_HIGHEST = lax.Precision.HIGHEST


def output_scale(
    kernel: jax.Array, factors: LoraFactors, cut: tuple[str, ...] | None = None
) -> jax.Array | None:
    """Returns `magnitude / ‖W + s·a·b‖`, by which DoRA scales each output.

    The norm is a constant of the gradient (section 4.3 of the paper). An output whose
    kernel is zero is left as it is.

    Args:
        kernel: the frozen kernel `W`.
        factors: its factors.
        cut: inside of a shard_map, the mesh axes along which the input axes of a larger
            kernel are cut, over which its norm is summed; None for a kernel that must
            be whole.

    Returns:
        An array of shape `(*batch, *out)` in float32 at least; None without a
        magnitude.

    Raises:
        UnsupportedFeatureError: if the kernel is one shard of a larger one, and must be
            whole.

    References:
        Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation,
        <https://arxiv.org/abs/2402.09353>, 2024, equations 5 and 11.
    """
    if factors.magnitude is None:
        return None
    if cut is None and (shards := manual_axes(kernel)):
        raise UnsupportedFeatureError(
            f"a DoRA kernel of shape {kernel.shape} is one of the shards along "
            f"{sorted(shards)}, and its norm needs the whole kernel; do this outside "
            "of `jax.shard_map`"
        )
    norm = lax.stop_gradient(adapted_norm(kernel, factors, cut or ()))
    magnitude = beside(factors.magnitude.astype(norm.dtype), norm)
    return jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 1)


def kernel_norm(kernel: jax.Array, axes: KernelAxes) -> jax.Array:
    """Returns ‖W‖ over the input axes, of shape `(*batch, *out)`, where DoRA starts."""
    return jnp.sqrt(_squares(_workable(kernel), axes))


def adapted_norm(
    kernel: jax.Array, factors: LoraFactors, cut: tuple[str, ...] = ()
) -> jax.Array:
    """Returns ‖W + s·a·b‖ over the input axes, of shape `(*batch, *out)`.

    Each of the three parts is a sum over inputs, so that those of shards are summed
    over the mesh axes `cut`.
    """
    old, mixed, new = _products(kernel, factors)
    total = old + 2 * mixed + new
    total = lax.psum(total, cut) if cut else total
    # Rounding may leave a sum just below zero where the two cancel each other.
    return jnp.sqrt(jnp.maximum(total, 0))


def change_squares(kernel: jax.Array, factors: LoraFactors) -> jax.Array:
    """Returns the squared Frobenius norm of what DoRA changes in a kernel.

    With the scale `c` it changes `W` by `(c - 1)·W + c·ΔW`.
    """
    scale = output_scale(kernel, factors)
    if scale is None:
        raise ValueError("the factors have no magnitude")
    old, mixed, new = _products(kernel, factors)
    stretch = scale - 1
    squares = stretch**2 * old + 2 * stretch * scale * mixed + scale**2 * new
    return jnp.maximum(jnp.sum(squares), 0)


def _products(
    kernel: jax.Array, factors: LoraFactors
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns ‖w_j‖², ⟨w_j, Δ_j⟩ and ‖Δ_j‖² of each output, `(*batch, *out)`."""
    axes, scaling, kernel = factors.axes, factors.scaling, _workable(kernel)
    wide = summed_in(kernel.dtype)
    a, b = factors.a.astype(wide), factors.b.astype(wide)
    n = len(axes.batch)
    batch, inner = tuple(range(n)), tuple(range(n, a.ndim - 1))
    to_kernel, own = (inner, axes.in_), (batch, axes.batch)
    cross = wide_dot(a.astype(kernel.dtype), kernel, to_kernel, own, wide, _HIGHEST)
    b = beside(b, cross)
    gram = dot(a, a, (inner, inner), (batch, batch), wide, _HIGHEST)
    image = dot(gram, b, ((n + 1,), (n,)), (batch, batch), wide, _HIGHEST)
    mixed = scaling * jnp.sum(b * cross, axis=n)
    return _squares(kernel, axes), mixed, scaling**2 * jnp.sum(b * image, axis=n)


def _squares(kernel: jax.Array, axes: KernelAxes) -> jax.Array:
    """Returns ‖W‖² over the input axes as one contraction: W² is not formed."""
    wide = summed_in(kernel.dtype)
    kept = axes.batch + axes.out
    return wide_dot(kernel, kernel, (axes.in_, axes.in_), (kept, kept), wide, _HIGHEST)


def _workable(kernel: jax.Array) -> jax.Array:
    """Widens kernels of eight bits: `a` would lose most of its digits beside them."""
    return kernel if is_workable(kernel.dtype) else kernel.astype(jnp.float32)

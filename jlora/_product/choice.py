"""The choice among the forms of `_product.forms` for a group of adapted products."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._jax.sharding import is_whole
from .._jax.symbolic import are_known, exceeds
from .group import Form, GroupDims, compute_dtype
from .hopper_kernel import fills, fits, is_written_for_this_jax, on_hopper

Contraction = Literal["factored", "merged", "auto", "fused"]

# Features and outputs from which on a kernel is extended: 768 lost, 2048 gains.
_LEAST_EXTENDED = 1024


def choose(
    contraction: Contraction, dims: GroupDims, x: Any, kernels: Sequence[Any]
) -> Form:
    """Returns the form for a group, from shapes, dtypes and backend alone.

    Args:
        contraction: as `jlora.lora` takes it.
        dims: the static description of the products.
        x: the shared operand; shape and dtype are read.
        kernels: the kernels, likewise.

    Where sizes are symbolic it is the form that is right for all of them.
    """
    if contraction == "merged":
        return "merged"
    size = lambda array, axes: math.prod(array.shape[i] for i in axes)
    features, shared = size(x, dims.contract), size(x, dims.batch)
    tokens = x.size // max(features * shared, 1)
    outputs = [w.size // max(features * shared, 1) for w in kernels]
    if contraction == "auto" and all(v.dtype == jnp.float32 for v in (x, *kernels)):
        # Formed twice, forward and backward: 4·r·m·k each against 2·n·r·(m + k).
        if all(exceeds(tokens * (features + k), 2 * features * k) for k in outputs):
            return "merged"
    if not are_known([tokens, features, *outputs]):
        return "separate"  # the others pay, or fit, for some sizes alone
    extensible = _extensible(dims, x, kernels)
    may_fuse = contraction in ("fused", "auto") and extensible and _has_kernel(dims, x)
    if may_fuse and all(fits(tokens, features, k) for k in outputs):
        if contraction == "fused" or _fused_pays(tokens, features, max(outputs)):
            return "fused"
    # A group is what its largest kernel is: it shares `x`, and so its copy.
    if extensible and _extended_pays(tokens, features, max(outputs)):
        return "extended"
    return "separate"


def _fused_pays(tokens: int, features: int, outputs: int) -> bool:
    """Whether the kernel fills the GPU, and this JAX has the API it is written in."""
    return fills(tokens, features, outputs) and is_written_for_this_jax()


def _extended_pays(tokens: int, features: int, outputs: int) -> bool:
    """Whether the copies of a kernel cost less than passes over its outputs.

    The kernel is copied forward and backward, 4·m·k values to and fro; saved are the
    delta, written and read forward, and one reading of `dy`, 3·n·k. (On an H100 the
    copy of `x` costs no more than the additions that it saves.) With a small side all
    is launches of short kernels: ViT-B, of 768, was slower than plain autodiff.
    """
    return 4 * features < 3 * tokens and min(features, outputs) >= _LEAST_EXTENDED


def _extensible(dims: GroupDims, x: Any, kernels: Sequence[Any]) -> bool:
    """Whether rows can be appended: whole arrays, contracted last by first."""
    if not _on_one_gpu() or dims.batch or not all(map(is_whole, (x, *kernels))):
        return False
    n = len(dims.contract)
    if dims.contract != tuple(range(x.ndim - n, x.ndim)):
        return False
    first = tuple(range(n))
    plain = all(not k.first and k.contract == first for k in dims.kernels)
    # Appended values have the dtype of what they are appended to.
    same = all(w.dtype == x.dtype for w in kernels)
    return plain and same and compute_dtype(dims, x, kernels) == x.dtype


def _has_kernel(dims: GroupDims, x: Any) -> bool:
    """Whether `hopper_kernel` computes what the program asks for."""
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    asked = [dict(k.params)["preferred_element_type"] for k in dims.kernels]
    return on_hopper() and half and all(dtype in (None, x.dtype) for dtype in asked)


def _on_one_gpu() -> bool:
    """With several devices nothing says, while tracing, which axes are sharded."""
    return jax.default_backend() == "gpu" and jax.device_count() == 1

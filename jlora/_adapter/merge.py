"""`merge`: the delta added into the kernels once and for all."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._errors import UnsupportedFeatureError
from .._jax.dtypes import summed_in
from .._jax.sharding import beside
from .._params.axes import KernelAxes, expand
from .._params.given import some
from .._params.paths import FlatParams, PyTree, is_quantized
from .._params.quantized import dequantized, qtype_of
from .check import check_adapter
from .dora import output_scale
from .factors import delta
from .variants import variant_of_entry


def merge(
    params: PyTree, adapter: Mapping[str, Any], *, dequantize: bool = False
) -> PyTree:
    """Returns plain params with `W + ΔW` in place of each adapted kernel `W`.

    With DoRA it is `magnitude · (W + ΔW) / ‖W + ΔW‖`. The sum is formed in float32 (or
    the kernel's dtype, if wider) and rounded once to the dtype of the kernel. The tree
    keeps its structure, boxes, dtypes and shardings; `params` itself is not changed.

    Args:
        params: the frozen params.
        adapter: the factors by path; arrays take the place of their leaves.
        dequantize: whether quantised kernels, adapted or not, become plain arrays in
            the dtype of their scales. A sum cannot be quantised again without a loss
            of its own, and so they are refused otherwise.

    Returns:
        A tree like `params`.

    Raises:
        AdapterError: if the adapter does not belong to `params`.
        UnsupportedFeatureError: if an adapted kernel is quantised, without
            `dequantize=True`.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> fn = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.ones((5, 7))}, jnp.ones((2, 5))
        >>> lora = jlora.lora(fn, jlora.LoraConfig("w", rank=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> bool((jlora.merge(params, adapter)["w"] == params["w"]).all())
        True
    """
    flat = FlatParams.of(params)
    check_adapter(flat, adapter)
    leaves = flat.by_path()
    if dequantize:
        leaves = {path: dequantized(leaf, path) for path, leaf in leaves.items()}
    else:
        _check_plain(leaves, adapter)
    merged = {p: _merged(leaves[p], entry) for p, entry in adapter.items()}
    return flat.replace({**leaves, **merged})


def _check_plain(leaves: Mapping[str, Any], adapter: Mapping[str, Any]) -> None:
    """Raises if an adapted kernel is quantised."""
    found = [
        f"{p!r} ({qtype_of(leaves[p])})" for p in adapter if is_quantized(leaves[p])
    ]
    if found:
        raise UnsupportedFeatureError(
            f"`jlora.merge`: {some(found)} are quantised, and W + ΔW is "
            "not of their values. Pass `dequantize=True` for plain arrays, or merge "
            "into the params that were quantised"
        )


def _merged(kernel: Any, entry: Any) -> Any:
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return kernel  # abstract params stay abstract
    traced = any(isinstance(v, Tracer) for v in jax.tree.leaves((kernel, entry)))
    if isinstance(kernel, np.ndarray):
        total = _sum(jnp.asarray(kernel), entry)
        return total if traced else np.asarray(total, kernel.dtype)
    if isinstance(kernel, Tracer):
        return _sum(kernel, entry)
    if len(kernel.sharding.device_set) == 1:
        return jax.jit(_sum)(kernel, entry)  # stays where it is, committed or not
    return jax.jit(_sum, out_shardings=kernel.sharding)(kernel, entry)


def _sum(kernel: jax.Array, entry: Any) -> jax.Array:
    variant = variant_of_entry(entry)
    if variant.merged is not None:
        return variant.merged(kernel, entry)
    factors, wide = variant.lowered(entry, kernel), summed_in(kernel.dtype)
    kernel_wide = kernel.astype(wide)
    total = kernel_wide + beside(delta(factors, dtype=wide), kernel_wide)
    scale = output_scale(kernel, factors)
    if scale is not None:
        total = total * _along(scale, factors.axes)
    return total.astype(kernel.dtype)


def _along(scale: jax.Array, axes: KernelAxes) -> jax.Array:
    """Lays a value of the batch and output axes out along those of the kernel."""
    return expand(scale[..., None], axes.batch + axes.out, axes.ndim)[..., 0]

"""LoftQ: the factors make up for what quantising a kernel loses."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter.factors import Adapter, LoraFactors, delta
from .._algebra.matrices import with_matrices
from .._jax.dtypes import summed_in
from .._params.paths import FlatParams, PyTree, is_array
from .from_kernel import check_count, check_entries, in_place
from .pissa import _principal


def loftq(
    params: PyTree,
    adapter: Mapping[str, Any],
    *,
    quantize: Callable[[jax.Array], Any],
    dequantize: Callable[[Any], jax.Array] | None = None,
    steps: int = 5,
) -> tuple[PyTree, Adapter]:
    """Returns quantised params and an adapter that makes up for the rounding.

    Each step quantises `Q = q(W − scaling·a·b)` and takes the factors from the singular
    value decomposition of `W − Q`. Unlike the other initialisers it keeps the old
    outputs only nearly: `Q + ΔW` is nearer to `W` than `q(W)` is. PEFT does not divide
    by the scaling, and so fits `W` only with alpha = rank; here it is divided.

    Args:
        params: the params before quantisation, as arrays.
        adapter: a new adapter, as `lora.init` gives it: its values are replaced.
        quantize: from a kernel in float32 to the values that its quantised form stands
            for, an array of its shape; or to a quantised array, with `dequantize`.
        dequantize: from what `quantize` gives to an array of the kernel's shape.
        steps: how often both are alternated; one is enough to gain most.

    Returns:
        Params with what `quantize` gave at the last step in place of each adapted
        kernel (arrays in the kernel's dtype), and the adapter.

    Raises:
        AdapterError: if the adapter does not fit `params`, or a rank is too large.
        UnsupportedFeatureError: for an entry that is more than two factors.
        TypeError: if what is quantised (and dequantised) is no array.
        ValueError: if it has another shape than the kernel, or `steps` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=2))
        >>> params = {"w": jax.random.normal(jax.random.key(0), (5, 7))}
        >>> adapter = lora.init(jax.random.key(1), params, jnp.ones((2, 5)))
        >>> halves = lambda w: jnp.round(2 * w) / 2
        >>> quantised, adapter = jlora.loftq(params, adapter, quantize=halves)
        >>> plain = jnp.linalg.norm(params["w"] - halves(params["w"]))
        >>> merged = jlora.merge(quantised, adapter)
        >>> bool(jnp.linalg.norm(params["w"] - merged["w"]) < plain)
        True

    References:
        Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models,
        <https://arxiv.org/abs/2310.08659>, 2023, algorithm 1.
    """
    check_count("steps", steps, 1)
    check_entries("loftq", params, adapter)
    flat = FlatParams.of(params)
    leaves, moved, entries = flat.by_path(), {}, dict(adapter)
    read = dequantize or (lambda quantised: quantised)
    for path, entry in entries.items():
        if isinstance(entry, LoraFactors):
            kernel = leaves[path]
            given = values = rest = _wide(kernel)
            for _ in range(steps):
                given = quantize(rest)
                values = _values(path, kernel, given, read)
                rest, entry = in_place(_made_up, None, kernel, entry, values)
            moved[path] = values if dequantize is None else given
            entries[path] = entry
    return flat.replace(moved), entries


def _wide(kernel: Any) -> jax.Array:
    kernel = jnp.asarray(kernel)
    return kernel.astype(summed_in(kernel.dtype))


def _values(path: str, kernel: Any, given: Any, read: Callable[[Any], Any]) -> Any:
    """Returns what a quantised kernel stands for, in the dtype of the kernel."""
    values = read(given)
    if not is_array(values):
        raise TypeError(
            f"`jlora.loftq`: the quantised {path!r} is a {type(values).__name__}, not "
            "an array; give `dequantize`, from it to an array of the kernel's shape"
        )
    if tuple(values.shape) != tuple(kernel.shape):
        raise ValueError(
            f"`jlora.loftq`: the quantised {path!r} stands for an array of shape "
            f"{tuple(values.shape)}; the kernel's is {tuple(kernel.shape)}"
        )
    return values.astype(kernel.dtype)


def _made_up(
    static: None, kernel: jax.Array, entry: LoraFactors, values: jax.Array
) -> tuple[jax.Array, LoraFactors]:
    """Returns `W − ΔW`, with a ΔW fitted to `W − Q`, and its factors."""
    wide = _wide(kernel)
    error = entry.axes.to_matrix(wide - values.astype(wide.dtype))
    new = with_matrices(entry, *_principal(error, entry))
    return wide - delta(new, dtype=wide.dtype), new

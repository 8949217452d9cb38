"""Norms of an adapter and of the change it makes, without forming the change."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import keystr, tree_leaves_with_path

from .._adapter.check import check_adapter
from .._adapter.dora import change_squares
from .._adapter.entries import lowered
from .._adapter.factors import LoraFactors
from .._jax.dtypes import summed_in
from .._jax.sharding import dot_sharding
from .._params.paths import FlatParams, PyTree
from .._params.quantized import dequantized


def adapter_norms(adapter: PyTree, *, name: str = "norm") -> dict[str, jax.Array]:
    """Returns the norm of an adapter, or of its gradient, in all and per array.

    One jitted call, in float32. All leaves of an adapter are trained, so this is the
    norm that a clip of its gradient acts on.

    Args:
        adapter: an adapter or a tree of the same structure: gradients, updates.
        name: how the keys begin.

    Returns:
        A flat dict of scalars: the global norm as `name`, and the norm of each array as
        `name/path/a`, `name/path/b`, or `name/path` for a leaf that is trained whole.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = jlora.LoraFactors(jnp.ones((4, 2)), jnp.ones((2, 4)), axes, 1.0)
        >>> norms = adapter_norms({"layer/w": factors}, name="grad_norm")
        >>> {key: round(float(value), 2) for key, value in norms.items()}
        {'grad_norm': 4.0, 'grad_norm/layer/w/a': 2.83, 'grad_norm/layer/w/b': 2.83}
    """
    leaves = tree_leaves_with_path(adapter)
    named = {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    return _log(name, named, _norms(tuple(named.values())))


def delta_norms(
    params: PyTree, adapter: Mapping[str, Any], *, name: str = "delta"
) -> dict[str, jax.Array]:
    """Returns ‖ΔW‖/‖W‖, by the Frobenius norm, in all and per target.

    One jitted call, in float32. ΔW is not formed: with `a` and `b` as matrices,
    ‖ab‖² = trace(aᵀa · bbᵀ), a product of two matrices of rank × rank for each index of
    the batch axes. For a leaf that is trained whole, ΔW is its difference from that of
    the base; with DoRA that of the adapted kernel from the frozen one.

    Args:
        params: the frozen params.
        adapter: the factors by path.
        name: how the keys begin.

    Returns:
        A flat dict of scalars: the ratio over all targets together as `name`, and that
        of each target as `name/path`. A delta of zero gives 0, whatever the kernel;
        another delta of a kernel of zeros gives inf.

    Raises:
        AdapterError: if the adapter does not belong to `params`.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = jlora.LoraFactors(jnp.ones((4, 2)), jnp.ones((2, 3)), axes, 0.5)
        >>> params = {"layer": {"w": 10 * jnp.ones((4, 3))}}
        >>> norms = delta_norms(params, {"layer/w": factors})
        >>> {key: round(float(value), 4) for key, value in norms.items()}
        {'delta': 0.1, 'delta/layer/w': 0.1}
    """
    flat = FlatParams.of(params)
    check_adapter(flat, adapter)
    kernels = flat.by_path()
    pairs = tuple((kernels[path], entry) for path, entry in adapter.items())
    return _log(name, adapter, _ratios(pairs))


def _log(name: str, paths: Iterable[str], values: list[Any]) -> dict[str, Any]:
    """Names the total and the values of the paths; jit would sort the keys."""
    return dict(zip([name, *(f"{name}/{p}" for p in paths)], values, strict=True))


@jax.jit
def _norms(leaves: tuple[jax.Array, ...]) -> list[jax.Array]:
    squares = [_sum_of_squares(leaf) for leaf in leaves]
    return [jnp.sqrt(square) for square in (sum(squares), *squares)]


@jax.jit
def _ratios(pairs: tuple[tuple[jax.Array, Any], ...]) -> list[jax.Array]:
    pairs = tuple((dequantized(kernel), entry) for kernel, entry in pairs)
    deltas = [_delta_squares(kernel, entry) for kernel, entry in pairs]
    bases = [_sum_of_squares(kernel) for kernel, _ in pairs]
    deltas, bases = [sum(deltas), *deltas], [sum(bases), *bases]
    return [_ratio(d, w) for d, w in zip(deltas, bases, strict=True)]


def _ratio(delta: Any, base: Any) -> jax.Array:
    base = jnp.where(delta == 0, 1, base)  # 0/0 is no news, and NaN would spoil the log
    return jnp.sqrt(delta) / jnp.sqrt(base)


def _sum_of_squares(x: jax.Array) -> jax.Array:
    """Returns ‖x‖² as one contraction, so that not even x² is formed."""
    return gram(x, range(x.ndim), range(0))


def _delta_squares(kernel: jax.Array, entry: Any) -> jax.Array:
    entry = lowered(entry, kernel)
    if not isinstance(entry, LoraFactors):
        wide = summed_in(kernel.dtype)
        return _sum_of_squares(entry.astype(wide) - kernel.astype(wide))
    if entry.magnitude is not None:
        return change_squares(kernel, entry)
    n_batch = len(entry.axes.batch)
    gram_a = gram(entry.a, range(n_batch, entry.a.ndim - 1), range(n_batch))
    gram_b = gram(entry.b, range(n_batch + 1, entry.b.ndim), range(n_batch))
    # Rounding may leave a sum just below zero where the factors cancel each other.
    trace = jnp.maximum(jnp.sum(gram_a * gram_b), 0)
    return entry.scaling**2 * trace


def gram(x: jax.Array, contracted: range, batch: range) -> jax.Array:
    """Returns the products of `x` with itself: (*batch, *others, *others)."""
    dims = (tuple(contracted), tuple(contracted)), (tuple(batch), tuple(batch))
    out_sharding = dot_sharding(x, x, dims)
    kind, precision = summed_in(x.dtype), lax.Precision.HIGHEST
    return lax.dot_general(x, x, dims, precision, kind, out_sharding=out_sharding)

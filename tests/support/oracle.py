"""The reference: the same function with `W + s·a·b` formed by an einsum.

Nothing here calls jlora. The einsum comes from the use, which knows its axes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from use import ALPHA, RANK, Kernel, Use


def delta(kernel: Kernel, a: jax.Array, b: jax.Array, scaling: float) -> jax.Array:
    """Returns scaling · a·b in the layout of the kernel, in float32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return scaling * jnp.einsum(kernel.delta, a, b, precision="highest")


def materialized(use: Use, params: Any, adapter: Mapping[str, Any]) -> Any:
    """Returns params with every kernel replaced by W + ΔW, rounded once."""
    layer = dict(params["layer"])
    for name, kernel in use.kernels.items():
        factors = adapter[f"layer/{name}"]
        change = delta(kernel, factors.a, factors.b, ALPHA / RANK)
        w = layer[name]
        total = w.astype(jnp.float32) + change
        if factors.magnitude is not None:
            total = decomposed(kernel, total, factors.magnitude)
        layer[name] = total.astype(w.dtype)
    return {**params, "layer": layer}


def decomposed(kernel: Kernel, total: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Returns magnitude · V/‖V‖ of DoRA, with the norm as a constant."""
    batch, in_, out = kernel.axes
    norm = jnp.sqrt(jnp.sum(total * total, axis=in_, keepdims=True))
    order = [*batch, *out]
    aligned = magnitude.transpose([order.index(i) for i in sorted(order)])
    return jnp.expand_dims(aligned, in_) * total / jax.lax.stop_gradient(norm)


def reference(use: Use, fn: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Returns `(params, adapter, *inputs) -> fn(materialized params, *inputs)`."""
    fn = fn or use.model
    return lambda params, adapter, *inputs: fn(
        materialized(use, params, adapter), *inputs
    )


def assert_close(actual: Any, expected: Any, rtol: float, where: str = "") -> None:
    """Asserts equal trees, shapes and dtypes, and values within `rtol`.

    The error is relative to the largest value of the array, for entries that cancel to
    zero have no relative error of their own. NaNs must be at the same places.
    """
    jax.tree.map(lambda *_: None, actual, expected)  # raises if the trees differ
    for (path, x), y in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        name = f"{where}{jax.tree_util.keystr(path)}"
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        error = relative_error(x, y)
        assert error <= rtol, f"{name}: relative error {error:.2e} > {rtol:.0e}"


def relative_error(actual: Any, expected: Any) -> float:
    """Returns the largest difference over the largest value; NaNs must agree."""
    x, y = (np.asarray(v, np.float64) for v in (actual, expected))
    if not np.array_equal(np.isnan(x), np.isnan(y)):
        return np.inf
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    return np.abs(x - y).max(initial=0.0) / np.abs(y).max(initial=1e-6)


def random_like(tree: Any, seed: int) -> Any:
    """Returns fixed float32 values in the shapes of a tree, to weight a loss with.

    They are positive, so that the gradient of a scalar that is added everywhere is no
    small difference of large numbers.
    """
    rng = np.random.default_rng(seed)
    values = lambda y: rng.uniform(0.5, 1.5, size=y.shape).astype(np.float32)
    return jax.tree.map(values, tree)


def weighted_sum(out: Any, weights: Any) -> jax.Array:
    """Returns a scalar loss that depends on every entry of a tree of outputs.

    NaNs (rows that were looked up out of bounds) are left out.
    """
    parts = jax.tree.map(
        lambda y, c: jnp.where(jnp.isnan(y), 0.0, y.astype(jnp.float32) * c).sum(),
        out,
        weights,
    )
    return sum(jax.tree.leaves(parts), jnp.float32(0.0))

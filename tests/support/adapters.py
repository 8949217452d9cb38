"""Adapters of a dense kernel, a stack and a convolution, and float32 accuracy."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import jlora

SHAPES = {"layer/w": (5, 7), "layer/stack": (3, 7, 2, 6), "conv": (3, 2, 6, 5)}


AXES = {
    "layer/w": jlora.KernelAxes((), (0,), (1,)),
    "layer/stack": jlora.KernelAxes((0,), (1,), (2, 3)),
    "conv": jlora.KernelAxes((), (0, 1, 2), (3,)),
}


def make(seed: int, rank: int = 3, scaling: float = 1.5, dtype: Any = None) -> Any:
    """An adapter of a dense kernel, of a stack of kernels and of a convolution."""
    random = np.random.default_rng(seed)
    found = {}
    for path, shape in SHAPES.items():
        shapes = AXES[path].factor_shapes(shape, rank)
        a, b = (
            jnp.asarray(random.normal(size=s), dtype or jnp.float32) for s in shapes
        )
        found[path] = jlora.LoraFactors(a, b, AXES[path], scaling)
    return found


def assert_near(
    actual: Any, expected: np.ndarray, scale: np.ndarray | None = None
) -> None:
    """Asserts float32 accuracy, relative to the largest value of what was summed."""
    scale = expected if scale is None else scale
    largest = np.abs(scale).max(initial=1e-6)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=3e-6 * largest)

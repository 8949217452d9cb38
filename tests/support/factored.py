"""Factors of kernels of any axes, and their deltas by an einsum in float64."""

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

import jlora


def normal(seed: int, *shapes: Sequence[int]) -> list[np.ndarray]:
    """Float32 values, one array for each shape."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def subset(letters: str, of: str) -> str:
    """The letters that are in `of`, in their order."""
    return "".join(letter for letter in letters if letter in of)


@st.composite
def factored_kernels(draw: st.DrawFn) -> tuple[str, str, str, dict[str, int]]:
    """The letters of a kernel, of `a` and of `b`, and their sizes."""
    some = lambda letters, least: letters[: draw(st.integers(least, len(letters)))]
    batch, in_, out = some("xyz", 0), some("ijk", 1), some("opq", 1)
    kernel = "".join(draw(st.permutations(batch + in_ + out)))
    batch, in_, out = (subset(kernel, group) for group in (batch, in_, out))
    size = {letter: draw(st.integers(1, 4)) for letter in kernel + "r"}
    return kernel, batch + in_ + "r", batch + "r" + out, size


def factors_of(kernel: tuple[Any, ...], scaling: float, seed: int) -> Any:
    letters, a, b, size = kernel
    place = lambda group: tuple(map(letters.index, group))
    batch = subset(a, b).replace("r", "")
    in_, out = ("".join(v for v in factor if v not in batch + "r") for factor in (a, b))
    shape = lambda names: tuple(size[letter] for letter in names)
    arrays = map(jnp.asarray, normal(seed, shape(a), shape(b)))
    axes = jlora.KernelAxes(batch=place(batch), in_=place(in_), out=place(out))
    return jlora.LoraFactors(*arrays, axes=axes, scaling=scaling)


def formed(factors: jlora.LoraFactors) -> np.ndarray:
    """Scaling · a·b in the layout of the kernel, in float64, without jlora."""
    axes, rank = factors.axes, 51
    a, b = (np.asarray(x, np.float64) for x in (factors.a, factors.b))
    in_, out = [*axes.batch, *axes.in_, rank], [*axes.batch, rank, *axes.out]
    n = len(axes.batch) + len(axes.in_) + len(axes.out)
    return factors.scaling * np.einsum(a, in_, b, out, list(range(n)))


def as_matrix(kernel: np.ndarray, axes: jlora.KernelAxes) -> np.ndarray:
    """A kernel as `(*batch, in, out)`."""
    order = (*axes.batch, *axes.in_, *axes.out)
    batch = tuple(kernel.shape[i] for i in axes.batch)
    fan_in = int(np.prod([kernel.shape[i] for i in axes.in_]))
    return kernel.transpose(order).reshape(*batch, fan_in, -1)


def singular_values(factors: jlora.LoraFactors) -> np.ndarray:
    """Those of the formed delta, `(*batch, min(in, out))`."""
    return np.linalg.svd(as_matrix(formed(factors), factors.axes), compute_uv=False)

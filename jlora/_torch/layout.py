"""Between JAX's layouts and torch's: factors, kernels and vectors, in NumPy.

Everything goes through matrices: a kernel is `(in, out)`, its factors are `(in, rank)`
and `(rank, out)`, whatever axes they have on either side.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._adapter.factors import LoraFactors
from .._errors import AdapterError
from .._params.axes import KernelAxes, with_batch
from .names import TABLES, Binding

Array = np.ndarray
Shape = tuple[int, ...]


# --- JAX's side ---


def sizes(shape: Sequence[int], axes: Sequence[int]) -> Shape:
    """Returns the sizes of some axes."""
    return tuple(shape[i] for i in axes)


def factor_matrices(factors: LoraFactors) -> tuple[Array, Array]:
    """Returns `a (*batch, in, rank)` and `b (*batch, rank, out)` on the host."""
    a, b = np.asarray(factors.a), np.asarray(factors.b)
    batch = a.shape[: len(factors.axes.batch)]
    fan_in, fan_out = factors.axes.fans(factors.kernel_shape)
    rank = factors.rank
    return a.reshape(*batch, fan_in, rank), b.reshape(*batch, rank, fan_out)


def factors_from(
    a: Array,
    b: Array,
    axes: KernelAxes,
    shape: Shape,
    scaling: float,
    magnitude: Array | None = None,
) -> LoraFactors:
    """Returns the factors of a kernel of a shape, from `factor_matrices` of them."""
    shapes = axes.factor_shapes(shape, a.shape[-1])
    at_host: Any = a.reshape(shapes[0]), b.reshape(shapes[1])
    if magnitude is not None:
        magnitude = magnitude.reshape(axes.magnitude_shape(shape))
    own: Any = magnitude
    return LoraFactors(at_host[0], at_host[1], axes, scaling, own)


def magnitudes(factors: LoraFactors) -> Array | None:
    """Returns DoRA's magnitude as `(*batch, out)` on the host, if there is one."""
    if factors.magnitude is None:
        return None
    found = np.asarray(factors.magnitude)
    return found.reshape(*found.shape[: len(factors.axes.batch)], -1)


def kernel_matrix(kernel: Array, axes: KernelAxes) -> Array:
    """Returns a kernel as `(*batch, in, out)`."""
    order = axes.batch + axes.in_ + axes.out
    batch = sizes(kernel.shape, axes.batch)
    return kernel.transpose(order).reshape(*batch, *axes.fans(kernel.shape))


def kernel_from(matrix: Array, axes: KernelAxes, shape: Shape) -> Array:
    """Returns the kernel of a shape, from `kernel_matrix` of it."""
    order = axes.batch + axes.in_ + axes.out
    kernel = matrix.reshape(sizes(shape, order))
    return kernel.transpose(np.argsort(order))


def guess_axes(
    path: str, shape: Shape, binding: Binding, fan_in: int | None
) -> KernelAxes:
    """Returns the roles of the axes of a Flax kernel, if they are beyond doubt.

    Flax's kernels have their batch axes first, then the input axes, then the output
    axes; torch's shape says where the input axes end.

    Args:
        path: the kernel.
        shape: its shape.
        binding: what the rules say of it.
        fan_in: the size of the input side in torch, if it is known.

    Raises:
        AdapterError: if there is doubt.
    """
    packed = "experts" in binding.steps and len(shape) > 2
    n_batch = binding.n_fields + packed
    rest, last = range(n_batch, len(shape)), path.rpartition("/")[2]
    known = last in ("kernel", *TABLES) or "conv" in binding.steps
    ends = [i for i in rest[1:] if fan_in in (None, math.prod(shape[n_batch:i]))]
    if "conv" in binding.steps:
        ends = list(rest[-1:])
    if not known or len(ends) != 1:
        side = "" if fan_in is None else f", of {fan_in} inputs in torch,"
        raise AdapterError(
            f"the roles of the axes of {path!r} {shape}{side} cannot be told from its "
            "name and shape; give the plan of a `jlora.lora` that adapts it instead of "
            "the params"
        )
    batch = tuple(range(n_batch))
    return KernelAxes(
        batch, tuple(range(n_batch, ends[0])), tuple(range(ends[0], len(shape)))
    )


def with_experts(axes: KernelAxes, binding: Binding) -> KernelAxes:
    """Returns the roles with torch's axis of experts among the batch axes.

    A program that computes all experts for every token has it among the outputs.
    It is then the first axis behind those that the name counts.

    Raises:
        AdapterError: if that axis cannot be one of experts.
    """
    n = binding.n_fields
    told = "experts" not in binding.steps or len(axes.batch) != n
    if told or axes.ndim - n < 3:
        return axes
    first = min(axes.in_ + axes.out)
    found = with_batch(axes, [first])
    if found is None or first < max(axes.batch, default=0):
        raise AdapterError(
            f"{binding.path!r} is a parameter of experts in torch, and which of its "
            f"axes counts them cannot be told: axis {first} is the first that its name "
            f"leaves, and its roles are {axes}. Adapt it with `LoraConfig(batch=...)`"
        )
    return found


def spread(factors: LoraFactors, axes: KernelAxes) -> LoraFactors:
    """Returns the same delta with roles that have more batch axes.

    A factor that does not vary along such an axis is repeated. On the host.
    """
    if factors.axes == axes:
        return factors
    old, shape = factors.axes, factors.kernel_shape

    def laid_out(array: Any, has: Sequence[int], wants: Sequence[int]) -> Any:
        array, has = np.asarray(array), [*has, *(i for i in wants if i not in has)]
        array = array.reshape(array.shape + (1,) * (len(has) - array.ndim))
        array = array.transpose([has.index(i) for i in wants])
        rank = array.shape[wants.index(-1)] if -1 in wants else 0
        return np.broadcast_to(array, [rank if i < 0 else shape[i] for i in wants])

    sides = lambda axes: (
        (*axes.batch, *axes.in_, -1),
        (*axes.batch, -1, *axes.out),
        (*axes.batch, *axes.out),
    )
    rows = zip(
        (factors.a, factors.b, factors.magnitude), sides(old), sides(axes), strict=True
    )
    a, b, magnitude = (None if v is None else laid_out(v, *pair) for v, *pair in rows)
    return LoraFactors(a, b, axes, factors.scaling, magnitude)  # type: ignore[arg-type]


# --- torch's side ---


def window_last(a: Array, inputs: Shape) -> Array:
    """Returns `a` of a convolution with its rows in torch's order, `(in, *window)`.

    Args:
        a: its rows are `(*window, in)`.
        inputs: the sizes of these axes.
    """
    split = a.reshape(*inputs, a.shape[-1])
    last = split.ndim - 1
    return split.transpose(last - 1, *range(last - 1), last).reshape(a.shape)


def window_first(a: Array, window: Shape) -> Array:
    """Returns `a` with its rows in the order of Flax: undoes `window_last`."""
    split = a.reshape(-1, *window, a.shape[-1])
    last = split.ndim - 1
    return split.transpose(*range(1, last), 0, last).reshape(a.shape)


def weight(matrix: Array, binding: Binding, inputs: Shape) -> Array:
    """Returns a kernel `(in, out)` as torch keeps it."""
    if {"embedding", "fan_in_fan_out"} & set(binding.steps):
        return matrix
    if "conv" not in binding.steps:
        return matrix.T
    split = matrix.reshape(*inputs, -1)
    last = split.ndim - 1
    return split.transpose(last, last - 1, *range(last - 1))


def weight_matrix(found: Array, binding: Binding) -> Array:
    """Returns torch's weight as `(in, out)`."""
    if {"embedding", "fan_in_fan_out"} & set(binding.steps):
        return found
    return found.transpose(*range(2, found.ndim), 1, 0).reshape(-1, found.shape[0])


# --- the order of rotated features ---


def rope_order(binding: Binding, n: int, outputs: Shape) -> Array | None:
    """Returns where torch finds its outputs among JAX's, or None if at the same place.

    Args:
        binding: what the rules say of the leaf.
        n: the number of output features.
        outputs: the leaf's output axes, the last of which is the head if several.

    Raises:
        AdapterError: if the size of a head is unknown or does not divide `n`.
    """
    if "rope" not in binding.steps:
        return None
    given = int(binding.steps["rope"] or 0)
    head = given or (outputs[-1] if len(outputs) > 1 else 0)
    if not head or head % 2 or n % head:
        raise AdapterError(
            f"{binding.path!r} has {n} outputs and heads of {head or 'unknown size'}; "
            'name an even size that divides them, as in "rope(64)"'
        )
    # torch: both features of pair i are i and i + head/2; JAX: 2i and 2i + 1
    within = np.arange(head).reshape(head // 2, 2).T.ravel()
    return (np.arange(0, n, head)[:, None] + within).ravel()

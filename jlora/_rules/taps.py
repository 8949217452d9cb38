"""What the taps of a window meet along the axes of an image, by pads and slices."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Reach(NamedTuple):
    """Where the taps of a window stand along one axis of a value.

    Entry `i` meets, under tap `k`, the entry `start + i·stride + k·step` of the value
    with `dilation - 1` zeros between its entries, and zeros around it.
    """

    taps: int
    start: int
    step: int
    stride: int
    dilation: int
    length: int


def dilated(size: int, dilation: int) -> int:
    """Returns the length of an axis with `dilation - 1` zeros between its entries."""
    return (size - 1) * dilation + 1 if size else 0


def turned(reach: Reach, size: int) -> Reach:
    """Returns the outputs that each of `size` entries of `x` meets."""
    taps, start, step, stride, dilation, _ = reach
    return Reach(taps, -start, -step, dilation, stride, size)


def met(value: jax.Array, axis: int, reach: Reach) -> list[jax.Array]:
    """Returns the entries that each tap meets along an axis."""
    taps, start, step, stride, dilation, length = reach
    starts = [start + k * step for k in range(taps)]
    low, span = min(starts), (length - 1) * stride + 1
    size = dilated(value.shape[axis], dilation)
    config = [(0, 0, 0)] * value.ndim
    config[axis] = (-low, max(starts) + span - size, dilation - 1)
    value = lax.pad(value, jnp.zeros((), value.dtype), config)
    return [
        lax.slice_in_dim(value, s - low, s - low + span, stride, axis) for s in starts
    ]


def spread(value: jax.Array, reaches: Sequence[Reach]) -> jax.Array:
    """Returns `(batch, *space, groups, *taps, channels)` of what the taps meet."""
    for axis, reach in enumerate(reaches, 1):
        value = jnp.stack(met(value, axis, reach), axis=-2)
    return value


def each_tap(x: jax.Array, reaches: Sequence[Reach]) -> list[jax.Array]:
    """Returns what each tap of the whole window meets, the last axis fastest."""
    pieces = [x]
    for axis, reach in enumerate(reaches, 1):
        each = [met(piece, axis, reach) for piece in pieces]
        pieces = list(itertools.chain.from_iterable(each))
    return pieces


def placed(
    value: jax.Array, axis: int, reach: Reach, counts: Sequence[int]
) -> jax.Array:
    """The transpose of `spread` along one axis: adds up taps, the last axis but one."""
    taps, start, step, stride, dilation, length = reach
    starts = [start + k * step for k in range(taps)]
    low, high = min(starts), max(starts)
    zero, config = jnp.zeros((), value.dtype), [(0, 0, 0)] * (value.ndim - 1)

    def padded(value: jax.Array, before: int, after: int, between: int) -> jax.Array:
        config[axis] = (before, after, between)
        return lax.pad(value, zero, config)

    pieces = [
        padded(piece, s - low, high - s, stride - 1)
        for s, piece in zip(starts, jnp.unstack(value, axis=-2), strict=True)
    ]
    wanted = dilated(counts[axis - 1], dilation)
    span = high - low + (length - 1) * stride + 1
    total = padded(functools.reduce(jnp.add, pieces), low, wanted - low - span, 0)
    return lax.slice_in_dim(total, 0, wanted, dilation, axis)

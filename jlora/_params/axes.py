"""The roles of a kernel's axes. The only room that knows layouts."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.sharding import dot_sharding

Shape = tuple[int, ...]
# The role of each axis of a value; None for an axis that no factor has.
Roles = Sequence[str | None]


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """Which axes of a kernel are batch, input and output axes.

    Batch axes (layers of a scan, experts, ensemble members) have factors of their own
    for every index. Each axis of the kernel has exactly one role.

    Example:
        >>> KernelAxes(batch=(0,), in_=(1,), out=(2, 3)).factor_shapes((4, 5, 2, 3), 8)
        ((4, 5, 8), (4, 8, 2, 3))
    """

    batch: tuple[int, ...]
    in_: tuple[int, ...]
    out: tuple[int, ...]

    def __post_init__(self) -> None:
        """Checks that the roles are a partition of the axes with an in and an out."""
        for field in ("batch", "in_", "out"):
            object.__setattr__(self, field, tuple(sorted(getattr(self, field))))
        axes = sorted(self.batch + self.in_ + self.out)
        if axes != list(range(len(axes))) or not self.in_ or not self.out:
            raise ValueError(
                "each axis of a kernel needs exactly one role, with at least one input "
                f"and one output axis; got {self}"
            )

    @property
    def ndim(self) -> int:
        """The number of axes of the kernel."""
        return len(self.batch) + len(self.in_) + len(self.out)

    def role(self, axis: int) -> str:
        """Returns "batch", "in" or "out"."""
        if axis in self.batch:
            return "batch"
        return "in" if axis in self.in_ else "out"

    def fans(self, shape: Sequence[int]) -> tuple[int, int]:
        """Returns the sizes of the input and of the output group."""
        fan_in = math.prod(shape[i] for i in self.in_)
        return fan_in, math.prod(shape[i] for i in self.out)

    def factor_shapes(self, shape: Sequence[int], rank: int) -> tuple[Shape, Shape]:
        """Returns the shapes of `a: (*batch, *in, rank)`, `b: (*batch, rank, *out)`."""
        batch = tuple(shape[i] for i in self.batch)
        in_ = tuple(shape[i] for i in self.in_)
        out = tuple(shape[i] for i in self.out)
        return (*batch, *in_, rank), (*batch, rank, *out)

    def along_factors(self) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
        """Returns which axis of the kernel each axis of `a` and of `b` is along.

        >>> KernelAxes((0,), (2, 3), (1,)).along_factors()  # None: the rank
        ((0, 2, 3, None), (0, None, 1))
        """
        return (*self.batch, *self.in_, None), (*self.batch, None, *self.out)

    def kernel_shape(self, sizes: Sequence[int]) -> Shape:
        """Returns a kernel's shape from the sizes of its `(*batch, *in, *out)`.

        >>> KernelAxes((0,), (2, 3), (1,)).kernel_shape((4, 2, 3, 7))
        (4, 7, 2, 3)
        """
        order = self.batch + self.in_ + self.out
        return tuple(sizes[order.index(i)] for i in range(len(order)))

    def magnitude_shape(self, shape: Sequence[int]) -> Shape:
        """Returns the shape `(*batch, *out)` of DoRA's magnitude."""
        return tuple(shape[i] for i in self.batch + self.out)

    def to_matrix(self, kernel: jax.Array) -> jax.Array:
        """Returns a kernel in the canonical view `(*batch, in, out)`.

        >>> KernelAxes((0,), (2, 3), (1,)).to_matrix(jnp.ones((4, 7, 2, 3))).shape
        (4, 6, 7)
        """
        batch = tuple(kernel.shape[i] for i in self.batch)
        moved = jnp.transpose(kernel, self.batch + self.in_ + self.out)
        return moved.reshape(*batch, *self.fans(kernel.shape))


def with_batch(axes: KernelAxes, batch: Sequence[int]) -> KernelAxes | None:
    """Returns the roles with further batch axes; None if no in or out axis is left.

    Axes below zero count from the end; None, too, if there is no such axis.

    >>> with_batch(KernelAxes((), (1,), (0, 2)), [-3])
    KernelAxes(batch=(0,), in_=(1,), out=(2,))
    """
    asked = {i + axes.ndim if i < 0 else i for i in batch}
    if not asked <= set(range(axes.ndim)):
        return None
    left = [tuple(i for i in own if i not in asked) for own in (axes.in_, axes.out)]
    if not all(left):
        return None
    return KernelAxes(tuple({*axes.batch, *asked}), *left)


def free_axes(ndim: int, *taken: Sequence[int]) -> tuple[int, ...]:
    """Returns the axes of `ndim` that none of the sequences has.

    >>> free_axes(4, (0,), (2,))
    (1, 3)
    """
    return tuple(i for i in range(ndim) if not any(i in axes for axes in taken))


def align(a: jax.Array, b: jax.Array, axes: KernelAxes) -> tuple[jax.Array, jax.Array]:
    """Lays both factors out along the kernel's axes, with the rank as last axis.

    An axis that a factor does not have gets size 1, so that
    `delta == scaling * sum(a * b, axis=-1)` by broadcasting, and every operation that
    moves the kernel's axes moves those of both factors in the same way.
    """
    b = jnp.moveaxis(b, len(axes.batch), -1)
    return (
        expand(a, axes.batch + axes.in_, axes.ndim),
        expand(b, axes.batch + axes.out, axes.ndim),
    )


def expand(factor: jax.Array, axes: tuple[int, ...], ndim: int) -> jax.Array:
    """Moves the leading axes of `factor` to the positions `axes` of `ndim` axes."""
    factor = ordered(factor, axes, sorted(axes))
    return jax.lax.expand_dims(factor, free_axes(ndim, axes))


def ordered(factor: jax.Array, axes: Sequence[int], wanted: Sequence[int]) -> jax.Array:
    """Returns a factor with `axes`, and the rank last, with these in another order."""
    return jax.lax.transpose(factor, (*map(axes.index, wanted), len(axes)))


def contract_rank(
    a: jax.Array, b: jax.Array, *, dtype: Any, precision: Any = None
) -> jax.Array:
    """Returns `sum(a * b, axis=-1)` of two aligned factors as one matrix product.

    Axes that both have are batch axes of the product; an axis that neither has stays
    of size 1.
    """
    rank_axis = a.ndim - 1
    shape = [max(m, n) for m, n in zip(a.shape, b.shape, strict=True)][:-1]
    both = [i for i in range(rank_axis) if a.shape[i] == b.shape[i]]
    only_a = [i for i in range(rank_axis) if a.shape[i] != b.shape[i] == 1]
    only_b = [i for i in range(rank_axis) if b.shape[i] != a.shape[i] == 1]
    a = jnp.squeeze(a, only_b)
    b = jnp.squeeze(b, only_a)
    in_a = [i for i in range(rank_axis) if i not in only_b]
    in_b = [i for i in range(rank_axis) if i not in only_a]
    dims = (
        ((a.ndim - 1,), (b.ndim - 1,)),
        (tuple(map(in_a.index, both)), tuple(map(in_b.index, both))),
    )
    out = jax.lax.dot_general(
        a,
        b,
        dims,
        precision=precision,
        preferred_element_type=dtype,
        # Factors that are spread both lie along the mesh axes of their kernel.
        out_sharding=dot_sharding(a, b, dims),
    )
    order = both + only_a + only_b
    out = jnp.transpose(out, [order.index(i) for i in range(rank_axis)])
    return out.reshape(shape)


def reshape_groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Matches the axes of a reshape in the smallest groups of equal size.

    Axes of size one form groups of their own.

    >>> reshape_groups((4, 6), (4, 2, 3))
    [([0], [0]), ([1], [1, 2])]
    """
    groups = [([i], []) for i, n in enumerate(old) if n == 1]
    groups += [([], [j]) for j, n in enumerate(new) if n == 1]
    left = [i for i, n in enumerate(old) if n != 1]
    right = [j for j, n in enumerate(new) if n != 1]
    while left:
        took, gave = [left.pop(0)], [right.pop(0)]
        while (m := math.prod(old[i] for i in took)) != (
            n := math.prod(new[j] for j in gave)
        ):
            (took if m < n else gave).append((left if m < n else right).pop(0))
        groups.append((took, gave))
    return groups

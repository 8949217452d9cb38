"""What an adapter may hold of a kernel beside `LoraFactors`: slices, and rows.

Both are low-rank changes in another guise, so the program that is evaluated knows
factors alone: `lowered` says which.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._jax.sharding import explicit_sharding, spec_of
from .._params.axes import KernelAxes, Shape
from .factors import LoraFactors, exportable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlicedFactors:
    """Factors of some slices of a fused kernel, as of q and v in a kernel of q, k, v.

    Each slice is a run of outputs with an `a` and a `b` of its own; the other outputs
    are not adapted. Slices count the outputs of all output axes together, the last
    axis fastest.

    Attributes:
        a: of all slices side by side, of shape `(*batch, *in, slices·rank)`.
        b: of all slices side by side, of shape `(*batch, rank, outputs of slices)`.
        axes: the roles of the kernel's axes.
        scaling: alpha/rank (or alpha/√rank), a Python float.
        slices: the first output of each slice, and the one behind its last.
        out: the sizes of the output axes.

    References:
        `MergedLinear` of loralib, <https://github.com/microsoft/LoRA>.
    """

    a: jax.Array
    b: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})
    slices: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})
    out: Shape = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The rank of each slice."""
        return self.a.shape[-1] // len(self.slices)

    @property
    def kernel_shape(self) -> Shape:
        """The shape of the kernel that the factors belong to."""
        order = self.axes.batch + self.axes.in_ + self.axes.out
        sizes = self.a.shape[:-1] + self.out
        return tuple(sizes[order.index(i)] for i in range(len(order)))

    def wanted(self, shape: Shape) -> dict[str, Shape]:
        """Returns the shapes of the arrays for a kernel of a shape."""
        return sliced_shapes(self.axes, shape, self.slices, self.rank)

    def lowered(self) -> LoraFactors:
        """Returns the same change as factors: `b` is block-diagonal."""
        batch, width = self.b.shape[: len(self.axes.batch)], math.prod(self.out)
        rows, start = [], 0
        for first, stop in self.slices:
            block = self.b[..., start : start + stop - first]
            start += stop - first
            sides = [(0, 0)] * (block.ndim - 1) + [(first, width - stop)]
            rows.append(jnp.pad(block, sides))
        b = jnp.concatenate(rows, axis=-2)
        b = b.reshape(*batch, b.shape[-2], *self.out)
        return LoraFactors(self.a, b, self.axes, self.scaling)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainedRows:
    """New values of some rows of a table; the other rows are frozen.

    Attributes:
        values: the rows, of shape `(rows, *out)`.
        rows: which rows of the table they are.
        length: the number of rows of the table.
        axes: the roles of the table's axes: one input axis, which counts rows.
    """

    values: jax.Array
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    axes: KernelAxes = dataclasses.field(metadata={"static": True})

    @property
    def kernel_shape(self) -> Shape:
        """The shape of the table."""
        sizes = (self.length, *self.values.shape[1:])
        order = self.axes.in_ + self.axes.out
        return tuple(sizes[order.index(i)] for i in range(len(order)))

    def wanted(self, shape: Shape) -> dict[str, Shape]:
        """Returns the shape of the values for a table of a shape."""
        return {"values": (len(self.rows), *(shape[i] for i in self.axes.out))}

    def lowered(self, table: jax.Array) -> LoraFactors:
        """Returns the change of the table as factors: `a` picks the rows.

        The change is in float32 at least, so that the old row and it make the new one.
        """
        old = taken_rows(table, self.axes, self.rows)
        wide = jnp.float64 if self.values.dtype == jnp.float64 else jnp.float32
        change = self.values.astype(wide) - jax.lax.stop_gradient(old).astype(wide)
        picked = jax.nn.one_hot(jnp.array(self.rows), self.length, dtype=change.dtype)
        return LoraFactors(picked.T, change, self.axes, 1.0)

    def placed_in(self, table: jax.Array) -> jax.Array:
        """Returns the table with the rows in their places, to the bit."""
        axis, sharding = self.axes.in_[0], explicit_sharding(table)
        first = jnp.moveaxis(table, axis, 0)
        values = self.values.astype(table.dtype)
        if sharding is not None:  # whole along the rows, which any of them may be
            whole = PartitionSpec(None, *spec_of(first)[1:])
            place = sharding.update(spec=whole)
            first, values = (jax.sharding.reshard(v, place) for v in (first, values))
        new = first.at[jnp.array(self.rows)].set(values)
        new = jnp.moveaxis(new, 0, axis)
        return new if sharding is None else jax.sharding.reshard(new, sharding)


def taken_rows(table: jax.Array, axes: KernelAxes, rows: Sequence[int]) -> jax.Array:
    """Returns rows of a table, `(rows, *out)`, wherever it is sharded."""
    (axis,), sharding = axes.in_, explicit_sharding(table)
    if sharding is None:
        return jnp.moveaxis(jnp.take(table, jnp.array(rows), axis=axis), axis, 0)
    first = jnp.moveaxis(table, axis, 0)
    place = sharding.update(spec=PartitionSpec(None, *spec_of(first)[1:]))
    return first.at[jnp.array(rows)].get(out_sharding=place)


exportable(SlicedFactors, "jlora.SlicedFactors")
exportable(TrainedRows, "jlora.TrainedRows")

Special = SlicedFactors | TrainedRows
Factored = LoraFactors | SlicedFactors | TrainedRows


def sliced_shapes(
    axes: KernelAxes, shape: Shape, slices: tuple[tuple[int, int], ...], rank: int
) -> dict[str, Shape]:
    """Returns the shapes of `a` and `b` of slices of a kernel."""
    a, b = axes.factor_shapes(shape, rank)
    width = sum(stop - first for first, stop in slices)
    n_batch = len(axes.batch)
    return {
        "a": (*a[:-1], len(slices) * rank),
        "b": (*b[: n_batch + 1], width),
    }


def lowered(entry: Any, kernel: Any) -> Any:
    """Returns an entry as `LoraFactors`; an array of a leaf trained whole as it is."""
    if isinstance(entry, SlicedFactors):
        return entry.lowered()
    if isinstance(entry, TrainedRows):
        return entry.lowered(jnp.asarray(kernel))
    return entry

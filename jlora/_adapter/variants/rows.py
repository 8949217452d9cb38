"""New values of some rows of a table that is looked up; the others are frozen."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..._jax.dtypes import widest
from ..._jax.sharding import beside, explicit_sharding, spec_of
from ..._params.axes import KernelAxes, Shape
from ..factors import LoraFactors
from .variant import New, Variant


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

    def lowered(self, table: jax.Array) -> LoraFactors:
        """Returns the change of the table as factors: `a` picks the rows.

        The change is in float32 at least, so that the old row and it make the new one.
        """
        old = _taken(table, self.axes, self.rows)
        wide = jnp.float64 if self.values.dtype == jnp.float64 else jnp.float32
        values = beside(self.values.astype(wide), old)
        change = values - old.astype(wide)
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


def _taken(table: jax.Array, axes: KernelAxes, rows: Sequence[int]) -> jax.Array:
    """Returns rows of a table, `(rows, *out)`, wherever it is sharded."""
    (axis,), sharding = axes.in_, explicit_sharding(table)
    if sharding is None:
        return jnp.moveaxis(jnp.take(table, jnp.array(rows), axis=axis), axis, 0)
    first = jnp.moveaxis(table, axis, 0)
    place = sharding.update(spec=PartitionSpec(None, *spec_of(first)[1:]))
    return first.at[jnp.array(rows)].get(out_sharding=place)


def _shapes(
    axes: KernelAxes, shape: Shape, rank: None, rows: Sequence[int]
) -> dict[str, Shape]:
    return {"values": (len(rows), *(shape[i] for i in axes.out))}


def _new(new: New, table: Any) -> dict[str, Any]:
    rows: Any = new.config.rows
    return {"values": _taken(table, new.axes, rows).astype(new.config.dtype)}


def _origin(entry: TrainedRows, table: Any) -> jax.Array | None:
    if table is None:
        return None
    old = _taken(jnp.asarray(table), entry.axes, entry.rows)
    return old.astype(widest(entry.values))


def _misfit(axes: KernelAxes, shape: Shape, rows: Sequence[int]) -> str | None:
    last = max(rows)
    if axes.batch or len(axes.in_) != 1:
        return "is no table: `rows` need one input axis and no batch axes"
    if last >= shape[axes.in_[0]]:
        return f"has {shape[axes.in_[0]]} rows, and `rows` names row {last}"
    return None


ROWS = Variant(
    "rows",
    TrainedRows,
    _shapes,
    _new,
    lambda entry, table: entry.lowered(jnp.asarray(table)),
    statics=lambda axes, shape: {"length": shape[axes.in_[0]]},
    settings=("rows",),
    chosen=lambda config: config.rows is not None,
    rank=None,
    misfit=_misfit,
    from_leaf=lambda config: "has rows that are trained whole, each of which",
    along=lambda axes: {"values": (None, *axes.out)},
    labels={"values": "full"},
    reads_kernel=True,
    leaf="table",
    merged=lambda table, entry: entry.placed_in(table),
    origin=_origin,
    note=lambda entry: f"{len(entry.rows)} rows",
    plural="rows that are trained alone",
    peft="trainable_token_indices",
)

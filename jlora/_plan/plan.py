"""The plan: the analysis as people read it."""

import dataclasses
import html
import math
from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from .._params.layout import AnyMesh
from .._params.paths import FlatParams, PyTree, is_array, is_quantized
from .._params.quantized import qtype_of
from .._program.flops import Flops, step_flops
from .._program.trace import Traced
from .measure import measure, stored_bytes
from .memory import Memory, human
from .target import Target, Unusable, counted, entry_of, variant_of


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be trained, how each kernel is used, and what was left out.

    Attributes:
        targets: the leaves that will be trained, in the order of the params.
        unusable: leaves that a pattern matched and that are no targets, each with the
            reason.
        total: the number of values in the params. Of Linen's variables these are the
            collection "params" and those that hold a target.
        flops: what a step costs; None for a plan from the params alone.
        params: the params as shapes, dtypes and shardings; in no comparison.
        apart: the other collections of Linen's variables (statistics, caches), each
            with the number of its values.

    Printing a plan gives a table; in a notebook it is shown as HTML.
    """

    targets: tuple[Target, ...]
    unusable: tuple[Unusable, ...]
    total: int
    flops: Flops | None = None
    params: PyTree = dataclasses.field(default=None, repr=False, compare=False)
    apart: tuple[tuple[str, int], ...] = ()

    @property
    def trainable(self) -> int:
        """The number of values that will be trained."""
        return sum(target.trainable for target in self.targets)

    @property
    def materialized(self) -> tuple[Target, ...]:
        """The targets whose `W + s·a·b` is formed somewhere."""
        return tuple(t for t in self.targets if any(not use.factored for use in t.uses))

    def summary(self) -> str:
        """Returns the line of totals."""
        share = 100 * self.trainable / max(self.total, 1)
        told = ", ".join(f"{name} {size:,}" for name, size in self.apart)
        beside = f"; beside the params: {told}" if told else ""
        return f"trainable {self.trainable:,} of {self.total:,} ({share:.3f} %){beside}"

    def cost(self) -> str:
        """Returns the line of a step's FLOPs and bytes beside full fine-tuning's."""
        trained = [v for t in self.targets for v in t.abstract_arrays.values()]
        own = sum(math.prod(v.shape) * v.dtype.itemsize for v in trained)
        flat = FlatParams.of(self.params)
        floating = [
            leaf
            for leaf, counts in zip(
                flat.leaves, counted(flat, self.targets), strict=True
            )
            if counts and is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        full = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in floating)
        gradients = f"gradients {human(own)} instead of {human(full)}"
        if self.flops is None:
            return gradients
        return f"a step: {self.flops}, {gradients}"

    def memory(
        self,
        *,
        optimizer: Any,
        mesh: AnyMesh | None = None,
        batch: PyTree = None,
        shardings: PyTree = None,
    ) -> Memory:
        """Returns the bytes that a training step holds on each device.

        Counted are the arguments of a step `(adapter, state, params, batch)` and the
        gradients; activations are not. Factors are laid out as `jlora.shardings` does
        from the params, the optimizer's state as `jlora.state_shardings` does, and
        gradients like the factors.

        Args:
            optimizer: an optax optimizer, or anything with its `init`.
            mesh: the mesh for what names no mesh of its own; one of
                `jax.sharding.AbstractMesh` needs no devices.
            batch: a tree of arrays or `jax.ShapeDtypeStruct`s.
            shardings: the layout of the params, as `jlora.shardings` takes it, where
                they do not say it themselves: a tree with their paths of shardings or
                `PartitionSpec`s. What has no sharding is whole on every device.

        Returns:
            A `Memory`, which prints as a table.

        Raises:
            TypeError: if `optimizer` is none.
            ValueError: if a sharding is missing in `shardings`, or does not fit its
                leaf.

        Example:
            >>> import jax, jax.numpy as jnp, jlora, optax
            >>> w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
            >>> x = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16)
            >>> config = jlora.LoraConfig("w", rank=8)
            >>> plan = jlora.lora(lambda p, x: x @ p["w"], config).plan({"w": w}, x)
            >>> print(plan.memory(optimizer=optax.adam(1e-4), batch=x))
            bytes on each device      adapter  full fine-tuning
            ------------------------  -------  ----------------
            base                      33.6 MB           33.6 MB
            factors                    262 kB               0 B
            optimizer state            524 kB           67.1 MB
            batch                     65.5 kB           65.5 kB
            arguments of a step       34.4 MB            101 MB
            gradients, within a step   262 kB           33.6 MB
            total                     34.7 MB            134 MB
            trainable 65,536 of 16,777,216 (0.391 %), 256× fewer
            checkpoint 262 kB, of all params 33.6 MB
            1 device; 1 kB is 1000 bytes; activations are not counted
        """
        return measure(
            self.params,
            self.targets,
            optimizer=optimizer,
            mesh=mesh,
            batch=batch,
            shardings=shardings,
        )

    def __str__(self) -> str:
        """Returns the plan as a table."""
        rows = [_HEAD, *self._rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [_line(row, widths) for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines += [self.summary(), self.cost(), *self._quantized()]
        if self.unusable:
            lines.append(f"matched and left out: {len(self.unusable)}")
            lines += [f"  {u.path} {u.shape}: {u.reason}" for u in self.unusable]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Returns the plan as an HTML table."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in _HEAD)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        left = "".join(
            f"<li>{html.escape(f'{u.path} {u.shape}: {u.reason}')}</li>"
            for u in self.unusable
        )
        title = f"<p>matched and left out</p><ul>{left}</ul>" if left else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        below = "<br>".join(map(html.escape, [self.cost(), *self._quantized()]))
        totals = f"<b>{html.escape(self.summary())}</b><br>{below}"
        return f"{table}<p>{totals}</p>{title}"

    def _quantized(self) -> list[str]:
        """Returns the line about quantised kernels, if there are any."""
        leaves = FlatParams.of(self.params).by_path()
        found = {p: leaf for p, leaf in leaves.items() if is_quantized(leaf)}
        if not found:
            return []
        kinds = Counter(map(qtype_of, found.values()))
        told = ", ".join(f"{times} {kind}" for kind, times in kinds.items())
        held = sum(stored_bytes(leaf) for leaf in found.values())
        dense = sum(math.prod(v.shape) * v.dtype.itemsize for v in found.values())
        frozen = sorted(set(found) - {target.path for target in self.targets})
        more = f" and {len(frozen) - 5} more" if len(frozen) > 5 else ""
        rest = f"; not adapted: {', '.join(frozen[:5])}{more}" if frozen else ""
        return [f"quantised: {told}, {human(held)} instead of {human(dense)}{rest}"]

    def _rows(self) -> list[tuple[str, ...]]:
        trainable = max(self.trainable, 1)
        return [_row(target, trainable) for target in self.targets]


_HEAD = (
    "path",
    "shape",
    "axes",
    "uses",
    "product",
    "rank",
    "scaling",
    "trainable",
    "share",
)
_LEFT = 5  # the columns that are aligned to the left


def make_plan(
    params: FlatParams,
    targets: Sequence[Target],
    unusable: Sequence[Unusable],
    traced: Traced | None,
) -> Plan:
    """Returns the plan of a resolved config."""
    counts = counted(params, targets)
    sizes = [math.prod(v.shape) if is_array(v) else 0 for v in params.leaves]
    total = sum(size for size, own in zip(sizes, counts, strict=True) if own)
    apart: Counter[str] = Counter()
    for path, size, own in zip(params.paths, sizes, counts, strict=True):
        if not own:
            apart[params.collection(path) or ""] += size
    # A quantised leaf is a tree of arrays.
    each = lambda leaf: jax.tree.map(_abstract, leaf)
    abstract = params.treedef.unflatten(map(each, params.leaves))
    own = {path for path, own in zip(params.paths, counts, strict=True) if own}
    flops = None if traced is None else _flops(targets, traced, own)
    held = tuple(sorted(apart.items()))
    return Plan(tuple(targets), tuple(unusable), total, flops, abstract, held)


def _flops(targets: Sequence[Target], traced: Traced, own: Set[str]) -> Flops:
    places = {place for path, place in traced.positions.items() if path in own}
    is_param = [i in places for i in range(len(traced.inputs))]
    factors = sum((t.rank or 0) * use.factor_flops for t in targets for use in t.uses)
    return step_flops(traced.jaxpr, is_param, factors)


def _abstract(leaf: Any) -> Any:
    """Returns the shape, dtype and sharding of an array; other leaves as they are."""
    if not is_array(leaf):
        return leaf
    place = getattr(leaf, "sharding", None)
    named = place if isinstance(place, NamedSharding) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named)


def _row(target: Target, trainable: int) -> tuple[str, ...]:
    return (
        target.path,
        _shape(target),
        _axes(target),
        _uses(target),
        _products(target),
        _rank(target),
        "" if target.scaling is None else f"{target.scaling:g}",
        f"{target.trainable:,}",
        f"{100 * target.trainable / trainable:.1f} %",
    )


def _rank(target: Target) -> str:
    """Tells the rank, or what is trained instead, and what else the factors have."""
    config = target.config
    note = variant_of(target).note(entry_of(target, target.abstract_arrays))
    if target.rank is None:
        return note
    told = [note] if note else []
    told += [f" dropout {config.dropout:g}"] if config.dropout else []
    asked = f" of {config.rank}" if target.rank != config.rank else ""
    return f"{target.rank}{asked}" + ",".join(told)


def _shape(target: Target) -> str:
    shape = "×".join(map(str, target.shape)) or "scalar"
    return shape if target.qtype is None else f"{shape} {target.qtype}"


def _axes(target: Target) -> str:
    if target.axes is None:
        return "whole"
    roles = (
        ("batch", target.axes.batch),
        ("in", target.axes.in_),
        ("out", target.axes.out),
    )
    told = " ".join(
        f"{name} {','.join(map(str, axes))}" for name, axes in roles if axes
    )
    given = {i % target.axes.ndim for i in target.config.batch_axes}
    own = ",".join(map(str, sorted(given)))
    return f"{told} (batch={own} by config)" if given else told


def _uses(target: Target) -> str:
    if target.axes is None:
        return "trained whole"
    counted = Counter(target.uses)
    if not counted:
        return "not traced"
    told = []
    for use, times in counted.items():
        how = use.kind if use.factored else f"{use.kind}: materialized"
        told.append(f"{how} ({use.source})" + (f" ×{times}" if times > 1 else ""))
    return ", ".join(told)


def _products(target: Target) -> str:
    """Names the form of each product, and how many share its operand."""
    told = []
    for use in target.uses:
        if use.form is not None:
            told.append(use.form + (f" ×{use.siblings}" if use.siblings > 1 else ""))
    return ", ".join(dict.fromkeys(told))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        padded.append(cell.ljust(width) if i < _LEFT else cell.rjust(width))
    return "  ".join(padded).rstrip()

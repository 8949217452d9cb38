"""The plan: the analysis as people read it."""

import dataclasses
import html
import math
import re
import textwrap
from collections import Counter
from collections.abc import Sequence, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from .._params.given import described, some
from .._params.layout import AnyMesh
from .._params.paths import FlatParams, PyTree, is_array, is_quantized
from .._params.quantized import qtype_of
from .._program.flops import Flops, step_flops
from .._program.trace import Traced
from .left import lines_of_formed, lines_of_frozen, lines_of_left
from .measure import measure, stored_bytes
from .memory import Memory, human
from .table import HEAD, cells_of, lines_of, rows_of
from .target import Target, Unusable, counted


@dataclasses.dataclass(frozen=True, repr=False)
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
        frozen: the paths of kernels that are no targets, and could be.

    Printing a plan gives a table, that of `table`; in a notebook it is shown as HTML.
    """

    targets: tuple[Target, ...]
    unusable: tuple[Unusable, ...]
    total: int
    flops: Flops | None = None
    params: PyTree = dataclasses.field(default=None, repr=False, compare=False)
    apart: tuple[tuple[str, int], ...] = ()
    frozen: tuple[str, ...] = ()

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
        replicate: bool = False,
        spread: bool = False,
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
            replicate: how factors are laid out, as `jlora.shardings` takes it.
            spread: likewise.

        Returns:
            A `Memory`, which prints as a table.

        Raises:
            TypeError: if `optimizer` is none.
            ValueError: if a sharding is missing in `shardings`, or does not fit its
                leaf; if both `replicate` and `spread` are asked for.

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
            policy={"replicate": replicate, "spread": spread},
        )

    def table(self, *, fold: bool = True, width: int | None = 100) -> str:
        """Returns the plan as a table, and what there is to say of it.

        Args:
            fold: whether targets that differ in numbers alone, such as those of layers,
                are one row, and what is left out is told in few lines. False gives a
                row for each target and a line for each leaf.
            width: the longest line, in letters, or None for any. Where there is too
                little room, columns are left out or cut.

        Example:
            >>> import jax, jax.numpy as jnp, jlora
            >>> def model(params, x):
            ...     for layer in params["layers"]:
            ...         x = jnp.tanh(x @ layer["up"]) @ layer["down"]
            ...     return x
            >>> up, down = (jax.ShapeDtypeStruct(s, "f4") for s in ((8, 32), (32, 8)))
            >>> params = {"layers": [{"up": up, "down": down} for _ in range(12)]}
            >>> config = jlora.LoraConfig("layers/.*/up", rank=2)
            >>> plan = jlora.lora(model, config).plan(params, jnp.ones((3, 8)))
            >>> print(plan.table().splitlines()[2].partition("  ")[0])
            layers/[0-11]/up × 12
            >>> print(plan.table().splitlines()[-1].strip())
            layers/[0-11]/down × 12
            >>> len(plan.table(fold=False, width=None).splitlines()) > 12
            True
        """
        lines = lines_of(rows_of(self.targets, fold=fold), width)
        told = [*self._totals(), *self._left(fold)]
        if width is not None:
            cut = lambda line: textwrap.wrap(
                line,
                width,
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
                drop_whitespace=True,
            )
            told = [piece for line in told for piece in cut(line)]
        return "\n".join([*lines, *told])

    def __str__(self) -> str:
        """Returns the plan as a table of at most 100 columns, layers folded."""
        return self.table()

    def __repr__(self) -> str:
        """Returns the plan in one line."""
        count = f"{len(self.targets)} target{'s' * (len(self.targets) != 1)}"
        return f"Plan({count}, {self.summary()})"

    def _repr_html_(self) -> str:
        """Returns the plan as an HTML table, layers folded."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in HEAD)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in cells_of(rows_of(self.targets, fold=True))
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        first, *others = map(html.escape, self._totals())
        totals = "<br>".join([f"<b>{first}</b>", *others])
        return f"{table}<p>{totals}</p>{self._html_of_left()}"

    def _html_of_left(self) -> str:
        items = ""
        for line in map(html.escape, self._left(fold=True)):
            tag = "li" if line.startswith(" ") else "p"
            items += f"<{tag}>{line.strip()}</{tag}>"
        return re.sub("((?:<li>.*?</li>)+)", r"<ul>\1</ul>", items)

    def _totals(self) -> list[str]:
        uses = (use for target in self.targets for use in target.uses)
        why = {why: None for use in uses if (why := use.without_kernel)}
        missed = [f"without the kernel for Hopper GPUs: {one}" for one in why]
        return [self.summary(), self.cost(), *self._quantized(), *missed]

    def _left(self, fold: bool) -> list[str]:
        formed = lines_of_formed(self.targets, fold=fold)
        told = lines_of_left(self.targets, self.unusable, fold=fold)
        return [*formed, *told, *lines_of_frozen(self.frozen, fold=fold)]

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
        rest = f"; not adapted: {some(frozen)}" if frozen else ""
        return [f"quantised: {told}, {human(held)} instead of {human(dense)}{rest}"]


def make_plan(
    params: FlatParams,
    targets: Sequence[Target],
    unusable: Sequence[Unusable],
    traced: Traced | None,
    frozen: Sequence[str] = (),
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
    known = tuple(targets), tuple(unusable), total, flops, abstract, held
    return Plan(*known, tuple(frozen))


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


def print_trainable(plan: Plan) -> None:
    """Prints how much of a model is trained, in one line and in the words of PEFT.

    Args:
        plan: what `lora.plan` returned. Printed itself, it is a table.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> w, x = jax.ShapeDtypeStruct((64, 64), jnp.float32), jnp.ones((1, 64))
        >>> lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=4))
        >>> jlora.print_trainable(lora.plan({"w": w}, x))
        trainable params: 512 || all params: 4,096 || trainable%: 12.5000
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"`jlora.print_trainable` takes a plan, got {described(plan)}: give "
            "`lora.plan(params, x)`"
        )
    share = 100 * plan.trainable / max(plan.total, 1)
    print(
        f"trainable params: {plan.trainable:,} || all params: {plan.total:,} || "
        f"trainable%: {share:.4f}"
    )

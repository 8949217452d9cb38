"""What jlora knows of one primitive: a record, which its file enters in the tables.

`CarryRule` says that an operation moves a kernel and leaves it factored, `ConsumeRule`
that it is linear in a kernel and uses it up, `ControlFlowRule` that it has a function
inside. Other modules ask a primitive's record and not for its name; the few that know
one besides are listed in `tests/test_structure.py`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from .._jax.versions import rebind
from .._params.axes import Roles, Shape
from .._params.lazy import is_lazy
from .adapted import Adapted, base_of
from .lazy_moves import remembered
from .rows import RowLayout
from .tiles import TilesMove
from .view import Body, Passed, Place, Program, Step, Value, View

# Axes of a value, as those along which a scale varies.
Axes = frozenset[int] | set[int]

# --- operations that carry a kernel ---

# For each axis of a value, the axes of another value that it comes from.
AxisMap = list[frozenset[int]]

# `(eqn, operands, bases of the outputs) -> outputs`, on plain and adapted values.
Move = Callable[[Any, list[Any], list[Any]], list[Any]]


@dataclasses.dataclass(frozen=True)
class CarryRule:
    """One operation that keeps an adapted operand factored.

    Attributes:
        axes: `(eqn, operand) -> [AxisMap of each output]`, with None for an output that
            does not come from the operand; None where the form of the equation is not
            supported.
        move: `(eqn, operands, bases) -> outputs` on plain and adapted values, given the
            equation's outputs on the bases of the operands.
        operands: the operands that may be adapted; None means any one of them.
        together: whether several operands may be adapted at once.
        frozen: whether the other operands must not depend on activations: what is
            added to an activation, or multiplied by one, is used up.
        supports: `(eqn, operand, roles of the value) -> bool`: whether the value stays
            factored once the roles of the kernel are settled.
        entrywise: whether each entry comes from the entries at its place alone.
        repeats: `(eqn, axes) -> axes` of an operation that repeats entries along new
            axes: those along which the output varies, given those of the operand.
        mixes: whether it sums over axes of a kernel, as a product does, so that it may
            be its use.
        passed: `(eqn, operand, view, place) -> Passed`, of an operation whose meaning
            shows only later.
        adds: whether it adds the other operands to the kernel: one that the adapter
            moves keeps the kernel from passing.
        rows: `eqn -> RowLayout`, of an operation that may take single entries along
            some axes; None where it does not.
        found: `(eqn, operands) -> mask` of the rows that are no filling, or None.
        take: what takes rows for themselves, where that is not `move`.
        beside: `(eqn, operands) -> outputs` that keeps the other operand apart from the
            kernel, of an operation that scales it.
        scale_varies: `eqn -> axes` of the outputs along which a scale of the kernel
            varies after this in any case.
        keeps_scale: `(eqn, operand, axes) -> bool`: whether a scale of the kernel that
            varies along these axes is one of the outputs too.
        tiles: `(eqn, quantised value, other operands) -> values`, which does it to the
            arrays of a quantised value; None where it tears a tile apart.
        lazy: `(eqn, values) -> values`, what is done in place of the operation where
            some values are not made yet; they remember it where this is None.
        in_place: whether values lie in memory as they did.
    """

    axes: Callable[[Any, int], Sequence[AxisMap | None] | None]
    move: Move
    operands: tuple[int, ...] | None = (0,)
    together: bool = False
    frozen: bool = False
    supports: Callable[[Any, int, Roles], bool] = lambda eqn, operand, roles: True
    entrywise: bool = False
    repeats: Callable[[Any, Axes], frozenset[int]] | None = None
    mixes: bool = False
    passed: Callable[[Any, int, View, Place], Passed] | None = None
    adds: bool = False
    rows: Callable[[Any], RowLayout | None] = lambda eqn: None
    found: Callable[[Any, list[Any]], jax.Array | None] = lambda eqn, operands: None
    take: Move | None = None
    beside: Callable[[Any, list[Any]], list[Any]] | None = None
    scale_varies: Callable[[Any], frozenset[int]] = lambda eqn: frozenset()
    keeps_scale: Callable[[Any, int, Axes], bool] = lambda eqn, operand, varies: True
    tiles: TilesMove | None = None
    lazy: Callable[[Any, Sequence[Any]], list[Any]] | None = None
    in_place: bool = False

    def takes(self, operands: Collection[int], active: bool) -> bool:
        """Returns whether just these operands may be adapted.

        Args:
            operands: the operands.
            active: whether another operand depends on activations.
        """
        known = self.operands is None or set(operands) <= set(self.operands)
        alone = self.together or len(operands) == 1
        return known and alone and not (self.frozen and active)

    def run(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """Evaluates an equation on plain and adapted values."""
        return self.move(eqn, operands, self.on_bases(eqn, operands))

    def run_rows(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """Evaluates an equation whose rows are wanted for themselves."""
        return (self.take or self.move)(eqn, operands, self.on_bases(eqn, operands))

    def on_bases(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """Evaluates an equation on frozen values; what comes of lazy ones is lazy."""
        values = [base_of(value) for value in operands]
        if not is_lazy(values):
            return rebind(eqn, values)
        if self.lazy is not None:
            return self.lazy(eqn, values)
        return remembered(eqn, values, tiles=self.tiles, entrywise=self.entrywise)


def present(factor: jax.Array, axis: int, shape: Shape) -> bool:
    """Returns whether an aligned factor has an axis of a value of `shape`."""
    return factor.shape[axis] == shape[axis]


def identity(ndim: int) -> AxisMap:
    """Each axis comes from itself."""
    return [frozenset([i]) for i in range(ndim)]


def same_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """Each output has the axes of the operand."""
    return [identity(eqn.invars[operand].aval.ndim) for _ in eqn.outvars]


def each_factor(move: Callable[[Any, jax.Array, Shape, list[Any]], jax.Array]) -> Move:
    """Returns a `move` of the first operand that does the same to all its factors.

    Args:
        move: `(eqn, factor, shape of the value, other operands) -> factor`, where an
            axis that the factor lacks is of size one and stays so.
    """

    def run(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
        value, others = operands[0], operands[1:]
        shape = value.base.shape
        return [value.moved(bases[0], lambda f: move(eqn, f, shape, others))]

    return run


def unchanged(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    """Leaves the factors of all operands as they are."""
    return [
        value.with_base(base) if isinstance(value, Adapted) else base
        for base, value in zip(bases, operands, strict=True)
    ]


def rebound(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """The operation itself, on the factor: it does not look at axes."""
    return rebind(eqn, [factor])[0]


# --- operations that use a kernel up ---


@dataclasses.dataclass(frozen=True)
class LinearUse:
    """How one primitive uses a kernel up, as a map that is linear in it.

    Attributes:
        summed: `(eqn, operand) -> axes` of the kernel that it sums over.
        shared: `(eqn, operand) -> axes` that the kernel shares with what it meets.
        apply: `(eqn, operand, others, probe, shape, own) -> x·Ω`, given the other
            operands, the kernel's shape and its own axes.
        rows: `(eqn, operand, values) -> number of inputs`, for each group if there are.
        own: `(eqn, operand, part) -> axes` that it sums over and that are no inputs, as
            the batch axes of a kernel.
    """

    summed: Callable[[Any, int], Sequence[int]]
    shared: Callable[[Any, int], Sequence[int]]
    apply: Callable[
        [Any, int, Sequence[Any], jax.Array, Shape, Collection[int]], jax.Array
    ]
    rows: Callable[[Any, int, Sequence[Any]], Any]
    own: Callable[[Any, int, Any], set[int]] = lambda eqn, operand, part: set()


@dataclasses.dataclass(frozen=True)
class ConsumeRule:
    """One operation that is linear in a kernel and gives a plain value.

    Attributes:
        kind: the name of the use, as the plan prints it.
        operands: the operands that may be a kernel.
        roles: `(eqn, operand) -> roles` of the operand's axes, or None where the
            equation says nothing about them: this is where the axes of a kernel are
            learnt. One that is "either" is an input axis, but where it is cut from an
            axis that has outputs too.
        flops: `eqn -> FLOPs` of the forward pass.
        linear: the use as a map that is linear in the kernel, for statistics of inputs.
        run: `(eqn, operands, derive) -> outputs`, of which one operand is `Adapted`:
            the base may be lazy (`lazy.called`), each part may have dropout
            (`parts.dropped_input`), and DoRA's scale is applied if `scale_fits` lets
            one pass. None for products, of which those that share an operand are
            evaluated together, see `products.py`.
        supports: `(eqn, operand, roles of the value) -> bool`.
        details: `(eqn, view) -> text` that the name of the use gets.
        scale_fits: `(eqn, operand, axes) -> bool`: whether a scale of the kernel that
            varies along these axes can be applied to the other operand or the result.
        features: `(eqn, operand) -> bool`: whether the other operand is contracted as
            features are, if it is frozen.
        by_heads: `(eqn, operand, view) -> bool`: whether it contracts, head by head,
            what frozen features have been multiplied by.
        maps_kernel: whether JAX maps it only where its kernel is mapped too. Then `run`
            makes one of it for all examples of a mixed batch, where parts have gates or
            the kernel is frozen: `Adapted` without parts.
    """

    kind: str
    operands: tuple[int, ...]
    roles: Callable[[Any, int], list[str] | None]
    flops: Callable[[Any], int]
    linear: LinearUse
    run: Callable[[Any, list[Any], str], list[Any]] | None = None
    supports: Callable[[Any, int, Roles], bool] = lambda eqn, operand, roles: True
    details: Callable[[Any, View], str] = lambda eqn, view: ""
    scale_fits: Callable[[Any, int, Axes], bool] = lambda eqn, operand, varies: True
    features: Callable[[Any, int], bool] = lambda eqn, operand: False
    by_heads: Callable[[Any, int, View], bool] = lambda eqn, operand, view: False
    maps_kernel: bool = False


# --- control flow ---

# What is gathered of one value: arrays, of which a plain evaluation has none.
Gathered = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """How an evaluation runs the programs inside of an operation, and what it gathers.

    Beside its outputs, an evaluation may gather something of each value that goes into
    a program. A rule brings it out of its operation: added up over the steps of a loop,
    and for what a scan cuts, slice by slice. A plain evaluation gathers nothing: of no
    value `()`, so that all of this leaves no trace in a program.

    Attributes:
        program: runs a program on values; returns its outputs, and what it has gathered
            of each value.
        whole: returns what stands for a value where it is needed as one array.
        places: returns, of values, arrays with the shapes and types of what is gathered
            of them; of their specs, its specs.
    """

    program: Callable[[Program, Sequence[Any]], tuple[list[Any], Sequence[Gathered]]]
    whole: Callable[[Any], Any]
    places: Callable[[Sequence[Any]], Sequence[Gathered]]

    def zeros(self, values: Sequence[Any]) -> Sequence[Gathered]:
        """Returns what was gathered of values before the first step of a loop."""
        # Not `zeros_like`: a zero of this kind varies in a shard_map as its place does.
        return jax.tree.map(lambda place: 0 * place, self.places(values))


def _always(eqn: Any) -> str | None:
    return None


class Analysis(Protocol):
    """A pass over the program, as the rules of control flow see it."""

    def program(self, jaxpr: Any, inputs: Sequence[Value]) -> Body:
        """Analyzes a jaxpr, given what is known of its inputs."""
        ...

    def loop(self, length: int = 1) -> contextlib.AbstractContextManager[None]:
        """Surrounds the analysis of a body that runs `length` times, if it is known."""
        ...

    def materialized(
        self, eqn: Any, values: Iterable[Value], where: str = "", *, used: bool = False
    ) -> None:
        """Notes that the operands with views must be formed at an equation."""
        ...

    def is_one_sided(self, view: View, axes: Iterable[int]) -> bool:
        """Whether axes of a view are batch axes, or on one side of its kernel."""
        ...


class Inside(NamedTuple):
    """A function inside of an operation, as it is counted.

    Attributes:
        jaxpr: the function.
        frozen: which of its inputs surely depend on the params alone.
        times: how often it runs.
    """

    jaxpr: Any
    frozen: Sequence[bool]
    times: int = 1


@dataclasses.dataclass(frozen=True)
class ControlFlowRule:
    """How one higher-order primitive is analyzed and emitted again.

    It is emitted through the public functions of `jax` and `jax.lax`. Adapted values
    are pytrees, so that factors pass as ordinary operands. `jax.vmap` and `jax.grad`
    make equations that the public function of a primitive does not: a loop whose
    condition is a bool for each example, a checkpoint that is part of a backward pass.
    The file of each rule says what becomes of each parameter.

    Attributes:
        analyze: returns the step, with the programs inside, and what is known of the
            outputs, given which of these are used.
        run: emits the operation around its programs; returns its outputs, and what was
            gathered of each of its operands.
        is_call: whether it stands for its body, which can be evaluated in its place.
        uncounted: says what cannot be told of the inputs of kernels inside, if they
            cannot be counted.
        inside: `(eqn, which operands depend on the params alone)` to the functions
            inside whose work is the operation's, of one whose outputs depend on more;
            of a call it is None.
        one_of: whether only one of them runs.
    """

    analyze: Callable[
        [Analysis, Any, list[Value], tuple[bool, ...]], tuple[Step, list[Value]]
    ]
    run: Callable[[Any, Step, list[Any], Run], tuple[Sequence[Any], Sequence[Gathered]]]
    is_call: bool = False
    uncounted: Callable[[Any], str | None] = _always
    inside: Callable[[Any, Sequence[bool]], list[Inside]] | None = None
    one_of: bool = False

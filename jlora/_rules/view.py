"""What the abstract pass knows: views of kernels, uses of them, and the steps.

A `View` says that a value of the program carries (part of) a kernel, and which axes of
the kernel each of its axes comes from. A `Value` is what is known of any value: its
views, and whether it is computed from an *activation*, that is from an input of the
program that is no param.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from .._params.axes import KernelAxes
from .._product.choice import ByPlatform, form_here, without_kernel
from .._product.group import Form

Action = Literal[
    "plain", "dead", "carry", "consume", "product", "lookup", "enter", "materialize"
]

# The place of an equation: its number, after those of the equations around it.
Place = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Passed:
    """An operation that a kernel has passed, whose meaning shows only later.

    A row that is taken is a lookup if it is wanted for itself, and only a move if it
    goes on to a product. A product with a frozen matrix is a use of the kernel if that
    matrix holds features (learned queries of several heads, say), and a move if the
    result is what multiplies the activations. A sum with a frozen value is an offset of
    the kernel if the activations are multiplied by it, and else one of features.

    Attributes:
        place: where it is.
        axes: the axes of the kernel that were indexed or summed over.
        kind: "index" for rows taken by an index that depends on activations, "order"
            for rows taken by one that does not, "mix" for a frozen product or a sum
            over axes, "sum" for a sum with a frozen value.
        tied: of a "mix", the axes of the kernel that go along with axes of the frozen
            operand.
        features: of a "mix", whether the frozen operand is contracted along its last
            axes, as features are.
    """

    place: Place
    axes: frozenset[int]
    kind: Literal["index", "order", "mix", "sum"]
    features: bool = False
    tied: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class View:
    """A value that carries a kernel.

    Attributes:
        path: the kernel.
        shape: the kernel's shape.
        origins: for each axis of the value, the axes of the kernel it comes from.
        passed: the operations on its way whose meaning is not settled yet.
        spread: the axes of the value along which a scale of the kernel varies, as DoRA
            has one, whatever their origins: it was padded, or joined with others.
        formed: whether it has passed an operation without a rule, at which the kernel
            is formed; only its roles are still to be learnt.
        scaled: whether it has a scale that the adapter moves, which is kept beside.
        chosen: the axes of the value that come from no axis of the kernel, and along
            which the factors differ: other ones were chosen for each entry.
    """

    path: str
    shape: tuple[int, ...]
    origins: tuple[frozenset[int], ...]
    passed: tuple[Passed, ...] = ()
    spread: frozenset[int] = frozenset()
    formed: bool = False
    scaled: bool = False
    chosen: frozenset[int] = frozenset()

    @classmethod
    def whole(cls, path: str, shape: Sequence[int]) -> "View":
        """Returns the view of a whole kernel."""
        axes = tuple(frozenset([i]) for i in range(len(shape)))
        return cls(path, tuple(shape), axes)

    def moved(self, axis_map: Sequence[frozenset[int]]) -> "View":
        """Returns the view of a value whose axes come from this one's by `axis_map`."""
        origins = tuple(
            frozenset().union(*(self.origins[i] for i in axes)) for axes in axis_map
        )
        from_any = lambda old: frozenset(
            j for j, axes in enumerate(axis_map) if axes & old
        )
        return dataclasses.replace(
            self,
            origins=origins,
            spread=from_any(self.spread),
            chosen=from_any(self.chosen),
        )

    def without_leading(self) -> "View":
        """Returns the view of one slice along the first axis, as a scan makes it."""
        axes = range(1, len(self.origins))
        return self.moved([frozenset([i]) for i in axes])

    def spread_along(self, axes: frozenset[int]) -> "View":
        """Returns the view of a value along whose `axes` a scale varies besides."""
        return dataclasses.replace(self, spread=self.spread | axes)

    def scaled_along(self, axes: frozenset[int]) -> "View":
        """Returns the view of a value with a scale beside that varies along `axes`."""
        return dataclasses.replace(self.spread_along(axes), scaled=True)

    def chosen_along(self, axes: frozenset[int]) -> "View":
        """Returns the view of a value whose factors were chosen along `axes`."""
        has_none = lambda i: all(self.shape[axis] == 1 for axis in self.origins[i])
        chosen = self.chosen | frozenset(filter(has_none, axes))
        return dataclasses.replace(self, chosen=chosen)

    def after(self, passed: Passed) -> "View":
        """Returns the view with one more operation passed."""
        return dataclasses.replace(self, passed=(*self.passed, passed))

    def origin_of(self, axes: Iterable[int]) -> frozenset[int]:
        """Returns the axes of the kernel that some axes of the value come from."""
        return frozenset().union(*(self.origins[i] for i in axes))

    @property
    def mixed(self) -> frozenset[int]:
        """The axes of the kernel that frozen operands were summed over with."""
        return frozenset().union(*(p.axes for p in self.passed if p.kind == "mix"))

    @property
    def untouched(self) -> frozenset[int]:
        """The axes of the kernel that have met no axis of a frozen operand."""
        tied = frozenset().union(*(p.tied for p in self.passed))
        return frozenset(range(len(self.shape))) - self.mixed - tied

    @property
    def is_matrix(self) -> bool:
        """Whether two of its axes or more come from the kernel."""
        longer = lambda origin: any(self.shape[i] != 1 for i in origin)
        return sum(map(longer, self.origins)) > 1

    def roles(self, axes: KernelAxes) -> list[str | None] | None:
        """Returns the role of each axis, or None where roles are mixed in one axis."""
        found = []
        for place, origin in enumerate(self.origins):
            roles = {axes.role(i) for i in origin if self.shape[i] != 1}
            roles |= {"batch"} if place in self.chosen else set()
            if len(roles) > 1:
                return None
            found.append(roles.pop() if roles else None)
        return found


Views = tuple[View, ...]


@dataclasses.dataclass(frozen=True)
class Flow:
    """What a value depends on; true if it depends on an activation.

    Attributes:
        active: whether it depends on an input that is no param.
        adapter: whether it depends on what the adapter holds.
    """

    active: bool = False
    adapter: bool = False

    def __bool__(self) -> bool:
        """Returns whether the value depends on an activation."""
        return self.active


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a value of the program.

    Attributes:
        views: the kernels that it carries.
        active: whether it depends on an input that is no param, or on the adapter.
        along: the axes along which it may vary, of a value that was broadcast; None if
            it was not.
        lazy: whether it may be made where it is used, as a quantised kernel is.
    """

    views: Views = ()
    active: Flow = Flow()
    along: frozenset[int] | None = None
    lazy: bool = False


def any_active(values: Iterable[Value]) -> Flow:
    """Returns whether any of the values depends on an activation, or the adapter."""
    known = [(value.active, bool(value.views)) for value in values]
    moves = any(flow.adapter or adapted for flow, adapted in known)
    return Flow(any(flow.active for flow, _ in known), moves)


def plain(count: int, active: Flow) -> list[Value]:
    """Returns values that carry no kernel."""
    return [Value((), active)] * count


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a kernel is consumed, or has to be materialized.

    Attributes:
        path: the kernel.
        kind: what consumes it, as the plan prints it.
        source: the line of the model.
        factored: whether the factors stay apart.
        primitive: the name of the operation.
        chosen: how a product is computed, see `_product/choice.py`; None for other
            operations.
        siblings: the number of products in its group, itself included.
        factor_flops: what its factors add to a step, for each unit of rank.
        is_matrix: of what has no rule, whether two axes of the kernel or more come
            there: a stack of norm scales or biases comes slice by slice.
    """

    path: str
    kind: str
    source: str
    factored: bool
    primitive: str
    chosen: Form | ByPlatform | None = None
    siblings: int = 1
    factor_flops: int = 0
    is_matrix: bool = False

    @property
    def form(self) -> Form | None:
        """The form of a product on one device of the default platform."""
        return None if self.chosen is None else form_here(self.chosen)

    @property
    def without_kernel(self) -> str | None:
        """Why the kernel for Hopper GPUs is not used here, where it would be."""
        return None if self.chosen is None else without_kernel(self.chosen)


@dataclasses.dataclass(frozen=True)
class Vote:
    """What one use says about the axes of a kernel.

    Attributes:
        path: the kernel.
        kind: the kind of the use.
        roles: the role of each kernel axis that the use sees; the others are batch axes
            (or of size 1).
        place: where it is.
        weak: whether the use says little: it contracts all axes.
        formed: whether the kernel was formed before it.
    """

    path: str
    kind: str
    roles: Mapping[int, str]
    place: Place
    weak: bool = False
    formed: bool = False


@dataclasses.dataclass
class Log:
    """What the pass has seen.

    Attributes:
        uses: those that stay factored.
        obstacles: those that cannot.
        votes: what the uses say about roles.
        met: operations that a kernel has passed on its way to a use.
        needed: those on its way to a use with activations.
        lost: those that it has passed on its way to no use, with their kinds.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    obstacles: list[Use] = dataclasses.field(default_factory=list)
    votes: list[Vote] = dataclasses.field(default_factory=list)
    met: set[Place] = dataclasses.field(default_factory=set)
    needed: set[Place] = dataclasses.field(default_factory=set)
    lost: dict[Place, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Step:
    """The action for one equation, or for a group of products.

    Attributes:
        action: what to do with it.
        eqns: the equations.
        programs: the programs of its sub-jaxprs, if any.
        wanted: which of its outputs are used, if it has sub-jaxprs.
        kernels: which operand of each product is the kernel.
        form: how products are computed.
        along: of an equation with a value that was broadcast, the axes along which that
            varies: the others are cut to size one.
        beside: whether the scale of an equation is kept beside the kernel.
        predicate: of a choice, the axes along which its predicate varies.
    """

    action: Action
    programs: tuple["Program", ...] = ()
    wanted: tuple[bool, ...] = ()
    eqns: tuple[Any, ...] = ()
    kernels: tuple[int, ...] = ()
    form: Form | ByPlatform = "separate"
    along: frozenset[int] | None = None
    beside: bool = False
    predicate: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A jaxpr with the steps that evaluate it.

    Attributes:
        jaxpr: the jaxpr.
        consts: the values of its constants.
        steps: what to do, in order.
        kept: functions made from the program, so that all calls of it run the same one.
    """

    jaxpr: Any
    consts: tuple[Any, ...]
    steps: tuple[Step, ...]
    kept: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)


@dataclasses.dataclass(frozen=True)
class Body:
    """A program and what is known of its outputs, which differs from call to call."""

    program: Program
    outputs: tuple[Value, ...]

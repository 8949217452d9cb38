"""The abstract pass: everything that can be decided before a number flows.

A `View` says that a value of the program carries (part of) a kernel, and which axes of
the kernel each of its axes comes from. The pass follows views from the params through
every equation, control flow included, and gives each equation one action. It runs
twice:

* `_discover.py` learns the roles of a kernel's axes from the operations that consume
  it;
* `_decide.py`, with the roles settled (by the discovery, or by the factors of an
  adapter), decides how each equation is evaluated. `_interpret.py` follows that
  decision and `_plan.py` prints it: there is one source of truth.
"""

import abc
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ._axes import KernelAxes
from ._compat import is_literal, is_var, open_jaxpr, source_line
from ._gather import row_layout
from ._group import Form

Action = Literal[
    "plain", "dead", "carry", "consume", "product", "lookup", "enter", "materialize"
]


@dataclasses.dataclass(frozen=True)
class View:
    """A value that carries a kernel.

    Attributes:
        path: the kernel.
        shape: the kernel's shape.
        origins: for each axis of the value, the axes of the kernel it comes from.
        taken: the lookups (by number) that the value has passed, each with the kernel
            axis that was indexed; they turn out to be carries if a product follows.
        spread: the axes of the value along which a scale of the kernel varies, as DoRA
            has one, whatever their origins: it was padded, or joined with others.
    """

    path: str
    shape: tuple[int, ...]
    origins: tuple[frozenset[int], ...]
    taken: tuple[tuple[int, int], ...] = ()
    spread: frozenset[int] = frozenset()

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
        spread = frozenset(j for j, axes in enumerate(axis_map) if axes & self.spread)
        return dataclasses.replace(self, origins=origins, spread=spread)

    def without_leading(self) -> "View":
        """Returns the view of one slice along the first axis, as a scan makes it."""
        spread = frozenset(i - 1 for i in self.spread if i)
        return dataclasses.replace(self, origins=self.origins[1:], spread=spread)

    def spread_along(self, axes: frozenset[int]) -> "View":
        """Returns the view of a value along whose `axes` a scale varies besides."""
        return dataclasses.replace(self, spread=self.spread | axes)

    def roles(self, axes: KernelAxes) -> list[str | None] | None:
        """Returns the role of each axis, or None where roles are mixed in one axis."""
        found = []
        for origin in self.origins:
            roles = {axes.role(i) for i in origin if self.shape[i] != 1}
            if len(roles) > 1:
                return None
            found.append(roles.pop() if roles else None)
        return found


Views = tuple[View, ...]


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a kernel is consumed, or has to be materialized.

    Attributes:
        path: the kernel.
        kind: what consumes it, as the plan prints it.
        source: the line of the model.
        factored: whether the factors stay apart.
        primitive: the name of the operation.
        form: how a product is computed, see `_forms`; None for other operations.
        siblings: the number of products in its group, itself included.
        factor_flops: what its factors add to a step, for each unit of rank.
    """

    path: str
    kind: str
    source: str
    factored: bool
    primitive: str
    form: Form | None = None
    siblings: int = 1
    factor_flops: int = 0


@dataclasses.dataclass
class Log:
    """What the pass has seen: uses that stay factored, and those that cannot."""

    uses: list[Use] = dataclasses.field(default_factory=list)
    obstacles: list[Use] = dataclasses.field(default_factory=list)


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
    """

    action: Action
    programs: tuple["Program", ...] = ()
    wanted: tuple[bool, ...] = ()
    eqns: tuple[Any, ...] = ()
    kernels: tuple[int, ...] = ()
    form: Form = "separate"


@dataclasses.dataclass(frozen=True)
class Program:
    """A jaxpr with the steps that evaluate it and the views of its outputs."""

    jaxpr: Any
    consts: tuple[Any, ...]
    steps: tuple[Step, ...]
    out_views: tuple[Views, ...]


class Analysis(abc.ABC):
    """One run of the pass over a program; the two passes say what an equation does.

    Args:
        control_flow: the rules of `_control_flow.py`, by primitive name.
    """

    def __init__(self, control_flow: Mapping[str, Any]) -> None:
        self.control_flow = control_flow
        self.log = Log()
        self.loop_depth = 0
        self.trips = 1
        self._lines: list[str] = []

    @abc.abstractmethod
    def first_order(self, eqn: Any, views: list[Views]) -> tuple[Step, list[Views]]:
        """Returns the action for an equation without sub-jaxprs, and its outputs."""

    def whole(self, jaxpr: Any, views: Sequence[View | None]) -> Program:
        """Analyzes the function itself, given the kernels among its inputs."""
        program = self.program(jaxpr, [() if v is None else (v,) for v in views])
        for view in itertools.chain(*program.out_views):
            use = Use(view.path, "output", "the function's result", False, "output")
            self.log.obstacles.append(use)
        return program

    def program(self, jaxpr: Any, in_views: Sequence[Views]) -> Program:
        """Analyzes a jaxpr, given the views of its inputs."""
        jaxpr, consts = open_jaxpr(jaxpr)
        env: dict[Any, Views] = dict(zip(jaxpr.invars, in_views, strict=True))
        read = lambda v: () if is_literal(v) else env.get(v, ())
        steps = []
        live, needed = _liveness(jaxpr)
        for eqn, alive in zip(jaxpr.eqns, live, strict=True):
            views = [read(v) for v in eqn.invars]
            step, outputs = Step("plain" if alive else "dead"), [()] * len(eqn.outvars)
            if alive and any(views):
                wanted = tuple(v in needed for v in eqn.outvars)
                step, outputs = self._equation(eqn, views, wanted)
            steps.append(dataclasses.replace(step, eqns=(eqn,)))
            env.update(zip(eqn.outvars, outputs, strict=True))
        outs = tuple(read(v) for v in jaxpr.outvars)
        return Program(jaxpr, tuple(consts), tuple(self.arranged(steps)), outs)

    def arranged(self, steps: list[Step]) -> list[Step]:
        """Returns the steps in the order of evaluation."""
        return steps

    def _equation(
        self, eqn: Any, views: list[Views], wanted: tuple[bool, ...]
    ) -> tuple[Step, list[Views]]:
        rule = self.control_flow.get(eqn.primitive.name)
        if rule is None:
            return self.first_order(eqn, views)
        self._lines.append(self.line_of(eqn))
        result = rule.analyze(self, eqn, views, wanted)
        self._lines.pop()
        return result

    def line_of(self, eqn: Any) -> str:
        """Returns the model's line; a library's own jit has that of its caller."""
        return source_line(eqn, self._lines[-1] if self._lines else None)

    def materialized(self, eqn: Any, views: Sequence[Views], where: str = "") -> None:
        """Notes that the operands with views must be formed at an equation."""
        name = eqn.primitive.name
        for view in itertools.chain(*views):
            use = Use(view.path, f"{name}{where}", self.line_of(eqn), False, name)
            self.log.obstacles.append(use)


def indexed_axes(eqn: Any) -> list[int]:
    """Returns the axes of the operand along which single entries are taken."""
    shape, params = eqn.invars[0].aval.shape, eqn.params
    if eqn.primitive.name == "gather":
        layout = row_layout(eqn)
        return [] if layout is None else list(layout.indexed)
    if eqn.primitive.name == "dynamic_slice":
        sizes = params["slice_sizes"]
    elif eqn.primitive.name == "slice":
        pairs = zip(params["start_indices"], params["limit_indices"], strict=True)
        sizes = [limit - start for start, limit in pairs]
    else:
        return []
    return [i for i, n in enumerate(sizes) if n == 1 and shape[i] != 1]


def _liveness(jaxpr: Any) -> tuple[list[bool], set[Any]]:
    """Returns which equations, and which variables, the outputs or effects need."""
    needed = {v for v in jaxpr.outvars if is_var(v)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        alive = bool(eqn.effects) or any(v in needed for v in eqn.outvars)
        if alive:
            needed.update(v for v in eqn.invars if is_var(v))
        live.append(alive)
    return live[::-1], needed

"""The abstract pass: everything that can be decided before a number flows.

A `View` says that a value of the program carries (part of) a kernel, and which axes of
the kernel each of its axes comes from. The pass follows views from the params through
every equation, control flow included, and gives each equation one action. It runs twice:

* to *discover* the roles of a kernel's axes, from the operations that consume it;
* with the roles settled (from the discovery, or from the factors of an adapter), to
  decide how each equation is evaluated. `_interpret.py` follows that decision, and
  `_plan.py` prints it: there is one source of truth.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ._axes import KernelAxes
from ._carry import CARRY, scale_varies_along
from ._compat import is_literal, is_var, open_jaxpr, source_line
from ._consume import CONSUME, Roles

Action = Literal["plain", "dead", "carry", "consume", "lookup", "enter", "materialize"]


@dataclasses.dataclass(frozen=True)
class View:
    """A value that carries a kernel.

    Attributes:
        path: the kernel.
        shape: the kernel's shape.
        origins: for each axis of the value, the axes of the kernel it comes from.
        taken: the lookups (by number) that the value has passed, each with the kernel
            axis that was indexed; they turn out to be carries if a product follows.
    """

    path: str
    shape: tuple[int, ...]
    origins: tuple[frozenset[int], ...]
    taken: tuple[tuple[int, int], ...] = ()

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
        return dataclasses.replace(self, origins=origins)

    def without_leading(self) -> "View":
        """Returns the view of one slice along the first axis, as a scan makes it."""
        return dataclasses.replace(self, origins=self.origins[1:])

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
class Vote:
    """What one use says about the axes of a kernel.

    Attributes:
        kind: the kind of the use.
        roles: the role of each kernel axis that the use sees; the others are batch axes
            (or of size 1).
        taken: the lookups that were passed on the way.
        lookup: the number of the lookup, if the use is one.
    """

    kind: str
    roles: Mapping[int, str]
    taken: tuple[tuple[int, int], ...]
    lookup: int | None = None


@dataclasses.dataclass(frozen=True)
class Use:
    """One place where a kernel is consumed, or has to be materialized."""

    path: str
    kind: str
    source: str
    factored: bool
    primitive: str


@dataclasses.dataclass
class Log:
    """What the pass has seen, per kernel."""

    votes: dict[str, list[Vote]] = dataclasses.field(
        default_factory=lambda: defaultdict(list)
    )
    uses: list[Use] = dataclasses.field(default_factory=list)
    obstacles: list[Use] = dataclasses.field(default_factory=list)
    numbers: Any = dataclasses.field(default_factory=itertools.count)


@dataclasses.dataclass(frozen=True)
class Step:
    """The action for one equation, with the programs of its sub-jaxprs if any."""

    action: Action
    programs: tuple["Program", ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A jaxpr with one step per equation and the views of its outputs."""

    jaxpr: Any
    consts: tuple[Any, ...]
    steps: tuple[Step, ...]
    out_views: tuple[Views, ...]


PLAIN, DEAD = Step("plain"), Step("dead")


class Analysis:
    """One run of the pass over a program.

    Args:
        axes: the settled roles by path, or None to discover them.
        control_flow: the rules of `_control_flow.py`, by primitive name.
    """

    def __init__(
        self, axes: Mapping[str, KernelAxes] | None, control_flow: Mapping[str, Any]
    ) -> None:
        self.axes = axes
        self.control_flow = control_flow
        self.log = Log()
        self.loop_depth = 0

    def program(self, jaxpr: Any, in_views: Sequence[Views]) -> Program:
        """Analyzes a jaxpr, given the views of its inputs."""
        jaxpr, consts = open_jaxpr(jaxpr)
        env: dict[Any, Views] = dict(zip(jaxpr.invars, in_views, strict=True))
        live = _live_equations(jaxpr)
        steps = []
        for eqn, alive in zip(jaxpr.eqns, live, strict=True):
            views = [() if is_literal(v) else env.get(v, ()) for v in eqn.invars]
            if not alive or not any(views):
                steps.append(PLAIN if alive else DEAD)
                continue
            step, outputs = self._equation(eqn, views)
            steps.append(step)
            env.update(zip(eqn.outvars, outputs, strict=True))
        outs = [() if is_literal(v) else env.get(v, ()) for v in jaxpr.outvars]
        return Program(jaxpr, tuple(consts), tuple(steps), tuple(outs))

    def _equation(self, eqn: Any, views: list[Views]) -> tuple[Step, list[Views]]:
        name = eqn.primitive.name
        nothing: list[Views] = [()] * len(eqn.outvars)
        if name in self.control_flow:
            return self.control_flow[name].analyze(self, eqn, views)
        if name in CONSUME and self._consumes(eqn, views):
            return Step("consume"), nothing
        if name in CARRY:
            carried = self._carry(eqn, views)
            if carried is not None:
                return carried
        self.materialized(eqn, views)
        return Step("materialize"), nothing

    def materialized(self, eqn: Any, views: Sequence[Views], where: str = "") -> None:
        """Notes that operands with views must be formed at an equation."""
        for view in itertools.chain(*views):
            kind = f"{eqn.primitive.name}{where}"
            self.log.obstacles.append(
                Use(view.path, kind, source_line(eqn), False, eqn.primitive.name)
            )

    def returned(self, program: Program) -> None:
        """Notes that outputs of the whole function that carry a kernel are formed."""
        for view in itertools.chain(*program.out_views):
            self.log.obstacles.append(
                Use(view.path, "output", "the function's result", False, "output")
            )

    # --- consuming ---

    def _consumes(self, eqn: Any, views: list[Views]) -> bool:
        rule = CONSUME[eqn.primitive.name]
        where = [i for i, v in enumerate(views) if v]
        if len(where) != 1 or where[0] not in rule.operands:
            return False
        (operand,) = where
        if self.axes is None:
            roles = rule.roles(eqn, operand)
            if roles is None:
                return False
            for view in views[operand]:
                self._vote(rule.kind, view, roles)
            return True
        settled = [v.roles(self.axes[v.path]) for v in views[operand]]
        if any(r is None or not rule.supports(eqn, operand, r) for r in settled):
            return False
        for view, roles in zip(views[operand], settled, strict=True):
            kind = _kind(rule.kind, rule.roles(eqn, operand), roles)
            self._used(eqn, view, kind)
        return True

    def _vote(self, kind: str, view: View, roles: Sequence[str]) -> None:
        """Notes the roles that a use gives to the axes of a kernel."""
        seen: dict[int, str] = {}
        for origin, role in zip(view.origins, roles, strict=True):
            for axis in sorted(origin):
                seen.setdefault(axis, role)
        indexed = {axis for _, axis in view.taken}
        if any(seen.get(axis, "batch") != "batch" for axis in indexed):
            return  # a product with looked-up rows is no product with the kernel
        self.log.votes[view.path].append(Vote(kind, seen, view.taken))

    def _used(self, eqn: Any, view: View, kind: str) -> None:
        self.log.uses.append(
            Use(view.path, kind, source_line(eqn), True, eqn.primitive.name)
        )

    # --- carrying ---

    def _carry(self, eqn: Any, views: list[Views]) -> tuple[Step, list[Views]] | None:
        rule = CARRY[eqn.primitive.name]
        where = [i for i, v in enumerate(views) if v]
        if not rule.together and len(where) != 1:
            return None
        if rule.operands is not None and not set(where) <= set(rule.operands):
            return None
        outputs: list[list[View]] = [[] for _ in eqn.outvars]
        for operand in where:
            maps = rule.axes(eqn, operand)
            if maps is None:
                return None
            for view in views[operand]:
                for output, axis_map in zip(outputs, maps, strict=True):
                    if axis_map is not None:
                        output.append(view.moved(axis_map))
        outs = [tuple(output) for output in outputs]
        if self.axes is None:
            return Step("carry"), self._indexed_in_discovery(eqn, views, outs)
        if any(v.roles(self.axes[v.path]) is None for v in itertools.chain(*outs)):
            return None
        if eqn.primitive.name in ("mul", "div") and not self._scales(
            eqn, views, where[0]
        ):
            return None
        if self._is_lookup(eqn, views):
            for view in itertools.chain(*views):
                self._used(eqn, view, "lookup")
            return Step("lookup"), [()] * len(eqn.outvars)
        return Step("carry"), list(outs)

    def _scales(self, eqn: Any, views: list[Views], operand: int) -> bool:
        """Whether a vector scale varies along the axes of one factor alone."""
        varies = scale_varies_along(eqn, operand)
        for view in views[operand]:
            roles = view.roles(self.axes[view.path])  # type: ignore[index]
            along = {roles[i] for i in varies} - {"batch"} if roles else {None}
            if len(along) > 1 or None in along:
                return False
        return True

    def _indexed_in_discovery(
        self, eqn: Any, views: list[Views], outs: list[Views]
    ) -> list[Views]:
        """Marks views that pass an indexing operation, and votes for a lookup."""
        indexed = indexed_axes(eqn)
        if not indexed:
            return outs
        (views_in,) = [v for v in views if v]
        number = next(self.log.numbers)
        marked: list[View] = []
        for before, after in zip(views_in, outs[0], strict=True):
            axes = sorted(set().union(*(before.origins[i] for i in indexed)))
            if eqn.primitive.name == "gather" or self.loop_depth == 0:
                self._vote_lookup(before, axes, number)
            taken = tuple((number, axis) for axis in axes)
            marked.append(dataclasses.replace(after, taken=before.taken + taken))
        return [tuple(marked), *outs[1:]]

    def _vote_lookup(self, view: View, indexed: list[int], number: int) -> None:
        roles = {i: "out" for origin in view.origins for i in origin}
        roles.update(dict.fromkeys(indexed, "in"))
        vote = Vote("lookup", roles, view.taken, lookup=number)
        self.log.votes[view.path].append(vote)

    def _is_lookup(self, eqn: Any, views: list[Views]) -> bool:
        """Whether rows are taken along an input or output axis of the kernel."""
        indexed = indexed_axes(eqn)
        for view in itertools.chain(*views):
            roles = view.roles(self.axes[view.path])  # type: ignore[index]
            if any(roles and roles[i] not in ("batch", None) for i in indexed):
                return True
        return False


def indexed_axes(eqn: Any) -> list[int]:
    """Returns the axes of the operand along which single entries are taken."""
    shape, params = eqn.invars[0].aval.shape, eqn.params
    if eqn.primitive.name == "gather":
        return list(params["dimension_numbers"].start_index_map)
    if eqn.primitive.name == "dynamic_slice":
        sizes = params["slice_sizes"]
        return [i for i, n in enumerate(sizes) if n == 1 and shape[i] != 1]
    return []


def _kind(kind: str, roles: list[str] | None, settled: Roles) -> str:
    """Names a product that contracts the output axes: the transposed use."""
    if roles is None:
        return kind
    contracted = {s for r, s in zip(roles, settled, strict=True) if r == "in" and s}
    return f"transposed {kind}" if contracted == {"out"} else kind


def _live_equations(jaxpr: Any) -> list[bool]:
    """Returns which equations the outputs or effects of a jaxpr need."""
    needed = {v for v in jaxpr.outvars if is_var(v)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        alive = bool(eqn.effects) or any(v in needed for v in eqn.outvars)
        if alive:
            needed.update(v for v in eqn.invars if is_var(v))
        live.append(alive)
    return live[::-1]


def settle(votes: Sequence[Vote], shape: Sequence[int]) -> KernelAxes | None:
    """Returns the roles that the uses of a kernel agree on, or None if it is no kernel.

    A batch axis in any use is one for all (factors per slice serve every use); then a
    lookup decides, and then the first product.
    """
    carried = {n for vote in votes if vote.lookup is None for n, _ in vote.taken}
    counted = [v for v in votes if v.lookup is None or v.lookup not in carried]
    counted.sort(key=lambda vote: vote.lookup is None)
    roles: dict[int, str] = {}
    for axis in range(len(shape)):
        said = [vote.roles.get(axis, "batch") for vote in counted]
        unit = shape[axis] == 1
        said = [
            s for s, v in zip(said, counted, strict=True) if not unit or axis in v.roles
        ]
        roles[axis] = "batch" if "batch" in said else next(iter(said), "in")
    groups = {
        role: tuple(i for i in roles if roles[i] == role)
        for role in ("batch", "in", "out")
    }
    if not counted or not groups["in"] or not groups["out"]:
        return None
    return KernelAxes(groups["batch"], groups["in"], groups["out"])

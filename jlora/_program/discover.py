"""The first pass: which leaves are kernels, and which role each axis of theirs plays.

Each use of a kernel is a vote: the axes that a product contracts are input axes, those
it shares with the other operand are batch axes, the rest are output axes; axes that a
scan or an index has taken away are batch axes. `settle` counts the votes.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .._jax.versions import own_body
from .._params.axes import KernelAxes
from .._rules import CARRY, CONSUME
from .._rules.broadcast import narrowed
from .._rules.elementwise import is_elementwise, keeps_axes
from .._rules.rows import RowLayout
from .._rules.rule import CarryRule
from .._rules.view import Log, Passed, Place, Step, Value, View, Vote, any_active
from .analysis import Analysis, ends_of
from .passed import is_frozen_product
from .recall import Recall


class Discovery(Analysis):
    """The pass that collects votes. It looks at each operand as if it were alone."""

    def __init__(self, recall: Recall, ends: frozenset[Place]) -> None:
        super().__init__(recall, ends)

    def first_order(self, eqn: Any, values: list[Value]) -> tuple[Step, list[Value]]:
        """Votes where a kernel is consumed, and follows it where it is carried."""
        eqn, _ = narrowed(eqn, values)
        outputs: list[list[View]] = [[] for _ in eqn.outvars]
        pairs = [(i, view) for i, known in enumerate(values) for view in known.views]
        for operand, view in pairs:
            others = [known for i, known in enumerate(values) if i != operand]
            carried, active = None, bool(any_active(others))
            if self._is_use(eqn, operand, others):
                if self._vote(eqn, operand, view, active):
                    continue
            else:
                carried = self._carry(eqn, operand, view, active)
            if carried is None:
                self._look_inside(eqn, operand, values)
                carried = self._formed(eqn, operand, view, active)
                self.materialized(eqn, [Value((view,))], used=any(carried))
            for output, out_view in zip(outputs, carried, strict=True):
                output.extend(out_view)
        flow = any_active(values)
        return Step("carry"), [Value(tuple(output), flow) for output in outputs]

    def _formed(
        self, eqn: Any, operand: int, view: View, active: bool
    ) -> list[tuple[View, ...]]:
        """Follows a kernel past an obstacle that keeps its axes, to learn their roles.

        A later product says what they are. Beside an activation it is no kernel any
        more that goes on, but features.
        """
        if active or not keeps_axes(eqn, operand):
            return [() for _ in eqn.outvars]
        formed = dataclasses.replace(view, formed=True)
        return [(formed,) for _ in eqn.outvars]

    def _look_inside(self, eqn: Any, operand: int, values: list[Value]) -> None:
        """Learns roles from a function that takes the kernel as a whole.

        It has a derivative of its own, so that the kernel is materialized for it; what
        it does to the kernel tells the roles all the same.
        """
        body, bodies = own_body(eqn), self._bodies
        if body is not None:
            alone = [Value((), value.active) for value in values]
            alone[operand] = values[operand]
            self.program(body, alone)
            self._bodies = bodies

    def _is_use(self, eqn: Any, operand: int, others: list[Value]) -> bool:
        """Whether an operation uses a kernel up, rather than pass it on."""
        rule = CONSUME.get(eqn.primitive.name)
        if rule is None or operand not in rule.operands:
            return False
        passes_on = is_frozen_product(eqn, others) and self.place not in self.ends
        return not passes_on

    def _vote(self, eqn: Any, operand: int, view: View, active: bool) -> bool:
        """Notes the roles that a use gives to the axes of a kernel."""
        rule = CONSUME[eqn.primitive.name]
        roles = rule.roles(eqn, operand)
        if roles is None:
            return False
        seen = _roles_of(view, roles)
        # A product that contracts all axes fits any roles.
        weak = len(roles) > 1 and set(roles) == {"in"} and not view.mixed
        if weak:
            seen[max(seen, default=0)] = "out"
        if not {"in", "out"} <= set(seen.values()):
            return False
        if view.formed and not active:
            self._lose(view)  # what is formed of params alone may be anything
            return True
        if any(
            seen.get(axis, "batch") != "batch"
            for passed in view.passed
            if passed.kind == "index"
            for axis in passed.axes
        ):
            # A product that contracts looked-up rows is no product with the kernel.
            self._lose(view)
            return True
        if self.reaches(eqn, operand, view, active):
            vote = Vote(view.path, rule.kind, seen, self.place, weak, view.formed)
            self.log.votes.append(vote)
        return True

    def _carry(
        self, eqn: Any, operand: int, view: View, active: bool
    ) -> list[tuple[View, ...]] | None:
        rule = CARRY.get(eqn.primitive.name)
        if rule is None or not rule.takes([operand], active):
            return None
        maps = rule.axes(eqn, operand)
        if maps is None:
            return None
        if view.formed and (
            rule.mixes or (active and is_elementwise(eqn.primitive.name))
        ):
            # A gate or an offset of features is no kernel, nor is a sum of products.
            self._lose(view)
            return [() for _ in maps]
        if rule.passed is not None and not view.formed:
            if self.place in self.ends:
                return None
            view = view.after(rule.passed(eqn, operand, view, self.place))
        indexed = self._indexed(eqn, rule, view, active)
        if indexed is None:
            return [() for _ in maps]
        return self._moved(indexed, maps)

    def _moved(
        self, view: View, maps: Sequence[Sequence[frozenset[int]] | None]
    ) -> list[tuple[View, ...]]:
        return [() if axes is None else (view.moved(axes),) for axes in maps]

    def _indexed(
        self, eqn: Any, rule: CarryRule, view: View, active: bool
    ) -> View | None:
        """Marks a view that passes an indexing operation, and votes for a lookup.

        None if it ends there.
        """
        # What is taken without an index is known beforehand, and no row of a table.
        layout = rule.rows(eqn) if len(eqn.invars) > 1 else None
        axes = frozenset() if layout is None else view.origin_of(layout.indexed)
        if layout is None or not axes:
            return view
        # One index inside a loop picks a layer, of a bias stack too: no evidence.
        evidence = self.loop_depth == 0 or bool(layout.index_axes)
        if active or self.place in self.ends:
            if evidence:
                self._vote_lookup(layout, view, axes)
            if not active and evidence:
                return None
            return view.after(Passed(self.place, axes, "index"))
        if not evidence or view.formed:
            return view
        return view.after(Passed(self.place, axes, "order"))

    def _vote_lookup(
        self, layout: RowLayout, view: View, indexed: frozenset[int]
    ) -> None:
        roles = {i: "out" for origin in view.origins for i in origin}
        roles.update(dict.fromkeys(indexed, "in"))
        roles.update(dict.fromkeys(view.origin_of(layout.batching), "batch"))
        self.meets(view)
        vote = Vote(view.path, "lookup", roles, self.place, formed=view.formed)
        self.log.votes.append(vote)


def _roles_of(view: View, roles: Sequence[str]) -> dict[int, str]:
    """Returns the roles that a use gives to the axes of a kernel that it sees.

    An axis that a frozen operand has summed over has the role of what came from it, but
    for the first axis of a whole kernel: a basis of kernels has factors for each of
    them. If nothing came from it, it is on the side that has no axis.
    """
    seen: dict[int, str] = {}
    either = lambda pair: pair[1] == "either"
    for origin, role in sorted(zip(view.origins, roles, strict=True), key=either):
        for axis in sorted(origin):
            seen.setdefault(axis, "in" if role == "either" else role)
    own = {role for axis, role in seen.items() if axis in view.untouched}
    first = min(view.untouched, default=0)
    if {"in", "out"} <= own and all(axis < first for axis in view.mixed):
        return {axis: role for axis, role in seen.items() if axis not in view.mixed}
    for side in ("in", "out"):
        if side not in seen.values():
            unseen = sorted(view.mixed - set(seen))
            seen.update(dict.fromkeys(unseen, side))
    return seen


@dataclasses.dataclass(frozen=True)
class Discovered:
    """What the pass has learnt.

    Attributes:
        votes: the votes on each kernel.
        log: what kept others from being kernels.
        ends: the places where kernels come to an end that could have passed on.
    """

    votes: Mapping[str, list[Vote]]
    log: Log
    ends: frozenset[Place]

    @property
    def passed_on(self) -> frozenset[Place]:
        """The places that kernels pass on their way to a use with activations."""
        return frozenset(self.log.needed) - self.ends


def discover(jaxpr: Any, inputs: Sequence[Value]) -> Discovered:
    """Returns what the uses of kernels say about them."""
    recall, ends = Recall(), frozenset[Place]()
    while True:
        discovery = Discovery(recall, ends)
        discovery.whole(jaxpr, inputs)
        log = discovery.log
        more = ends | ends_of(log)
        if more == ends:
            break
        ends = more
    votes: dict[str, list[Vote]] = defaultdict(list)
    for vote in log.votes:
        # A lookup whose rows a product consumed was none: it carried the kernel there.
        if vote.kind != "lookup" or vote.place not in log.met:
            votes[vote.path].append(vote)
    firm = {path: _firm(found) for path, found in votes.items()}
    return Discovered(firm, log, ends)


def _firm(votes: list[Vote]) -> list[Vote]:
    """Returns the votes of a kernel itself, or else those of what is formed of it."""
    return [vote for vote in votes if not vote.formed] or votes


def settle(votes: Sequence[Vote], shape: Sequence[int]) -> KernelAxes | None:
    """Returns the roles that the uses of a kernel agree on, or None if it is no kernel.

    A batch axis in any use is one for all (factors per slice serve every use); then a
    lookup decides, and then the first product that contracts some of the axes.
    """
    if not votes:
        return None
    counted = sorted(votes, key=lambda vote: (vote.weak, vote.kind != "lookup"))
    groups: dict[str, list[int]] = {"batch": [], "in": [], "out": []}
    for axis in range(len(shape)):
        said = [vote.roles.get(axis, "batch") for vote in counted if not vote.weak]
        said = said or [counted[0].roles.get(axis, "batch")]
        groups["batch" if "batch" in said else said[0]].append(axis)
    if not groups["in"] or not groups["out"]:
        return None
    return KernelAxes(tuple(groups["batch"]), tuple(groups["in"]), tuple(groups["out"]))

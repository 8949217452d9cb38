"""The first pass: which leaves are kernels, and which role each axis of theirs plays.

Each use of a kernel is a vote: the axes that a product contracts are input axes, those
it shares with the other operand are batch axes, the rest are output axes; axes that a
scan or an index has taken away are batch axes. `settle` counts the votes.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ._analyze import Analysis, Log, Step, View, Views, indexed_axes
from ._axes import KernelAxes
from ._carry import CARRY
from ._consume import CONSUME
from ._control_flow import CONTROL_FLOW
from ._gather import row_layout


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


class Discovery(Analysis):
    """The pass that collects votes. It looks at each operand as if it were alone."""

    def __init__(self) -> None:
        super().__init__(CONTROL_FLOW)
        self.votes: dict[str, list[Vote]] = defaultdict(list)
        self._numbers = itertools.count()

    def first_order(self, eqn: Any, views: list[Views]) -> tuple[Step, list[Views]]:
        """Votes where a kernel is consumed, and follows it where it is carried."""
        outputs: list[list[View]] = [[] for _ in eqn.outvars]
        for operand, view in ((i, v) for i, group in enumerate(views) for v in group):
            if self._vote(eqn, operand, view):
                continue
            carried = self._carry(eqn, operand, view)
            if carried is None:
                self.materialized(eqn, [(view,)])
                continue
            for output, out_view in zip(outputs, carried, strict=True):
                output.extend(out_view)
        return Step("carry"), [tuple(output) for output in outputs]

    def _vote(self, eqn: Any, operand: int, view: View) -> bool:
        """Notes the roles that a use gives to the axes of a kernel."""
        rule = CONSUME.get(eqn.primitive.name)
        if rule is None or operand not in rule.operands:
            return False
        roles = rule.roles(eqn, operand)
        if roles is None:
            return False
        seen: dict[int, str] = {}
        for origin, role in zip(view.origins, roles, strict=True):
            for axis in sorted(origin):
                seen.setdefault(axis, role)
        # A product that contracts looked-up rows is no product with the kernel.
        if all(seen.get(axis, "batch") == "batch" for _, axis in view.taken):
            self.votes[view.path].append(Vote(rule.kind, seen, view.taken))
        return True

    def _carry(self, eqn: Any, operand: int, view: View) -> list[Views] | None:
        rule = CARRY.get(eqn.primitive.name)
        if rule is None or not rule.takes([operand]):
            return None
        maps = rule.axes(eqn, operand)
        if maps is None:
            return None
        view = self._indexed(eqn, view)
        return [
            () if axis_map is None else (view.moved(axis_map),) for axis_map in maps
        ]

    def _indexed(self, eqn: Any, view: View) -> View:
        """Marks a view that passes an indexing operation, and votes for a lookup."""
        if eqn.primitive.name not in ("gather", "dynamic_slice"):
            return view
        indexed = indexed_axes(eqn)
        axes = sorted(set().union(*(view.origins[i] for i in indexed)))
        if not axes:
            return view
        number = next(self._numbers)
        # One index inside a loop picks a layer, of a bias stack too: no evidence.
        if self.loop_depth == 0 or _takes_many(eqn):
            self._vote_lookup(eqn, view, axes, number)
        taken = tuple((number, axis) for axis in axes)
        return dataclasses.replace(view, taken=view.taken + taken)

    def _vote_lookup(
        self, eqn: Any, view: View, indexed: Sequence[int], number: int
    ) -> None:
        roles = {i: "out" for origin in view.origins for i in origin}
        roles.update(dict.fromkeys(indexed, "in"))
        if eqn.primitive.name == "gather" and (layout := row_layout(eqn)):
            along = set().union(*(view.origins[i] for i in layout.batching))
            roles.update(dict.fromkeys(along, "batch"))
        vote = Vote("lookup", roles, view.taken, lookup=number)
        self.votes[view.path].append(vote)


def _takes_many(eqn: Any) -> bool:
    layout = row_layout(eqn) if eqn.primitive.name == "gather" else None
    return layout is not None and bool(layout.index_axes)


def discover(
    jaxpr: Any, views: Sequence[View | None]
) -> tuple[Mapping[str, list[Vote]], Log]:
    """Returns the votes on each kernel and what kept others from being kernels."""
    discovery = Discovery()
    discovery.whole(jaxpr, views)
    return discovery.votes, discovery.log


def settle(votes: Sequence[Vote], shape: Sequence[int]) -> KernelAxes | None:
    """Returns the roles that the uses of a kernel agree on, or None if it is no kernel.

    A batch axis in any use is one for all (factors per slice serve every use); then a
    lookup decides, and then the first product. A lookup whose rows a product consumed
    was no lookup: it carried the kernel there.
    """
    carried = {n for vote in votes if vote.lookup is None for n, _ in vote.taken}
    counted = [v for v in votes if v.lookup is None or v.lookup not in carried]
    counted.sort(key=lambda vote: vote.lookup is None)
    if not counted:
        return None
    groups: dict[str, list[int]] = {"batch": [], "in": [], "out": []}
    for axis in range(len(shape)):
        said = [vote.roles.get(axis, "batch") for vote in counted]
        groups["batch" if "batch" in said else said[0]].append(axis)
    if not groups["in"] or not groups["out"]:
        return None
    return KernelAxes(tuple(groups["batch"]), tuple(groups["in"]), tuple(groups["out"]))

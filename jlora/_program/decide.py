"""The second pass: how each equation is evaluated, once the roles are settled."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from .._params.axes import KernelAxes, Roles
from .._product.choice import Contraction
from .._rules import CARRY, CONSUME
from .._rules.broadcast import narrowed
from .._rules.lookup import indexed_axes
from .._rules.scaling import grown_axes, scale_axes
from .._rules.view import (
    Log,
    Passed,
    Place,
    Program,
    Step,
    Use,
    Value,
    View,
    any_active,
    plain,
)
from .analysis import Analysis, ends_of
from .discover import discover
from .passed import is_frozen_product, passed_by
from .products import Products
from .recall import Recall


@dataclasses.dataclass(frozen=True)
class SideScale:
    """A scale that the adapter has beside a kernel, of one side of it.

    Attributes:
        roles: those of the axes along which it varies.
        where: what the name of a use gets where it fits neither side of that.
    """

    roles: tuple[str, ...]
    where: str


class Decision(Analysis):
    """The pass that gives each equation its action.

    Args:
        axes: the settled roles by path.
        contraction: as `jlora.lora` takes it.
        scales: the scales that kernels have, by path.
        recall: what was found out of jaxprs before.
        ends: the places where kernels come to an end.
    """

    def __init__(
        self,
        axes: Mapping[str, KernelAxes],
        contraction: Contraction,
        scales: Mapping[str, SideScale],
        recall: Recall,
        ends: frozenset[Place],
    ) -> None:
        super().__init__(recall, ends)
        self.axes, self.scales = axes, scales
        self._products = Products(contraction)

    def kind_of(self, path: str) -> Hashable:
        """Returns the roles of a kernel's axes, and its scale, if it has one."""
        return self.axes[path], self.scales.get(path)

    def is_one_sided(self, view: View, axes: Iterable[int]) -> bool:
        """Whether axes of a view are batch axes, or on one side of its kernel."""
        roles = self._roles(view)
        return roles is not None and len({roles[i] for i in axes} & {"in", "out"}) < 2

    def first_order(self, eqn: Any, values: list[Value]) -> tuple[Step, list[Value]]:
        """Consumes, carries, looks up, or else materializes the adapted operands."""
        nothing = plain(len(eqn.outvars), any_active(values))
        eqn, along = narrowed(eqn, values)
        if not self._scale_follows(eqn, values):
            where = _moved(eqn, values) or self._of_scale(values)
            self.materialized(eqn, values, where)
            return Step("materialize"), nothing
        if self._passes_on(eqn, values):
            moved = _is_beside_moved(values)
            outputs = None if moved else self._carried(eqn, values)
            if outputs is not None:
                return Step("carry"), outputs
            # It may be a use, which the next run tells, or else it is an obstacle.
            self.log.lost[self.place] = "mix"
            self.materialized(eqn, values, OF_SUM if moved else "", used=True)
            return Step("materialize"), nothing
        kinds = self._consumed(eqn, values)
        if kinds and not self._scale_fits(eqn, values):
            where = _moved(eqn, values) or self._of_scale(values)
            self.materialized(eqn, values, where)
            return Step("materialize"), nothing
        if kinds:
            return self._use(eqn, values, kinds), nothing
        outputs = self._carried(eqn, values)
        if outputs is None:
            self.materialized(eqn, values, _moved(eqn, values))
            return Step("materialize"), nothing
        if self._is_lookup(eqn, values):
            self._used(eqn, values, itertools.repeat("lookup"))
            return Step("lookup"), nothing
        return Step("carry", along=along, beside=_is_beside(eqn, values)), outputs

    def _use(self, eqn: Any, values: list[Value], kinds: Sequence[str]) -> Step:
        before = len(self.log.uses)
        self._used(eqn, values, kinds)
        if CONSUME[eqn.primitive.name].run is not None:
            return Step("consume")
        operand = next(i for i, value in enumerate(values) if value.views)
        logged = range(before, len(self.log.uses))
        views = values[operand].views
        roles = [self._roles(view) or [] for view in views]
        self._products.note(eqn, operand, logged, views, roles)
        return Step("product")

    def _passes_on(self, eqn: Any, values: list[Value]) -> bool:
        """Whether an equation is a frozen product that is not the use of its kernel."""
        others = [value for value in values if not value.views]
        return is_frozen_product(eqn, others) and self.place not in self.ends

    def arranged(self, steps: list[Step]) -> list[Step]:
        """Puts products that share an operand into one step, and chooses its form."""
        loops = self.loop_depth > 0
        return self._products.arranged(steps, self.log, self.trips, loops=loops)

    def _used(self, eqn: Any, values: Sequence[Value], kinds: Any) -> None:
        name, line = eqn.primitive.name, self.line_of(eqn)
        operand = next(i for i, value in enumerate(values) if value.views)
        views = itertools.chain(*(value.views for value in values))
        for view, kind in zip(views, kinds, strict=False):
            if name in CONSUME:
                self.reaches(eqn, operand, view, bool(any_active(values)))
            else:
                self.meets(view)
            self.log.uses.append(Use(view.path, kind, line, True, name))

    def _roles(self, view: View) -> list[str | None] | None:
        return view.roles(self.axes[view.path])

    def _consumed(self, eqn: Any, values: list[Value]) -> list[str]:
        """Returns the kind of use of each view, or nothing if it is no use."""
        rule = CONSUME.get(eqn.primitive.name)
        where = [i for i, value in enumerate(values) if value.views]
        if rule is None or len(where) != 1 or where[0] not in rule.operands:
            return []
        (operand,) = where
        kinds = []
        for view in values[operand].views:
            roles = self._roles(view)
            if roles is None or not rule.supports(eqn, operand, roles):
                return []
            kind = rule.kind + rule.details(eqn, view)
            kinds.append(_kind(kind, rule.roles(eqn, operand), roles))
        return kinds

    def _scale_fits(self, eqn: Any, values: list[Value]) -> bool:
        """Whether a scale, where there is one, can be applied beside a use."""
        rule = CONSUME[eqn.primitive.name]
        return self._all_scales(rule.scale_fits, eqn, values)

    def _of_scale(self, values: Sequence[Value]) -> str:
        """Returns what is said of a use that a scale does not fit."""
        paths = (view.path for value in values for view in value.views)
        return next((self.scales[p].where for p in paths if p in self.scales), OF_DORA)

    def _scale_follows(self, eqn: Any, values: list[Value]) -> bool:
        """Whether a scale, where there is one, stays one in a frozen product."""
        rule = CARRY.get(eqn.primitive.name)
        others = [value for value in values if not value.views]
        if rule is None or any_active(others) or self.place in self.ends:
            return True
        return self._all_scales(rule.keeps_scale, eqn, values)

    def _all_scales(
        self,
        holds: Callable[[Any, int, set[int]], bool],
        eqn: Any,
        values: Sequence[Value],
    ) -> bool:
        """Whether something holds for the scale of each operand that has one."""
        for operand, value in enumerate(values):
            varies = self._scale_varies(eqn, operand, value)
            if varies and not holds(eqn, operand, varies):
                return False
        return True

    def _scale_varies(self, eqn: Any, operand: int, value: Value) -> set[int]:
        """Returns the axes of an operand along which a scale of it varies."""
        scaled = [v for v in value.views if v.path in self.scales or v.scaled]
        varies = set().union(*map(self._varies, scaled))
        return {i for i in varies if eqn.invars[operand].aval.shape[i] != 1}

    def _varies(self, view: View) -> set[int]:
        """Returns the axes of a value along which the scale of a kernel varies."""
        scale = self.scales.get(view.path)
        own = scale.roles if scale else ()
        roles = enumerate((own and self._roles(view)) or [])
        return {i for i, role in roles if role in own} | view.spread

    def _carried(self, eqn: Any, values: list[Value]) -> list[Value] | None:
        rule = CARRY.get(eqn.primitive.name)
        where = [i for i, value in enumerate(values) if value.views]
        others = [value for value in values if not value.views]
        if rule is None or not rule.takes(where, bool(any_active(others))):
            return None
        if rule.passed is not None and self.place in self.ends:
            return None
        if rule.adds and _moved(eqn, values):
            return None
        outputs: list[list[View]] = [[] for _ in eqn.outvars]
        spread = rule.scale_varies(eqn)
        for operand in where:
            maps = rule.axes(eqn, operand)
            if maps is None:
                return None
            for view in values[operand].views:
                if not rule.supports(eqn, operand, self._roles(view) or []):
                    return None
                view = self._marked(eqn, operand, view, values)
                for output, axis_map in zip(outputs, maps, strict=True):
                    if axis_map is not None:
                        moved = view.moved(axis_map).spread_along(spread)
                        if rule.beside is not None:
                            moved = _scaled(eqn, operand, moved, values)
                        output.append(moved)
        if any(self._roles(view) is None for view in itertools.chain(*outputs)):
            return None
        active = any_active(values)
        return [Value(tuple(output), active) for output in outputs]

    def _marked(
        self, eqn: Any, operand: int, view: View, values: Sequence[Value]
    ) -> View:
        """Returns a view with what it passes at an equation."""
        if passed := passed_by(eqn, operand, view, self.place):
            return view.after(passed)
        others = [value for i, value in enumerate(values) if i != operand]
        if self._loses_side(eqn, view) and not any_active(others):
            axes = view.origin_of(indexed_axes(eqn))
            return view.after(Passed(self.place, axes, "order"))
        return view

    def _is_lookup(self, eqn: Any, values: list[Value]) -> bool:
        """Whether rows are taken for themselves: they have lost one side of the kernel.

        An index that depends on no activation only puts the rows in order, unless that
        is where the kernel comes to its end.
        """
        views = itertools.chain(*(value.views for value in values))
        if not any(self._loses_side(eqn, view) for view in views):
            return False
        others = [value for value in values if not value.views]
        return bool(any_active(others)) or self.place in self.ends

    def _loses_side(self, eqn: Any, view: View) -> bool:
        """Whether single entries are taken along a whole side of a kernel."""
        indexed = indexed_axes(eqn)
        if not indexed:
            return False
        roles = self._roles(view) or []
        taken = {roles[i] for i in indexed}
        rest = {r for i, r in enumerate(roles) if i not in indexed}
        return bool(taken & {"in", "out"}) and not {"in", "out"} <= rest


# What the name of a use gets where DoRA alone keeps it from staying factored, or what
# else the adapter moves.
OF_DORA = " over a part of DoRA's outputs"
OF_SCALE = " with a scale that the adapter moves, which fits neither side of it"
OF_SUM = " with a value that the adapter moves"
DORA = SideScale(("batch", "out"), OF_DORA)


def _is_beside(eqn: Any, values: Sequence[Value]) -> bool:
    """Whether an equation scales a kernel by what the adapter moves.

    Multiplied into the kernel, such a scale would have the gradient of a whole kernel
    as its own. Beside it, as DoRA's is, it is applied to the inputs or the outputs.
    """
    rule = CARRY.get(eqn.primitive.name)
    scales = rule is not None and rule.beside is not None
    return scales and _is_beside_moved(values)


def _scaled(eqn: Any, operand: int, view: View, values: Sequence[Value]) -> View:
    """Returns a view with the marks of the scale that an equation has beside it."""
    if _is_beside_moved(values):
        view = view.scaled_along(scale_axes(eqn, operand))
    return view.chosen_along(grown_axes(eqn, operand))


def _is_beside_moved(values: Sequence[Value]) -> bool:
    """Whether the adapter moves another operand of an equation."""
    return any_active([value for value in values if not value.views]).adapter


def _moved(eqn: Any, values: Sequence[Value]) -> str:
    """Names what the adapter moves beside a kernel, where that keeps it from passing.

    A kernel with a scale beside it is no sum with another value; and a value that is
    added to a kernel would have the gradient of a whole kernel.
    """
    if any(view.scaled for value in values for view in value.views):
        return OF_SCALE
    rule = CARRY.get(eqn.primitive.name)
    adds = rule is not None and rule.adds
    return OF_SUM if adds and _is_beside_moved(values) else ""


def _kind(kind: str, roles: list[str] | None, settled: Roles) -> str:
    """Names a product that contracts the output axes: the transposed use."""
    if roles is None:
        return kind
    contracted = {s for r, s in zip(roles, settled, strict=True) if r == "in" and s}
    return f"transposed {kind}" if contracted == {"out"} else kind


def decide(
    jaxpr: Any,
    inputs: Sequence[Value],
    axes: Mapping[str, KernelAxes],
    contraction: Contraction,
    scales: Mapping[str, SideScale] | None = None,
) -> tuple[Program, Log]:
    """Returns the program to evaluate, and the uses of the kernels in it."""
    recall = Recall()

    def run(ends: frozenset[Place]) -> tuple[Program, Log]:
        decision = Decision(axes, contraction, scales or {}, recall, ends)
        return decision.whole(jaxpr, inputs), decision.log

    program, log = run(frozenset())
    if not ends_of(log):
        return program, log
    # What was passed, or was a use, shows where the kernels go after that.
    found = discover(jaxpr, inputs)
    ends = frozenset[Place]()
    more = found.ends | (ends_of(log) - found.passed_on)
    while not more <= ends:
        ends |= more
        program, log = run(ends)
        more = ends_of(log) - found.passed_on
    return program, log

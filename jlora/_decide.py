"""The second pass: how each equation is evaluated, once the roles are settled."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ._analyze import Analysis, Log, Program, Step, Use, View, Views, indexed_axes
from ._axes import KernelAxes, Roles
from ._carry import CARRY
from ._choice import Contraction, choose
from ._consume import CONSUME
from ._control_flow import CONTROL_FLOW
from ._dora_uses import fits, spread
from ._group import GroupDims
from ._labelled import Labels, cuts_across
from ._products import group_dims
from ._siblings import arrange


class Decision(Analysis):
    """The pass that gives each equation its action.

    Args:
        axes: the settled roles by path.
        contraction: as `jlora.lora` takes it.
        dora: the paths of the kernels that have DoRA's scale.
    """

    def __init__(
        self,
        axes: Mapping[str, KernelAxes],
        contraction: Contraction,
        dora: Collection[str] = (),
    ) -> None:
        super().__init__(CONTROL_FLOW)
        self.axes, self.dora = axes, dora
        self.contraction: Contraction = contraction
        # Of each product: the operand that is a kernel, and its entries in the log.
        self._products: dict[int, tuple[int, range]] = {}
        # Of those that cut across the roles: what each entry takes for each rank.
        self._across: dict[int, list[int]] = {}

    def first_order(self, eqn: Any, views: list[Views]) -> tuple[Step, list[Views]]:
        """Consumes, carries, looks up, or else materializes the adapted operands."""
        nothing: list[Views] = [()] * len(eqn.outvars)
        kinds = self._consumed(eqn, views)
        if kinds and not self._scale_fits(eqn, views):
            self.materialized(eqn, views, OF_DORA)
            return Step("materialize"), nothing
        if kinds:
            before = len(self.log.uses)
            self._used(eqn, views, kinds)
            if eqn.primitive.name != "dot_general":
                return Step("consume"), nothing
            operand = next(i for i, group in enumerate(views) if group)
            logged = range(before, len(self.log.uses))
            self._products[id(eqn)] = (operand, logged)
            self._note_across(eqn, operand, views[operand])
            return Step("product"), nothing
        outputs = self._carried(eqn, views)
        if outputs is None:
            self.materialized(eqn, views)
            return Step("materialize"), nothing
        if self._is_lookup(eqn, views):
            self._used(eqn, views, itertools.repeat("lookup"))
            return Step("lookup"), nothing
        return Step("carry"), outputs

    def arranged(self, steps: list[Step]) -> list[Step]:
        """Puts products that share an operand into one step, and chooses its form."""
        eqns = [step.eqns[0] for step in steps]
        kernels = {
            i: self._products[id(eqn)][0]
            for i, (eqn, step) in enumerate(zip(eqns, steps, strict=True))
            if step.action == "product" and id(eqn) not in self._across
        }
        movable = lambda i: (
            steps[i].action in ("plain", "carry") and not eqns[i].effects
        )
        units = arrange(eqns, kernels, movable)
        return [
            self._group([eqns[i] for i in unit])
            if steps[i].action == "product"
            else steps[i]
            for unit in units
            for i in unit[:1]
        ]

    def _note_across(self, eqn: Any, operand: int, views: Views) -> None:
        """Notes a product that no two matrices say: it is computed by itself."""
        sides = []
        for view in views:
            roles = list(enumerate(self._roles(view) or []))
            has = lambda role, roles=roles: {
                i for i, r in roles if r in (role, "batch")
            }
            sides.append((has("in"), has("out")))
        if any(cuts_across(eqn, operand, *pair) for pair in sides):
            shapes = eqn.invars[1 - operand].aval.shape, eqn.outvars[0].aval.shape
            self._across[id(eqn)] = [
                Labels.of(eqn, operand, *pair).work(*shapes) for pair in sides
            ]

    def _group(self, eqns: list[Any]) -> Step:
        operands = [self._products[id(eqn)][0] for eqn in eqns]
        if id(eqns[0]) in self._across:
            return self._alone(eqns[0])
        dims: GroupDims = group_dims(eqns[0], operands[0])
        for eqn, operand in zip(eqns[1:], operands[1:], strict=True):
            dims = dims.with_kernels(group_dims(eqn, operand).kernels)
        x = eqns[0].invars[1 - operands[0]].aval
        pairs = zip(eqns, operands, strict=True)
        kernels = [eqn.invars[operand].aval for eqn, operand in pairs]
        form = choose(self.contraction, dims, x, kernels)
        features = math.prod(x.shape[i] for i in dims.contract)
        rows = self.trips * x.size // max(features, 1)
        for eqn, one, kernel in zip(eqns, dims.kernels, kernels, strict=True):
            shared = math.prod(kernel.shape[i] for i in one.batch)
            outputs = kernel.size // max(features * shared, 1)
            flops = 6 * rows * (features + outputs)
            if form == "merged":  # of six products two are replaced by the kernel's
                flops = 4 * rows * (features + outputs) + 4 * self.trips * kernel.size
            for i in self._products[id(eqn)][1]:
                self.log.uses[i] = dataclasses.replace(
                    self.log.uses[i],
                    form=form,
                    siblings=len(eqns),
                    factor_flops=flops,
                )
        return Step("product", eqns=tuple(eqns), kernels=tuple(operands), form=form)

    def _alone(self, eqn: Any) -> Step:
        operand, logged = self._products[id(eqn)]
        for i, work in zip(logged, self._across[id(eqn)], strict=True):
            self.log.uses[i] = dataclasses.replace(
                self.log.uses[i], form="separate", factor_flops=6 * self.trips * work
            )
        return Step("product", eqns=(eqn,), kernels=(operand,))

    def _used(self, eqn: Any, views: Sequence[Views], kinds: Any) -> None:
        name, line = eqn.primitive.name, self.line_of(eqn)
        for view, kind in zip(itertools.chain(*views), kinds, strict=False):
            self.log.uses.append(Use(view.path, kind, line, True, name))

    def _roles(self, view: View) -> list[str | None] | None:
        return view.roles(self.axes[view.path])

    def _consumed(self, eqn: Any, views: list[Views]) -> list[str]:
        """Returns the kind of use of each view, or nothing if it is no use."""
        rule = CONSUME.get(eqn.primitive.name)
        where = [i for i, group in enumerate(views) if group]
        if rule is None or len(where) != 1 or where[0] not in rule.operands:
            return []
        (operand,) = where
        kinds = []
        for view in views[operand]:
            roles = self._roles(view)
            if roles is None or not rule.supports(eqn, operand, roles):
                return []
            kind = rule.kind + rule.details(eqn)
            kinds.append(_kind(kind, rule.roles(eqn, operand), roles))
        return kinds

    def _scale_fits(self, eqn: Any, views: list[Views]) -> bool:
        """Whether DoRA's scale, where there is one, can be applied beside a use."""
        for operand, group in enumerate(views):
            scaled = [view for view in group if view.path in self.dora]
            varies = set().union(*map(self._varies, scaled))
            varies = {i for i in varies if eqn.invars[operand].aval.shape[i] != 1}
            if scaled and not fits(eqn, operand, varies):
                return False
        return True

    def _varies(self, view: View) -> set[int]:
        """Returns the axes of a value along which DoRA's scale of a kernel varies."""
        roles = enumerate(self._roles(view) or [])
        return {i for i, role in roles if role in ("batch", "out")} | view.spread

    def _carried(self, eqn: Any, views: list[Views]) -> list[Views] | None:
        rule = CARRY.get(eqn.primitive.name)
        where = [i for i, group in enumerate(views) if group]
        if rule is None or not rule.takes(where):
            return None
        outputs: list[list[View]] = [[] for _ in eqn.outvars]
        for operand in where:
            maps = rule.axes(eqn, operand)
            if maps is None:
                return None
            for view in views[operand]:
                if not rule.supports(eqn, operand, self._roles(view) or []):
                    return None
                for output, axis_map in zip(outputs, maps, strict=True):
                    if axis_map is not None:
                        moved = view.moved(axis_map).spread_along(spread(eqn))
                        output.append(moved)
        if any(self._roles(view) is None for view in itertools.chain(*outputs)):
            return None
        return [tuple(output) for output in outputs]

    def _is_lookup(self, eqn: Any, views: list[Views]) -> bool:
        """Whether the rows that are taken have lost one side of the kernel."""
        indexed = indexed_axes(eqn)
        if not indexed:
            return False
        for view in itertools.chain(*views):
            roles = self._roles(view) or []
            taken = {roles[i] for i in indexed}
            rest = {r for i, r in enumerate(roles) if i not in indexed}
            if taken & {"in", "out"} and not {"in", "out"} <= rest:
                return True
        return False


# What the name of a use gets where DoRA alone keeps it from staying factored.
OF_DORA = " over a part of DoRA's outputs"


def _kind(kind: str, roles: list[str] | None, settled: Roles) -> str:
    """Names a product that contracts the output axes: the transposed use."""
    if roles is None:
        return kind
    contracted = {s for r, s in zip(roles, settled, strict=True) if r == "in" and s}
    return f"transposed {kind}" if contracted == {"out"} else kind


def decide(
    jaxpr: Any,
    views: Sequence[View | None],
    axes: Mapping[str, KernelAxes],
    contraction: Contraction,
    dora: Collection[str] = (),
) -> tuple[Program, Log]:
    """Returns the program to evaluate, and the uses of the kernels in it."""
    decision = Decision(axes, contraction, dora)
    return decision.whole(jaxpr, views), decision.log

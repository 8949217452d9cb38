"""The products of a program with adapted kernels: their groups and their forms."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from .._jax.versions import is_literal
from .._params.axes import Roles
from .._product.choice import Contraction, Where, choose
from .._product.group import GroupDims
from .._rules import CARRY
from .._rules.dot_einsum import Labels, cuts_across
from .._rules.dot_general import group_dims
from .._rules.view import Log, Step, View
from .siblings import arrange


class Products:
    """The products that one run of the decision has seen.

    Args:
        contraction: as `jlora.lora` takes it.
    """

    def __init__(self, contraction: Contraction) -> None:
        self.contraction: Contraction = contraction
        # Of each product: the operand that is a kernel, and its entries in the log.
        self._seen: dict[int, tuple[int, range]] = {}
        # Of those that cut across the roles: what each entry takes for each rank.
        self._across: dict[int, list[int]] = {}
        # Those whose kernel is a leaf of the params as it lies, so far as views tell.
        self._whole: set[int] = set()

    def note(
        self,
        eqn: Any,
        operand: int,
        logged: range,
        views: Sequence[View],
        roles_of: Sequence[Roles],
    ) -> None:
        """Notes a product with an adapted kernel.

        Args:
            eqn: the equation.
            operand: the operand that is a kernel.
            logged: its entries among the uses in the log.
            views: those of the operand.
            roles_of: the roles of its axes, of each view.
        """
        self._seen[id(eqn)] = (operand, logged)
        shape = eqn.invars[operand].aval.shape
        if len(views) == 1 and _lies_as(shape, views[0]):
            self._whole.add(id(eqn))
        sides = []
        for roles in roles_of:
            has = lambda role, roles=roles: {
                i for i, r in enumerate(roles) if r in (role, "batch")
            }
            sides.append((has("in"), has("out")))
        if any(cuts_across(eqn, operand, *pair) for pair in sides):
            # No two matrices say what it does: it is computed by itself.
            shapes = eqn.invars[1 - operand].aval.shape, eqn.outvars[0].aval.shape
            self._across[id(eqn)] = [
                Labels.of(eqn, operand, *pair).work(*shapes) for pair in sides
            ]

    def arranged(
        self, steps: list[Step], log: Log, trips: int, *, loops: bool
    ) -> list[Step]:
        """Returns steps in which products that share an operand are one, with a form.

        Args:
            steps: the steps of one jaxpr, in the order of its equations.
            log: the log of that jaxpr, whose uses are told their forms.
            trips: how often it runs.
            loops: whether it is the body of a loop, or in one.
        """
        eqns = [step.eqns[0] for step in steps]
        made = _made_by(eqns)
        for eqn, step in zip(eqns, steps, strict=True):
            if step.action == "product" and eqn.invars[self._seen[id(eqn)][0]] in made:
                self._whole.discard(id(eqn))
        kernels = {
            i: self._seen[id(eqn)][0]
            for i, (eqn, step) in enumerate(zip(eqns, steps, strict=True))
            if step.action == "product" and id(eqn) not in self._across
        }
        movable = lambda i: (
            steps[i].action in ("plain", "carry") and not eqns[i].effects
        )
        units = arrange(eqns, kernels, movable)
        return [
            self._group([eqns[i] for i in unit], log, trips, loops)
            if steps[i].action == "product"
            else steps[i]
            for unit in units
            for i in unit[:1]
        ]

    def _group(self, eqns: list[Any], log: Log, trips: int, loops: bool) -> Step:
        operands = [self._seen[id(eqn)][0] for eqn in eqns]
        if id(eqns[0]) in self._across:
            return self._alone(eqns[0], log, trips)
        dims: GroupDims = group_dims(eqns[0], operands[0])
        for eqn, operand in zip(eqns[1:], operands[1:], strict=True):
            dims = dims.with_kernels(group_dims(eqn, operand).kernels)
        x = eqns[0].invars[1 - operands[0]].aval
        pairs = zip(eqns, operands, strict=True)
        kernels = [eqn.invars[operand].aval for eqn, operand in pairs]
        whole = all(id(eqn) in self._whole for eqn in eqns)
        where = Where(whole, loops)
        form = choose(self.contraction, dims, x, kernels, where)
        features = math.prod(x.shape[i] for i in dims.contract)
        rows = trips * x.size // max(features, 1)
        for eqn, one, kernel in zip(eqns, dims.kernels, kernels, strict=True):
            shared = math.prod(kernel.shape[i] for i in one.batch)
            outputs = kernel.size // max(features * shared, 1)
            flops = 6 * rows * (features + outputs)
            if form == "merged":  # of six products two are replaced by the kernel's
                flops = 4 * rows * (features + outputs) + 4 * trips * kernel.size
            for i in self._seen[id(eqn)][1]:
                log.uses[i] = dataclasses.replace(
                    log.uses[i], chosen=form, siblings=len(eqns), factor_flops=flops
                )
        return Step("product", eqns=tuple(eqns), kernels=tuple(operands), form=form)

    def _alone(self, eqn: Any, log: Log, trips: int) -> Step:
        operand, logged = self._seen[id(eqn)]
        for i, work in zip(logged, self._across[id(eqn)], strict=True):
            log.uses[i] = dataclasses.replace(
                log.uses[i], chosen="separate", factor_flops=6 * trips * work
            )
        return Step("product", eqns=(eqn,), kernels=(operand,))


def _lies_as(shape: Sequence[int], view: View) -> bool:
    """Whether a value of this shape is the whole kernel in its order.

    It is read where it is then; a part of it, or a turned one, is copied for whom
    cannot cut or turn.
    """
    order = [i for origin in view.origins for i in sorted(origin)]
    longer = lambda axes: [i for i in axes if view.shape[i] != 1]
    whole = math.prod(shape) == math.prod(view.shape)
    return whole and longer(order) == longer(range(len(view.shape)))


def _made_by(eqns: Sequence[Any]) -> set[Any]:
    """Returns what equations write: their results, but for what stays in its place."""
    made: set[Any] = set()
    for eqn in eqns:
        rule = CARRY.get(eqn.primitive.name)
        stays = rule is not None and rule.in_place and not is_literal(eqn.invars[0])
        if not stays or eqn.invars[0] in made:
            made.update(eqn.outvars)
    return made

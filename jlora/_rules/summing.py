"""Sums of a kernel with frozen values or other kernels, and over its axes.

`(W + s·a·b) + v = (W + v) + s·a·b`: only the base changes. A sum with an activation is
none of these: a bias or a table of positions that is added is no kernel.
"""

import dataclasses
from typing import Any

from .._params.axes import free_axes
from .adapted import Adapted
from .mix import Mix, mixing
from .rule import AxisMap, CarryRule, same_axes
from .view import Passed, Place, View


def _axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    """The axes of the operand, if it is not broadcast."""
    if eqn.invars[operand].aval.shape != eqn.outvars[0].aval.shape:
        return None
    return same_axes(eqn, operand)


def _sum(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    """Adds, or subtracts, the bases, and puts all parts together."""
    parts = []
    for i, value in enumerate(operands):
        if isinstance(value, Adapted):
            minus = i == 1 and eqn.primitive.name == "sub"
            parts += [
                dataclasses.replace(part, a=-part.a) if minus else part
                for part in value.parts
            ]
    return [Adapted(bases[0], tuple(parts))]


def _passed(eqn: Any, operand: int, view: View, place: Place) -> Passed:
    return Passed(place, frozenset(), "sum")


def _over_axes(eqn: Any, operand: int) -> Mix:
    axes = tuple(eqn.params["axes"])
    free = free_axes(eqn.invars[operand].aval.ndim, axes)
    return Mix(axes, (), free, (), (), 0, own_first=True)


_sums = CarryRule(
    _axes,
    _sum,
    operands=None,
    together=True,
    frozen=True,
    entrywise=True,
    passed=_passed,
    adds=True,
    keeps_scale=lambda eqn, operand, varies: not varies,
)

CARRY = {"add": _sums, "sub": _sums, "reduce_sum": mixing(_over_axes)}

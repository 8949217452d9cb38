"""Sums of a kernel with frozen values, or with other kernels: they stay factored.

`(W + s·a·b) + v = (W + v) + s·a·b`: only the base changes. A sum with an activation is
none of these: a bias or a table of positions that is added is no kernel.
"""

import dataclasses
from typing import Any

from .adapted import Adapted, base_of
from .lazy_moves import carried
from .moves import AxisMap, same_axes


def sum_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    """The axes of the operand, if it is not broadcast."""
    if eqn.invars[operand].aval.shape != eqn.outvars[0].aval.shape:
        return None
    return same_axes(eqn, operand)


def sum_(eqn: Any, operands: list[Any]) -> list[Any]:
    """Adds, or subtracts, the bases, and puts all parts together."""
    (base,) = carried(eqn, [base_of(v) for v in operands])
    parts = []
    for i, value in enumerate(operands):
        if isinstance(value, Adapted):
            minus = i == 1 and eqn.primitive.name == "sub"
            parts += [
                dataclasses.replace(part, a=-part.a) if minus else part
                for part in value.parts
            ]
    return [Adapted(base, tuple(parts))]

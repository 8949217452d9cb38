"""Operations that a kernel passes whose meaning shows only later, see `Passed`."""

from collections.abc import Sequence
from typing import Any

from .._rules import CARRY, CONSUME
from .._rules.view import Passed, Place, Value, View, any_active


def is_frozen_product(eqn: Any, others: Sequence[Value]) -> bool:
    """Returns whether an equation sums a kernel with nothing but frozen operands."""
    rule = CARRY.get(eqn.primitive.name)
    return rule is not None and rule.mixes and not any_active(others)


def passed_by(eqn: Any, operand: int, view: View, place: Place) -> Passed | None:
    """Returns what a view passes in a frozen product or sum; None elsewhere."""
    rule = CARRY.get(eqn.primitive.name)
    if rule is None or rule.passed is None:
        return None
    return rule.passed(eqn, operand, view, place)


def use_before(eqn: Any, operand: int, view: View, active: bool) -> Passed | None:
    """Returns what a view has passed that was its use, if this product is not.

    A frozen product is where frozen features went into the kernel, and this product
    contracts their outputs head by head: the keys `k` of attention whose queries are
    learned. So it is where an operation without a rule follows, as an activation
    function does. A sum of frozen values is one of features where it goes into a frozen
    product.
    """
    kinds = [passed.kind for passed in view.passed]
    if "sum" in kinds:
        first = kinds.index("sum")
        if not active or "mix" in kinds[first:]:
            return view.passed[first]
    mixes = [p for p in view.passed if p.kind == "mix" and p.features]
    if not mixes:
        return None
    by_heads = CONSUME[eqn.primitive.name].by_heads
    return mixes[-1] if view.formed or by_heads(eqn, operand, view) else None

"""Quantised values whose arrays are moved and cut as the values are.

What each operation does to them stands with its rule, see `CarryRule.tiles`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .._jax.versions import rebind
from .._params.quantized import Quantized

Moved = Sequence[Quantized] | None

# `(eqn, value, other operands) -> the value of each output`, or None where a tile would
# be cut or torn apart.
TilesMove = Callable[[Any, Quantized, list[Any]], Moved]


def apart(q: Quantized, axis: int) -> bool:
    """Returns whether each array has all of an axis, or nothing of it."""
    found: list[bool] = []
    q.each(lambda v: found.append(v.shape[axis] in (1, q.shape[axis])))
    return all(found)


def rebound_tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    """The operation itself, on each array: it does not look at axes."""
    return [q.each(lambda v: rebind(eqn, [v])[0])]

"""Values that were broadcast: a scale along one axis, written out in full.

`w * jnp.broadcast_to(v, w.shape)` scales the columns of `w` as `w * v` does. The pass
follows along which axes such a value varies, and the scale is cut back to these.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from .._params.lazy import Lazy
from . import CARRY
from .adapted import Adapted
from .view import Value

# Operations without a rule that take a mask entry by entry: it varies where it did.
_ENTRYWISE = ("not",)


@dataclasses.dataclass(frozen=True)
class _Narrowed:
    """An operand of an equation with another type."""

    aval: Any


def varies_along(eqn: Any, values: Sequence[Value]) -> frozenset[int] | None:
    """Returns along which axes an output varies, if it was broadcast."""
    rule, along = CARRY.get(eqn.primitive.name), values[0].along if values else None
    if rule is None:
        return along if eqn.primitive.name in _ENTRYWISE else None
    if rule.repeats is not None:
        ndim = eqn.invars[0].aval.ndim
        return rule.repeats(eqn, frozenset(range(ndim)) if along is None else along)
    return along if rule.entrywise and len(values) == 1 else None


def narrowed(eqn: Any, values: Sequence[Value]) -> tuple[Any, frozenset[int] | None]:
    """Returns an equation with its scale cut to the axes along which it varies.

    And these axes: None where there is nothing to cut.
    """
    rule = CARRY.get(eqn.primitive.name)
    if rule is None or rule.beside is None:
        return eqn, None
    scales = [i for i, value in enumerate(values) if not value.views]
    if len(scales) != 1:
        return eqn, None
    (index,) = scales
    aval, along = eqn.invars[index].aval, values[index].along
    if along is None or all(n == 1 or i in along for i, n in enumerate(aval.shape)):
        return eqn, None
    shape = tuple(n if i in along else 1 for i, n in enumerate(aval.shape))
    invars = list(eqn.invars)
    invars[index] = _Narrowed(jax.ShapeDtypeStruct(shape, aval.dtype))
    return eqn.replace(invars=invars), along


def cut(values: Sequence[Any], along: frozenset[int]) -> list[Any]:
    """Returns operands with the scale among them cut to the axes `along`."""

    def one(value: Any) -> Any:
        if isinstance(value, Adapted | Lazy):
            return value
        limits = [n if i in along else min(n, 1) for i, n in enumerate(value.shape)]
        return lax.slice(value, [0] * value.ndim, limits)

    return list(map(one, values))

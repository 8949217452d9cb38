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
from .adapted import Adapted
from .view import Value

# Operations that take a value entry by entry, so that it varies where it did.
_SCALES = ("mul", "div")
_ENTRYWISE = ("convert_element_type", "neg", "copy", "stop_gradient", "not")


@dataclasses.dataclass(frozen=True)
class _Narrowed:
    """An operand of an equation with another type."""

    aval: Any


def varies_along(eqn: Any, values: Sequence[Value]) -> frozenset[int] | None:
    """Returns along which axes an output varies, if it was broadcast."""
    name = eqn.primitive.name
    if name in _ENTRYWISE:
        return values[0].along
    if name != "broadcast_in_dim":
        return None
    shape, dims = eqn.invars[0].aval.shape, eqn.params["broadcast_dimensions"]
    before = range(len(shape)) if values[0].along is None else values[0].along
    return frozenset(int(dims[i]) for i in before if shape[i] != 1)


def narrowed(eqn: Any, values: Sequence[Value]) -> tuple[Any, frozenset[int] | None]:
    """Returns an equation with its scale cut to the axes along which it varies.

    And these axes: None where there is nothing to cut.
    """
    scales = [i for i, value in enumerate(values) if not value.views]
    if eqn.primitive.name not in _SCALES or len(scales) != 1 or len(values) != 2:
        return eqn, None
    (index,) = scales
    aval, along = eqn.invars[index].aval, values[index].along
    if along is None or all(n == 1 or i in along for i, n in enumerate(aval.shape)):
        return eqn, None
    shape = tuple(n if i in along else 1 for i, n in enumerate(aval.shape))
    invars = list(eqn.invars)
    invars[index] = _Narrowed(jax.ShapeDtypeStruct(shape, aval.dtype))
    return eqn.replace(invars=invars), along


def grown(eqn: Any, operand: int) -> frozenset[int]:
    """Returns the axes of size one that a scale makes longer: factors differ there."""
    if eqn.primitive.name not in _SCALES:
        return frozenset()
    pairs = zip(eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape, strict=True)
    return frozenset(i for i, (own, out) in enumerate(pairs) if own != out)


def cut(values: Sequence[Any], along: frozenset[int]) -> list[Any]:
    """Returns operands with the scale among them cut to the axes `along`."""

    def one(value: Any) -> Any:
        if isinstance(value, Adapted | Lazy):
            return value
        limits = [n if i in along else min(n, 1) for i, n in enumerate(value.shape)]
        return lax.slice(value, [0] * value.ndim, limits)

    return list(map(one, values))

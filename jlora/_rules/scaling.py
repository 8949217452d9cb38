"""Operations that scale a kernel: by a frozen value, or by one that stays beside it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.dtypes import summed_in
from .._params.axes import Roles
from .._params.lazy import dense
from .adapted import Adapted, Part
from .rule import AxisMap, CarryRule, present, same_axes


def _axes_scaled(eqn: Any, operand: int) -> list[AxisMap] | None:
    """The other operand is a scalar, or a vector along some axes, new ones too."""
    own, out = eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape
    if any(m not in (n, 1) for m, n in zip(own, out, strict=True)):
        return None
    return same_axes(eqn, operand)


def scale_axes(eqn: Any, operand: int) -> frozenset[int]:
    """Returns the axes along which the scale that an operand is scaled by varies."""
    shape = eqn.invars[1 - operand].aval.shape
    return frozenset(i for i, n in enumerate(shape) if n != 1)


def grown_axes(eqn: Any, operand: int) -> frozenset[int]:
    """Returns the axes of size one that a scale makes longer: factors differ there."""
    pairs = zip(eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape, strict=True)
    return frozenset(i for i, (own, out) in enumerate(pairs) if own != out)


def _scale_supports(eqn: Any, operand: int, roles: Roles) -> bool:
    """Whether the scale varies along axes that one factor has alone, or none has."""
    shape = eqn.invars[operand].aval.shape
    varies = [i for i in scale_axes(eqn, operand) if shape[i] != 1]
    along = {roles[i] for i in varies} - {"batch"}
    return len(along) <= 1 and None not in along


def _scale(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    index = 0 if isinstance(operands[0], Adapted) else 1
    value, other = operands[index], operands[1 - index]
    sizes = enumerate(zip(jnp.shape(other), value.base.shape, strict=False))
    varies = [i for i, (n, own) in sizes if n != 1 != own]
    amount = other.astype(summed_in(other.dtype))
    amount = amount[..., None] if amount.ndim else amount
    divides = eqn.primitive.name == "div"

    def times(factor: jax.Array) -> jax.Array:
        return factor / amount if divides else factor * amount

    def scaled(part: Part) -> Part:
        has = lambda array: all(present(array, i, value.base.shape) for i in varies)
        if has(part.a):
            return dataclasses.replace(part, a=times(part.a))
        placed = [i for i, place in enumerate(part.places) if has(place)]
        if has(part.b) or not placed:
            return dataclasses.replace(part, b=times(part.b))
        places = list(part.places)
        places[placed[0]] = times(places[placed[0]])
        return dataclasses.replace(part, places=tuple(places))

    return [Adapted(bases[0], tuple(map(scaled, value.parts)), value.scale)]


def _beside(eqn: Any, operands: list[Any]) -> list[Any]:
    """Keeps a scale apart from the kernel: `(base + Δ)·scale`, as DoRA's is kept."""
    index = 0 if isinstance(operands[0], Adapted) else 1
    value, other = operands[index], operands[1 - index]
    amount = other.astype(summed_in(other.dtype))
    amount = amount.reshape(*(amount.shape or (1,) * value.base.ndim), 1)
    amount = 1 / amount if eqn.primitive.name == "div" else amount
    scale = amount if value.scale is None else value.scale * amount
    base, shape = value.base, tuple(eqn.outvars[0].aval.shape)
    if base.shape != shape:  # the scale has axes along which the kernel has size one
        base = jnp.broadcast_to(dense(base), shape)
    return [dataclasses.replace(value, base=base, scale=scale)]


def _negate(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    (value,), (base,) = operands, bases
    flipped = [dataclasses.replace(part, a=-part.a) for part in value.parts]
    return [Adapted(base, tuple(flipped), value.scale)]


_division = CarryRule(
    _axes_scaled, _scale, supports=_scale_supports, entrywise=True, beside=_beside
)

CARRY = {
    "mul": dataclasses.replace(_division, operands=(0, 1)),
    "div": _division,
    "neg": CarryRule(same_axes, _negate, entrywise=True),
}

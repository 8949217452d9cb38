"""Operations that touch a value as a whole, and leave its axes as they are."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from .._params.lazy import Lazy
from .rule import (
    AxisMap,
    CarryRule,
    each_factor,
    identity,
    rebound,
    same_axes,
    unchanged,
)


def _convert_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    """Casts to floats, and to complex: the real part of a complex sum is no sum."""
    new, old = eqn.params["new_dtype"], eqn.invars[0].aval.dtype
    is_complex = lambda dtype: jnp.issubdtype(dtype, jnp.complexfloating)
    if not jnp.issubdtype(new, jnp.inexact) or (
        is_complex(old) and not is_complex(new)
    ):
        return None
    return same_axes(eqn, operand)


def _own_axes(eqn: Any, operand: int) -> list[AxisMap | None]:
    """Only the output of the same position comes from the operand."""
    maps: list[AxisMap | None] = [None] * len(eqn.outvars)
    maps[operand] = identity(eqn.outvars[operand].aval.ndim)
    return maps


def _lazy_barrier(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """A value that is not made yet needs no barrier: it has one where it is made."""
    where = [i for i, v in enumerate(values) if not isinstance(v, Lazy)]
    held = iter(lax.optimization_barrier([values[i] for i in where]) if where else ())
    return [next(held) if i in where else v for i, v in enumerate(values)]


def _power_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    return same_axes(eqn, operand) if eqn.params["y"] == 1 else None


_entrywise = CarryRule(same_axes, unchanged, entrywise=True)
_several = CarryRule(_own_axes, unchanged, operands=None, together=True)

CARRY = {
    "convert_element_type": CarryRule(_convert_axes, unchanged, entrywise=True),
    "reduce_precision": _entrywise,
    "integer_pow": CarryRule(_power_axes, unchanged, entrywise=True),
    "copy": _entrywise,
    "copy_p": _entrywise,
    "name": _entrywise,
    "device_put": _several,
    "layout_constraint": CarryRule(same_axes, unchanged),
    "optimization_barrier": dataclasses.replace(_several, lazy=_lazy_barrier),
    "stop_gradient": CarryRule(same_axes, each_factor(rebound), entrywise=True),
}

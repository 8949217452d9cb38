"""Collectives of a kernel inside of a `shard_map`: factors are sent as the kernel is.

A factor that does not vary along the mesh axis is the same on every device, and stays
where it is. JAX knows which do with `check_vma=True`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.versions import manual_axes, rebind
from .adapted import Adapted
from .lazy_moves import carried
from .moves import AxisMap, identity, same_axes


def _each(eqn: Any, value: Adapted, same: Callable[[jax.Array], jax.Array]) -> Adapted:
    """Sends the base, and each factor that varies along the axis; `same` of others."""
    (base,) = carried(eqn, [value.base])
    names = eqn.params["axis_name"]
    axes = set(names if isinstance(names, tuple | list) else (names,))
    known = bool(axes & manual_axes(value.base))

    def send(factor: jax.Array) -> jax.Array:
        if known and not axes & manual_axes(factor):
            return same(factor)
        return rebind(eqn, [factor])[0]

    return value.moved(base, send)


def permute(eqn: Any, operands: list[Any]) -> list[Any]:
    """Sends a value to another device (`ppermute`)."""
    return [_each(eqn, operands[0], lambda factor: factor)]


def all_gather_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    """A tiled gather makes an axis longer, another one puts a new axis in front of it.

    The latter is followed where it is known which factors vary.
    """
    if eqn.params.get("tiled"):
        return same_axes(eqn, operand)
    aval, names = eqn.invars[operand].aval, eqn.params["axis_name"]
    if not set(names) & aval.manual_axis_type.varying:
        return None
    axes, new = identity(aval.ndim), eqn.params["all_gather_dimension"]
    return [[*axes[:new], frozenset(), *axes[new:]]]


def all_gather(eqn: Any, operands: list[Any]) -> list[Any]:
    """Gathers the factor that has the axis; the other is the same on every device."""
    (value,), axis = operands, eqn.params["all_gather_dimension"]
    if not eqn.params.get("tiled"):
        return [_each(eqn, value, lambda factor: jnp.expand_dims(factor, axis))]
    (base,) = carried(eqn, [value.base])
    n = value.base.shape[axis]
    gather = lambda f: rebind(eqn, [f])[0] if f.shape[axis] == n else f
    return [value.moved(base, gather)]

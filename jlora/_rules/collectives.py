"""Operations that say on which devices a kernel is, or send it to others.

Factors are laid out and sent as the kernel is. Inside of a `shard_map`, a factor that
does not vary along the mesh axis is the same on every device, and stays where it is.
JAX knows which do with `check_vma=True`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._jax.sharding import factor_spec, names_of_entry
from .._jax.versions import manual_axes, rebind
from .._params.axes import Shape
from .._params.quantized import Quantized
from .adapted import Adapted
from .rule import (
    AxisMap,
    CarryRule,
    each_factor,
    identity,
    rebound,
    same_axes,
    unchanged,
)
from .tiles import Moved, rebound_tiles


def _sent(
    eqn: Any, value: Adapted, base: Any, same: Callable[[jax.Array], jax.Array]
) -> Adapted:
    """Sends each factor that varies along the axis; `same` of others."""
    names = eqn.params["axis_name"]
    axes = set(names if isinstance(names, tuple | list) else (names,))
    known = bool(axes & manual_axes(value.base))

    def send(factor: jax.Array) -> jax.Array:
        if known and not axes & manual_axes(factor):
            return same(factor)
        return rebind(eqn, [factor])[0]

    return value.moved(base, send)


def _permute(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    """Sends a value to another device."""
    return [_sent(eqn, operands[0], bases[0], lambda factor: factor)]


def _all_gather_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
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


def _all_gather(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    """Gathers the factor that has the axis; the other is the same on every device."""
    (value,), (base,) = operands, bases
    axis = eqn.params["all_gather_dimension"]
    if not eqn.params.get("tiled"):
        return [_sent(eqn, value, base, lambda factor: jnp.expand_dims(factor, axis))]
    n = value.base.shape[axis]
    if n > 1:
        gather = lambda f: rebind(eqn, [f])[0] if f.shape[axis] == n else f
        return [value.moved(base, gather)]
    # Of one entry on each device both factors have the size: types say which varies.
    return [_sent(eqn, value, base, lambda f: f)]


def _constrain_tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    """The codes have the shape that the sharding is for; XLA lays the scales out."""
    return [dataclasses.replace(q, qvalue=rebind(eqn, [q.qvalue])[0])]


def _reshard_tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    """Each array is laid out as the value, whole along axes that do not divide."""
    place = eqn.params["dst_sharding"]
    shards = lambda entry: math.prod(place.mesh.shape[n] for n in names_of_entry(entry))

    def move(array: jax.Array) -> jax.Array:
        pairs = zip(place.spec, array.shape, strict=False)
        fit = [None if n % shards(entry) else entry for entry, n in pairs]
        return jax.sharding.reshard(array, place.update(spec=PartitionSpec(*fit)))

    return [q.each(move)]


def _reshard(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Sends the factor along, to another mesh or into a region of Auto axes too."""
    wanted = eqn.params["dst_sharding"]
    spec = factor_spec(wanted.spec, factor.shape, shape)
    params = {**eqn.params, "dst_sharding": wanted.update(spec=spec)}
    return rebind(eqn.replace(params=params), [factor])[0]


_varying = CarryRule(
    same_axes, each_factor(rebound), tiles=rebound_tiles, in_place=True
)

CARRY = {
    "sharding_constraint": CarryRule(same_axes, unchanged, tiles=_constrain_tiles),
    "reshard": CarryRule(same_axes, each_factor(_reshard), tiles=_reshard_tiles),
    "pvary": _varying,
    "pcast": _varying,
    "all_gather": CarryRule(_all_gather_axes, _all_gather),
    "all_gather_invariant": CarryRule(_all_gather_axes, _all_gather),
    "ppermute": CarryRule(same_axes, _permute),
}

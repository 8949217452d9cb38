"""Operations that make a value part of a larger one: pads, concatenations, stacks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._params.axes import Shape
from .adapted import Adapted, Part, base_of, complete
from .rule import AxisMap, CarryRule, identity, present, same_axes


def _pad_part(part: Part, config: Sequence[tuple], shape: Shape) -> Part:
    """Pads with zeros what has the padded axes; where nothing has one, notes its place.

    An axis of size one may be of either side: the use will tell.
    """
    own = [part.a, part.b, *part.places]
    has = lambda axis: any(present(f, axis, shape) for f in own)
    padded = [axis for axis, amounts in enumerate(config) if any(amounts)]
    alone = [axis for axis in padded if shape[axis] == 1 or not has(axis)]

    def pad(array: jax.Array, axes: Sequence[int]) -> jax.Array:
        amounts = [c if i in axes else (0, 0, 0) for i, c in enumerate(config)]
        return lax.pad(array, jnp.zeros((), array.dtype), [*amounts, (0, 0, 0)])

    def moved(array: jax.Array) -> jax.Array:
        held = [i for i in padded if i not in alone and present(array, i, shape)]
        return pad(array, held)

    def place(axis: int) -> jax.Array:
        sizes = [n if i == axis else 1 for i, n in enumerate(shape)]
        return pad(jnp.ones([*sizes, 1], part.a.dtype), [axis])

    part = part.each(moved)
    places = (*part.places, *map(place, alone))
    return dataclasses.replace(part, places=places)


def _pad(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    """Pads the parts with zeros: nothing is added where the base is padded."""
    value, (base,) = operands[0], bases
    config, shape = eqn.params["padding_config"], value.base.shape
    parts = tuple(_pad_part(p, config, shape) for p in value.parts)
    return [Adapted(base, parts, _pad_scale(value.scale, config, shape))]


def _pad_scale(
    scale: jax.Array | None, config: Sequence[tuple], shape: Shape
) -> jax.Array | None:
    """Pads a scale with ones: the base is left as it is where it is padded."""
    if scale is None:
        return None
    scale = complete(
        scale, [i for i, amounts in enumerate(config) if any(amounts)], shape
    )
    return lax.pad(scale, jnp.ones((), scale.dtype), [*config, (0, 0, 0)])


def _concatenate(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    """Joins the parts of all operands along an axis."""
    return [_joined(bases[0], operands, eqn.params["dimension"])]


def _joined(base: jax.Array, operands: Sequence[Any], axis: int) -> Adapted:
    """Pads the parts of each operand with zeros to their place in the whole."""
    parts, offset, total = [], 0, base.shape[axis]
    for value in operands:
        shape = base_of(value).shape
        if isinstance(value, Adapted):
            config = [(0, 0, 0)] * base.ndim
            config[axis] = (offset, total - offset - shape[axis], 0)
            parts += [_pad_part(part, config, shape) for part in value.parts]
        offset += shape[axis]
    return Adapted(base, tuple(parts), _joined_scale(operands, axis))


def _joined_scale(operands: Sequence[Any], axis: int) -> jax.Array | None:
    """Joins the scales of all operands; those without one are scaled by one."""
    scales = [v.scale if isinstance(v, Adapted) else None for v in operands]
    known = [scale for scale in scales if scale is not None]
    if not known:
        return None
    sizes = [max(lengths) for lengths in zip(*(s.shape for s in known), strict=True)]
    pieces = []
    for scale, value in zip(scales, operands, strict=True):
        sizes[axis] = base_of(value).shape[axis]
        one = jnp.ones((), known[0].dtype) if scale is None else scale
        pieces.append(jnp.broadcast_to(one, sizes))
    return lax.concatenate(pieces, axis)


def _stack_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """The axes of the operand, and a new one from nowhere."""
    axes = identity(eqn.invars[operand].aval.ndim)
    return [[*axes[: eqn.params["axis"]], frozenset(), *axes[eqn.params["axis"] :]]]


def _stack(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
    """Joins the parts of all operands along a new axis."""
    axis = eqn.params["axis"]
    add_axis = lambda array: jnp.expand_dims(array, axis)
    return [_joined(bases[0], [jax.tree.map(add_axis, v) for v in operands], axis)]


def _padded(eqn: Any) -> frozenset[int]:
    padded = enumerate(eqn.params["padding_config"])
    return frozenset(i for i, amounts in padded if any(amounts))


CARRY = {
    "pad": CarryRule(same_axes, _pad, scale_varies=_padded),
    "concatenate": CarryRule(
        same_axes,
        _concatenate,
        operands=None,
        together=True,
        scale_varies=lambda eqn: frozenset([eqn.params["dimension"]]),
    ),
    "stack": CarryRule(
        _stack_axes,
        _stack,
        operands=None,
        together=True,
        scale_varies=lambda eqn: frozenset([eqn.params["axis"]]),
    ),
}

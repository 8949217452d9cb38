"""Halves of the carry rules that move, cut and join the axes of a value.

An `…_axes` function says where the axes of each output come from; its twin does the
same to one aligned factor, `(eqn, factor, shape of the value, other operands)`, or,
where parts are cut or joined, to the whole value, `(eqn, operands)`. `_carry.py` enters
them in its table.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._params.axes import Shape, reshape_groups
from .adapted import Adapted, Part, base_of, complete
from .lazy_moves import carried

# A prime that is the size of no axis.
_NO_SIZE = 2**61 - 1

# For each axis of a value, the axes of another value that it comes from.
AxisMap = list[frozenset[int]]


def present(factor: jax.Array, axis: int, shape: Shape) -> bool:
    """Returns whether an aligned factor has an axis of a value of `shape`."""
    return factor.shape[axis] == shape[axis]


def identity(ndim: int) -> AxisMap:
    """Each axis comes from itself."""
    return [frozenset([i]) for i in range(ndim)]


def same_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """Each output has the axes of the operand."""
    return [identity(eqn.invars[operand].aval.ndim) for _ in eqn.outvars]


# --- transpose, reshape, and axes of size one ---


def transpose_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """The axes of the operand, permuted."""
    return [[frozenset([i]) for i in eqn.params["permutation"]]]


def transpose(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Permutes a factor; its rank stays last."""
    return jnp.transpose(factor, (*eqn.params["permutation"], len(shape)))


def squeeze_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """The axes of the operand that are kept."""
    ndim = eqn.invars[0].aval.ndim
    dropped = {d % ndim for d in eqn.params["dimensions"]}
    return [[frozenset([i]) for i in range(ndim) if i not in dropped]]


def squeeze(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Drops the same axes; a factor has size one there too."""
    return jnp.squeeze(factor, [d % len(shape) for d in eqn.params["dimensions"]])


def broadcast_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """Old axes come from themselves, new ones from nowhere."""
    dims = eqn.params["broadcast_dimensions"]
    ndim = len(eqn.params["shape"])
    return [[frozenset([dims.index(i)] if i in dims else []) for i in range(ndim)]]


def broadcast(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Gives a factor the new axes, of size one: it is the same along them."""
    dims = eqn.params["broadcast_dimensions"]
    new = [1] * len(eqn.params["shape"])
    for axis, target in enumerate(dims):
        new[target] = factor.shape[axis]
    return factor.reshape(*new, factor.shape[-1])


def reshape_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    """Each axis comes from all the axes of its group."""
    old, new = eqn.invars[0].aval.shape, eqn.params["new_sizes"]
    if eqn.params.get("dimensions") is not None or not _same_size(old, new):
        return None
    origins: AxisMap = [frozenset()] * len(new)
    for took, gave in reshape_groups(_with_size(old), _with_size(new)):
        for j in gave:
            origins[j] = frozenset(took)
    return [origins]


def _with_size(shape: Shape) -> Shape:
    """Returns a shape in which an axis of size zero has a size that no other has."""
    return tuple(_NO_SIZE if isinstance(n, int) and n == 0 else n for n in shape)


def _same_size(old: Shape, new: Shape) -> bool:
    """Whether axes of size zero, if there are any, go over into each other."""
    if 0 not in (*old, *new):
        return True
    return math.prod(_with_size(old)) == math.prod(_with_size(new))


def reshape(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Reshapes a factor group by group, where it has the axes of the group."""
    new = eqn.params["new_sizes"]
    sizes = [1] * len(new)
    for took, gave in reshape_groups(_with_size(shape), _with_size(new)):
        if all(factor.shape[i] == 1 for i in took):
            continue
        factor = complete(factor, took, shape)
        for j in gave:
            sizes[j] = new[j]
    return factor.reshape(*sizes, factor.shape[-1])


def tile(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Repeats a factor along the axes that it has."""
    reps = enumerate(eqn.params["reps"])
    return jnp.tile(
        factor, [n if present(factor, i, shape) else 1 for i, n in reps] + [1]
    )


# --- pieces of a value ---


def slice_(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Cuts a factor along the axes it has."""
    params = eqn.params
    strides = params["strides"] or (1,) * len(shape)
    starts, limits, steps = [], [], []
    for axis, n in enumerate(factor.shape[:-1]):
        here = present(factor, axis, shape)
        starts.append(params["start_indices"][axis] if here else 0)
        limits.append(params["limit_indices"][axis] if here else n)
        steps.append(strides[axis] if here else 1)
    rank = factor.shape[-1]
    return lax.slice(factor, (*starts, 0), (*limits, rank), (*steps, 1))


def dynamic_slice(eqn: Any, factor: jax.Array, shape: Shape, starts: list) -> jax.Array:
    """Cuts a factor along the axes it has, at the same places."""
    sizes, where = [], []
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        here = present(factor, axis, shape)
        sizes.append(size if here else 1)
        where.append(starts[axis] if here else jnp.zeros_like(starts[axis]))
    zero = jnp.zeros_like(starts[0])
    return lax.dynamic_slice(factor, [*where, zero], [*sizes, factor.shape[-1]])


def split(eqn: Any, operands: list[Any]) -> list[Any]:
    """Splits the factors that have the axis; all pieces share the others."""
    (value,) = operands
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    bases = carried(eqn, [value.base])

    def pieces(factor: jax.Array) -> Sequence[jax.Array]:
        if not present(factor, axis, value.base.shape):
            return [factor] * len(bases)
        return lax.split(factor, sizes, axis=axis)

    leaves, treedef = jax.tree.flatten(value.with_base(None))
    cut = [pieces(leaf) for leaf in leaves]
    return [
        treedef.unflatten([leaf[i] for leaf in cut]).with_base(base)
        for i, base in enumerate(bases)
    ]


def unstack_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """The axes of the operand without the one that is taken apart."""
    ndim, axis = eqn.invars[0].aval.ndim, eqn.params["axis"]
    kept = [frozenset([i]) for i in range(ndim) if i != axis]
    return [kept for _ in eqn.outvars]


def unstack(eqn: Any, operands: list[Any]) -> list[Any]:
    """Takes the factors that have the axis apart; all entries share the others."""
    (value,) = operands
    axis, bases = eqn.params["axis"], carried(eqn, [value.base])

    def entry(factor: jax.Array, i: int) -> jax.Array:
        here = present(factor, axis, value.base.shape)
        return lax.index_in_dim(factor, i if here else 0, axis, keepdims=False)

    return [
        value.moved(base, functools.partial(entry, i=i)) for i, base in enumerate(bases)
    ]


# --- pads and concatenations ---


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


def pad(eqn: Any, operands: list[Any]) -> list[Any]:
    """Pads the parts with zeros: nothing is added where the base is padded."""
    value, fill = operands
    (base,) = carried(eqn, [value.base, fill])
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


def concatenate(eqn: Any, operands: list[Any]) -> list[Any]:
    """Joins the parts of all operands along an axis."""
    (base,) = carried(eqn, [base_of(v) for v in operands])
    return [_joined(base, operands, eqn.params["dimension"])]


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


def stack_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """The axes of the operand, and a new one from nowhere."""
    axes = identity(eqn.invars[operand].aval.ndim)
    return [[*axes[: eqn.params["axis"]], frozenset(), *axes[eqn.params["axis"] :]]]


def stack(eqn: Any, operands: list[Any]) -> list[Any]:
    """Joins the parts of all operands along a new axis."""
    axis = eqn.params["axis"]
    (base,) = carried(eqn, [base_of(v) for v in operands])
    add_axis = lambda array: jnp.expand_dims(array, axis)
    return [_joined(base, [jax.tree.map(add_axis, v) for v in operands], axis)]

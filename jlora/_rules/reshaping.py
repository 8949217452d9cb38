"""Operations that move the axes of a value, join them, split them or repeat it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._params.axes import Shape, reshape_groups
from .._params.quantized import Quantized
from .adapted import complete
from .rule import Axes, AxisMap, CarryRule, each_factor, present, rebound, same_axes
from .tiles import Moved

# A prime that is the size of no axis.
_NO_SIZE = 2**61 - 1


def _transpose_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """The axes of the operand, permuted."""
    return [[frozenset([i]) for i in eqn.params["permutation"]]]


def _transpose(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Permutes a factor; its rank stays last."""
    return jnp.transpose(factor, (*eqn.params["permutation"], len(shape)))


def _squeeze_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """The axes of the operand that are kept."""
    ndim = eqn.invars[0].aval.ndim
    dropped = {d % ndim for d in eqn.params["dimensions"]}
    return [[frozenset([i]) for i in range(ndim) if i not in dropped]]


def _squeeze(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Drops the same axes; a factor has size one there too."""
    return jnp.squeeze(factor, [d % len(shape) for d in eqn.params["dimensions"]])


def _broadcast_axes(eqn: Any, operand: int) -> list[AxisMap]:
    """Old axes come from themselves, new ones from nowhere."""
    dims = eqn.params["broadcast_dimensions"]
    ndim = len(eqn.params["shape"])
    return [[frozenset([dims.index(i)] if i in dims else []) for i in range(ndim)]]


def _broadcast(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Gives a factor the new axes, of size one: it is the same along them."""
    dims = eqn.params["broadcast_dimensions"]
    new = [1] * len(eqn.params["shape"])
    for axis, target in enumerate(dims):
        new[target] = factor.shape[axis]
    return factor.reshape(*new, factor.shape[-1])


def _reshape_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
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


def _reshape(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
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


def _tile(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Repeats a factor along the axes that it has."""
    reps = enumerate(eqn.params["reps"])
    return jnp.tile(
        factor, [n if present(factor, i, shape) else 1 for i, n in reps] + [1]
    )


def _transpose_tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    return [q.each(lambda v: lax.transpose(v, eqn.params["permutation"]))]


def _squeeze_tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    return [q.each(lambda v: lax.squeeze(v, eqn.params["dimensions"]))]


def _broadcast_tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    """New axes of size one."""
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    new = [i for i in range(len(shape)) if i not in dims]
    same = q.shape == tuple(shape[i] for i in dims)
    if not same or any(shape[i] != 1 for i in new):
        return None
    return [q.each(lambda v: lax.expand_dims(v, new))]


def _reshape_tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    new = tuple(eqn.params["new_sizes"])
    if eqn.params.get("dimensions") is not None or 0 in q.shape:
        return None
    groups = reshape_groups(q.shape, new)
    sizes: dict[Shape, Shape] = {}

    def plan(array: Any) -> None:
        found = [1] * len(new)
        for took, gave in groups:
            old = [q.shape[i] for i in took], [array.shape[i] for i in took]
            blocks = _blocks(*old, [new[j] for j in gave])
            if blocks is None:
                return
            for j, size in zip(gave, blocks, strict=True):
                found[j] = size
        sizes[tuple(array.shape)] = tuple(found)

    q.each(plan)
    shapes = {tuple(v.shape) for v in jax.tree.leaves(q)}
    if shapes != set(sizes):
        return None
    return [q.each(lambda v: v.reshape(sizes[tuple(v.shape)]))]


def _blocks(
    old: Sequence[int], tiles: Sequence[int], new: Sequence[int]
) -> list[int] | None:
    """Returns the tiles along the axes that axes are split into or joined to.

    That works where a tile is a run of neighbouring values in both.

    >>> _blocks([21], [3], [3, 7]), _blocks([3, 4], [3, 2], [12])
    ([3, 1], [6])
    """
    if not _is_run(old, tiles):
        return None
    block, found = math.prod(old) // math.prod(tiles), []
    for size in reversed(new):
        if block >= size and block % size == 0:
            found.append(1)
            block //= size
        elif size % block == 0:
            found.append(size // block)
            block = 1
        else:
            return None
    return found[::-1] if block == 1 else None


def _is_run(old: Sequence[int], tiles: Sequence[int]) -> bool:
    """Whether tiles are whole along the last axes, part of one, single before it."""
    partial = False
    for size, count in zip(reversed(old), reversed(tiles), strict=True):
        if partial and count != size:
            return False
        partial = partial or count != 1
    return True


def _rev_tiles(eqn: Any, q: Quantized, others: list[Any]) -> Moved:
    return [q.each(lambda v: lax.rev(v, eqn.params["dimensions"]))]


def _repeats(eqn: Any, varies: Axes) -> frozenset[int]:
    """Returns the axes along which a value varies that was written out in full."""
    shape, dims = eqn.invars[0].aval.shape, eqn.params["broadcast_dimensions"]
    return frozenset(int(dims[i]) for i in varies if shape[i] != 1)


CARRY = {
    "transpose": CarryRule(
        _transpose_axes, each_factor(_transpose), tiles=_transpose_tiles
    ),
    "squeeze": CarryRule(_squeeze_axes, each_factor(_squeeze), tiles=_squeeze_tiles),
    "broadcast_in_dim": CarryRule(
        _broadcast_axes,
        each_factor(_broadcast),
        repeats=_repeats,
        tiles=_broadcast_tiles,
    ),
    "reshape": CarryRule(
        _reshape_axes, each_factor(_reshape), tiles=_reshape_tiles, in_place=True
    ),
    "rev": CarryRule(same_axes, each_factor(rebound), tiles=_rev_tiles),
    "tile": CarryRule(same_axes, each_factor(_tile)),
}

"""Dot products, with the shardings and dtypes that meshes and gradients ask for."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from .dtypes import common, is_workable, narrowed, summed_in
from .sharding import dot_sharding, explicit_sharding
from .symbolic import exceeds
from .unless_cpu import unless_cpu
from .versions import RANK_FIRST_ON_CPU

# Multiplications from which on a product is compiled with the rank first on CPUs: with
# as many it runs 8 µs faster, half of what it takes to start one, and compiles for some
# 6 ms longer (two cores).
_LEAST_TURNED = 2**16


def dot(
    lhs: jax.Array,
    rhs: jax.Array,
    contract: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    dtype: Any,
    precision: Any,
    place: NamedSharding | None = None,
) -> jax.Array:
    """One `dot_general`, with the output sharding that Explicit meshes ask for.

    That is `place`, or else what follows from the operands.
    """
    (lc, rc), (lb, rb) = contract, batch
    dims = ((tuple(lc), tuple(rc)), (tuple(lb), tuple(rb)))
    return lax.dot_general(
        lhs,
        rhs,
        dims,
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=place or dot_sharding(lhs, rhs, dims),
    )


def as_laid_out(value: jax.Array, other: jax.Array) -> jax.Array:
    """Gives a value the sharding of another of its shape, on Explicit meshes."""
    sharding = explicit_sharding(other)
    return value if sharding is None else jax.sharding.reshard(value, sharding)


def where_first(mask: jax.Array, value: jax.Array, other: Any) -> jax.Array:
    """Returns a value where a mask of its first axes holds, and a number elsewhere."""
    mask = mask.reshape(*mask.shape, *[1] * (value.ndim - mask.ndim))
    shape = jnp.broadcast_shapes(mask.shape, value.shape)
    value = jnp.broadcast_to(value, shape)
    return jnp.where(as_laid_out(jnp.broadcast_to(mask, shape), value), value, other)


def as_type_of(gradient: jax.Array, primal: jax.Array) -> jax.Array:
    """Gives a gradient the dtype (on Explicit meshes the sharding) of its primal."""
    return as_laid_out(narrowed(gradient, primal.dtype), primal)


def wide_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    contract: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    dtype: Any,
    precision: Any,
) -> jax.Array:
    """As `dot`, where the result may be wider than its operands.

    Inside of a loop XLA's CPU runtime has no product of 16-bit operands with a 32-bit
    result: "Unsupported element type for DotThunk::Execute" (jax 0.12).
    """
    axes = _hashable(contract), _hashable(batch)
    if min(lhs.dtype.itemsize, rhs.dtype.itemsize) >= jnp.dtype(dtype).itemsize:
        return dot(lhs, rhs, *axes, dtype, precision)
    return unless_cpu(_wide_dot, (*axes, dtype, precision), lhs, rhs)


def _wide_dot(
    on_cpu: bool,
    contract: Any,
    batch: Any,
    dtype: Any,
    precision: Any,
    lhs: jax.Array,
    rhs: jax.Array,
) -> jax.Array:
    if on_cpu:
        lhs, rhs = (v.astype(common(v.dtype, dtype)) for v in (lhs, rhs))
    return dot(lhs, rhs, contract, batch, dtype, precision)


def rank_last(
    skinny: jax.Array,
    wide: jax.Array,
    contract: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    dtype: Any,
    precision: Any,
) -> jax.Array:
    """The gradient of a factor, `(batch, free of wide, r)`, in float32 at least."""
    dtype = summed_in(dtype, skinny.dtype, wide.dtype)
    if not is_workable(wide.dtype):
        skinny, wide = skinny.astype(dtype), wide.astype(dtype)
    contract, batch = _hashable(contract), _hashable(batch)
    small = not exceeds(wide.size * math.prod(skinny.shape[-1:]), _LEAST_TURNED)
    if batch[0] or small or not RANK_FIRST_ON_CPU:
        pairs = (contract[1], contract[0]), (batch[1], batch[0])
        return wide_dot(wide, skinny, *pairs, dtype, precision)
    return unless_cpu(_rank_last, (contract, dtype, precision), skinny, wide)


def _rank_last(
    on_cpu: bool,
    contract: Any,
    dtype: Any,
    precision: Any,
    skinny: jax.Array,
    wide: jax.Array,
) -> jax.Array:
    none = ((), ())
    if not on_cpu:
        return dot(wide, skinny, contract[::-1], none, dtype, precision)
    # It is two to four times as fast with the rank first, as long as it does not fold
    # the transpose of the small result into the product: hence the barrier.
    product = _wide_dot(True, contract, none, dtype, precision, skinny, wide)
    return jnp.moveaxis(lax.optimization_barrier(product), 0, -1)


def _hashable(axes: Any) -> Any:
    return tuple(tuple(one) for one in axes)

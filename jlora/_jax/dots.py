"""Dot products, with the shardings and dtypes that meshes and gradients ask for."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from .dtypes import is_workable, summed_in
from .sharding import dot_sharding, explicit_sharding
from .versions import RANK_FIRST_ON_CPU


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


def as_type_of(gradient: jax.Array, primal: jax.Array) -> jax.Array:
    """Gives a gradient the dtype (on Explicit meshes the sharding) of its primal."""
    real = not jnp.issubdtype(primal.dtype, jnp.complexfloating)
    if real and jnp.issubdtype(gradient.dtype, jnp.complexfloating):
        gradient = lax.real(gradient)
    return as_laid_out(lax.convert_element_type(gradient, primal.dtype), primal)


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
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu or not is_workable(wide.dtype):
        # Inside of a loop XLA's CPU runtime has no product of 16-bit operands with a
        # 32-bit result: "Unsupported element type for DotThunk::Execute" (jax 0.12).
        skinny, wide = skinny.astype(dtype), wide.astype(dtype)
    if not (on_cpu and RANK_FIRST_ON_CPU) or batch[0]:
        pairs = (contract[1], contract[0]), (batch[1], batch[0])
        return dot(wide, skinny, *pairs, dtype, precision)
    # It is two to four times as fast with the rank first, as long as it does not fold
    # the transpose of the small result into the product: hence the barrier.
    product = lax.optimization_barrier(
        dot(skinny, wide, contract, batch, dtype, precision)
    )
    return jnp.moveaxis(product, 0, -1)

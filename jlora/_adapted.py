"""An adapted value of the traced program: the frozen value beside its factors."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import align, contract_rank
from ._factors import LoraFactors
from ._lazy import Lazy, dense


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """The factors of one kernel inside a value, aligned with the value's axes.

    Both arrays have the axes of the value and the rank as last axis; an axis that a
    factor does not have is of size 1. The part stands for
    `scaling * sum(a * b, axis=-1)`, broadcast to the shape of the value.
    """

    a: jax.Array
    b: jax.Array
    scaling: float = dataclasses.field(metadata={"static": True})

    def each(self, move: Callable[[jax.Array], jax.Array]) -> "Part":
        """Returns the part with both arrays moved in the same way."""
        return dataclasses.replace(self, a=move(self.a), b=move(self.b))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen value and the parts that are to be added to it."""

    base: jax.Array | Lazy
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, kernel: jax.Array | Lazy, factors: LoraFactors) -> "Adapted":
        """Returns `kernel` with its factors."""
        a, b = align(factors.a, factors.b, factors.axes)
        return cls(kernel, (Part(a, b, factors.scaling),))


def part_delta(part: Part, shape: tuple[int, ...]) -> jax.Array:
    """Returns the delta of one part in float32, broadcast to `shape`."""
    wide = jnp.promote_types(part.a.dtype, jnp.float32)
    a, b = part.a.astype(wide), part.b.astype(wide)
    product = contract_rank(a, b, dtype=wide, precision=jax.lax.Precision.HIGHEST)
    return jnp.broadcast_to(part.scaling * product, shape)


def materialize(value: Any) -> jax.Array:
    """Returns the value with its deltas added in float32 and rounded once."""
    if not isinstance(value, Adapted):
        return dense(value)
    base = dense(value.base)
    total = base.astype(jnp.promote_types(base.dtype, jnp.float32))
    for part in value.parts:
        total = total + part_delta(part, base.shape)
    return total.astype(base.dtype)


def base_of(value: Any) -> Any:
    """Returns the frozen value."""
    return value.base if isinstance(value, Adapted) else value


def complete(
    factor: jax.Array, axes: Sequence[int], shape: tuple[int, ...]
) -> jax.Array:
    """Broadcasts `factor` to the full size of the value along `axes`."""
    sizes = list(factor.shape)
    for axis in axes:
        sizes[axis] = shape[axis]
    return factor if factor.shape == tuple(sizes) else jnp.broadcast_to(factor, sizes)

"""Gates on the rank: which columns of `x·a` an example lets through.

Where several adapters lie side by side along the rank, an example uses the columns of
one of them. Its gate is 1 there, 0 in the columns of all others, and NaN where nothing
right can come out. It is applied to `x·a`, and to its cotangent, and never to a factor:
that would make a copy of the factor for each example.
"""

import jax
import jax.numpy as jnp

from .._jax.dots import as_laid_out


def through(value: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Returns a value with the rank last times its gate; None lets all through.

    A shut column is zero whatever it held: an overflow in that of another adapter is
    not this example's.

    >>> through(jnp.array([1.0, 2.0, jnp.inf]), jnp.array([0.0, 1.0, 0.0])).tolist()
    [0.0, 2.0, 0.0]
    """
    if gate is None:
        return value
    wide = jnp.broadcast_to(gate.astype(value.dtype), value.shape)
    wide = as_laid_out(wide, value)
    return jnp.where(wide == 0, jnp.zeros_like(value), value * wide)


def factor_through(value: jax.Array, gate: jax.Array | None) -> jax.Array:
    """Returns a factor, or its gradient, with the rank last through a gate.

    A gradient is that of one example here, summed over examples later: what is shut is
    zero even if the example itself is not a number.
    """
    return value if gate is None else through(value, gate.reshape(-1))

"""Random matrices that are a function of their indices alone.

What JAX draws from a key may differ in another release, and a part of a matrix is not
what it draws for the part. These values are integers and shifts of them: the same
everywhere, on each device, and for each part.
"""

import jax
import jax.numpy as jnp
from jax import lax


def hashed_uniform(seed: int, rows: int, columns: int) -> jax.Array:
    """Returns values of U(-1, 1) in float32, `(rows, columns)`.

    A value depends on the seed, its row and its column, and not on how many there are.

    Args:
        seed: a number of 32 bits.
        rows: how many rows.
        columns: how many columns.

    >>> small, large = hashed_uniform(3, 2, 2), hashed_uniform(3, 5, 4)
    >>> bool((small == large[:2, :2]).all())
    True
    """
    index = lambda axis: lax.broadcasted_iota(jnp.uint32, (rows, columns), axis)
    # Zero, which `_mixed` leaves as it is, is a seed that nobody gives.
    start = jnp.full((rows, columns), seed ^ 0x5BD1E995, jnp.uint32)
    bits = _mixed(_mixed(_mixed(start) + index(0)) + index(1))
    # 24 bits are a float32 to the last one.
    return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-23) - jnp.float32(1)


def _mixed(bits: jax.Array) -> jax.Array:
    """Returns a permutation of the numbers of 32 bits, each bit of which tells on all.

    References:
        Wellons, <https://github.com/skeeto/hash-prospector>, 2018, `lowbias32`.
    """
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)

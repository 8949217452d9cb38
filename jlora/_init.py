"""The initialisers of `a`, one function each. `b` starts at zero, so that ΔW = 0."""

import hashlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

Initializer = Callable[
    [jax.Array, tuple[int, ...], int, jnp.dtype, NamedSharding | None], jax.Array
]


def kaiming_uniform(
    key: jax.Array,
    shape: tuple[int, ...],
    fan_in: int,
    dtype: jnp.dtype,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Returns `a ~ U(-1/√fan_in, 1/√fan_in)`, PEFT's and loralib's default.

    This is He's uniform initialisation with negative slope √5,
    `√(6 / ((1 + 5)·fan_in))`; it is √6 narrower than JAX's `he_uniform`.

    Args:
        key: a PRNG key.
        shape: the shape of `a`, `(*batch, *in, rank)`.
        fan_in: the product of the input axes alone: layers and experts do not count.
        dtype: the dtype of the result.
        out_sharding: its sharding on an Explicit mesh.

    References:
        He et al., Delving Deep into Rectifiers, <https://arxiv.org/abs/1502.01852>,
        2015, equation 10.
    """
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(
        key, shape, dtype, -bound, bound, out_sharding=out_sharding
    )


def gaussian(
    key: jax.Array,
    shape: tuple[int, ...],
    fan_in: int,
    dtype: jnp.dtype,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Returns `a ~ N(0, 1/rank²)`: standard deviation 1/rank, as PEFT's "gaussian".

    Args:
        key: a PRNG key.
        shape: the shape of `a`, `(*batch, *in, rank)`.
        fan_in: not used; the deviation follows from the rank.
        dtype: the dtype of the result.
        out_sharding: its sharding on an Explicit mesh.

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
        <https://arxiv.org/abs/2106.09685>, 2021, section 4.1.
    """
    del fan_in
    values = jax.random.normal(key, shape, dtype, out_sharding=out_sharding)
    return values / shape[-1]


INITIALIZERS: dict[str, Initializer] = {
    "kaiming_uniform": kaiming_uniform,
    "gaussian": gaussian,
}


def key_of(key: jax.Array, path: str) -> jax.Array:
    """Returns a key for `path` alone, so that no target changes another's factors."""
    digest = hashlib.blake2b(path.encode(), digest_size=4).digest()
    return jax.random.fold_in(key, int.from_bytes(digest, "big"))

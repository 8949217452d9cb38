"""What the tests of the Linen and of the NNX door share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jlora

# Before Flax 0.12.7 it has another name.
as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure

RANK, ALPHA = 2, 3.0
# The einsums of the deltas.
DENSE = "ir,ro->io"
CONV = "hwir,ro->hwio"
SPLIT = "ir,rhd->ihd"
JOIN = "hdr,ro->hdo"
STACKED = "lir,lro->lio"


def config(target: str | None = None, **settings: Any) -> jlora.LoraConfig:
    """A config in which alpha is not the rank."""
    return jlora.LoraConfig(target, rank=RANK, alpha=ALPHA, **settings)


def values(*shape: int) -> jax.Array:
    """The same normal values in every test."""
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def with_random_b(adapter: Any, seed: int = 1) -> Any:
    """The adapter with factors that are not zero; boxes and axes stay."""
    rng = np.random.default_rng(seed)
    fill = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return jax.tree.map(fill, adapter)

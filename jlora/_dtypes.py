"""The dtypes in which sums and products are formed."""

from typing import Any

import jax.numpy as jnp


def summed_in(dtype: Any) -> Any:
    """Returns float32, or a dtype that is wider as it is.

    Unlike `jnp.promote_types`, which raises for floats of eight bits and fewer: it
    leaves it to the program to say when they are widened, and here it is said.
    """
    dtype = jnp.dtype(dtype)
    narrow = dtype.itemsize < 4
    return jnp.dtype("float32") if narrow else jnp.promote_types(dtype, jnp.float32)


def widest(*arrays: Any) -> Any:
    """Returns the dtype that holds sums and products of arrays: float32 or float64."""
    return jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32

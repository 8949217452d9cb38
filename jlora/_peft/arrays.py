"""Arrays of an adapter between files, the host and devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def named_arrays(entries: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of some entries, by path and field."""
    leaves = jax.tree.leaves_with_path(dict(entries))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def on_device(tensor: np.ndarray) -> jax.Array:
    """Returns a tensor of a file where JAX puts it by default."""
    return jnp.asarray(np.ascontiguousarray(tensor))


def on_host(array: Any) -> np.ndarray:
    """Returns a whole array, gathered from all hosts if need be."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)

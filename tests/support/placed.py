"""Programs compiled from types and places: no array is made."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def placed(shape: tuple[int, ...], place: Any, dtype: Any = jnp.bfloat16) -> Any:
    """An array by its type and place."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)


def at(tree: Any, places: Any) -> Any:
    """A tree of types, each at its place."""
    return jax.tree.map(lambda v, place: placed(v.shape, place, v.dtype), tree, places)


def compiled(fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A function compiled for the devices of its arguments."""
    return jax.jit(fn, **options).lower(*args).compile()

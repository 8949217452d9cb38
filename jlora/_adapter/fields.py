"""What the fields of a config may be: their checks, and values in one form."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from .initializers import INITIALIZERS
from .other_names import FROM_DATA


def whole_rank(rank: Any) -> int:
    """Returns a rank as an int, NumPy's too; raises if it is none of at least 1."""
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"`LoraConfig.rank` must be an int, got {rank!r}")
    if rank < 1:
        raise ValueError(f"`LoraConfig.rank` must be at least 1, got {rank}")
    return int(rank)


def check_init(init: Any, rank: int) -> None:
    """Raises if there is no such initialiser, or the rank does not suit it."""
    if init not in INITIALIZERS:
        known = ", ".join(map(repr, INITIALIZERS))
        from_data = isinstance(init, str) and init.lower() in FROM_DATA
        hint = f". Call `jlora.{init.lower()}` with a new adapter" if from_data else ""
        raise ValueError(
            f"`LoraConfig.init` must be one of {known}; got {init!r}{hint}"
        )
    if init == "orthogonal" and rank % 2:
        raise ValueError(
            "`LoraConfig(init='orthogonal')` shares an orthogonal matrix between both "
            f"factors and needs an even rank, got {rank}"
        )


def check_bool(field: str, value: Any) -> None:
    """Raises if a field is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"`LoraConfig.{field}` must be True or False, got {value!r}")


def positive(field: str, value: Any) -> float:
    """Returns a number as a float, if it is finite and positive."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`LoraConfig.{field}` must be a number, got {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"`LoraConfig.{field}` must be finite and greater than 0, got {value!r}"
        )
    return float(value)


def rate(value: Any) -> float:
    """Returns a share as a float, if it is in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`LoraConfig.dropout` must be a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(
            f"`LoraConfig.dropout` must be at least 0 and less than 1, got {value!r}"
        )
    return float(value)


def floating(dtype: Any) -> Any:
    """Returns the dtype object of a floating dtype."""
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"`LoraConfig.dtype` {dtype!r} is no dtype") from error
    if not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"`LoraConfig.dtype` must be floating, got {found.name}")
    return found


def check_seed(field: str, value: Any) -> None:
    """Raises if it is no whole number of 32 bits, or negative."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`LoraConfig.{field}` must be an int, got {value!r}")
    if not 0 <= value < 2**32:
        raise ValueError(f"`LoraConfig.{field}` must be from 0 to 2³² - 1, got {value}")


def check_factor(value: Any) -> None:
    """Raises if it is no number of parts, and not -1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`LoraConfig.decompose_factor` must be an int, got {value!r}")
    if value < 1 and value != -1:
        raise ValueError(
            "`LoraConfig.decompose_factor` must be at least 1, or -1 for the square "
            f"root, got {value}"
        )

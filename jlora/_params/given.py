"""What was given for an argument, as an error says it; and what is no key or path."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def described(value: Any) -> str:
    """Returns what a thing is, in a few words, never its values.

    >>> import jax.numpy as jnp
    >>> described({"w": 1}), described(jnp.ones((2, 3))), described(7), described(None)
    ('a dict with w', 'an array (2, 3) of float32', 'the int 7', 'None')
    """
    kind = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, bool | int | float | str):
        return f"the {kind} {value!r}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Mapping):
        return f"a {kind} {_keys(value)}"
    if _is_array(value):
        return f"an array {tuple(value.shape)} of {value.dtype}"
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    return f"{article} {kind}"


def _keys(value: Mapping[Any, Any]) -> str:
    keys = [str(key) for key in value]
    if not keys:
        return "that is empty"
    return f"with {some(keys, 3)}"


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def some(told: Sequence[str], limit: int = 5, between: str = ", ") -> str:
    """Returns the first few of what is told, and how many there are besides.

    >>> some(["a", "b", "c"], 2), some(["a", "b"], between="; ")
    ('a, b and 1 more', 'a; b')
    """
    more = f" and {len(told) - limit} more" if len(told) > limit else ""
    return f"{between.join(told[:limit])}{more}"


def listed(problems: Sequence[str], limit: int = 10) -> str:
    """Returns problems as lines, and how many there are besides.

    >>> listed(["one", "two", "three"], limit=1)
    'one\\n… and 2 more'
    """
    more = len(problems) - limit
    return "\n".join([*problems[:limit], *([f"… and {more} more"] if more > 0 else [])])


def check_key(key: Any, name: str, hint: str = ": give `jax.random.key(0)`") -> None:
    """Raises unless a thing is one PRNG key, typed or legacy.

    Args:
        key: what was given.
        name: what the argument is called.
        hint: how to go on where it is no key at all.

    Raises:
        TypeError: that names the argument and says what to give.
    """
    shape, dtype = (key.shape, key.dtype) if _is_array(key) else (None, None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    legacy = dtype == jnp.uint32 and shape is not None and len(shape) == 1
    if legacy or (typed and shape == ()):
        return
    if isinstance(key, int) and not isinstance(key, bool):
        told = f"the number {key}: give `jax.random.key({key})`"
    elif typed:
        told = f"{shape} of them: give one, or map over them by `jax.vmap`"
    elif type(key).__name__ in ("Rngs", "RngStream"):
        told = f"a {type(key).__name__}: draw one from it, `rngs.params()`"
    else:
        told = f"{described(key)}{hint}"
    raise TypeError(f"`{name}` must be a PRNG key, got {told}")


def check_path(path: Any, call: str) -> None:
    """Raises unless a thing is the path of a file or folder.

    Args:
        path: what was given.
        call: how the function is called, with the arguments in order.

    Raises:
        TypeError: that says the order of the arguments.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"`path` must be a path, got {described(path)}. The order is `{call}`"
        )

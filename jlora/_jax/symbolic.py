"""Sizes that are not known: the symbolic dimensions of `jax.export`."""

from collections.abc import Iterable
from typing import Any

from jax.export import is_symbolic_dim

from .versions import InconclusiveDimensionOperation


def are_known(sizes: Iterable[Any]) -> bool:
    """Returns whether all sizes are numbers.

    >>> are_known([3, 4])
    True
    """
    return not any(map(is_symbolic_dim, sizes))


def exceeds(size: Any, other: Any) -> bool:
    """Returns whether a size is larger than another, whatever symbols stand for.

    False where that depends on them.

    >>> from jax.export import symbolic_shape
    >>> (b,) = symbolic_shape("b")
    >>> exceeds(4, 3), exceeds(8 * b, 4), exceeds(b, 4)
    (True, True, False)
    """
    try:
        return bool(size > other)
    except InconclusiveDimensionOperation:
        return False


def scan_length(length: Any) -> int | None:
    """Returns a length as `lax.scan` takes it: a symbolic one is that of what it scans.

    >>> scan_length(3)
    3
    """
    return length if are_known([length]) else None

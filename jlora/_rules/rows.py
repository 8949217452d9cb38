"""Rows of a value: how an operation takes them, and which of them it finds."""

import dataclasses
from typing import Any

import jax

from .._jax.dots import where_first


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """How an operation takes single entries along some axes, and others whole.

    Attributes:
        indexed: the operand axes along which single entries are taken.
        batching: the operand axes that go along with axes of the indices.
        sources: per output axis, the operand axis it is (or None for an index axis).
    """

    indexed: tuple[int, ...]
    batching: tuple[int, ...]
    sources: tuple[int | None, ...]

    @property
    def index_axes(self) -> list[int]:
        """The output axes that come from the indices."""
        return [i for i, source in enumerate(self.sources) if source is None]


def where_found(found: jax.Array | None, rows: jax.Array, other: Any) -> jax.Array:
    """Returns `rows` where they were found, and `other` where they were filled in.

    Args:
        found: a mask of them, see `CarryRule.found`; None if all were.
        rows: what is laid out as the result, perhaps with the rank behind.
        other: a number.
    """
    if found is None:
        return rows
    return where_first(found, rows, other)

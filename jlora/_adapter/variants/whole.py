"""A leaf that is trained whole: its entry is a plain array, in the leaf's place."""

from typing import Any

import jax

from ..._params.axes import Shape
from .variant import WHOLE, New, Variant


def _new(new: New, leaf: Any) -> dict[str, Any]:
    return {WHOLE: leaf.astype(new.config.dtype)}


def _problem(entry: Any, shape: Shape) -> str | None:
    if tuple(entry.shape) != shape:
        return f"is trained whole by an array of shape {tuple(entry.shape)}"
    return None


def _merged(leaf: jax.Array, entry: Any) -> jax.Array:
    return entry.astype(leaf.dtype)


WHOLE_LEAF = Variant(
    "full",
    object,
    lambda axes, shape, rank: {WHOLE: shape},
    _new,
    lambda entry, leaf: entry,
    chosen=lambda config: config.full,
    rank=None,
    from_leaf=lambda config: "is trained whole and so",
    labels={WHOLE: "full"},
    has_roles=False,
    merged=_merged,
    origin=lambda entry, leaf: leaf,
    problem=_problem,
    note=lambda entry: "full",
)

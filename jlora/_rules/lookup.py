"""Rows of a kernel that are wanted for themselves: its use is a lookup."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.dtypes import summed_in
from .._jax.sharding import explicit_sharding
from .._params.axes import contract_rank
from .._params.lazy import dense
from . import CARRY
from .adapted import Adapted, Part, whole
from .parts import times
from .rows import where_found


def indexed_axes(eqn: Any) -> Sequence[int]:
    """Returns the axes of the operand along which single entries are taken."""
    rule = CARRY.get(eqn.primitive.name)
    layout = None if rule is None else rule.rows(eqn)
    return () if layout is None else layout.indexed


def look_up(eqn: Any, operands: list[Any]) -> list[jax.Array]:
    """Evaluates an operation whose rows are wanted for themselves."""
    rule = CARRY[eqn.primitive.name]
    found = rule.found(eqn, operands)
    return [_add_rows(rows, found) for rows in rule.run_rows(eqn, operands)]


def _add_rows(value: Adapted, found: jax.Array | None = None) -> jax.Array:
    """Returns looked-up rows with their deltas `s·a[ids]·b` added, rounded once.

    In float32 at least: where a delta takes most of a row away, as that of a row that
    is trained whole does, a rounded sum would leave the rounding of the old row.

    Args:
        value: the rows, with the factors of each.
        found: which of them are no filling, see `CarryRule.found`.
    """
    rows = dense(value.base)
    total, sharding = rows.astype(summed_in(rows.dtype)), explicit_sharding(rows)
    for part in value.parts:
        change = _rows_of(part, total.dtype)
        change = jnp.broadcast_to(change, rows.shape)
        if sharding is not None:
            change = jax.sharding.reshard(change, sharding)
        total = total + where_found(found, change, 0)
    total = total if value.scale is None else times(total, value.scale[..., 0])
    return total.astype(rows.dtype)


def _rows_of(part: Part, dtype: Any) -> jax.Array:
    part = whole(part)
    scaled, b = part.scaling * part.a.astype(dtype), part.b.astype(dtype)
    return contract_rank(scaled, b, dtype=dtype, precision=lax.Precision.HIGHEST)

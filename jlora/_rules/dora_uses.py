"""Which uses DoRA's scale can be taken out of: what the analysis asks beforehand.

The scale of an adapted value varies along the batch and output axes of the kernel, and
wherever the kernel was padded or joined with others, which are not scaled. A product
can have it applied to the other operand or to the result, but not to a part of each.
"""

from collections.abc import Callable
from typing import Any

from jax import lax

from .._params.axes import free_axes
from .dot_general import dot_dims
from .gather import row_layout

Axes = frozenset[int] | set[int]


def fits(eqn: Any, operand: int, varies: Axes) -> bool:
    """Returns whether a use can have a scale applied before or after it.

    Args:
        eqn: an operation of `_consume`.
        operand: which operand is the kernel.
        varies: the axes of the operand along which its scale varies.
    """
    rule = _FITS.get(eqn.primitive.name)
    return rule is None or rule(eqn, operand, varies)


def _dot(eqn: Any, operand: int, varies: Axes) -> bool:
    contract, batch, _, _ = dot_dims(eqn, operand)
    free = free_axes(eqn.invars[operand].aval.ndim, contract, batch)
    return not varies & set(contract) or not varies & set(free)


def _conv(eqn: Any, operand: int, varies: Axes) -> bool:
    return varies <= {eqn.params["dimension_numbers"].rhs_spec[0]}


def _ragged(eqn: Any, operand: int, varies: Axes) -> bool:
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = dims.dot_dimension_numbers
    (group,), rows = dims.rhs_group_dimensions, dims.lhs_ragged_dimensions
    if batch or eqn.invars[0].aval.ndim != 2 or tuple(rows) != (0,):
        return False
    free = free_axes(eqn.invars[operand].aval.ndim, contract, [group])
    sides = [axes for axes in (free, contract) if len(axes) == 1]
    return any(varies <= {group, *axes} for axes in sides)


_FITS: dict[str, Callable[[Any, int, Axes], bool]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged,
}


def keeps_scale(eqn: Any, operand: int, varies: Axes) -> bool:
    """Returns whether a move keeps a scale of its operand a scale of its outputs.

    A sum over axes along which the scale varies does not, nor one with another value.
    """
    match eqn.primitive.name:
        case "dot_general":
            return not varies & set(dot_dims(eqn, operand)[0])
        case "reduce_sum":
            return not varies & set(eqn.params["axes"])
        case "add" | "sub":
            return not varies
    return True


def spread(eqn: Any) -> frozenset[int]:
    """Returns the output axes along which a scale varies after a move in any case."""
    params = eqn.params
    match eqn.primitive.name:
        case "pad":
            padded = enumerate(params["padding_config"])
            return frozenset(i for i, amounts in padded if any(amounts))
        case "concatenate":
            return frozenset([params["dimension"]])
        case "stack":
            return frozenset([params["axis"]])
        case "gather" if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
            return _rows_filled_in(eqn)
    return frozenset()


def _rows_filled_in(eqn: Any) -> frozenset[int]:
    layout = row_layout(eqn)
    if layout is None:
        return frozenset()
    picked = (None, *layout.batching)
    return frozenset(i for i, s in enumerate(layout.sources) if s in picked)

"""Rules for the operations that consume an adapted kernel and give a plain value.

A rule has two parts. `roles(eqn, operand)` says which role each axis of the operand
plays in this use: this is where the axes of a kernel are learnt. `supports` says
whether the use stays factored once the roles of the kernel are settled. `EVALUATE` has
what evaluates it; products are evaluated in groups, by `_products.run_products`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._errors import MaterializationError
from .._jax.dtypes import common, is_workable, product_dtype, summed_in
from .._jax.sharding import explicit_sharding, spec_of, without_axes
from .._jax.versions import explicit_mesh, source_line
from .._params.axes import Roles, contract_rank, free_axes
from .._params.lazy import called, dense, is_lazy, made_again
from .adapted import Adapted, Part, base_of, complete, part_delta, whole
from .channels import Mixing, mix_channels
from .conv import Window, convolve
from .dot_general import (
    contracted_first,
    dot_roles,
    dropped_input,
    factor_matrix,
    part_words,
    times,
)
from .gather import select
from .ragged_dot import Rows, rows_product


@dataclasses.dataclass(frozen=True)
class ConsumeRule:
    """One operation that is linear in a kernel.

    Attributes:
        kind: the name of the use, as the plan prints it.
        operands: the operands that may be a kernel.
        roles: `(eqn, operand) -> roles` of the operand's axes, or None where the
            equation says nothing about them.
        supports: `(eqn, operand, roles of the value) -> bool`.
        details: `eqn -> text` that the name of the use gets.
    """

    kind: str
    operands: tuple[int, ...]
    roles: Callable[[Any, int], list[str] | None]
    supports: Callable[[Any, int, Roles], bool]
    details: Callable[[Any], str] = lambda eqn: ""


# --- convolution ---


def is_depthwise(eqn: Any) -> bool:
    """Returns whether a convolution has one input channel per group."""
    in_feature = eqn.params["dimension_numbers"].rhs_spec[1]
    single = eqn.invars[1].aval.shape[in_feature] == 1
    return single and eqn.params["feature_group_count"] > 1


def _conv_roles(eqn: Any, operand: int) -> list[str] | None:
    if eqn.params["batch_group_count"] != 1:
        return None
    out_feature = eqn.params["dimension_numbers"].rhs_spec[0]
    ndim = eqn.invars[1].aval.ndim
    return ["out" if i == out_feature else "in" for i in range(ndim)]


def _conv_details(eqn: Any) -> str:
    """Names what not every library's convolution has."""
    groups = eqn.params["feature_group_count"]
    strides = max(eqn.params["lhs_dilation"], default=1)
    told = {
        f", {groups} groups": groups > 1,
        ", dilated": max(eqn.params["rhs_dilation"], default=1) > 1,
        ", fractionally strided": strides > 1,
    }
    return "".join(text for text, holds in told.items() if holds)


def _conv_supports(eqn: Any, operand: int, roles: Roles) -> bool:
    if eqn.params["batch_group_count"] != 1:
        return False
    out_feature = eqn.params["dimension_numbers"].rhs_spec[0]
    others = {r for i, r in enumerate(roles) if i != out_feature and r is not None}
    single = len(others) <= 1 and "batch" not in {*others, roles[out_feature]}
    return is_depthwise(eqn) or (single and roles[out_feature] not in others)


def _conv(eqn: Any, operands: list[Any], derive: str) -> list[Any]:
    x, value = operands
    (y,) = called(eqn, [x, value.base], derive)
    for part in value.parts:
        convolve = _conv_depthwise if is_depthwise(eqn) else _conv_part
        dropped = dropped_input(part, x, part_words(part, ()), ())
        delta = convolve(eqn, dropped, value.base, part, y, derive)
        y = y + delta.astype(y.dtype)
    return [_conv_scaled(eqn, y, value)]


def _conv_scaled(eqn: Any, y: jax.Array, value: Adapted) -> jax.Array:
    """Applies DoRA's scale along the output channels."""
    if value.scale is None:
        return y
    dims, ndim = eqn.params["dimension_numbers"], value.base.ndim
    out_axis, sizes = dims.rhs_spec[0], [1] * y.ndim
    if any(value.scale.shape[i] != 1 for i in free_axes(ndim, [out_axis])):
        raise MaterializationError(
            f"a DoRA kernel of shape {value.base.shape} has output axes that a "
            f"convolution at {source_line(eqn)} sums over; adapt it without `dora=True`"
        )
    sizes[dims.out_spec[1]] = y.shape[dims.out_spec[1]]
    return times(y, complete(value.scale, [out_axis], value.base.shape).reshape(sizes))


def _conv_depthwise(
    eqn: Any, x: jax.Array, w: Any, part: Part, y: jax.Array, derive: str
) -> jax.Array:
    """One depthwise convolution with the delta, which is a few values per channel."""
    out, in_, *space = eqn.params["dimension_numbers"].rhs_spec
    kernel = jnp.transpose(part_delta(part, w.shape), [*space, in_, out])
    computed = product_dtype(x.dtype, w.dtype, y.dtype)
    window = Window.of(
        eqn,
        shared=False,
        computed=computed,
        result=_wide_enough(y.dtype, computed),
        sharding=explicit_sharding(y),
    )
    return convolve(window, x, kernel, derive)


def _wide_enough(result: Any, computed: Any) -> Any:
    """The dtype of a branch: that of the result, unless it is one of eight bits."""
    return result if is_workable(result) else computed


def _conv_part(
    eqn: Any, x: jax.Array, w: Any, part: Part, y: jax.Array, derive: str
) -> jax.Array:
    """A convolution to rank channels, then a product over the channels."""
    dims, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out, in_, *space = dims.rhs_spec
    pair = contracted_first(part, [*space, in_], [out])
    if pair is None:
        raise MaterializationError(_split_join(eqn, w, "is convolved"))
    first = factor_matrix(pair[0], [*space, in_], w.shape)
    second = factor_matrix(pair[1], [out], w.shape)
    computed = product_dtype(x.dtype, w.dtype, y.dtype)
    sharding, channels = explicit_sharding(y), dims.out_spec[1]
    settings = {
        "shared": True,
        "computed": computed,
        "result": computed,
        "sharding": without_axes(sharding, spec_of(y), [channels]),
    }
    h = convolve(Window.of(eqn, **settings), x, first, derive)
    result, precision = _wide_enough(y.dtype, computed), eqn.params["precision"]
    mixing = Mixing(channels, groups, precision, result, sharding)
    # The scaling is folded into the rank-sized value.
    return mix_channels(mixing, part.scaling * h, second, derive)


def _split_join(eqn: Any, w: Any, use: str) -> str:
    """Says that an axis of joined kernels lies on both sides of a use."""
    return (
        f"a kernel of shape {w.shape} that was joined from several {use} at "
        f"{source_line(eqn)}, where the axis along which they were joined is split "
        "into an input and an output axis; join them along one of these"
    )


# --- ragged_dot_general ---


def _ragged_dims(eqn: Any) -> Any:
    return eqn.params["ragged_dot_dimension_numbers"]


def _ragged_is_grouped(eqn: Any) -> bool:
    """Whether the rows of the left operand are grouped, one kernel slice per group."""
    dims = _ragged_dims(eqn)
    (contract, _), (batch, _) = dims.dot_dimension_numbers
    ragged = dims.lhs_ragged_dimensions
    free = not set(ragged) & {*contract, *batch}
    return len(ragged) == 1 and len(dims.rhs_group_dimensions) == 1 and free


def _ragged_roles(eqn: Any, operand: int) -> list[str] | None:
    if not _ragged_is_grouped(eqn):
        return None
    dims = _ragged_dims(eqn)
    (_, contract), (_, batch) = dims.dot_dimension_numbers
    roles = ["out"] * eqn.invars[1].aval.ndim
    for axes, role in (
        (contract, "in"),
        ((*batch, *dims.rhs_group_dimensions), "batch"),
    ):
        for axis in axes:
            roles[axis] = role
    return roles if "in" in roles and "out" in roles else None


def _ragged_supports(eqn: Any, operand: int, roles: Roles) -> bool:
    wanted = _ragged_roles(eqn, operand)
    if wanted is None:
        return False
    swapped = {"in": "out", "out": "in"}
    pairs = [(w, r) for w, r in zip(wanted, roles, strict=True) if r is not None]
    # A factor that all groups share is the same for each of them.
    pairs = [(w, r) for w, r in pairs if w != "batch"]
    return all(w == r for w, r in pairs) or all(swapped[w] == r for w, r in pairs)


def _ragged_dot(eqn: Any, operands: list[Any], derive: str) -> list[Any]:
    x, value, sizes, *rest = operands
    x, after = _ragged_scaled(eqn, x, value, sizes)
    y = _ragged_base(eqn, [x, *map(base_of, [value, sizes, *rest])], derive)
    for part in value.parts:
        dropped = dropped_input(part, x, part_words(part, ()), ())
        delta = _ragged_part(eqn, dropped, value.base, sizes, part, y, derive)
        y = y + delta.astype(y.dtype)
    return [y if after is None else times(y, after)]


def _ragged_base(eqn: Any, operands: list[Any], derive: str) -> jax.Array:
    """The base product; on Explicit meshes with derivatives, which JAX's has not."""
    x, w, sizes, *_ = operands
    if derive != "custom" or explicit_mesh(x, *jax.tree.leaves(w)) is None:
        return called(eqn, operands, derive)[0]
    dims, precision = _ragged_dims(eqn), eqn.params["precision"]
    (x_contract, contract), (x_batch, batch) = dims.dot_dimension_numbers
    shared, (ragged,) = [*dims.rhs_group_dimensions, *batch], dims.lhs_ragged_dimensions
    order = (*shared, *contract, *free_axes(w.ndim, contract, shared))
    dtype, result = common(x.dtype, w.dtype), eqn.outvars[0].aval.dtype
    sharding = eqn.params["out_sharding"]
    rows = Rows(x_contract, x_batch, ragged, precision, dtype, result, sharding)

    def product(values: Sequence[Any]) -> list[jax.Array]:
        x, w, sizes = values
        return [rows_product(rows, x, jnp.transpose(dense(w), order), sizes, derive)]

    values = [x, w, sizes]
    return (
        made_again(product, values, derive) if is_lazy(values) else product(values)
    )[0]


def _ragged_scaled(
    eqn: Any, x: jax.Array, value: Adapted, sizes: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns `x` and what the result is multiplied by, with DoRA's scale in either."""
    if value.scale is None:
        return x, None
    dims, shape = _ragged_dims(eqn), value.base.shape
    (_, contract), (_, batch) = dims.dot_dimension_numbers
    (group,), (rows,) = dims.rhs_group_dimensions, dims.lhs_ragged_dimensions
    free = free_axes(len(shape), contract, [group, *batch])
    for axes in (free, contract):
        others = set(range(len(shape))) - {group, *axes}
        plain = not batch and x.ndim == 2 and len(axes) == 1 and rows == 0
        if plain and all(value.scale.shape[i] == 1 for i in others):
            own = factor_matrix(value.scale, [group, *axes], shape)[..., 0]
            of_rows = jnp.repeat(own, sizes, axis=0, total_repeat_length=x.shape[0])
            return (x, of_rows) if axes == free else (times(x, of_rows), None)
    raise MaterializationError(
        f"a DoRA kernel of shape {shape} enters a ragged product at {source_line(eqn)} "
        "in a form that its norm cannot be applied to; adapt it without `dora=True`"
    )


def _ragged_part(
    eqn: Any,
    x: jax.Array,
    w: Any,
    sizes: jax.Array,
    part: Part,
    y: jax.Array,
    derive: str,
) -> jax.Array:
    """Returns `s·(x·a)·b`, each group of rows with the factors of its own expert."""
    dims = _ragged_dims(eqn)
    (x_contract, contract), (x_batch, batch) = dims.dot_dimension_numbers
    (group,), (ragged,) = dims.rhs_group_dimensions, dims.lhs_ragged_dimensions
    shared = [group, *batch]
    free = free_axes(w.ndim, contract, shared)
    pair = contracted_first(part, contract, free)
    if pair is None:
        raise MaterializationError(_split_join(eqn, w, "enters a ragged product"))
    first = factor_matrix(pair[0], [*shared, *contract], w.shape)
    second = factor_matrix(pair[1], [*shared, *free], w.shape)
    second = jnp.moveaxis(second, -1, len(shared))
    computed = product_dtype(x.dtype, w.dtype, y.dtype)
    own = Rows(x_contract, x_batch, ragged, eqn.params["precision"], computed, computed)
    h = part.scaling * rows_product(own, x, first, sizes, derive)
    n = len(batch)
    then = own._replace(
        contract=(h.ndim - 1,),
        batch=tuple(range(n)),
        ragged=n + own.free(x).index(ragged),
        result=_wide_enough(y.dtype, computed),
        sharding=explicit_sharding(y),
    )
    return rows_product(then, h, second, sizes, derive)


# --- lookups ---


def add_rows(value: Adapted, found: jax.Array | None = None) -> jax.Array:
    """Returns looked-up rows with their deltas `s·a[ids]·b` added, rounded once.

    In float32 at least: where a delta takes most of a row away, as that of a row that
    is trained whole does, a rounded sum would leave the rounding of the old row.

    Args:
        value: the rows, with the factors of each.
        found: which of them are no filling, see `_gather.found_rows`.
    """
    rows = dense(value.base)
    total, sharding = rows.astype(summed_in(rows.dtype)), explicit_sharding(rows)
    for part in value.parts:
        change = _rows_of(part, total.dtype)
        change = jnp.broadcast_to(change, rows.shape)
        if sharding is not None:
            change = jax.sharding.reshard(change, sharding)
        total = total + select(found, change, 0)
    total = total if value.scale is None else times(total, value.scale[..., 0])
    return total.astype(rows.dtype)


def _rows_of(part: Part, dtype: Any) -> jax.Array:
    part = whole(part)
    scaled, b = part.scaling * part.a.astype(dtype), part.b.astype(dtype)
    return contract_rank(scaled, b, dtype=dtype, precision=lax.Precision.HIGHEST)


CONSUME: dict[str, ConsumeRule] = {
    "dot_general": ConsumeRule(
        "dot_general",
        (0, 1),
        dot_roles,
        lambda eqn, operand, roles: True,
    ),
    "conv_general_dilated": ConsumeRule(
        "conv", (1,), _conv_roles, _conv_supports, _conv_details
    ),
    "ragged_dot_general": ConsumeRule(
        "ragged_dot", (1,), _ragged_roles, _ragged_supports
    ),
}
# `(eqn, operands, derive) -> [output]`
EVALUATE: dict[str, Callable[[Any, list[Any], str], list[Any]]] = {
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
}

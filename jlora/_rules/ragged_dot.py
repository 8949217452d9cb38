"""Ragged products with an adapted kernel: experts, each with a group of rows."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._errors import MaterializationError, UnsupportedFeatureError
from .._jax.dtypes import common, product_dtype
from .._jax.sharding import explicit_sharding
from .._jax.versions import explicit_mesh, source_line
from .._params.axes import Roles, Shape, free_axes
from .._params.lazy import called, dense, is_lazy, made_again
from .._product.gate import through
from .adapted import Adapted, Part, base_of
from .parts import (
    branch_dtype,
    contracted_first,
    dropped_input,
    factor_matrix,
    part_words,
    split_join,
    times,
)
from .ragged_examples import rows_of_examples
from .ragged_rows import Rows, rows_product
from .rule import Axes, ConsumeRule, LinearUse


def _dims(eqn: Any) -> Any:
    return eqn.params["ragged_dot_dimension_numbers"]


def _is_grouped(eqn: Any) -> bool:
    """Whether the rows of the left operand are grouped, one kernel slice per group."""
    dims = _dims(eqn)
    (contract, _), (batch, _) = dims.dot_dimension_numbers
    ragged = dims.lhs_ragged_dimensions
    free = not set(ragged) & {*contract, *batch}
    return len(ragged) == 1 and len(dims.rhs_group_dimensions) == 1 and free


def _roles(eqn: Any, operand: int) -> list[str] | None:
    if not _is_grouped(eqn):
        return None
    dims = _dims(eqn)
    (_, contract), (_, batch) = dims.dot_dimension_numbers
    roles = ["out"] * eqn.invars[1].aval.ndim
    for axes, role in (
        (contract, "in"),
        ((*batch, *dims.rhs_group_dimensions), "batch"),
    ):
        for axis in axes:
            roles[axis] = role
    return roles if "in" in roles and "out" in roles else None


def _supports(eqn: Any, operand: int, roles: Roles) -> bool:
    wanted = _roles(eqn, operand)
    if wanted is None:
        return False
    swapped = {"in": "out", "out": "in"}
    pairs = [(w, r) for w, r in zip(wanted, roles, strict=True) if r is not None]
    # A factor that all groups share is the same for each of them.
    pairs = [(w, r) for w, r in pairs if w != "batch"]
    return all(w == r for w, r in pairs) or all(swapped[w] == r for w, r in pairs)


def _run(eqn: Any, operands: list[Any], derive: str) -> list[Any]:
    x, value, sizes, *rest = operands
    x, after = _scaled(eqn, x, value, sizes)
    gates = [part.gate for part in value.parts if part.gate is not None]
    mixed = value.is_shared or bool(gates)
    if mixed and _dims(eqn).dot_dimension_numbers[1][0]:
        raise UnsupportedFeatureError(
            f"a ragged product of several batches, at {source_line(eqn)}, cannot be "
            "one for all examples of a mixed batch: call `lora.apply(params, "
            "jlora.take(stacked, i), ...)` with the examples of adapter i"
        )
    bases = [x, *map(base_of, [value, sizes, *rest])]
    gate = gates[0] if gates else None
    y = _base_product(eqn, bases, derive, mixed=mixed, gate=gate)
    for part in value.parts:
        dropped = dropped_input(part, x, part_words(part, ()), ())
        delta = _low_rank(eqn, dropped, value.base, sizes, part, y, derive)
        y = y + delta.astype(y.dtype)
    return [y if after is None else times(y, after)]


def _base_product(
    eqn: Any,
    operands: list[Any],
    derive: str,
    *,
    mixed: bool,
    gate: jax.Array | None = None,
) -> jax.Array:
    """The base product.

    On Explicit meshes it has derivatives, which JAX's has not; in a mixed batch it is
    one for all examples.
    """
    x, w, sizes, *_ = operands
    own = derive == "custom" and explicit_mesh(x, *jax.tree.leaves(w)) is not None
    if not (own or mixed):
        return called(eqn, operands, derive)[0]
    dims, precision = _dims(eqn), eqn.params["precision"]
    (x_contract, contract), (x_batch, batch) = dims.dot_dimension_numbers
    shared, (ragged,) = [*dims.rhs_group_dimensions, *batch], dims.lhs_ragged_dimensions
    order = (*shared, *contract, *free_axes(w.ndim, contract, shared))
    dtype, result = common(x.dtype, w.dtype), eqn.outvars[0].aval.dtype
    sharding = eqn.params.get("out_sharding")  # jax 0.8 has none
    rows = Rows(x_contract, x_batch, ragged, precision, dtype, result, sharding)

    def of_values(values: Sequence[Any]) -> list[jax.Array]:
        x, w, sizes = values
        return [rows_product(rows, x, jnp.transpose(dense(w), order), sizes, derive)]

    def product(x: jax.Array, w: Any, sizes: jax.Array) -> jax.Array:
        values = [x, w, sizes]
        if is_lazy(values):
            return made_again(of_values, values, derive)[0]
        return of_values(values)[0]

    if mixed:
        return rows_of_examples(rows, x, w, sizes, product, gate)
    return product(x, w, sizes)


def _scaled(
    eqn: Any, x: jax.Array, value: Adapted, sizes: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Returns `x` and what the result is multiplied by, with DoRA's scale in either."""
    if value.scale is None:
        return x, None
    dims, shape = _dims(eqn), value.base.shape
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


def _low_rank(
    eqn: Any,
    x: jax.Array,
    w: Any,
    sizes: jax.Array,
    part: Part,
    y: jax.Array,
    derive: str,
) -> jax.Array:
    """Returns `s·(x·a)·b`, each group of rows with the factors of its own expert."""
    dims = _dims(eqn)
    (x_contract, contract), (x_batch, batch) = dims.dot_dimension_numbers
    (group,), (ragged,) = dims.rhs_group_dimensions, dims.lhs_ragged_dimensions
    shared = [group, *batch]
    free = free_axes(w.ndim, contract, shared)
    pair = contracted_first(part, contract, free)
    if pair is None:
        raise MaterializationError(split_join(eqn, w, "enters a ragged product"))
    first = factor_matrix(pair[0], [*shared, *contract], w.shape)
    second = factor_matrix(pair[1], [*shared, *free], w.shape)
    second = jnp.moveaxis(second, -1, len(shared))
    computed = product_dtype(x.dtype, w.dtype, y.dtype)
    own = Rows(x_contract, x_batch, ragged, eqn.params["precision"], computed, computed)

    def run(rows: Rows, x: jax.Array, factor: jax.Array) -> jax.Array:
        product = lambda x, factor, sizes: rows_product(rows, x, factor, sizes, derive)
        if part.gate is None:
            return product(x, factor, sizes)
        return rows_of_examples(rows, x, factor, sizes, product, part.gate)

    h = part.scaling * run(own, x, first)
    h = h if part.gate is None else through(h, part.gate.reshape(-1))
    n = len(batch)
    then = own._replace(
        contract=(h.ndim - 1,),
        batch=tuple(range(n)),
        ragged=n + own.free(x).index(ragged),
        result=branch_dtype(y.dtype, computed),
        sharding=explicit_sharding(y),
    )
    return run(then, h, second)


def _flops(eqn: Any) -> int:
    (contract, _), _ = _dims(eqn).dot_dimension_numbers
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contract)


def _scale_fits(eqn: Any, operand: int, varies: Axes) -> bool:
    dims = _dims(eqn)
    (_, contract), (_, batch) = dims.dot_dimension_numbers
    (group,), rows = dims.rhs_group_dimensions, dims.lhs_ragged_dimensions
    if batch or eqn.invars[0].aval.ndim != 2 or tuple(rows) != (0,):
        return False
    free = free_axes(eqn.invars[operand].aval.ndim, contract, [group])
    sides = [axes for axes in (free, contract) if len(axes) == 1]
    return any(varies <= {group, *axes} for axes in sides)


# --- with a probe in the place of the kernel, see `linear_use.py` ---


def _on_probe(
    eqn: Any,
    operand: int,
    others: Sequence[Any],
    probe: jax.Array,
    shape: Shape,
    own: Collection[int],
) -> jax.Array:
    """The ragged product; rows of each group with the probe of that group."""
    x, sizes, *_ = others
    dims = _dims(eqn)
    (x_contract, contract), (x_batch, _) = dims.dot_dimension_numbers
    (ragged,) = dims.lhs_ragged_dimensions
    factor = factor_matrix(probe, [*_shared(eqn, operand), *contract], shape)
    highest, dtype = lax.Precision.HIGHEST, x.dtype
    rows = Rows(x_contract, x_batch, ragged, highest, dtype, dtype)
    return rows_product(rows, x, factor, sizes, "custom")


def _summed(eqn: Any, operand: int) -> Sequence[int]:
    return _dims(eqn).dot_dimension_numbers[0][1]


def _shared(eqn: Any, operand: int) -> Sequence[int]:
    dims = _dims(eqn)
    return [*dims.rhs_group_dimensions, *dims.dot_dimension_numbers[1][1]]


def _inputs(eqn: Any, operand: int, values: Sequence[Any]) -> jax.Array:
    """Returns the number of inputs of each group."""
    dims = _dims(eqn)
    (group,) = dims.rhs_group_dimensions
    ndim = values[1].base.ndim + 1
    sizes = values[2].astype(jnp.float32)
    return sizes.reshape([-1 if i == group else 1 for i in range(ndim)])


CONSUME = {
    "ragged_dot_general": ConsumeRule(
        "ragged_dot",
        (1,),
        _roles,
        _flops,
        run=_run,
        linear=LinearUse(_summed, _shared, _on_probe, _inputs),
        supports=_supports,
        scale_fits=_scale_fits,
        maps_kernel=True,
    )
}

"""Ragged products of the low-rank branch: each group of rows with factors of its own.

Their gradients are ragged products too: with the rows as the ragged axis again, or
summed over the rows of each group, in float32 at least. On an Explicit mesh each says
how its result is laid out: JAX asks for that, and forgets it in its own derivatives.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .._jax.dots import as_type_of
from .._jax.dtypes import summed_in
from .._jax.sharding import spec_of, whole_along
from .._jax.unless_cpu import unless_cpu
from .._jax.versions import explicit_mesh, manual_axes, ragged_dot_general, vary
from .._params.axes import free_axes

Axes = tuple[int, ...]


class Rows(NamedTuple):
    """What is static about one product of rows with a factor of each group.

    The factor is laid out `(groups, *batch, *contract, *free)`, the result as
    `(*batch, *free of x, *free)`.

    Attributes:
        contract: the axes of `x` that are summed over, in the order of the factor.
        batch: the batch axes of `x`, in the order of the factor.
        ragged: the axis of `x` along which the groups lie.
        precision: of the base product.
        computed: the dtype in which it is computed.
        result: the dtype of the result.
        sharding: of the result, on an Explicit mesh; None if it has none.
    """

    contract: Axes
    batch: Axes
    ragged: int
    precision: Any
    computed: Any
    result: Any
    sharding: Any = None

    def free(self, x: jax.Array) -> Axes:
        """Returns the axes of `x` that are neither summed over nor batch axes."""
        return free_axes(x.ndim, self.contract, self.batch)

    def turned(self, x: jax.Array, dy: jax.Array) -> "Rows":
        """Returns the product that takes the cotangent of the result to that of `x`.

        Its result has the axes of `x` as `(*batch, *free, *contract)`.
        """
        n, free = len(self.batch), self.free(x)
        order = (*self.batch, *free, *self.contract)
        return self._replace(
            contract=tuple(range(n + len(free), dy.ndim)),
            batch=tuple(range(n)),
            ragged=n + free.index(self.ragged),
            result=self.computed,
            sharding=_sharding(x, [spec_of(x)[i] for i in order]),
        )


def _sharding(array: jax.Array, spec: list[Any]) -> NamedSharding | None:
    mesh = explicit_mesh(array)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))


def _whole(rows: jax.Array) -> jax.Array:
    """Returns rows that are not sharded on an Explicit mesh: not all backends can."""
    return whole_along(rows, range(rows.ndim))


def rows_product(
    rows: Rows, x: jax.Array, factor: jax.Array, sizes: jax.Array, derive: str
) -> jax.Array:
    """Returns each row of `x` times the factor of its group.

    Args:
        rows: the product.
        x: the rows.
        factor: the factors of all groups.
        sizes: the number of rows of each group.
        derive: "custom" for the gradients derived here, else those of JAX.
    """
    varying = manual_axes(x) | manual_axes(factor) | manual_axes(sizes)
    x, factor, sizes = (vary(v, varying) for v in (x, factor, sizes))
    run = _product if derive == "custom" else _evaluate
    return run(rows, x, factor, sizes)


def _evaluate(
    rows: Rows, x: jax.Array, factor: jax.Array, sizes: jax.Array
) -> jax.Array:
    n, k = len(rows.batch), len(rows.contract)
    contract = (rows.contract, tuple(range(1 + n, 1 + n + k)))
    batch = (rows.batch, tuple(range(1, 1 + n)))
    x = _whole(x)
    return ragged_dot_general(
        x.astype(rows.computed),
        factor.astype(rows.computed),
        sizes,
        lax.RaggedDotDimensionNumbers((contract, batch), [rows.ragged], [0]),
        precision=rows.precision,
        preferred_element_type=rows.result,
        out_sharding=rows.sharding or _sharding(x, []) or _sharding(factor, []),
    )


_product = jax.custom_vjp(_evaluate, nondiff_argnums=(0,))


def _forward(
    rows: Rows, x: jax.Array, factor: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, Any]:
    return _product(rows, x, factor, sizes), (x, factor, sizes)


def _backward(rows: Rows, kept: Any, dy: jax.Array) -> tuple[Any, Any, None]:
    x, factor, sizes = kept
    dy = _whole(dy)
    n, k = len(rows.batch), len(rows.contract)
    ins, outs = range(1 + n, 1 + n + k), range(1 + n + k, factor.ndim)
    flipped = jnp.transpose(factor, (*range(1 + n), *outs, *ins))
    dx = _product(rows.turned(x, dy), dy, flipped, sizes)
    order = (*rows.batch, *rows.free(x), *rows.contract)
    dx = jnp.transpose(dx, sorted(range(x.ndim), key=order.__getitem__))
    return as_type_of(dx, x), _grad_factor(rows, x, dy, factor, sizes), None


def _grad_factor(
    rows: Rows, x: jax.Array, dy: jax.Array, factor: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Returns `Σ xᵀ·dy` over the rows of each group, in float32 at least."""
    n, free = len(rows.batch), rows.free(x)
    wide = summed_in(factor.dtype, x.dtype, dy.dtype)
    # What is not summed over comes out in the order of x.
    ascending = sorted(range(len(rows.contract)), key=rows.contract.__getitem__)
    axes = [*range(1 + n), *[1 + n + i for i in ascending]]
    axes += range(len(axes), factor.ndim)
    place = _sharding(x, [spec_of(factor)[i] for i in axes])
    computed = (v.astype(rows.computed) for v in (_whole(x), dy))
    found = unless_cpu(_sum_groups, (rows, free, wide, place), *computed, sizes)
    found = jnp.transpose(found, sorted(range(found.ndim), key=axes.__getitem__))
    return as_type_of(found, factor)


def _sum_groups(
    on_cpu: bool,
    rows: Rows,
    free: Axes,
    wide: Any,
    place: NamedSharding | None,
    x: jax.Array,
    dy: jax.Array,
    sizes: jax.Array,
) -> jax.Array:
    if on_cpu:  # in a loop it has no 16-bit products with a 32-bit result
        x, dy = x.astype(wide), dy.astype(wide)
    n = len(rows.batch)
    contract = (free, tuple(range(n, n + len(free))))
    batch = (rows.batch, tuple(range(n)))
    return ragged_dot_general(
        x,
        dy,
        sizes,
        lax.RaggedDotDimensionNumbers((contract, batch), [rows.ragged], []),
        precision=rows.precision,
        preferred_element_type=wide,
        out_sharding=place,
    )


_product.defvjp(_forward, _backward)

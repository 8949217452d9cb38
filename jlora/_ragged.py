"""Ragged products of the low-rank branch: each group of rows with factors of its own.

Their gradients are ragged products too: with the rows as the ragged axis again, or
summed over the rows of each group, in float32 at least. On an Explicit mesh each says
how its result is laid out, which JAX asks for, and leaves out of its own derivatives.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ._axes import free_axes
from ._compat import explicit_mesh, manual_axes, vary
from ._dtypes import summed_in, workable
from ._group import as_type_of
from ._sharding import spec_of

Axes = tuple[int, ...]


class Rows(NamedTuple):
    """What is static about one product of rows with a factor of each group.

    The factor is laid out `(groups, *batch, *contract, *free)`; the result as
    `(*batch, *free of x, *free)`.

    Attributes:
        contract: the axes of `x` that are summed over, in the order of the factor.
        batch: the batch axes of `x`, in the order of the factor.
        ragged: the axis of `x` along which the groups lie.
        precision: of the base product.
        result: the dtype of the result.
        sharding: of the result, on an Explicit mesh; None to follow the operands.
    """

    contract: Axes
    batch: Axes
    ragged: int
    precision: Any
    result: Any
    sharding: Any = None


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
    free = free_axes(x.ndim, rows.contract, rows.batch)
    spec = spec_of(factor)
    own = [spec_of(x)[i] for i in (*rows.batch, *free)] + [*spec[1 + n + k :]]
    dims = lax.RaggedDotDimensionNumbers((contract, batch), [rows.ragged], [0])
    sharding = rows.sharding or _sharding(own, x, factor)
    computed = _computed(rows, x)
    return lax.ragged_dot_general(
        x.astype(computed),
        factor.astype(computed),
        sizes,
        dims,
        precision=rows.precision,
        preferred_element_type=rows.result,
        out_sharding=sharding,
    )

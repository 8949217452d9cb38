"""Ragged products of a mixed batch: the rows of all examples in one product.

JAX maps a ragged product only where rows, kernels and sizes are all mapped. Here an
example has rows and sizes of its own, and the kernel is that of all: so the rows of all
examples are put in the order of their groups, go through one product, and back.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from .ragged_rows import Rows, rows_product


def rows_of_examples(
    rows: Rows, x: jax.Array, factor: jax.Array, sizes: jax.Array, derive: str
) -> jax.Array:
    """Returns `rows_product` of an example, under `jax.vmap` over examples.

    It is mapped once, and differentiated outside of that map alone, as is the way of
    custom rules of a map. The product has no batch axes. Arguments are those of
    `rows_product`.
    """

    def product(x: jax.Array, factor: jax.Array, sizes: jax.Array) -> jax.Array:
        return rows_product(rows, x, factor, sizes, derive)

    mapped = custom_vmap(product)

    @mapped.def_vmap
    def rule(
        size: int, batched: Any, x: jax.Array, factor: jax.Array, sizes: jax.Array
    ) -> tuple[jax.Array, bool]:
        each = lambda v, own: v if own else jnp.broadcast_to(v, (size, *v.shape))
        x, sizes = each(x, batched[0]), each(sizes, batched[2])
        if batched[1]:
            return jax.vmap(product)(x, factor, sizes), True
        return _at_once(rows, x, factor, sizes, derive), True

    return mapped(x, factor, sizes)


def _at_once(
    rows: Rows, x: jax.Array, factor: jax.Array, sizes: jax.Array, derive: str
) -> jax.Array:
    """Returns the products of examples along axis 0, of `x` and `sizes`, with it."""
    of_example = rows.free(x[0]).index(rows.ragged)
    order = jnp.argsort(_groups(x.shape[1 + rows.ragged], sizes).reshape(-1))
    together = _merged(x, rows.ragged)
    ordered = jnp.take(together, order, axis=rows.ragged, mode="clip")
    y = rows_product(rows, ordered, factor, jnp.sum(sizes, 0), derive)
    y = jnp.take(y, jnp.argsort(order), axis=of_example, mode="clip")
    apart = (*y.shape[:of_example], len(x), -1, *y.shape[of_example + 1 :])
    return jnp.moveaxis(y.reshape(apart), of_example, 0)


def _groups(count: int, sizes: jax.Array) -> jax.Array:
    """Returns the group of each row of each example; that after the last for none.

    >>> _groups(4, jnp.array([[1, 0, 2], [0, 3, 1]])).tolist()
    [[0, 2, 2, 3], [1, 1, 1, 2]]
    """
    ends = jnp.cumsum(sizes, axis=-1)
    find = functools.partial(jnp.searchsorted, side="right")
    return jax.vmap(find, (0, None))(ends, jnp.arange(count))


def _merged(x: jax.Array, axis: int) -> jax.Array:
    """Returns `x` with its first axis merged into another one, `axis` of an example."""
    moved = jnp.moveaxis(x, 0, axis)
    return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])

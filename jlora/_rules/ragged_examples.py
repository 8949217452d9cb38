"""Ragged products of a mixed batch: the rows of all examples in one product.

JAX maps a ragged product only where rows, kernels and sizes are all mapped. Here an
example has rows and sizes of its own, and the kernel is that of all: so the rows of all
examples are put in the order of their groups, go through one product, and back.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from .ragged_rows import Rows

Product = Callable[[jax.Array, Any, jax.Array], jax.Array]


def rows_of_examples(
    rows: Rows,
    x: jax.Array,
    factor: Any,
    sizes: jax.Array,
    product: Product,
    gate: jax.Array | None = None,
) -> jax.Array:
    """Returns a product of rows of an example, under `jax.vmap` over examples.

    It is mapped once, and differentiated outside of that map alone, as is the way of
    custom rules of a map. The product has no batch axes.

    Args:
        rows: the product.
        x: its rows.
        factor: what the factors of all groups are made of.
        sizes: the number of rows of each group.
        product: `(x, factor, sizes) -> y`.
        gate: what each example has one of, if it has: then the rule is asked, and can
            be differentiated, where the others are the same for all examples.
    """
    mapped = custom_vmap(lambda x, factor, sizes, gate: product(x, factor, sizes))

    @mapped.def_vmap
    def rule(
        size: int, batched: Any, x: jax.Array, factor: Any, sizes: jax.Array, _: Any
    ) -> tuple[jax.Array, bool]:
        own = [any(jax.tree.leaves(which)) for which in batched[:3]]
        if not any(own):
            return product(x, factor, sizes), False
        each = lambda v, own: v if own else jnp.broadcast_to(v, (size, *v.shape))
        x, sizes = each(x, own[0]), each(sizes, own[2])
        if own[1]:
            axes = jax.tree.map(lambda own: 0 if own else None, batched[1])
            return jax.vmap(product, (0, axes, 0))(x, factor, sizes), True
        return _at_once(rows, x, factor, sizes, product), True

    return mapped(x, factor, sizes, gate)


def _at_once(
    rows: Rows, x: jax.Array, factor: Any, sizes: jax.Array, product: Product
) -> jax.Array:
    """Returns the products of examples along axis 0, of `x` and `sizes`, with it."""
    of_example = rows.free(x[0]).index(rows.ragged)
    order = jnp.argsort(_groups(x.shape[1 + rows.ragged], sizes).reshape(-1))
    together = _merged(x, rows.ragged)
    ordered = jnp.take(together, order, axis=rows.ragged, mode="clip")
    y = product(ordered, factor, jnp.sum(sizes, 0))
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

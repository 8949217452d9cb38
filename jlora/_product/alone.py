"""A group of products that no backward pass follows: nothing else needs `x·a`."""

import math

import jax

from .few_kernel import LARGEST_OWN, MOST_ROWS, Linear, adapted_products, divides
from .forms import forward
from .fused import How, Product, product_by_xla
from .group import Form, GroupDims, Operands
from .partitioned import sum_partitioned
from .skinny import shrink


def products_alone(form: Form, dims: GroupDims, operands: Operands) -> list[jax.Array]:
    """Returns the adapted products, each laid out as its base product."""
    if form in ("ruled", "ruled_few") and _makes_its_own(dims, operands):
        return _ruled(form, dims, operands)
    if form == "grouped":
        each = jax.vmap(lambda one: shrink(dims, one), in_axes=(operands.adapter_axes,))
        return forward(form, dims, operands, each(operands))
    return forward(form, dims, operands, shrink(dims, operands, form))


def _makes_its_own(dims: GroupDims, operands: Operands) -> bool:
    """Whether each kernel's `x·a` is a part of its product on a mesh.

    Siblings share theirs, but for a few rows: what takes time then is every sum over
    devices, and not to read `x` again.
    """
    if operands.drops or any(gate is not None for gate in operands.gates):
        return False
    rows = set(range(operands.x.ndim)) - set(dims.contract)
    few = math.prod(operands.x.shape[i] for i in rows) <= MOST_ROWS
    return few or len(dims.kernels) == 1


def _ruled(form: Form, dims: GroupDims, operands: Operands) -> list[jax.Array]:
    """Each one operation, and so one sum over devices."""
    x, few = operands.x, form == "ruled_few"
    # The kernel reads factors as they lie; else what travels is what is multiplied.
    cast = (lambda factor: factor) if few else (lambda factor: factor.astype(x.dtype))
    rows = zip(dims.kernels, operands.kernels, operands.a, operands.b, strict=True)
    return [
        sum_partitioned(
            Product(x, w, cast(a), cast(b)),
            How(precision=one.precision, scaling=one.scaling),
            product_by_kernel if few else product_by_xla,
        )
        for one, w, a, b in rows
    ]


def product_by_kernel(product: Product, how: How) -> jax.Array:
    """Returns `x·w + s·(x·a)·b` by the kernel for few rows where that divides it."""
    x, w, a, b = product
    rows, columns, rank = x.shape[: product.rows], b.shape[:-1], a.shape[-1]
    n, depth = math.prod(rows), math.prod(a.shape[:-1])
    divided = divides(depth, math.prod(columns)) and 0 < n <= MOST_ROWS
    if not divided or rank > LARGEST_OWN:
        return product_by_xla(product, how)
    linear = Linear.of(w, a, b)
    (y,) = adapted_products(x.reshape(n, depth), [linear], (how.scaling,))
    return y.reshape(*rows, *columns)

"""A group of products that no backward pass follows: nothing else needs `x·a`."""

import jax

from .forms import forward
from .fused import How, Product, product_by_xla
from .group import Form, GroupDims, Operands
from .partitioned import sum_partitioned
from .skinny import shrink


def products_alone(form: Form, dims: GroupDims, operands: Operands) -> list[jax.Array]:
    """Returns the adapted products, each laid out as its base product."""
    through = any(gate is not None for gate in operands.gates) or operands.drops
    if form == "ruled" and len(dims.kernels) == 1 and not through:
        return [_ruled(dims, operands)]
    if form == "grouped":
        each = jax.vmap(lambda one: shrink(dims, one), in_axes=(operands.adapter_axes,))
        return forward(form, dims, operands, each(operands))
    return forward(form, dims, operands, shrink(dims, operands, form))


def _ruled(dims: GroupDims, operands: Operands) -> jax.Array:
    """One operation on a mesh, and so one sum over devices.

    (Siblings share their `x·a`, which is summed beside their own partial sums.)
    """
    (kernel,), (a,), (b,) = operands.kernels, operands.a, operands.b
    (one,) = dims.kernels
    cast = lambda value: value.astype(operands.x.dtype)
    arrays = Product(operands.x, kernel, cast(a), cast(b))
    how = How(precision=one.precision, scaling=one.scaling)
    return sum_partitioned(arrays, how, product_by_xla)

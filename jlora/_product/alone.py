"""A group of products that no backward pass follows: nothing else needs `x·a`."""

import math

import jax

from .few_kernel import MOST_ROWS
from .forms import forward
from .fused import How, Product, product_by_xla
from .group import Form, GroupDims, Operands
from .partitioned import sum_partitioned
from .skinny import shrink


def products_alone(form: Form, dims: GroupDims, operands: Operands) -> list[jax.Array]:
    """Returns the adapted products, each laid out as its base product."""
    if form == "ruled" and _makes_its_own(dims, operands):
        return _ruled(dims, operands)
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


def _ruled(dims: GroupDims, operands: Operands) -> list[jax.Array]:
    """Each one operation, and so one sum over devices."""
    x = operands.x
    rows = zip(dims.kernels, operands.kernels, operands.a, operands.b, strict=True)
    return [
        sum_partitioned(
            Product(x, w, a.astype(x.dtype), b.astype(x.dtype)),
            How(precision=one.precision, scaling=one.scaling),
            product_by_xla,
        )
        for one, w, a, b in rows
    ]

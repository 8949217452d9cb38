"""The low-rank product `x·W + s·(x·a)·b`, with a hand-derived backward pass.

Plain autodiff of the same expression does the same arithmetic and runs slower: it asks
for transposed copies of large operands. Here every gradient is one `dot_general` whose
operands lie as they are, and the residuals are `x`, `W`, `a` and `b` alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from ._compat import manual_axes, vary
from ._forms import Backward, backward, forward, scaled, shrink
from ._group import Form, GroupDims, Layout, Operands, as_type_of, per_kernel


def low_rank_product(
    dims: GroupDims, operands: Operands, *, form: Form, derive: str = "custom"
) -> list[jax.Array]:
    """Returns `x·W + s·(x·a)·b` for each kernel of a group.

    Args:
        dims: the static description of the products.
        operands: the arrays.
        form: how the products are computed, see `_forms`.
        derive: "custom" for the hand-derived backward pass, "autodiff" to leave the
            product to JAX, as forward-mode differentiation needs.

    Returns:
        One array per kernel, laid out as the base product lays it out.
    """
    varying = frozenset().union(*map(manual_axes, jax.tree.leaves(operands)))
    operands = jax.tree.map(lambda array: vary(array, varying), operands)
    if derive == "custom":
        return _product((dims, form), operands)
    return forward("separate" if form == "extended" else form, dims, operands)


def _one_kernel_for_all(
    run: Callable[..., Any], form: Form, operands: Operands, *rest: Any
) -> Any:
    """Runs a form so that `jax.vmap` over adapters keeps one copy of each kernel.

    The extended and the merged form put factors into a kernel; mapped over factors they
    would make one per adapter. The separate form then keeps the base product unbatched.
    """
    if form == "separate":
        return run(form, operands, *rest)
    mapped = custom_vmap(lambda operands, *rest: run(form, operands, *rest))

    @mapped.def_vmap
    def rule(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        mapped_operands = batched[0]
        factors = (mapped_operands.a, mapped_operands.b, mapped_operands.kernels)
        inner: Form = "separate" if any(jax.tree.leaves(factors)) else form
        axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, tuple(batched))

        def deeper(form: Form, *args: Any) -> Any:
            each = functools.partial(run, form)
            return jax.vmap(each, in_axes=axes, axis_size=size)(*args)

        out = _one_kernel_for_all(deeper, inner, *args)
        return out, jax.tree.map(lambda _: True, out)

    return mapped(operands, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: tuple[GroupDims, Form], operands: Operands) -> list[jax.Array]:
    dims, form = static
    run = lambda form, operands: forward(form, dims, operands)
    return _one_kernel_for_all(run, form, operands)


class _Residuals(NamedTuple):
    operands: Operands
    # None for what is not differentiated: a marker that is part of the tree structure,
    # so that no gradient of a frozen kernel is ever formed.
    wants_x: tuple[()] | None
    wants_kernel: tuple[tuple[()] | None, ...]


def _forward(
    static: tuple[GroupDims, Form], operands: Operands
) -> tuple[list[jax.Array], _Residuals]:
    """The forward pass; the residuals are the operands alone."""
    is_primal = lambda v: hasattr(v, "perturbed")
    arrays = jax.tree.map(lambda v: v.value, operands, is_leaf=is_primal)
    mark = lambda v: () if v.perturbed else None
    marks = _Residuals(arrays, mark(operands.x), tuple(map(mark, operands.kernels)))
    return _product(static, arrays), marks


def _backward(
    static: tuple[GroupDims, Form], residuals: _Residuals, cotangents: Sequence[Any]
) -> tuple[Operands]:
    """The gradients of `x`, `a` and `b`, and of a kernel only where it is asked for.

    With `h = s·x·a` and `g = s·dy·bᵀ`:
    `dx = dy·Wᵀ + g·aᵀ`, `da = xᵀ·g`, `db = hᵀ·dy` (kept as `dyᵀ·h`, rank last).
    """
    dims, form = static
    operands, wants_x, wants_kernel = residuals
    x, ranks = operands.x, operands.ranks
    dys = [_instantiate(dy) for dy in cotangents]
    a, h = shrink(dims, operands)

    def run(form: Form, operands: Operands, a: Any, dys: Any) -> Backward:
        return backward(form, dims, operands, a, dys, wants_x is not None)

    g, dx = _one_kernel_for_all(run, form, operands, a, dys)
    db, dw = [], []
    hs = scaled(dims, h, ranks)
    for i, (one, dy) in enumerate(zip(dims.kernels, dys, strict=True)):
        w, b = operands.kernels[i], operands.b[i]
        layout = Layout.of(dims, one, x, w)
        db.append(layout.grad_b(hs[i], dy, b))
        wanted = wants_kernel[i] is not None
        dw.append(layout.grad_kernel(x, dy, w) if wanted else None)
    layout = Layout.of(dims, dims.kernels[0], x, operands.kernels[0])
    da = per_kernel(layout.grad_a(x, g, operands.a[0].dtype), ranks)
    da = tuple(map(as_type_of, da, operands.a))
    return (Operands(dx, tuple(dw), da, tuple(db)),)


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _instantiate(cotangent: Any) -> jax.Array:
    """Returns a cotangent as an array; that of an unused output is symbolic."""
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        aval: Any = cotangent
        return jnp.zeros(aval.shape, aval.dtype)
    return cotangent

"""The low-rank product `x·W + s·(x·a)·b`, with a hand-derived backward pass.

Plain autodiff of the same expression does the same arithmetic and runs slower: it asks
for transposed copies of large operands. Here every gradient is one `dot_general` whose
operands lie as they are, and the residuals are `x`, `W`, `a` and `b` alone.

Several kernels that contract the same value ("siblings": query, key and value) are one
group, so that `x` is read once for all their skinny products, forward and backward; a
single kernel is a group of one.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._axes import free_axes
from ._compat import manual_axes, vary
from ._sharding import dot_sharding, explicit_sharding

Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KernelDims:
    """How one kernel enters its `dot_general` with the shared operand `x`.

    Attributes:
        contract: the kernel's contracting axes, paired with `GroupDims.contract`.
        batch: the kernel's batch axes, paired with `GroupDims.batch`.
        first: whether the kernel is the left operand.
        scaling: the scaling of its delta.
        params: the other parameters of the equation, as sorted pairs.
    """

    contract: Axes
    batch: Axes
    first: bool
    scaling: float
    params: tuple[tuple[str, Any], ...]

    @property
    def precision(self) -> Any:
        """The precision of the base product, used for the low-rank ones too."""
        return dict(self.params)["precision"]


@dataclasses.dataclass(frozen=True)
class GroupDims:
    """The axes of the shared operand `x`, and one `KernelDims` per kernel."""

    contract: Axes
    batch: Axes
    kernels: tuple[KernelDims, ...]


class Operands(NamedTuple):
    """The arrays of a group; `a: (*batch, *contract, r)`, `b: (*batch, *free, r)`.

    Both have the rank last, as they travel through the program (see `_axes.align`): a
    gradient that had to be transposed inside of a loop costs a copy at each step, and
    XLA on CPUs cannot run it in bfloat16.
    """

    x: Any
    kernels: tuple[Any, ...]
    a: tuple[Any, ...]
    b: tuple[Any, ...]


def low_rank_product(
    dims: GroupDims, operands: Operands, *, backward: str = "custom"
) -> list[jax.Array]:
    """Returns `x·W + s·(x·a)·b` for each kernel of a group.

    Args:
        dims: the static description of the products.
        operands: the arrays.
        backward: "custom" for the hand-derived backward pass, "autodiff" to leave the
            product to JAX, as forward-mode differentiation needs.

    Returns:
        One array per kernel, laid out as the base product lays it out.
    """
    varying = frozenset().union(*map(manual_axes, jax.tree.leaves(operands)))
    operands = jax.tree.map(lambda array: vary(array, varying), operands)
    product = _custom_product if backward == "custom" else _product
    return product(dims, operands)


def _dot(
    lhs: jax.Array,
    rhs: jax.Array,
    contract: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    dtype: Any,
    precision: Any,
) -> jax.Array:
    """One `dot_general`, with the output sharding that Explicit meshes ask for."""
    (lc, rc), (lb, rb) = contract, batch
    dims = ((tuple(lc), tuple(rc)), (tuple(lb), tuple(rb)))
    return lax.dot_general(
        lhs,
        rhs,
        dims,
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=dot_sharding(lhs, rhs, dims),
    )


def _dot_wide(
    lhs: jax.Array,
    rhs: jax.Array,
    contract: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    dtype: Any,
    precision: Any,
) -> jax.Array:
    """One `dot_general` whose result is float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    if jax.default_backend() == "cpu":
        # Inside of a loop XLA's CPU runtime has no product of 16-bit operands with a
        # 32-bit result: "Unsupported element type for DotThunk::Execute" (jax 0.12).
        lhs, rhs = lhs.astype(wide), rhs.astype(wide)
    return _dot(lhs, rhs, contract, batch, wide, precision)


def _compute_dtype(x: jax.Array, kernel: jax.Array) -> Any:
    """The dtype of the skinny products: that of the operands, if it is floating."""
    floating = [v.dtype for v in (x, kernel) if jnp.issubdtype(v.dtype, jnp.inexact)]
    return jnp.result_type(*floating) if floating else jnp.float32


def _shrink(dims: GroupDims, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns the concatenated `a` and `h = x·a` of a group."""
    x = operands.x
    dtype = _compute_dtype(x, operands.kernels[0])
    a = jnp.concatenate([a.astype(dtype) for a in operands.a], axis=-1)
    n_batch = len(dims.batch)
    axes_of_a = range(n_batch, a.ndim - 1)
    h = _dot(
        x,
        a,
        (dims.contract, axes_of_a),
        (dims.batch, range(n_batch)),
        dtype,
        dims.kernels[0].precision,
    )
    return a, h


def _per_kernel(h: jax.Array, operands: Operands) -> list[jax.Array]:
    """Splits a rank-sized value along its last axis, one piece per kernel."""
    ranks = [a.shape[-1] for a in operands.a]
    if len(ranks) == 1:
        return [h]
    return list(lax.split(h, ranks, axis=h.ndim - 1))


def _base(dims: GroupDims, one: KernelDims, x: jax.Array, w: jax.Array) -> jax.Array:
    """The base product, exactly as the program wrote it."""
    pairs = ((dims.contract, one.contract), (dims.batch, one.batch))
    if one.first:
        (xc, wc), (xb, wb) = pairs
        return lax.dot_general(w, x, ((wc, xc), (wb, xb)), **dict(one.params))
    return lax.dot_general(x, w, pairs, **dict(one.params))


def _expand(
    dims: GroupDims, one: KernelDims, h: jax.Array, b: jax.Array, y: jax.Array
) -> jax.Array:
    """Returns `y + s·h·b`, in the dtype and layout of `y`."""
    batch = tuple(range(len(dims.batch)))
    h = h * jnp.asarray(one.scaling, h.dtype)
    b = b.astype(h.dtype)
    lhs, rhs = (b, h) if one.first else (h, b)
    contract = ((lhs.ndim - 1,), (rhs.ndim - 1,))
    delta = lax.dot_general(
        lhs,
        rhs,
        (contract, (batch, batch)),
        precision=one.precision,
        preferred_element_type=y.dtype,
        out_sharding=explicit_sharding(y),
    )
    return y + delta


def _product(dims: GroupDims, operands: Operands) -> list[jax.Array]:
    """The forward pass."""
    _, h = _shrink(dims, operands)
    outputs = []
    each = zip(
        dims.kernels,
        operands.kernels,
        operands.b,
        _per_kernel(h, operands),
        strict=True,
    )
    for one, w, b, h_one in each:
        y = _base(dims, one, operands.x, w)
        outputs.append(_expand(dims, one, h_one, b, y))
    return outputs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _custom_product(dims: GroupDims, operands: Operands) -> list[jax.Array]:
    return _product(dims, operands)


class _Residuals(NamedTuple):
    operands: Operands
    # None for what is not differentiated: a marker that is part of the tree structure,
    # so that no gradient of a frozen kernel is ever formed.
    wants_x: tuple[()] | None
    wants_kernel: tuple[tuple[()] | None, ...]


def _forward(dims: GroupDims, operands: Operands) -> tuple[list[jax.Array], _Residuals]:
    """The forward pass; the residuals are the operands alone."""
    is_primal = lambda v: hasattr(v, "perturbed")
    arrays = jax.tree.map(lambda v: v.value, operands, is_leaf=is_primal)
    mark = lambda v: () if v.perturbed else None
    marks = _Residuals(arrays, mark(operands.x), tuple(map(mark, operands.kernels)))
    return _product(dims, arrays), marks


def _backward(
    dims: GroupDims, residuals: _Residuals, cotangents: Sequence[Any]
) -> tuple[Operands]:
    """The gradients of `x`, `a` and `b`, and of a kernel only where it is asked for.

    With `h = s·x·a` and `g = s·dy·bᵀ`:
    `dx = dy·Wᵀ + g·aᵀ`, `da = xᵀ·g`, `db = hᵀ·dy` (kept as `dyᵀ·h`, rank last).
    """
    operands = residuals.operands
    x = operands.x
    cotangents = [_instantiate(dy) for dy in cotangents]
    a, h = _shrink(dims, operands)
    pieces = _per_kernel(h, operands)
    g, db, dw, dx = [], [], [], None
    for i, (one, dy) in enumerate(zip(dims.kernels, cotangents, strict=True)):
        layout = _Layout.of(dims, one, x, operands.kernels[i])
        scale = jnp.asarray(one.scaling, h.dtype)
        b = operands.b[i]
        g.append(scale * layout.shrink_cotangent(dy, b.astype(h.dtype), h.dtype))
        db.append(layout.grad_b(scale * pieces[i], dy, b))
        if residuals.wants_x is not None:
            part = layout.grad_x(dy, operands.kernels[i], x)
            dx = part if dx is None else dx + part
        wanted = residuals.wants_kernel[i] is not None
        dw.append(layout.grad_kernel(x, dy, operands.kernels[i]) if wanted else None)
    g_all = jnp.concatenate(g, axis=-1)
    layout = _Layout.of(dims, dims.kernels[0], x, operands.kernels[0])
    if dx is not None:
        dx = dx + layout.grad_x_of_delta(g_all, a, x)
    da = _per_kernel(layout.grad_a(x, g_all, a), operands)
    da = tuple(map(_as_type_of, da, operands.a))
    return (Operands(dx, tuple(dw), da, tuple(db)),)


_custom_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _instantiate(cotangent: Any) -> jax.Array:
    """Returns a cotangent as an array; that of an unused output is symbolic."""
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        aval: Any = cotangent
        return jnp.zeros(aval.shape, aval.dtype)
    return cotangent


class _Layout(NamedTuple):
    """The axes of `x`, of the kernel and of `dy`, for the gradient products.

    The base product is laid out `(batch, free of left, free of right)`.
    """

    n_batch: int
    x_batch: Axes
    x_contract: Axes
    x_free: Axes
    w_batch: Axes
    w_contract: Axes
    w_free: Axes
    dy_x: Axes
    dy_w: Axes
    precision: Any

    @classmethod
    def of(
        cls, dims: GroupDims, one: KernelDims, x: jax.Array, w: jax.Array
    ) -> "_Layout":
        n = len(dims.batch)
        x_free = free_axes(x.ndim, dims.contract, dims.batch)
        w_free = free_axes(w.ndim, one.contract, one.batch)
        first, second = (w_free, x_free) if one.first else (x_free, w_free)
        left = tuple(range(n, n + len(first)))
        right = tuple(range(n + len(first), n + len(first) + len(second)))
        dy_x, dy_w = (right, left) if one.first else (left, right)
        return cls(
            n,
            dims.batch,
            dims.contract,
            x_free,
            one.batch,
            one.contract,
            w_free,
            dy_x,
            dy_w,
            one.precision,
        )

    @property
    def batch(self) -> Axes:
        return tuple(range(self.n_batch))

    def shrink_cotangent(self, dy: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        """`dy·bᵀ: (batch, free of x, r)`."""
        free_of_b = range(self.n_batch, b.ndim - 1)
        contract = (self.dy_w, free_of_b)
        return _dot(dy, b, contract, (self.batch, self.batch), dtype, self.precision)

    def grad_b(self, h: jax.Array, dy: jax.Array, b: jax.Array) -> jax.Array:
        """`dyᵀ·h: (batch, free of the kernel, r)`, accumulated in float32."""
        contract = (self.dy_x, range(self.n_batch, h.ndim - 1))
        batch = (self.batch, self.batch)
        db = _dot_wide(dy, h, contract, batch, b.dtype, self.precision)
        return _as_type_of(db, b)

    def grad_a(self, x: jax.Array, g: jax.Array, a: jax.Array) -> jax.Array:
        """`xᵀ·g: (batch, contract, r)`, accumulated in float32."""
        contract = (self.x_free, range(self.n_batch, g.ndim - 1))
        batch = (self.x_batch, self.batch)
        da = _dot_wide(x, g, contract, batch, a.dtype, self.precision)
        # The contracting axes come out in the order of x; a has them in pairs' order.
        order = [sorted(self.x_contract).index(i) for i in self.x_contract]
        n = self.n_batch
        return jnp.transpose(da, (*self.batch, *(n + i for i in order), da.ndim - 1))

    def grad_x(self, dy: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
        """`dy·Wᵀ` in the layout of `x`."""
        contract, batch = (self.dy_w, self.w_free), (self.batch, self.w_batch)
        dx = _dot(dy, w, contract, batch, x.dtype, self.precision)
        ascending = sorted(range(len(self.w_contract)), key=self.w_contract.__getitem__)
        return self._like_x(dx, [self.x_contract[i] for i in ascending], x)

    def grad_x_of_delta(self, g: jax.Array, a: jax.Array, x: jax.Array) -> jax.Array:
        """`g·aᵀ` in the layout of `x`."""
        contract = ((g.ndim - 1,), (a.ndim - 1,))
        dx = _dot(g, a, contract, (self.batch, self.batch), x.dtype, self.precision)
        return self._like_x(dx, list(self.x_contract), x)

    def _like_x(self, dx: jax.Array, contract: list[int], x: jax.Array) -> jax.Array:
        """Lays `(batch, free, contract)` out as `x`."""
        order = [*self.x_batch, *self.x_free, *contract]
        dx = jnp.transpose(dx, [order.index(i) for i in range(x.ndim)])
        return _as_type_of(dx, x)

    def grad_kernel(self, x: jax.Array, dy: jax.Array, w: jax.Array) -> jax.Array:
        """`xᵀ·dy` in the layout of the kernel."""
        contract, batch = (self.x_free, self.dy_x), (self.x_batch, self.batch)
        dw = _dot(x, dy, contract, batch, w.dtype, self.precision)
        ascending = sorted(range(len(self.x_contract)), key=self.x_contract.__getitem__)
        contracted = [self.w_contract[i] for i in ascending]
        order = [*self.w_batch, *contracted, *self.w_free]
        dw = jnp.transpose(dw, [order.index(i) for i in range(w.ndim)])
        return _as_type_of(dw, w)


def _as_type_of(gradient: jax.Array, primal: jax.Array) -> jax.Array:
    """Gives a gradient the dtype (on Explicit meshes the sharding) of its primal."""
    gradient = gradient.astype(primal.dtype)
    sharding = explicit_sharding(primal)
    return gradient if sharding is None else jax.sharding.reshard(gradient, sharding)

"""A group of products that share one operand, and the dot products of its gradients.

Several kernels that contract the same value ("siblings": query, key and value) are one
group, so that `x` is read once for all their skinny products, forward and backward; a
single kernel is a group of one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax import lax

from .._jax.dots import as_type_of, dot, rank_last
from .._jax.dtypes import (
    common,
    product_dtype,
    summands_in,
    workable,
)
from .._jax.sharding import place_of_axes
from .._params.axes import free_axes
from .dropout import Dropout, drop
from .gate import through

Axes = tuple[int, ...]
Form = Literal[
    "separate",
    "singly",
    "extended",
    "joined",
    "copied",
    "tiled",
    "fused",
    "few",
    "grouped",
    "partitioned",
    "ruled",
    "ruled_few",
    "merged",
]


@dataclasses.dataclass(frozen=True)
class KernelDims:
    """How one kernel enters its `dot_general` with the shared operand `x`.

    Attributes:
        contract: the kernel's contracting axes, paired with `GroupDims.contract`.
        batch: the kernel's batch axes, paired with `GroupDims.batch`.
        first: whether the kernel is the left operand.
        scaling: the scaling of its delta.
        params: the other parameters of the equation, as sorted pairs.
        dropout: that of the input of its low-rank branch, if it has any.
    """

    contract: Axes
    batch: Axes
    first: bool
    scaling: float
    params: tuple[tuple[str, Any], ...]
    dropout: Dropout | None = None

    @property
    def precision(self) -> Any:
        """The precision of the base product, used for the low-rank ones too."""
        return dict(self.params)["precision"]

    @property
    def placed(self) -> bool:
        """Whether the program says how the axes of its product lie."""
        return dict(self.params).get("out_sharding") is not None

    def unplaced(self) -> "KernelDims":
        """The same, that does not say it."""
        named = ((n, None if n == "out_sharding" else v) for n, v in self.params)
        return dataclasses.replace(self, params=tuple(named))

    def result_dtype(self, kernel: Any) -> Any:
        """The dtype of the base product, and of its cotangent."""
        return dict(self.params)["preferred_element_type"] or kernel.dtype


@dataclasses.dataclass(frozen=True)
class GroupDims:
    """The axes of the shared operand `x`, and one `KernelDims` per kernel."""

    contract: Axes
    batch: Axes
    kernels: tuple[KernelDims, ...]

    def with_kernels(self, more: tuple[KernelDims, ...]) -> "GroupDims":
        """Returns the group with further kernels."""
        return dataclasses.replace(self, kernels=self.kernels + more)


class Operands(NamedTuple):
    """The arrays of a group; `a: (*batch, *contract, r)`, `b: (*batch, *free, r)`.

    Both have the rank last, as they travel through the program (see `align`). `gates`
    has one entry for each kernel, or none at all: what `x·a` goes through, see `gate`,
    with as many axes as `x·a` has and the rank as the only one that is not 1; or None.
    `words` is likewise: the state of the keys of its dropout, or None.
    """

    x: Any
    kernels: tuple[Any, ...]
    a: tuple[Any, ...]
    b: tuple[Any, ...]
    gates: tuple[Any, ...] = ()
    words: tuple[Any, ...] = ()

    @property
    def drops(self) -> bool:
        """Whether the branch of any kernel has dropout, and so an input of its own."""
        return any(word is not None for word in self.words)

    @property
    def ranks(self) -> list[int]:
        """The rank of each kernel's factors."""
        return [a.shape[-1] for a in self.a]

    @property
    def adapter_axes(self) -> "Operands":
        """What `jax.vmap` maps over where there is an axis of adapters, first."""
        axes: Any = {"x": 0, "kernels": None, "a": 0, "b": 0}
        return self._replace(**axes)


def base_product(
    dims: GroupDims, one: KernelDims, x: jax.Array, w: jax.Array
) -> jax.Array:
    """The base product, exactly as the program wrote it."""
    pairs = ((dims.contract, one.contract), (dims.batch, one.batch))
    if one.first:
        (xc, wc), (xb, wb) = pairs
        return lax.dot_general(w, x, ((wc, xc), (wb, xb)), **dict(one.params))
    return lax.dot_general(x, w, pairs, **dict(one.params))


def compute_dtype(dims: GroupDims, x: Any, kernels: Sequence[Any]) -> Any:
    """The dtype of the skinny products of a group; only dtypes are read."""
    pairs = zip(dims.kernels, kernels, strict=True)
    own = [product_dtype(x.dtype, w.dtype, one.result_dtype(w)) for one, w in pairs]
    return common(*own)


def per_kernel(value: jax.Array, ranks: Sequence[int]) -> list[jax.Array]:
    """Splits a rank-sized value along its last axis, one piece per kernel."""
    if len(ranks) == 1:
        return [value]
    return list(lax.split(value, ranks, axis=value.ndim - 1))


def concatenate(pieces: Sequence[jax.Array]) -> jax.Array:
    """Joins rank-sized values along their last axis."""
    if len(pieces) == 1:
        return pieces[0]
    return lax.concatenate(pieces, pieces[0].ndim - 1)


def dropped(
    dims: GroupDims, operands: Operands, index: int, value: jax.Array
) -> jax.Array:
    """Masks `x` for the branch of a kernel, or its cotangent, which has the same mask.

    The value is laid out as `x` is, and widened: dropout divides by what it keeps.
    """
    words = operands.words[index] if operands.words else None
    dropout = dims.kernels[index].dropout
    if words is None or dropout is None:
        return value
    return drop(value, words, dropout, dims.batch)


def through_gates(operands: Operands, value: jax.Array) -> jax.Array:
    """Returns a rank-sized value of all kernels, each piece through its gate."""
    if all(gate is None for gate in operands.gates):
        return value
    pieces = zip(per_kernel(value, operands.ranks), operands.gates, strict=True)
    return concatenate([through(piece, gate) for piece, gate in pieces])


class Layout(NamedTuple):
    """The axes of `x`, of one kernel and of `dy`, for the gradient products.

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
    def of(cls, dims: GroupDims, one: KernelDims, x: jax.Array, w: Any) -> "Layout":
        """Returns the layout of one kernel of a group; only its rank is read."""
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
        """The batch axes of factors, of rank-sized values and of `dy`."""
        return tuple(range(self.n_batch))

    def shrink_cotangent(self, dy: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        """`dy·bᵀ: (batch, free of x, r)`."""
        free_of_b = range(self.n_batch, b.ndim - 1)
        contract, dy = (self.dy_w, free_of_b), workable(dy, dtype)
        return dot(dy, b, contract, (self.batch, self.batch), dtype, self.precision)

    def grad_b(self, h: jax.Array, dy: jax.Array, b: jax.Array) -> jax.Array:
        """`dyᵀ·h: (batch, free of the kernel, r)`, accumulated in float32."""
        h_rows = range(self.n_batch, h.ndim - 1)
        batch = (self.batch, self.batch)
        return as_type_of(
            rank_last(h, dy, (h_rows, self.dy_x), batch, b.dtype, self.precision), b
        )

    def grad_a(self, x: jax.Array, g: jax.Array, dtype: Any) -> jax.Array:
        """`xᵀ·g: (batch, contract, r)`, accumulated in float32."""
        g_rows = range(self.n_batch, g.ndim - 1)
        batch = (self.batch, self.x_batch)
        da = rank_last(g, x, (g_rows, self.x_free), batch, dtype, self.precision)
        # The contracting axes come out in the order of x; a has them in pairs' order.
        order = [sorted(self.x_contract).index(i) for i in self.x_contract]
        n = self.n_batch
        order = (*self.batch, *(n + i for i in order), da.ndim - 1)
        return lax.transpose(da, order)

    def grad_x(
        self, dy: jax.Array, w: jax.Array, x: jax.Array, dtype: Any
    ) -> jax.Array:
        """`dy·Wᵀ` in the layout of `x`, a summand of its gradient."""
        contract, batch = (self.dy_w, self.w_free), (self.batch, self.w_batch)
        dtype = summands_in(x.dtype, dtype)
        ascending = sorted(range(len(self.w_contract)), key=self.w_contract.__getitem__)
        order = self._order_of_x([self.x_contract[i] for i in ascending])
        # Where examples are mapped over a mesh axis that the kernel has too, the layout
        # of the kernel is none for `dx`: that of `x` is.
        place = place_of_axes(x, order)
        dx = dot(dy, w, contract, batch, dtype, self.precision, place)
        return self._like_x(dx, order, x)

    def grad_x_of_delta(self, g: jax.Array, a: jax.Array, x: jax.Array) -> jax.Array:
        """`g·aᵀ` in the layout of `x`, a summand of its gradient."""
        contract, dtype = ((g.ndim - 1,), (a.ndim - 1,)), summands_in(x.dtype, g.dtype)
        order = self._order_of_x(self.x_contract)
        place, batch = place_of_axes(x, order), (self.batch, self.batch)
        dx = dot(g, a, contract, batch, dtype, self.precision, place)
        return self._like_x(dx, order, x)

    def _order_of_x(self, contract: Sequence[int]) -> list[int]:
        """The axes of `x` as `(batch, free, contract)`."""
        return [*self.x_batch, *self.x_free, *contract]

    def _like_x(self, dx: jax.Array, order: list[int], x: jax.Array) -> jax.Array:
        """Puts axes that are in another order as those of `x` are."""
        return lax.transpose(dx, [order.index(i) for i in range(x.ndim)])

    def like_kernel(self, value: jax.Array, contract: Sequence[int]) -> jax.Array:
        """Lays `(batch, contract, free)` out as the kernel, given the order of axes."""
        order = [*self.w_batch, *contract, *self.w_free]
        return lax.transpose(value, [order.index(i) for i in range(value.ndim)])

    def grad_kernel(self, x: jax.Array, dy: jax.Array, w: jax.Array) -> jax.Array:
        """`xᵀ·dy` in the layout of the kernel."""
        contract, batch = (self.x_free, self.dy_x), (self.x_batch, self.batch)
        dtype = summands_in(w.dtype, product_dtype(x.dtype, w.dtype, dy.dtype))
        dw = dot(x, dy, contract, batch, dtype, self.precision)
        ascending = sorted(range(len(self.x_contract)), key=self.x_contract.__getitem__)
        contracted = [self.w_contract[i] for i in ascending]
        return as_type_of(self.like_kernel(dw, contracted), w)

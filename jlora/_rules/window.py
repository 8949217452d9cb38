"""Convolutions of the low-rank branch: to rank channels, or of a few values a channel.

Their gradients are products and sums, never a convolution whose window slides over a
whole image. XLA's partitioner multiplies the result of such a convolution by the size
of a mesh axis that its operands are not sharded over (jax 0.10.2 to 0.12.0.1): that of
a grouped kernel where the batch is sharded, of any kernel where the image is. A factor
reads few channels or gives few, so that a product costs no more: what it has little of
is laid out once for each tap of the window.
"""

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from .._jax.dots import as_type_of, dot, rank_last
from .._jax.dtypes import summed_in
from .._jax.sharding import explicit_sharding, spec_of, whole_along
from .._jax.versions import manual_axes, vary
from .._params.axes import Shape
from .taps import Reach, dilated, each_tap, placed, spread, turned


class Window(NamedTuple):
    """What is static about one convolution of the low-rank branch.

    The kernel is laid out `(*taps, in, out)`, with the channels of one group.

    Attributes:
        strides, padding, lhs_dilation, rhs_dilation: as `lax` takes them.
        lhs: the axes of the input: batch, channels, then those of space.
        out: the axes of the output, in the same order.
        groups: the number of groups of channels.
        shared: whether all groups have the same kernel, or each its own, which are
            then side by side along its output channels.
        precision: of the base convolution.
        computed: the dtype in which it is computed.
        result: the dtype of the output.
        sharding: of the output, on an Explicit mesh.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    lhs: tuple[int, ...]
    out: tuple[int, ...]
    groups: int
    shared: bool
    precision: Any
    computed: Any
    result: Any
    sharding: Any = None

    @classmethod
    def of(cls, eqn: Any, **settings: Any) -> "Window":
        """Returns the window of a convolution; see the attributes for the settings."""
        params = eqn.params
        dims = params["dimension_numbers"]
        names = ("strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
        own = {name: params[name] for name in names[1:]}
        return cls(
            strides=params["window_strides"],
            lhs=tuple(dims.lhs_spec),
            out=tuple(dims.out_spec),
            groups=params["feature_group_count"],
            **own,
            **settings,
        )

    def along(self, axes: Collection[int]) -> "Window":
        """Returns the window along some axes of space, with one tap along others."""
        kept = lambda own, other: tuple(
            value if i in axes else other for i, value in enumerate(own)
        )
        return self._replace(
            strides=kept(self.strides, 1),
            padding=kept(self.padding, (0, 0)),
            lhs_dilation=kept(self.lhs_dilation, 1),
            rhs_dilation=kept(self.rhs_dilation, 1),
        )

    def turned(self, x: jax.Array, taps: Shape, counts: Shape) -> "Window":
        """Returns the window that takes the cotangent of the output to that of `x`."""
        padding = []
        for i, (k, n) in enumerate(zip(taps, counts, strict=True)):
            reach = (k - 1) * self.rhs_dilation[i]
            low = reach - self.padding[i][0]
            size = x.shape[self.lhs[2 + i]]
            wanted = dilated(size, self.lhs_dilation[i]) + reach
            padding.append((low, wanted - low - dilated(n, self.strides[i])))
        return self._replace(
            strides=self.lhs_dilation,
            padding=tuple(padding),
            lhs_dilation=self.strides,
            lhs=self.out,
            out=self.lhs,
            result=self.computed,
            sharding=explicit_sharding(x),
        )


def convolve(window: Window, x: jax.Array, kernel: jax.Array, derive: str) -> jax.Array:
    """Returns the convolution of `x` with a kernel `(*taps, in, out)`.

    Args:
        window: the convolution.
        x: the input, laid out as `window.lhs` says.
        kernel: a small kernel; see `Window.shared`.
        derive: "custom" for the gradients derived here; "autodiff" computes it by
            products forward too, so that all derivatives are right on every mesh.
    """
    varying = manual_axes(x) | manual_axes(kernel)
    x, kernel = vary(x, varying), vary(kernel, varying)
    if derive == "custom":
        return _convolved(window, x, kernel)
    return _by_products(window, x, kernel)


def _evaluate(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    n = kernel.ndim
    groups = window.groups if window.shared else 1
    kernel = jnp.tile(kernel.astype(window.computed), (1,) * (n - 1) + (groups,))
    return lax.conv_general_dilated(
        x.astype(window.computed),
        kernel,
        window.strides,
        window.padding,
        window.lhs_dilation,
        window.rhs_dilation,
        lax.ConvDimensionNumbers(window.lhs, (n - 1, n - 2, *range(n - 2)), window.out),
        feature_group_count=window.groups,
        precision=window.precision,
        preferred_element_type=window.result,
        out_sharding=window.sharding,
    )


_convolved = jax.custom_vjp(_evaluate, nondiff_argnums=(0,))


def _forward(window: Window, x: jax.Array, kernel: jax.Array) -> tuple[Any, Any]:
    return _convolved(window, x, kernel), (x, kernel)


def _backward(window: Window, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    taps = kernel.shape[:-2]
    counts = tuple(dy.shape[i] for i in window.out[2:])
    flipped = _flipped(window, kernel)
    dx = _convolved(window.turned(x, taps, counts), dy, flipped)
    dk = _kernel_gradient(window, x, dy, kernel)
    return as_type_of(dx, x), as_type_of(dk, kernel)


_convolved.defvjp(_forward, _backward)


def _flipped(window: Window, kernel: jax.Array) -> jax.Array:
    """Returns the kernel that takes the outputs of each group back to its inputs."""
    n = kernel.ndim - 2
    flipped = jnp.flip(kernel, range(n))
    if window.shared:
        return jnp.swapaxes(flipped, n, n + 1)
    apart = _per_group(window, flipped)
    turned = jnp.swapaxes(apart, n, n + 2)
    return turned.reshape(*turned.shape[: n + 1], window.groups * kernel.shape[n])


def _per_group(window: Window, kernel: jax.Array) -> jax.Array:
    """Returns the kernels of all groups as `(*taps, in, groups, out)`."""
    out = kernel.shape[-1] // window.groups
    return kernel.reshape(*kernel.shape[:-1], window.groups, out)


# --- gradients of kernels ---


def _reaches(window: Window, taps: Shape, counts: Shape) -> list[Reach]:
    """Returns, for each axis of space, the entries of `x` that each output meets."""
    rows = zip(taps, window.padding, counts, strict=True)
    return [
        Reach(
            k,
            -low,
            window.rhs_dilation[i],
            window.strides[i],
            window.lhs_dilation[i],
            n,
        )
        for i, (k, (low, _), n) in enumerate(rows)
    ]


def _by_group(value: jax.Array, spec: Sequence[int], groups: int) -> jax.Array:
    """Returns a value as `(batch, *space, groups, channels of a group)`."""
    value = jnp.transpose(value, (spec[0], *spec[2:], spec[1]))
    return value.reshape(*value.shape[:-1], groups, value.shape[-1] // groups)


def _operands(
    window: Window, x: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns both `(batch, *space, groups, channels)`, in the computed dtype."""
    x = _of_whole_space(window, x).astype(window.computed)
    sharding = explicit_sharding(x)
    if sharding is not None:
        spec = [None] * dy.ndim
        spec[window.out[0]] = spec_of(x)[window.lhs[0]]
        dy = jax.sharding.reshard(dy, sharding.update(spec=PartitionSpec(*spec)))
    x = _by_group(x, window.lhs, window.groups)
    return x, _by_group(dy.astype(window.computed), window.out, window.groups)


def _of_whole_space(window: Window, x: jax.Array) -> jax.Array:
    """Returns `x`, on an Explicit mesh sharded along what is neither cut nor split."""
    split = () if window.groups == 1 else (window.lhs[1],)
    return whole_along(x, (*window.lhs[2:], *split))


def _kernel_gradient(
    window: Window, x: jax.Array, dy: jax.Array, kernel: jax.Array
) -> jax.Array:
    """Returns `Σ xᵀ·dy` under each tap, laid out as the kernel, in float32 at least."""
    dtype, taps = summed_in(kernel.dtype, x.dtype, dy.dtype), kernel.shape[:-2]
    x, dy = _operands(window, x, dy)
    if 0 in (*x.shape, *dy.shape):
        return jnp.zeros(kernel.shape, dtype)
    reaches = _reaches(window, taps, dy.shape[1 : len(taps) + 1])
    sums = _shared_sums if window.shared else _own_sums
    return sums(window, x, dy, reaches, dtype).reshape(kernel.shape)


def _shared_sums(
    window: Window, x: jax.Array, dy: jax.Array, reaches: Sequence[Reach], dtype: Any
) -> jax.Array:
    """Sums over all groups too, by one product; `(*taps, in, out)`."""
    n, precision = len(reaches), window.precision
    rows, batch = range(n + 2), ((), ())
    if not _turns(x.shape, dy.shape, n):
        return rank_last(dy, spread(x, reaches), (rows, rows), batch, dtype, precision)
    pairs = zip(reaches, x.shape[1 : n + 1], strict=True)
    dy = spread(dy, [turned(*pair) for pair in pairs])
    dy = dy.reshape(*dy.shape[: n + 2], -1)
    found = rank_last(dy, x, (rows, rows), batch, dtype, precision)
    taps = [reach.taps for reach in reaches]
    return jnp.moveaxis(found.reshape(x.shape[-1], *taps, -1), 0, n)


def _turns(x: Shape, dy: Shape, n: int) -> bool:
    """Whether it is less to lay `dy` out for each tap than `x`."""
    places = lambda sizes: math.prod(sizes[1 : n + 1])
    return places(x) * dy[-1] < places(dy) * x[-1]


def _own_sums(
    window: Window, x: jax.Array, dy: jax.Array, reaches: Sequence[Reach], dtype: Any
) -> jax.Array:
    """Sums of products of each group, no matrices; `(taps, in, groups, out)`."""
    dy = dy.astype(dtype)[..., None, :]
    sums = [
        (piece.astype(dtype)[..., None] * dy).sum(range(len(reaches) + 1))
        for piece in each_tap(x, reaches)
    ]
    return jnp.moveaxis(jnp.stack(sums), 1, 2)


# --- forward, left to autodiff ---


def _by_products(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution by the same products that its gradients are made of."""
    taps, n = kernel.shape[:-2], kernel.ndim - 2
    sizes = tuple(x.shape[i] for i in window.lhs[2:])
    counts = _counts(window, taps, sizes)
    if 0 in (*x.shape, *counts):
        return _evaluate(window, x, kernel)
    kernel, x = kernel.astype(window.computed), x.astype(window.computed)
    x = _by_group(_of_whole_space(window, x), window.lhs, window.groups)
    reaches = _reaches(window, taps, counts)
    run = _shared_products if window.shared else _own_products
    y = run(window, x, kernel, reaches)
    y = y.reshape(*y.shape[: n + 1], -1).astype(window.result)
    axes = (window.out[0], *window.out[2:], window.out[1])
    y = jnp.transpose(y, sorted(range(y.ndim), key=axes.__getitem__))
    return y if window.sharding is None else jax.sharding.reshard(y, window.sharding)


def _counts(window: Window, taps: Shape, sizes: Shape) -> Shape:
    """Returns the number of outputs along each axis of space."""
    counts = []
    for i, (k, size) in enumerate(zip(taps, sizes, strict=True)):
        whole = dilated(size, window.lhs_dilation[i]) + sum(window.padding[i])
        room = whole - dilated(k, window.rhs_dilation[i])
        counts.append(max(room // window.strides[i] + 1, 0))
    return tuple(counts)


def _shared_products(
    window: Window, x: jax.Array, kernel: jax.Array, reaches: Sequence[Reach]
) -> jax.Array:
    n, last, precision = len(reaches), x.ndim - 1, window.precision
    counts = [reach.length for reach in reaches]
    if _turns(x.shape, (x.shape[0], *counts, kernel.shape[-1]), n):
        z = dot(x, kernel, ((last,), (n,)), ((), ()), x.dtype, precision)
        for axis in reversed(range(1, n + 1)):
            z = placed(z, axis, turned(reaches[axis - 1], x.shape[axis]), counts)
        return z
    contract = (range(last, last + n + 1), range(n + 1))
    run = lambda x, kernel: dot(
        spread(x, reaches), kernel, contract, ((), ()), x.dtype, precision
    )
    return jax.checkpoint(run)(x, kernel)


def _own_products(
    window: Window, x: jax.Array, kernel: jax.Array, reaches: Sequence[Reach]
) -> jax.Array:
    wide = summed_in(window.result, x.dtype)
    each = _per_group(window, kernel).astype(wide)
    each = jnp.moveaxis(each.reshape(-1, *each.shape[-3:]), 1, 2)
    lead = (1,) * (len(reaches) + 1)
    pieces = zip(each_tap(x, reaches), each, strict=True)
    terms = [
        (piece.astype(wide)[..., None] * one.reshape(*lead, *one.shape)).sum(-2)
        for piece, one in pieces
    ]
    return functools.reduce(jnp.add, terms)

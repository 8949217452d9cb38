"""The product over the rank channels of a convolution, with its gradients.

The gradient of a factor is summed in float32 at least, as that of a product is.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ._compat import manual_axes, vary
from ._group import as_laid_out, as_type_of, dot, rank_last
from ._sharding import explicit_sharding, spec_of, whole_along


class Mixing(NamedTuple):
    """What is static about the product.

    Attributes:
        axis: the axis of the channels.
        groups: the number of groups of channels.
        precision: of the base convolution.
        result: the dtype of the output.
        sharding: of the output, on an Explicit mesh.
    """

    axis: int
    groups: int
    precision: Any
    result: Any
    sharding: Any


def mix_channels(
    mixing: Mixing, h: jax.Array, b: jax.Array, derive: str
) -> jax.Array:
    """Returns `h·b` over the rank channels of each group; `b: (out, r)`."""
    varying = manual_axes(h) | manual_axes(b)
    run = _mixed if derive == "custom" else _evaluate
    return run(mixing, vary(h, varying), vary(b, varying))


def _evaluate(mixing: Mixing, h: jax.Array, b: jax.Array) -> jax.Array:
    h = _by_group(mixing, h)
    b = _matrices(mixing, b).astype(h.dtype)
    last, axis = h.ndim - 1, h.ndim - 2
    batch = ((axis,), (0,))
    y = dot(h, b, ((last,), (2,)), batch, mixing.result, mixing.precision)
    y = jnp.moveaxis(y, 0, -2)
    y = jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, mixing.axis)
    return y if mixing.sharding is None else jax.sharding.reshard(y, mixing.sharding)


def _by_group(mixing: Mixing, value: jax.Array) -> jax.Array:
    """Returns a value as `(…, groups, channels of a group)`."""
    if mixing.groups > 1:
        value = whole_along(value, [mixing.axis])
    value = jnp.moveaxis(value, mixing.axis, -1)
    size = value.shape[-1] // mixing.groups
    return value.reshape(*value.shape[:-1], mixing.groups, size)


def _matrices(mixing: Mixing, b: jax.Array) -> jax.Array:
    """Returns `b` as `(groups, out of a group, r)`."""
    b = whole_along(b, [0, 1] if mixing.groups > 1 else [1])
    return b.reshape(mixing.groups, b.shape[0] // mixing.groups, b.shape[1])


_mixed = jax.custom_vjp(_evaluate, nondiff_argnums=(0,))


def _forward(mixing: Mixing, h: jax.Array, b: jax.Array) -> tuple[Any, Any]:
    return _mixed(mixing, h, b), (h, b)


def _backward(mixing: Mixing, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    h, b = kept

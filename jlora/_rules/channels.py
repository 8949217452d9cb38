"""The product over the rank channels of a convolution, with its gradients.

The gradient of a factor is summed in float32 at least, as that of a product is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._jax.dots import as_type_of, dot, rank_last
from .._jax.sharding import explicit_sharding, spec_of, whole_along
from .._jax.versions import manual_axes, vary


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


def mix_channels(mixing: Mixing, h: jax.Array, b: jax.Array, derive: str) -> jax.Array:
    """Returns `h·b` over the rank channels of each group; `b: (out, r)`."""
    varying = manual_axes(h) | manual_axes(b)
    run = _mixed if derive == "custom" else _evaluate
    return run(mixing, vary(h, varying), vary(b, varying))


def _evaluate(mixing: Mixing, h: jax.Array, b: jax.Array) -> jax.Array:
    h, b = _by_group(mixing, h), _matrices(mixing, b).astype(h.dtype)
    contract = ((h.ndim - 1,), (b.ndim - 1,))
    y = dot(h, b, contract, _batch(mixing, h, b), mixing.result, mixing.precision)
    return _laid_out(mixing, y)


def _batch(mixing: Mixing, *values: jax.Array) -> Any:
    """Returns the axis of the groups in each value; `b` has it first."""
    if mixing.groups == 1:
        return ((), ())
    h, other = values
    return (h.ndim - 2,), (other.ndim - 2 if other.ndim == h.ndim else 0,)


def _by_group(mixing: Mixing, value: jax.Array) -> jax.Array:
    """Returns a value as `(…, groups, channels)`; one group is no axis."""
    if mixing.groups == 1:
        return jnp.moveaxis(value, mixing.axis, -1)
    value = jnp.moveaxis(whole_along(value, [mixing.axis]), mixing.axis, -1)
    size = value.shape[-1] // mixing.groups
    return value.reshape(*value.shape[:-1], mixing.groups, size)


def _matrices(mixing: Mixing, b: jax.Array) -> jax.Array:
    """Returns `b` as `(groups, out, r)`."""
    if mixing.groups == 1:
        return b
    b = whole_along(b, [0])
    return b.reshape(mixing.groups, b.shape[0] // mixing.groups, b.shape[1])


def _laid_out(mixing: Mixing, y: jax.Array) -> jax.Array:
    """Lays `(groups, …, channels)`, as a product has them, out as the output."""
    if mixing.groups > 1:
        y = jnp.moveaxis(y, 0, -2)
        y = y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])
    y = jnp.moveaxis(y, -1, mixing.axis)
    return y if mixing.sharding is None else jax.sharding.reshard(y, mixing.sharding)


_mixed = jax.custom_vjp(_evaluate, nondiff_argnums=(0,))


def _forward(mixing: Mixing, h: jax.Array, b: jax.Array) -> tuple[Any, Any]:
    return _mixed(mixing, h, b), (h, b)


def _backward(mixing: Mixing, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    h, b = kept
    dy, matrices = dy.astype(h.dtype), _matrices(mixing, b).astype(h.dtype)
    back = mixing._replace(result=h.dtype, sharding=explicit_sharding(h))
    # The product back to the rank channels: the same, with the matrices turned.
    dys, hs = _by_group(mixing, dy), _by_group(mixing, h)
    if mixing.groups == 1:
        matrices = _like_channels(matrices, dys)
    contract = ((dys.ndim - 1,), (matrices.ndim - 2,))
    batch = _batch(mixing, dys, matrices)
    dh = dot(dys, matrices, contract, batch, h.dtype, mixing.precision)
    rows = range(hs.ndim - (1 if mixing.groups == 1 else 2))
    batch = _batch(mixing, hs, dys)
    db = rank_last(hs, dys, (rows, rows), batch, b.dtype, mixing.precision)
    return as_type_of(_laid_out(back, dh), h), as_type_of(db.reshape(b.shape), b)


_mixed.defvjp(_forward, _backward)


def _like_channels(b: jax.Array, dy: jax.Array) -> jax.Array:
    """Shards the output axis of `b: (out, r)` as the channels of `dy` are."""
    sharding = explicit_sharding(dy)
    if sharding is None:
        return b
    spec = PartitionSpec(spec_of(dy)[-1], None)
    return jax.sharding.reshard(b, sharding.update(spec=spec))

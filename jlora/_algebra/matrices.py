"""Factors as matrices, and back; in float32 at least, on the host in float64."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._adapter.factors import LoraFactors
from .._jax.dtypes import widest
from .._jax.sharding import explicit_sharding

Array = Any  # of JAX, or of NumPy: on the host, in float64


# --- dtypes ---


def common_dtype(*arrays: Array) -> Any:
    """Returns the dtype of the arrays if it is one, else the widest."""
    same = len({x.dtype for x in arrays}) == 1
    return arrays[0].dtype if same else widest(*arrays)


# --- matrices ---


def matrices(factors: LoraFactors) -> tuple[Array, Array]:
    """Returns `a (*batch, in, rank)` and `b (*batch, rank, out)`, not scaled.

    In float32 at least. NumPy arrays stay where they are and become float64. On an
    Explicit mesh the axes of the matrices are gathered, and batch axes stay sharded.
    """
    n_batch = len(factors.axes.batch)
    a, b = (_gathered(_wide(x), n_batch) for x in (factors.a, factors.b))
    fan_in, fan_out = factors.axes.fans(factors.kernel_shape)
    batch = a.shape[:n_batch]
    return (
        a.reshape(*batch, fan_in, factors.rank),
        b.reshape(*batch, factors.rank, fan_out),
    )


def with_matrices(factors: LoraFactors, a: Array, b: Array) -> LoraFactors:
    """Returns factors of the same kernel and scaling, from `matrices` of them.

    Dtypes and shardings are those of `factors`; the rank may be another.
    """
    shapes = factors.axes.factor_shapes(factors.kernel_shape, a.shape[-1])
    a, b = (
        _placed(new.reshape(shape).astype(old.dtype), old)
        for new, shape, old in zip((a, b), shapes, (factors.a, factors.b), strict=True)
    )
    return LoraFactors(a, b, factors.axes, factors.scaling)


def batch_placed(values: Array, like: LoraFactors) -> Array:
    """Returns values `(*batch, rank)`, laid out like the batch axes of factors."""
    sharding = _explicit(like.a)
    if sharding is None:
        return values
    spec = PartitionSpec(*tuple(sharding.spec)[: len(like.axes.batch)])
    return jax.sharding.reshard(values, NamedSharding(sharding.mesh, spec))


def replicated(x: Array) -> Array:
    """Returns an array that is whole on each device of an Explicit mesh."""
    return _gathered(x, 0)


def _wide(x: Array) -> Array:
    return x.astype(np.float64 if isinstance(x, np.ndarray) else widest(x))


def _gathered(x: Array, n_batch: int) -> Array:
    sharding = _explicit(x)
    if sharding is None:
        return x
    spec = PartitionSpec(*tuple(sharding.spec)[:n_batch])
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def _placed(x: Array, like: Array) -> Array:
    sharding = _explicit(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def _explicit(x: Array) -> NamedSharding | None:
    return None if isinstance(x, np.ndarray) else explicit_sharding(x)

"""Adapters of two factors each, and nothing else; the factors as matrices.

What is done to ΔW = scaling·a·b by way of its factors is not defined for a leaf that is
trained whole, nor for the magnitude of DoRA: both need the base. Here they are refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._adapter.factors import LoraFactors
from .._errors import AdapterError, UnsupportedFeatureError
from .._jax.dtypes import widest
from .._jax.sharding import explicit_sharding
from .._params.given import described
from .._params.paths import is_array

Array = Any  # of JAX, or of NumPy: on the host, in float64


# --- entries ---


def check_factors(
    caller: str, *adapters: Mapping[str, Any], whole: bool = False
) -> None:
    """Raises if an entry of an adapter is more or other than `a` and `b`.

    Args:
        caller: the function that can treat factors alone.
        *adapters: the adapters.
        whole: whether leaves that are trained whole are welcome.

    Raises:
        TypeError: if an adapter is no mapping.
        UnsupportedFeatureError: with every entry that is refused.
    """
    for adapter in adapters:
        if not isinstance(adapter, Mapping):
            listed = isinstance(adapter, list | tuple)
            several = f": give each by itself, `{caller}(*adapters)`" if listed else ""
            raise TypeError(
                f"`{caller}` takes adapters, dicts from path to `LoraFactors`; got "
                f"{described(adapter)}{several}"
            )
    entries = [item for adapter in adapters for item in adapter.items()]
    told = [_refusal(path, entry, whole) for path, entry in entries]
    found = list(dict.fromkeys(problem for problem in told if problem))
    if found:
        raise UnsupportedFeatureError(
            f"`{caller}` takes entries that are `LoraFactors` of `a` and `b`; leave "
            "these paths out of what you give it:\n" + "\n".join(found)
        )


def _refusal(path: str, entry: Any, whole: bool) -> str | None:
    if isinstance(entry, LoraFactors):
        if entry.magnitude is None:
            return None
        return f"{path!r} has a magnitude (DoRA), which is not linear in ΔW"
    if not is_array(entry):
        return f"{path!r} is of type {type(entry).__name__}"
    told = f"{path!r} {tuple(entry.shape)} is trained whole; its ΔW needs the base"
    return None if whole else told


def by_path(
    caller: str, adapters: Sequence[Mapping[str, LoraFactors]], *, ranks: bool = False
) -> dict[str, dict[int, LoraFactors]]:
    """Returns, for each path of any adapter, its factors by the adapter's number.

    Raises:
        AdapterError: with every path whose kernels (or, if `ranks`, ranks) differ.
    """
    paths = dict.fromkeys(path for adapter in adapters for path in adapter)
    found = {p: {i: x[p] for i, x in enumerate(adapters) if p in x} for p in paths}
    told = [_mismatch(path, entries, ranks) for path, entries in found.items()]
    problems = [problem for problem in told if problem]
    if problems:
        raise AdapterError(f"`{caller}` got unlike adapters:\n" + "\n".join(problems))
    return found


def _mismatch(path: str, entries: dict[int, LoraFactors], ranks: bool) -> str | None:
    kernels = {i: (f.kernel_shape, f.axes) for i, f in entries.items()}
    if len(set(kernels.values())) > 1:
        told = [f"{shape} with {axes} in {i}" for i, (shape, axes) in kernels.items()]
        return f"{path!r} is of a kernel {', '.join(told)}"
    if ranks and len({f.rank for f in entries.values()}) > 1:
        told = [f"{f.rank} in {i}" for i, f in entries.items()]
        return (
            f"{path!r} has rank {', '.join(told)}, and its factors are added one by "
            'one; use method="sum", or `jlora.truncate` them to one rank first'
        )
    return None


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

"""The entry of a target in a new adapter: from its initialiser, or from its leaf."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter.dora import kernel_norm
from .._adapter.entries import SlicedFactors, TrainedRows, taken_rows
from .._adapter.factors import LoraFactors
from .._adapter.initializers import INITIALIZERS, Initializer, Wanted
from .._adapter.rank import capped_rank
from .._adapter.shardings import factor_shardings
from .._errors import TargetError
from .._jax.dtypes import widest
from .._jax.keys import key_of
from .._jax.sharding import set_sharding
from .._params.axes import KernelAxes
from .._params.quantized import arrays_of, dequantized
from .target import Target


def new_entry(key: jax.Array, target: Target, leaf: Any) -> Any:
    """Returns the entry that a target has in a new adapter."""
    config, axes, shapes = target.config, target.axes, target.array_shapes
    if starts_from_leaf := _starts_from_leaf(target):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TargetError(
                f"{target.path!r} {starts_from_leaf} starts from the values of its "
                "leaf; pass the params as arrays, or call `init` under "
                "`jax.eval_shape`"
            )
        leaf = jnp.asarray(dequantized(leaf, target.path))
    if axes is None:
        return leaf.astype(config.dtype)
    if config.rows is not None:
        values = taken_rows(leaf, axes, config.rows).astype(config.dtype)
        return entry_of(target, {"values": values})
    # On an Explicit mesh layouts are part of the types, and the kernel's is known here.
    kernel = set_sharding(arrays_of(leaf)[0])
    places: Any = (None, None)
    if kernel and config.slices is None:
        places = factor_shardings(kernel, axes, shapes["a"], shapes["b"])
    rank = capped_rank(config, axes, target.shape)
    wanted = Wanted(axes, target.shape, rank, config.rank, config.dtype, places)
    make, own_key = INITIALIZERS[config.init], key_of(key, target.path)
    if config.slices is not None:
        a, b = _each_slice(make, own_key, wanted, config.slices)
    else:
        a, b = make(own_key, wanted)
    arrays = {"a": a, "b": b}
    if config.dora:
        # A rounded norm would stretch each output before the first step.
        arrays["magnitude"] = kernel_norm(leaf, axes).astype(widest(a))
    return entry_of(target, arrays)


def _each_slice(
    make: Initializer, key: jax.Array, wanted: Wanted, slices: Sequence[tuple[int, int]]
) -> tuple[jax.Array, jax.Array]:
    """Makes the factors of each slice as those of a kernel of its own."""
    axes, shape = wanted.axes, wanted.shape
    lead = tuple(shape[i] for i in axes.batch + axes.in_)
    n, end = len(axes.batch), len(lead)
    plain = KernelAxes(tuple(range(n)), tuple(range(n, end)), (end,))
    made = [
        make(
            jax.random.fold_in(key, i),
            dataclasses.replace(wanted, axes=plain, shape=(*lead, stop - first)),
        )
        for i, (first, stop) in enumerate(slices)
    ]
    a, b = zip(*made, strict=True)
    return jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=-1)


def _starts_from_leaf(target: Target) -> str | None:
    """Returns what of a target starts from the values of its leaf, if anything."""
    if target.axes is None:
        return "is trained whole and so"
    if target.config.rows is not None:
        return "has rows that are trained whole, each of which"
    return "has DoRA's magnitude, which" if target.config.dora else None


def entry_of(target: Target, arrays: Mapping[str, Any]) -> Any:
    """Returns the entry of a target in an adapter, from its arrays by name."""
    config, axes, shape = target.config, target.axes, target.shape
    if axes is None:
        return arrays["value"]
    if config.rows is not None:
        length = shape[axes.in_[0]]
        return TrainedRows(arrays["values"], tuple(config.rows), length, axes)
    if config.slices is not None:
        out = tuple(shape[i] for i in axes.out)
        static = axes, config.scaling, tuple(config.slices), out
        return SlicedFactors(arrays["a"], arrays["b"], *static)
    return LoraFactors(axes=axes, scaling=config.scaling, **arrays)

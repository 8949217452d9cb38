"""Initialisers that move the base: part of each kernel is handed to its factors.

What they have in common: which entries they take, and that the new kernel is
`W − ΔW`, formed in float32 of the factors as they are stored, and rounded once.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._adapter.check import check_adapter
from .._adapter.factors import Adapter, LoraFactors, delta
from .._adapter.instead import check_order
from .._algebra.matrices import replicated, with_matrices
from .._errors import AdapterError, UnsupportedFeatureError
from .._jax.dtypes import summed_in
from .._jax.sharding import explicit_sharding
from .._params.input_stats import InputStats
from .._params.layout import factor_shardings
from .._params.paths import FlatParams, PyTree, is_array, is_quantized
from .._params.quantized import qtype_of

# `(matrix (*batch, in, out), entry, extra arrays) -> (a (*batch, in, r), b)`.
Split = Callable[..., tuple[jax.Array, jax.Array]]


def move(
    params: PyTree,
    adapter: Mapping[str, Any],
    split: Split,
    settings: Mapping[str, Any],
    extra: Callable[[str], tuple[Any, ...]] = lambda path: (),
) -> tuple[PyTree, Adapter]:
    """Returns params and an adapter in which `split` has given ΔW to the factors.

    Args:
        params: the params.
        adapter: an adapter that `entries` has let pass.
        split: what the factors of a matrix are.
        settings: static settings of `split`, hashable.
        extra: the further arrays that `split` gets, by path.
    """
    flat = FlatParams.of(params)
    leaves, moved, entries = flat.by_path(), {}, dict(adapter)
    static = (split, tuple(sorted(settings.items())))
    for path, entry in entries.items():
        if isinstance(entry, LoraFactors):
            moved[path], entries[path] = in_place(
                _moved, static, leaves[path], entry, *extra(path)
            )
    return flat.replace(moved), entries


def _moved(
    static: Any, kernel: jax.Array, entry: LoraFactors, *extra: Any
) -> tuple[jax.Array, LoraFactors]:
    split, settings = static
    wide = kernel.astype(summed_in(kernel.dtype))
    a, b = split(entry.axes.to_matrix(wide), entry, *extra, **dict(settings))
    new = with_matrices(entry, a, b)
    # The delta of the factors as they are kept: what they lose in rounding stays here.
    rest = wide - delta(new, dtype=wide.dtype)
    return rest.astype(kernel.dtype), new


def matrix_of_a(entry: LoraFactors) -> jax.Array:
    """Returns `a` as `(*batch, in, r)`."""
    n_batch = len(entry.axes.batch)
    return entry.a.reshape(*entry.a.shape[:n_batch], -1, entry.rank)


# --- which entries are taken ---


def check_entries(name: str, params: PyTree, adapter: Mapping[str, Any]) -> None:
    """Raises with every entry that an initialiser cannot treat.

    Leaves that are trained whole are taken, and stay as they are.

    Raises:
        AdapterError: if the adapter does not belong to the params, or has a rank that
            is larger than its kernel, or a kernel is quantised.
        UnsupportedFeatureError: for entries that are no two factors alone.
    """
    check_order(params, adapter, f"The order is `jlora.{name}(params, adapter, ...)`")
    flat = FlatParams.of(params)
    check_plain(name, adapter)
    check_adapter(flat, adapter)
    leaves = flat.by_path()
    problems = [_problem(p, e, leaves[p]) for p, e in adapter.items()]
    if found := [problem for problem in problems if problem]:
        raise AdapterError(f"`jlora.{name}`:\n" + "\n".join(found))


def check_plain(name: str, adapter: Mapping[str, Any]) -> None:
    """Raises with every entry that is neither two factors nor a leaf trained whole.

    Raises:
        TypeError: if these are statistics of inputs, the argument behind the adapter.
        UnsupportedFeatureError: for other entries.
    """
    if any(isinstance(entry, InputStats) for entry in adapter.values()):
        raise TypeError(
            f"`jlora.{name}` takes the adapter before the statistics of `lora.inputs`, "
            "which are given in its place"
        )
    others = [p for p, e in adapter.items() if not (is_array(e) or _is_plain(e))]
    if others:
        raise UnsupportedFeatureError(
            f"`jlora.{name}` sets the two factors of a kernel, and these entries are "
            f"more, or something else: {sorted(others)}. Leave them out of the adapter "
            "that it gets, and put them back into what it returns"
        )


def _is_plain(entry: Any) -> bool:
    return type(entry) is LoraFactors and entry.magnitude is None


def _problem(path: str, entry: Any, leaf: Any) -> str | None:
    if not isinstance(entry, LoraFactors):
        return None
    if is_quantized(leaf):
        return (
            f"{path!r} is quantised ({qtype_of(leaf)}); its values are needed as they "
            "were. Begin with the params before quantising, and quantise what this "
            "returns (`jlora.loftq` on them makes up for the rounding)"
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return f"{path!r} is a shape; its values are needed (or use `jax.eval_shape`)"
    fans = entry.axes.fans(entry.kernel_shape)
    if entry.rank > min(fans):
        return (
            f"{path!r} maps {fans[0]} to {fans[1]} and has a rank of {entry.rank}; "
            f"give it a rank of at most {min(fans)}"
        )
    return None


# --- where it is computed ---


def in_place(
    fn: Callable[..., Any], static: Any, kernel: Any, entry: LoraFactors, *extra: Any
) -> Any:
    """Runs `fn(static, kernel, entry, *extra)`, the results where the operands are.

    `fn` returns a value in the layout of the kernel and an entry. Factors that are not
    on the devices of their kernel are laid out like it.
    """
    operands = (kernel, entry, *extra)
    if any(isinstance(v, Tracer) for v in jax.tree.leaves(operands)):
        return _whole(fn, static, *operands)
    if isinstance(kernel, np.ndarray):
        value, new = _compiled(None)(fn, static, jnp.asarray(kernel), *operands[1:])
        return np.asarray(value), new
    if len(kernel.sharding.device_set) == 1:
        return _compiled(None)(fn, static, *operands)
    return _compiled(_places(kernel, entry))(fn, static, *operands)


def _places(kernel: jax.Array, entry: LoraFactors) -> Any:
    devices = kernel.sharding.device_set
    places = factor_shardings(kernel.sharding, entry.axes, entry.a.shape, entry.b.shape)
    if all(
        isinstance(v, jax.Array) and v.sharding.device_set == devices
        for v in (entry.a, entry.b)
    ):
        places = entry.a.sharding, entry.b.sharding
    return kernel.sharding, LoraFactors(*places, entry.axes, entry.scaling)  # type: ignore[arg-type]


def _compiled(places: Any) -> Callable[..., Any]:
    if places is None:
        return jax.jit(_whole, static_argnums=(0, 1))
    return jax.jit(_whole, static_argnums=(0, 1), out_shardings=places)


def _whole(fn: Callable[..., Any], static: Any, *operands: Any) -> Any:
    """Runs `fn` on replicated operands if the mesh is Explicit: a QR is not sharded."""
    kernel, entry = operands[:2]
    if explicit_sharding(kernel) is None:
        return fn(static, *operands)
    value, new = fn(static, *jax.tree.map(replicated, operands))
    like: Any = factor_shardings(
        jax.typeof(kernel).sharding, entry.axes, new.a.shape, new.b.shape
    )
    a, b = map(jax.sharding.reshard, (new.a, new.b), like)
    value = jax.sharding.reshard(value, jax.typeof(kernel).sharding)
    return value, LoraFactors(a, b, new.axes, new.scaling)


Matrices = tuple[jax.Array, jax.Array]


def check_count(name: str, value: Any, least: int) -> None:
    """Raises ValueError if a number is no int, or too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an int of at least {least}, got {value!r}")

"""The door to Qwix: quantised leaves of params, and their shardings.

`jlora.quantize` opens it. `jlora.lora` takes quantised params as they are; nothing else
of jlora needs Qwix.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.core import Tracer
from jax.sharding import NamedSharding

from ._jax.sharding import explicit_sharding
from ._params.layout import AnyMesh, Layout, Rules, fitting
from ._params.paths import FlatParams, PyTree, is_array, is_quantized


def shardings(
    params: PyTree,
    kernels: PyTree,
    *,
    mesh: AnyMesh | None = None,
    rules: Rules | None = None,
) -> PyTree:
    """Returns the shardings of quantised params, from those of the kernels.

    The codes are laid out as the kernel is, scales and zero points as well where the
    mesh divides the tiles along an axis.

    Args:
        params: the quantised params or their shapes:
            `jax.eval_shape(lambda p: jlora.quantize(p, plan), params)`.
        kernels: the layout of the params that are not quantised, as `jlora.shardings`
            takes it.
        mesh: as for `jlora.shardings`.
        rules: as for `jlora.shardings`.

    Returns:
        A tree in the structure of `params`, for `jax.device_put`, `out_shardings` or
        for restoring.

    Raises:
        ValueError: if the sharding of a leaf is not known, or does not fit.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.quant
        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((1,), ("model",), (AxisType.Auto,))
        >>> params = jlora.quantize({"w": jnp.ones((6, 8))}, "w", "int8")
        >>> placed = jlora.quant.shardings(params, {"w": P(None, "model")}, mesh=mesh)
        >>> params = jax.device_put(params, placed)
        >>> tuple(params["w"].scale.sharding.spec)
        (None, 'model')
    """
    layout = Layout.of(kernels, mesh=mesh, rules=rules)
    flat = FlatParams.of(params)
    placed: dict[str, Any] = {}
    for path, leaf in flat.by_path().items():
        if is_array(leaf):
            place = layout.sharding(path, len(leaf.shape))
            placed[path] = _each(leaf, lambda v, p=place: fitting(p, v.shape))
    return flat.replace(placed)


def quantize_leaf(
    leaf: Any, qtype: str, tiles: Mapping[int, int], dtype: Any = None
) -> Any:
    """Returns one leaf quantised; `jlora.quantize` does that to a whole tree.

    Args:
        leaf: an array, also a sharded one, or its `jax.ShapeDtypeStruct`.
        qtype: as Qwix takes it.
        tiles: the size of a tile along each axis where it is not one.
        dtype: the dtype of the scales; by default that of the leaf.
    """
    run: Any = functools.partial(_quantize, qtype=qtype, tiles=tiles, dtype=dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return _abstract(run, leaf)
    if place := explicit_sharding(leaf):  # tiles are cut where they lie
        run = jax.sharding.auto_axes(run, out_sharding=_places(run, leaf, place))
    if isinstance(leaf, Tracer):
        return run(leaf)
    place = getattr(leaf, "sharding", None)
    if place is None or len(place.device_set) == 1:
        return jax.jit(run)(leaf)  # stays where it is, committed or not
    if explicit_sharding(leaf):
        return jax.jit(run)(leaf)
    return jax.jit(run, out_shardings=_places(run, leaf, place))(leaf)


def _quantize(
    array: jax.Array, *, qtype: str, tiles: Mapping[int, int], dtype: Any
) -> qwix.QArray:
    if array.dtype.itemsize < 4:  # scales are found in float32 and rounded once
        dtype, array = dtype or array.dtype, array.astype(jnp.float32)
    single = [i for i in range(array.ndim) if i not in tiles]
    return qwix.quantize(
        array, qtype, tiled_axes=tiles, channelwise_axes=single, scale_dtype=dtype
    )


def _places(run: Any, leaf: Any, place: Any) -> Any:
    """Returns the shardings of a quantised leaf."""
    abstract = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return _each(jax.eval_shape(run, abstract), lambda v: fitting(place, v.shape))


def _abstract(run: Any, leaf: jax.ShapeDtypeStruct) -> Any:
    found = jax.eval_shape(run, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    if not isinstance(leaf.sharding, NamedSharding):
        return found
    placed = lambda v: jax.ShapeDtypeStruct(
        v.shape, v.dtype, sharding=fitting(leaf.sharding, v.shape)
    )
    return _each(found, placed)


def _each(leaf: Any, place: Any) -> Any:
    """Does the same to each array of a leaf."""
    if not is_quantized(leaf):
        return place(leaf)
    arrays = {"qvalue": place(leaf.qvalue), "scale": place(leaf.scale)}
    if leaf.zero_point is not None:
        arrays["zero_point"] = place(leaf.zero_point)
    return dataclasses.replace(leaf, **arrays)

"""The door to Qwix: quantised leaves of params, and their shardings.

`jlora.quantize` opens it. `jlora.lora` takes quantised params as they are; nothing else
of jlora needs Qwix.

Orbax saves quantised params, but for those in nf4: its codes are uint4, which Orbax
does not write. `pack` makes bytes of them, two codes each, and `unpack` codes again,
onto whatever mesh they are restored to:

    saver.save(folder, jlora.quant.pack(params))
    shapes = jax.eval_shape(lambda: params)     # with the shardings that are wanted now
    found = saver.restore(folder, jlora.quant.pack(shapes))
    params = jlora.quant.unpack(found, shapes)

An adapter is saved beside its base by `jlora.checkpoint`, of any base.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding

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


def pack(params: PyTree) -> PyTree:
    """Returns params whose codes of four bits are bytes, two codes in each.

    The pairs are neighbours along the last axis that has an even size; without one a
    byte has one code. What is no quantised leaf of uint4 stays as it is.

    Args:
        params: the params, or their shapes: those of the packed ones then, with
            shardings that follow those of the codes.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.quant
        >>> params = jlora.quantize({"w": jnp.ones((6, 8))}, "w", "nf4")
        >>> jlora.quant.pack(params)["w"].qvalue.dtype.name
        'uint8'
        >>> jlora.quant.pack(params)["w"].qvalue.shape
        (6, 4)
    """
    flat = FlatParams.of(params)
    return flat.replace({path: _packed(leaf) for path, leaf in flat.by_path().items()})


def unpack(packed: PyTree, params: PyTree) -> PyTree:
    """Returns the params that `pack` made bytes of.

    Args:
        packed: what `pack` returned, restored onto any mesh.
        params: the quantised params or their shapes, such as
            `jax.eval_shape(lambda p: jlora.quantize(p, plan), params)`.

    Returns:
        Params in the structure of `params`, to the bit those that were packed. Codes
        are laid out as those of `params` are, if their shardings are known.

    Raises:
        ValueError: if `packed` is not what `pack` returns of such params.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.quant
        >>> params = jlora.quantize({"w": jnp.ones((6, 8))}, "w", "nf4")
        >>> again = jlora.quant.unpack(jlora.quant.pack(params), params)
        >>> bool((again["w"].qvalue == params["w"].qvalue).all())
        True
    """
    flat, found = FlatParams.of(params), FlatParams.of(packed)
    if flat.paths != found.paths:
        differ = sorted({*flat.paths} ^ {*found.paths}) or ["their order"]
        raise ValueError(f"`unpack`: the trees are not alike: {differ[:5]}")
    leaves = found.by_path()
    pairs = {path: (leaves[path], like) for path, like in flat.by_path().items()}
    return flat.replace({path: _unpacked(path, *pair) for path, pair in pairs.items()})


def _is_in_pairs(leaf: Any) -> bool:
    return is_quantized(leaf) and leaf.qvalue.dtype == jnp.uint4


def _paired_axis(shape: tuple[int, ...]) -> int | None:
    """Returns the axis along which two codes become a byte."""
    even = [axis for axis, size in enumerate(shape) if size and size % 2 == 0]
    return even[-1] if even else None


def _packed(leaf: Any) -> Any:
    if not _is_in_pairs(leaf):
        return leaf
    return dataclasses.replace(leaf, qvalue=_moved(_bytes_of, leaf.qvalue))


def _unpacked(path: str, leaf: Any, like: Any) -> Any:
    if not _is_in_pairs(like):
        return leaf
    wanted = jax.eval_shape(_bytes_of, _struct(like.qvalue))
    given = getattr(leaf, "qvalue", leaf)
    has = getattr(given, "shape", None), getattr(given, "dtype", None)
    if has != (wanted.shape, wanted.dtype):
        raise ValueError(
            f"`unpack`: {path!r} has codes {has}, and packed ones of such a leaf are "
            f"{wanted.shape} {wanted.dtype}; give what `jlora.quant.pack` returned"
        )
    run = functools.partial(_codes_of, shape=tuple(like.qvalue.shape))
    codes, place = _moved(run, given), getattr(like.qvalue, "sharding", None)
    if isinstance(place, NamedSharding) and isinstance(codes, jax.Array):
        if not isinstance(codes, Tracer) and isinstance(place.mesh, Mesh):
            codes = jax.device_put(codes, place)
    return dataclasses.replace(leaf, qvalue=codes)


def _bytes_of(codes: jax.Array) -> jax.Array:
    axis, wide = _paired_axis(codes.shape), codes.astype(jnp.uint8)
    if axis is None:
        return wide
    split = (*codes.shape[:axis], codes.shape[axis] // 2, 2, *codes.shape[axis + 1 :])
    low, high = jnp.moveaxis(wide.reshape(split), axis + 1, 0)
    return low | (high << 4)


def _codes_of(packed: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    axis = _paired_axis(shape)
    if axis is None:
        return packed.astype(jnp.uint4)
    both = jnp.stack([packed & 15, packed >> 4], axis + 1)
    return both.reshape(shape).astype(jnp.uint4)


def _moved(run: Any, array: Any) -> Any:
    """Returns an array in another packing, laid out along the same mesh axes."""
    place = getattr(array, "sharding", None)
    to = jax.eval_shape(run, _struct(array))
    if isinstance(array, jax.ShapeDtypeStruct):
        place = fitting(place, to.shape) if isinstance(place, NamedSharding) else None
        return jax.ShapeDtypeStruct(to.shape, to.dtype, sharding=place)
    if explicit := explicit_sharding(array):
        run = jax.sharding.auto_axes(run, out_sharding=fitting(explicit, to.shape))
        return run(array) if isinstance(array, Tracer) else jax.jit(run)(array)
    if isinstance(array, Tracer) or place is None or len(place.device_set) == 1:
        return run(array)
    return jax.jit(run, out_shardings=fitting(place, to.shape))(array)


def _struct(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


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

"""A quantised kernel: what is stored, and how it is made dense.

A value of the kernel is `(code(qvalue) - zero_point) * scale`, where one scale serves a
tile: scale and zero point have the axes of the kernel, each of its full size, of the
number of tiles along it, or of size 1. This is what `qwix.QArray` holds; here it is
known by its fields, so that qwix need not be imported.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from .._errors import UnsupportedFeatureError
from .._jax.sharding import explicit_sharding, names_of_entry, spec_of
from .axes import KernelAxes, Shape
from .paths import is_quantized

# The 16 quantiles of "NormalFloat", Dettmers et al., QLoRA, Appendix E,
# <https://arxiv.org/abs/2305.14314>, 2023.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
# What `jlora.quantize` makes; of these the code of a value is the value itself, but for
# nf4. Block formats (mxfp4, nvfp4) want tiles of their own and are read only.
QTYPES = ("nf4", *_INTEGERS, "float8_e4m3fn", "float8_e5m2")
KNOWN = (*QTYPES, "mxfp8", "mxfp4", "nvfp4", "float4_e2m1fn")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """The arrays of a quantised value, aligned with its axes.

    Attributes:
        qvalue: the codes, in the shape of the value.
        scale: one number per tile, in the dtype that the value has when dense.
        zero_point: the code of zero, one per tile; None if that is zero.
        qtype: the name of the code.
    """

    qvalue: Any
    scale: Any
    zero_point: Any
    qtype: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, path: str, leaf: Any) -> "Quantized":
        """Returns what a `qwix.QArray` holds.

        Raises:
            UnsupportedFeatureError: if its qtype is unknown or its arrays do not fit.
        """
        found = cls(leaf.qvalue, leaf.scale, leaf.zero_point, qtype_of(leaf))
        if problem := _problem(found):
            raise UnsupportedFeatureError(f"the quantised leaf {path!r} {problem}")
        return found

    @property
    def shape(self) -> Shape:
        """The shape of the dense value."""
        return tuple(self.qvalue.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the dense value."""
        return self.scale.dtype

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def each(self, move: Callable[[Any], Any]) -> "Quantized":
        """Returns the value with each of its arrays moved."""
        zero = None if self.zero_point is None else move(self.zero_point)
        return Quantized(move(self.qvalue), move(self.scale), zero, self.qtype)

    def dense(self) -> jax.Array:
        """Returns the value itself, in the dtype of its scale."""
        value = _decoded(self.qvalue, self.qtype).astype(self.scale.dtype)
        if self.zero_point is not None:
            value = _tiled(jnp.subtract, value, self.zero_point.astype(value.dtype))
        return _tiled(jnp.multiply, value, self.scale)


def qtype_of(leaf: Any) -> str:
    """Returns the name of the code of a `qwix.QArray`."""
    qtype = leaf.qvalue.dtype if leaf.qtype is None else leaf.qtype
    return qtype if isinstance(qtype, str) else jnp.dtype(qtype).name


def arrays_of(leaf: Any) -> tuple[Any, ...]:
    """Returns the arrays of a leaf: one, or those that a quantised one consists of."""
    if not is_quantized(leaf):
        return (leaf,)
    arrays = (leaf.qvalue, leaf.scale, leaf.zero_point)
    return tuple(v for v in arrays if v is not None)


def dequantized(leaf: Any, path: str = "") -> Any:
    """Returns a quantised leaf as an array; any other leaf is returned as it is.

    Abstract ones stay abstract.
    """
    if not is_quantized(leaf):
        return leaf
    value = Quantized.of(path, leaf)
    if isinstance(value.qvalue, jax.ShapeDtypeStruct):
        return jax.eval_shape(Quantized.dense, value)
    traced = any(isinstance(v, Tracer) for v in jax.tree.leaves(value))
    # Compiled, so that no more than the result is formed.
    return value.dense() if traced else jax.jit(Quantized.dense)(value)


def _problem(value: Quantized) -> str | None:
    """Says what is wrong with a quantised value, if anything is."""
    if value.qtype not in KNOWN:
        return (
            f"has the qtype {value.qtype!r}; known are {', '.join(KNOWN)}. Quantise it "
            "with `jlora.quantize`"
        )
    if not jnp.issubdtype(value.scale.dtype, jnp.floating):
        return f"has scales of {value.scale.dtype}, which are not floating"
    for name in ("scale", "zero_point"):
        array = getattr(value, name)
        if array is not None and not _tiles(tuple(array.shape), value.shape):
            return (
                f"{value.shape} has a {name} of shape {tuple(array.shape)}, which is "
                "not one per tile: each axis must divide that of the kernel"
            )
    return None


def _tiles(tiles: Shape, shape: Shape) -> bool:
    pairs = zip(shape, tiles, strict=False)
    return len(tiles) == len(shape) and all(t and n % t == 0 for n, t in pairs)


def _decoded(codes: jax.Array, qtype: str) -> jax.Array:
    return _nf4(codes) if qtype == "nf4" else codes


@jax.jit
def _nf4(codes: jax.Array) -> jax.Array:
    """Returns the quantiles of 4-bit codes, from a table that the program makes.

    An array of them would be a captured constant of every program.
    """
    table = lax.concatenate([lax.full((1,), v, jnp.float32) for v in NF4], 0)
    return table.at[codes.astype(jnp.int32)].get(
        mode="promise_in_bounds", out_sharding=explicit_sharding(codes)
    )


def _tiled(
    combine: Callable[[Any, Any], jax.Array], value: jax.Array, tiles: jax.Array
) -> jax.Array:
    """Combines a value with one number per tile."""
    split, ones = [], []
    for n, t in zip(value.shape, tiles.shape, strict=True):
        apart = t not in (1, n)  # of symbolic sizes it can be told what is equal
        split += [t, n // t] if apart else [n]
        ones += [t, 1] if apart else [t]
    if len(split) == value.ndim:
        return combine(value, tiles)
    sharding = explicit_sharding(value)
    laid = lambda x, sizes: _reshaped(x, sizes, _as_tiles(sharding, value, sizes))
    return _reshaped(
        combine(laid(value, split), laid(tiles, ones)), value.shape, sharding
    )


def _reshaped(value: jax.Array, sizes: Sequence[int], sharding: Any) -> jax.Array:
    return lax.reshape(value, tuple(sizes), out_sharding=sharding)


def _as_tiles(sharding: Any, value: jax.Array, sizes: Sequence[int]) -> Any:
    """Returns how a value with some of its axes split in tiles is laid out.

    On an Explicit mesh a sharded axis stays so if each shard has tiles of its own.
    """
    if sharding is None:
        return None
    entries: list[Any] = []
    for n, entry in zip(value.shape, spec_of(value), strict=True):
        n_tiles = sizes[len(entries)]
        apart = n_tiles not in (1, n)
        entries += [_dividing(sharding.mesh, entry, n_tiles)] + [None] * apart
    return sharding.update(spec=PartitionSpec(*entries))


def _dividing(mesh: Any, entry: Any, size: int) -> Any:
    parts = math.prod(mesh.shape[name] for name in names_of_entry(entry))
    return entry if size % parts == 0 else None


# --- the tiles that `quantize` makes ---


def tile_sizes(
    shape: Sequence[int], axes: KernelAxes, tile: int | None, *, rows: bool
) -> Mapping[int, int]:
    """Returns the size of a tile along each axis of which it takes more than one value.

    A tile takes up to `tile` values along the input axes, the last one first, and a
    single one along the others: so each slice of a stack has scales of its own. Along
    an axis that `tile` does not divide it takes the largest divisor below. With `rows`
    (a table that is looked up) it runs along the output axes: a row has its own scales.
    """
    sizes, left = {}, tile or math.prod(shape)
    for axis in reversed(axes.out if rows else axes.in_):
        size = next(
            n for n in range(min(left, shape[axis]), 0, -1) if not shape[axis] % n
        )
        if size > 1:
            sizes[axis] = size
        if size < shape[axis]:
            break
        left //= size
    return sizes

"""Digests of arrays that may be spread over devices and hosts: a base, an adapter.

Nothing is gathered. Each process reads what its own devices hold, and what it found is
put together with what the others found, so a digest does not depend on the sharding.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from .._params.axes import Shape
from .._params.paths import FlatParams, is_array, is_quantized, nearest
from .._params.quantized import arrays_of, qtype_of

SAMPLES = 256  # values of a kernel that its digest looks at, about
SMALL = 1 << 20  # bytes that are sooner copied than a program is compiled
CHUNK = 1 << 20  # values of an adapter that are hashed at once


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is known of one leaf of the base.

    Attributes:
        shape: its shape.
        dtype: the name of its dtype; None if the base was not given.
        samples: a digest of some of its values; None if they were not given.
    """

    shape: Shape
    dtype: str | None = None
    samples: str | None = None


def fingerprint(base: Any, paths: Iterable[str]) -> dict[str, Kernel]:
    """Returns what identifies the leaves of `base` at `paths`, those that are there.

    Args:
        base: the params: arrays, also those of other hosts, or their shapes alone.
        paths: the paths of the leaves.

    Example:
        >>> base = {"w": np.ones((2, 3), np.float32), "c": np.ones(3)}
        >>> fingerprint(base, ["w"])["w"].dtype
        'float32'
    """
    leaves = FlatParams.of(base).by_path()
    found = {path: leaves[path] for path in paths if is_array(leaves.get(path))}
    pieces = {(p, i): v for p, x in found.items() for i, v in enumerate(arrays_of(x))}
    concrete = [
        piece
        for piece, array in pieces.items()
        if not isinstance(array, jax.ShapeDtypeStruct)
    ]
    digests: dict[str, str] = {}
    sampled = _sampled([pieces[piece] for piece in concrete])
    for (path, _), digest in zip(concrete, sampled, strict=True):
        # Of a quantised kernel those of its codes and of its scales, joined.
        digests[path] = digests.get(path, "") + digest
    return {
        path: Kernel(tuple(leaf.shape), _dtype(leaf), digests.get(path))
        for path, leaf in found.items()
    }


def _dtype(leaf: Any) -> str:
    """Returns the name of a dtype; of a quantised leaf how it is quantised as well."""
    name = np.dtype(leaf.dtype).name
    return f"{qtype_of(leaf)} of {name}" if is_quantized(leaf) else name


def differences(
    recorded: Mapping[str, Kernel], found: Mapping[str, Kernel], paths: Sequence[str]
) -> list[str]:
    """Returns a line for each leaf that is another one, of what is known of both."""
    lines = []
    for path, kernel in recorded.items():
        if path in found:
            lines.extend(_difference(path, kernel, found[path]))
        else:
            near = ", ".join(map(repr, nearest(path, paths)))
            lines.append(f"{path!r} {kernel.shape} is missing. Nearest: {near}")
    return lines


def _difference(path: str, recorded: Kernel, found: Kernel) -> list[str]:
    if recorded.shape != found.shape:
        return [f"{path!r} has shape {found.shape}, and had {recorded.shape}"]
    if None not in (recorded.dtype, found.dtype) and recorded.dtype != found.dtype:
        return [f"{path!r} has dtype {found.dtype}, and had {recorded.dtype}"]
    known = None not in (recorded.samples, found.samples)
    if known and recorded.samples != found.samples:
        return [f"{path!r} {found.shape} has other values than it had"]
    return []


# --- some values of a kernel ---


def _sampled(arrays: Sequence[Any]) -> list[str]:
    """Returns a digest of some values of each array, in float32."""
    if not arrays:
        return []
    parts = [_samples(array) for array in arrays]
    values = np.concatenate([values for values, _ in parts])
    known = np.concatenate([known for _, known in parts])
    all_values, all_known = _gathered(values), _gathered(known)
    # A replicated value is the same on every process that holds it: take any.
    holder = np.argmax(all_known, axis=0)
    whole = np.take_along_axis(all_values, holder[None], axis=0)[0].astype("<u4")
    ends = np.cumsum([len(values) for values, _ in parts])[:-1]
    digests = [hashlib.sha256(one.tobytes()) for one in np.split(whole, ends)]
    return [digest.hexdigest()[:32] for digest in digests]


def _samples(array: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bits of the sampled values, and which of them are held here."""
    shape = tuple(array.shape)
    size = math.prod(shape)
    # An odd stride walks through all columns of a kernel whose sizes are even.
    flat = np.arange(0, size, (size // SAMPLES) | 1)
    places = np.unravel_index(flat, shape) if shape else ()
    values = np.zeros(len(flat), np.float32)
    known = np.zeros(len(flat), np.uint32)
    for start, piece in _pieces(array):
        if known.all():
            break
        inside = np.ones(len(flat), bool)
        local = []
        for place, first, extent in zip(places, start, piece.shape, strict=True):
            inside &= (first <= place) & (place < first + extent)
            local.append(np.clip(place - first, 0, extent - 1))
        # All places, also those outside: so one program serves all pieces.
        picked = _picked(piece, tuple(local)).astype(np.float32)
        values = np.where(inside, picked, values)
        known[inside] = 1
    return values.view(np.uint32), known


def _picked(piece: Any, places: tuple[np.ndarray, ...]) -> np.ndarray:
    if not isinstance(piece, jax.Array) or piece.nbytes <= SMALL:
        return np.asarray(piece)[places]
    # A mesh that the caller has set has other devices than the one of this piece.
    (device,) = piece.devices()
    with jax.set_mesh(Mesh(np.array([device]), ("one",))):
        return np.asarray(piece[places])


# --- all values of an adapter ---


@dataclasses.dataclass(frozen=True)
class Content:
    """A checksum of all bits of an array, and how many of its values are not finite."""

    checksum: str
    nonfinite: int


def contents(arrays: Sequence[Any]) -> list[Content]:
    """Returns a checksum of each array that does not depend on its sharding.

    It is a sum, modulo 2⁶⁴, of a hash of each value's bits and place. Any change of a
    single value alters it.

    Args:
        arrays: arrays of floating dtypes.
    """
    own = np.zeros((len(arrays), 3), np.uint32)
    for i, array in enumerate(arrays):
        total, nonfinite = 0, 0
        for start, piece in _pieces(array, once=True):
            hashed, bad = _hash(np.asarray(piece), start, tuple(array.shape))
            total, nonfinite = (total + hashed) % 2**64, nonfinite + bad
        own[i] = total % 2**32, total // 2**32, nonfinite
    everyone = _gathered(own)
    found = []
    for i, array in enumerate(arrays):
        mine = not isinstance(array, jax.Array) or array.is_fully_addressable
        rows = own[None, i] if mine else everyone[:, i]
        low, high, nonfinite = (int(n) for n in rows.astype(object).sum(axis=0))
        found.append(Content(f"{(low + (high << 32)) % 2**64:016x}", nonfinite))
    return found


def _hash(values: np.ndarray, start: Shape, shape: Shape) -> tuple[int, int]:
    """Returns the sum of the hashes of a piece, and how many are not finite."""
    values = np.ascontiguousarray(np.atleast_1d(values))
    start, shape = start or (0,), shape or (1,)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    rest = np.zeros((1,) * values.ndim, np.uint64)
    for axis in range(1, values.ndim):
        along = (start[axis] + np.arange(values.shape[axis])) * strides[axis]
        rest = rest + _along(along, axis, values.ndim)
    rows = max(1, CHUNK // max(1, math.prod(values.shape[1:])))
    total, nonfinite = 0, 0
    for row in range(0, len(values), rows):
        part = values[row : row + rows]
        first = (start[0] + row + np.arange(len(part))) * strides[0]
        place = rest + _along(first, 0, values.ndim)
        bits = part.view(f"u{part.dtype.itemsize}").astype(np.uint64)
        total += int(_mixed(bits, place).sum(dtype=np.uint64))
        nonfinite += int(part.size - np.count_nonzero(np.isfinite(part)))
    return total % 2**64, nonfinite


def _along(values: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    shape = [1] * ndim
    shape[axis] = len(values)
    return values.astype(np.uint64).reshape(shape)


def _mixed(bits: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Returns a hash of each value; for one place, different bits differ in it.

    The finalizer of SplitMix64: Steele et al., Fast Splittable Pseudorandom Number
    Generators, <https://doi.org/10.1145/2660193.2660195>, 2014.
    """
    x = bits + (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- arrays in pieces ---


def _pieces(array: Any, *, once: bool = False) -> Iterator[tuple[Shape, Any]]:
    """Yields the different pieces of an array that are held here, and their starts.

    With `once`, a piece that several processes hold is yielded by one of them alone.
    """
    if not isinstance(array, jax.Array):
        yield (0,) * np.ndim(array), np.asarray(array)
        return
    seen = set()
    for shard in array.addressable_shards:
        pairs = zip(shard.index, array.shape, strict=True)
        start = tuple(part.indices(size)[0] for part, size in pairs)
        if start not in seen and not (once and shard.replica_id):
            seen.add(start)
            yield start, shard.data


def _gathered(values: np.ndarray) -> np.ndarray:
    """Returns the values of all processes, one more axis in front."""
    if jax.process_count() == 1:
        return values[None]
    return np.asarray(multihost_utils.process_allgather(values, tiled=False))

"""How XLA has divided arrays among devices, said by the axes of a mesh.

A partitioning rule is told tiles of devices. They may follow a part of an axis of the
mesh: rows that lie along four devices, seen as two microbatches, lie along two and two.
JAX's own reading of tiles stops there (0.10 to 0.12), so axes are split first.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

Entries = tuple[tuple[str, ...] | None, ...]


def read_tiles(
    mesh: Mesh, shardings: Sequence[Any], ndims: Sequence[int]
) -> tuple[Mesh, list[Entries] | None]:
    """Returns a mesh of the same devices, and how arrays lie on it.

    Args:
        mesh: the mesh of the program; an empty one is that of all devices in a row.
        shardings: of the arrays, on the same devices.
        ndims: how many axes each array has.

    Returns:
        The mesh, its axes split into prime factors, and for each array the axes of the
        mesh along which each of its own is divided. None where they cannot say it.
    """
    pairs = list(zip(shardings, ndims, strict=True))
    if mesh.empty:
        one, ndim = pairs[0]
        devices = list(one.devices_indices_map((one.num_devices,) * ndim))
        mesh = Mesh(np.array(devices), ("all",))
    split = mesh
    for split in _splits(mesh):
        found = [_entries(split, sharding, ndim) for sharding, ndim in pairs]
        if all(one is not None for one in found):
            return split, [one for one in found if one is not None]
    return split, None


def _splits(mesh: Mesh) -> list[Mesh]:
    """The mesh with axes of prime sizes, the smaller ones first and last."""
    made = []
    for largest_first in (False, True):
        factors = {
            name: sorted(_factors(size), reverse=largest_first)
            for name, size in mesh.shape.items()
        }
        names = [f"{n}.{i}" for n, sizes in factors.items() for i in range(len(sizes))]
        sizes = itertools.chain.from_iterable(factors.values())
        made.append(Mesh(mesh.devices.reshape(tuple(sizes)), tuple(names)))
    return made


def _factors(size: int) -> list[int]:
    """The prime factors of a number.

    >>> _factors(12), _factors(1)
    ([2, 2, 3], [])
    """
    for p in range(2, size + 1):
        if size % p == 0:
            return [p, *_factors(size // p)]
    return []


def _entries(mesh: Mesh, sharding: Any, ndim: int) -> Entries | None:
    """Reads off where the tile of each device begins, in an array that all divide."""
    tiles = sharding.devices_indices_map((mesh.size,) * ndim)
    starts = np.array(
        [[s.start or 0 for s in tiles[device]] for device in mesh.devices.flat]
    ).reshape(*mesh.devices.shape, ndim)
    along: list[list[tuple[int, int, str]]] = [[] for _ in range(ndim)]
    rest = starts
    for k, (name, size) in enumerate(mesh.shape.items()):
        step = starts[tuple(int(i == k) for i in range(mesh.devices.ndim))]
        for axis in np.flatnonzero(step):
            along[axis].append((int(step[axis]), size, name))
        counts = np.arange(size).reshape(
            [-1 if i == k else 1 for i in range(rest.ndim)]
        )
        rest = rest - counts * step
    if rest.any():  # no sum of steps along axes
        return None
    entries: list[tuple[str, ...] | None] = []
    for steps in along:
        steps.sort(reverse=True)
        left = mesh.size
        for step, size, _ in steps:
            left //= size
            if step != left:  # not one axis within the next
                return None
        entries.append(tuple(name for *_, name in steps) or None)
    return tuple(entries)

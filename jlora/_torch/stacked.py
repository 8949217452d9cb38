"""From the factors at each index of a leaf's batch axes to those of the whole leaf."""

import dataclasses
from collections import Counter
from collections.abc import Mapping

import numpy as np

from .._errors import AdapterError, UnsupportedFeatureError
from .modules import TorchModule

Index = tuple[int, ...]


def check_fit(
    path: str,
    shape: tuple[int, ...],
    fans: tuple[int, int],
    batch: Index,
    modules: Mapping[Index, TorchModule],
) -> None:
    """Raises if factors are at no index of the leaf, or not of its fans."""
    outside = sorted(set(modules) - set(np.ndindex(batch)))
    if outside:
        raise AdapterError(
            f"{path!r} {shape} has the batch axes {batch}; the file has factors for "
            f"{outside[:5]} along them"
        )
    for index, module in modules.items():
        given = (module.a.shape[0], module.b.shape[1])
        if given != fans:
            hint = "; they look transposed" if given == fans[::-1] else ""
            at = f" at {index}" if index else ""
            raise AdapterError(
                f"{path!r} {shape}{at} maps {fans[0]} to {fans[1]}, and the factors in "
                f"the file {given[0]} to {given[1]}{hint}"
            )


def stack(
    modules: Mapping[Index, TorchModule], batch: Index
) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the stacked factors of all indices, and their common scaling.

    Where the file has none, both factors are zero: no delta, and no gradient either.
    Ranks are padded likewise, and where scalings differ `b` takes the difference.
    """
    if not batch:
        (module,) = modules.values()
        return module.a, module.b, module.scaling
    scaling = Counter(module.scaling for module in modules.values()).most_common(1)[0][
        0
    ]
    rank = max(module.rank for module in modules.values())
    some = next(iter(modules.values())).padded_to(rank)
    none = dataclasses.replace(some.zeros(some.b.shape[1]), scaling=scaling)
    full = {
        i: module.scaled_to(scaling).padded_to(rank) for i, module in modules.items()
    }
    every = [full.get(index, none) for index in np.ndindex(batch)]
    a, b = np.stack([p.a for p in every]), np.stack([p.b for p in every])
    return a.reshape(*batch, *a.shape[1:]), b.reshape(*batch, *b.shape[1:]), scaling


def stacked_magnitude(
    path: str, modules: Mapping[Index, TorchModule], batch: Index
) -> np.ndarray | None:
    """Returns the magnitudes of all indices; without one an index has no meaning."""
    known = {i: p.magnitude for i, p in modules.items() if p.magnitude is not None}
    if not known:
        return None
    missing = [index for index in np.ndindex(batch) if index not in known]
    if missing:
        raise UnsupportedFeatureError(
            f"{path!r} has DoRA's magnitudes in the file, but none at {missing[:5]} "
            "along its batch axes; a stack has them for all of its layers"
        )
    stacked = np.stack([known[index] for index in np.ndindex(batch)])
    return stacked.reshape(*batch, -1)

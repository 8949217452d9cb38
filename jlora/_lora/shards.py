"""DoRA's kernels that enter `lora.apply` inside of a shard_map: what their norms need.

The norm of an output is over all inputs of the kernel. Types tell along which mesh axes
an array differs, and not whether it was cut there or gathered: whoever calls says it.
"""

from collections.abc import Mapping
from typing import Any

import jax

from .._adapter.entries import arrays_of
from .._adapter.factors import LoraFactors
from .._errors import UnsupportedFeatureError
from .._jax.versions import manual_axes
from .._params.given import listed
from .._params.paths import FlatParams, matching

Cuts = dict[str, tuple[str, ...]]
# From patterns of paths to the mesh axes, one or several or none, of each kernel.
InputShards = Mapping[str, str | tuple[str, ...]] | None


def input_cuts(
    params: FlatParams, adapter: Mapping[str, Any], given: InputShards
) -> Cuts:
    """Returns the mesh axes along which the inputs of each DoRA kernel are cut.

    Where `a` is the same along an axis, the inputs are not cut along it.

    Args:
        params: the params as they are given.
        adapter: the adapter.
        given: `lora_input_shards` of `Lora.apply`.

    Raises:
        TypeError: if `given` is no mapping from patterns to names of axes.
        UnsupportedFeatureError: if the inputs of a kernel may be cut and nobody says.
        ValueError: if a pattern names no DoRA kernel, or an axis is none of its own.
    """
    told = _told(given)
    scaled = [
        path for path, entry in adapter.items() if "magnitude" in arrays_of(entry)
    ]
    axes: dict[str, tuple[str, ...]] = {}
    problems = []
    for pattern, names in told.items():
        found = matching(pattern, scaled)
        if not found:
            problems.append(
                f"{pattern!r} names no kernel with DoRA; those are {scaled}"
            )
        axes |= {path: names for path in found if path not in axes}
    leaves = params.by_path()
    for path, names in axes.items():
        varies = _varies(leaves[path])
        if varies and (others := sorted({*names} - varies)):
            problems.append(
                f"{path!r} is the same along {others}; it differs along "
                f"{sorted(varies)}"
            )
    if problems:
        raise ValueError(f"`lora_input_shards`: {listed(problems)}")
    for path in scaled:
        problems += _in_doubt(path, leaves[path], adapter[path], axes.get(path))
    if problems:
        raise UnsupportedFeatureError("\n".join(problems))
    return axes


def _told(given: InputShards) -> Cuts:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            "`lora_input_shards` is a mapping from patterns of paths to mesh axes, as "
            f'`{{"down": "model", "up": ()}}`, got {given!r}'
        )
    told = {p: (v,) if isinstance(v, str) else v for p, v in given.items()}
    wrong = {
        p: v
        for p, v in told.items()
        if not isinstance(v, tuple) or not all(isinstance(name, str) for name in v)
    }
    if wrong:
        raise TypeError(
            "`lora_input_shards` gives each pattern the name of a mesh axis, or a "
            f"tuple of names, got {wrong}"
        )
    return told


def _varies(leaf: Any) -> frozenset[str]:
    return frozenset().union(*map(manual_axes, jax.tree.leaves(leaf)))


def _in_doubt(path: str, leaf: Any, entry: Any, told: Any) -> list[str]:
    """Returns what is to be said of a kernel that may be a part of a larger one."""
    varies = _varies(leaf)
    if not isinstance(entry, LoraFactors):
        if not varies and not told:
            return []
        return [
            f"{path!r} has DoRA's magnitude for some of its outputs or layers, and is "
            f"one of the shards along {sorted(varies | {*(told or ())})}; call "
            "`lora.apply` outside of `jax.shard_map`, which may stand inside of the "
            "adapted function"
        ]
    doubtful = sorted(varies & manual_axes(entry.a))
    if told is not None or not doubtful:
        return []
    axis = doubtful[0]
    return [
        f"{path!r}, a DoRA kernel of shape {leaf.shape}, enters `lora.apply` as one of "
        f"the shards along {doubtful}; its norm is that of all inputs. Say whether "
        f'they are cut: `lora_input_shards={{"{path}": "{axis}"}}`, or `()` for one '
        "whose inputs are whole on each device; or call `lora.apply` outside of "
        "`jax.shard_map`, which may stand inside of the adapted function"
    ]

"""Leaves that PEFT trains whole, under the names and in the layouts of Flax."""

import numpy as np

from .._torch.alone import ParamsAlone, path_of


def add_whole(params: ParamsAlone, key: str, tensor: np.ndarray) -> None:
    """Adds a leaf that is trained whole, with the name that Flax gives it.

    Args:
        params: what to add it to.
        key: its name in the file, without PEFT's prefix.
        tensor: its values, as torch has them.
    """
    name = key.replace(".base_layer.", ".")
    owner, _, last = name.rpartition(".")
    path = path_of(owner, _flax_name(last, tensor.ndim)) if owner else path_of(name)
    path = path_of(name) if path in params.shapes else path
    if path == path_of(owner, "kernel"):
        params.add(path, tensor.shape[::-1], tensor.dtype, owner)
    else:
        params.add(path, tensor.shape, tensor.dtype, name, "parameter")


def _flax_name(last: str, ndim: int) -> str:
    """Returns what the mechanical map takes back to torch's name of a leaf."""
    if last == "weight":
        return {1: "scale", 2: "kernel"}.get(ndim, last)
    return {"running_mean": "mean", "running_var": "var"}.get(last, last)

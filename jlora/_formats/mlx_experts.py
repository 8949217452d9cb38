"""Experts in MLX's adapters: a module has all of a layer, and torch calls each its own.

MLX calls the module `switch_mlp.up_proj` and keeps its weight as `(experts, out, in)`.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

from .._errors import UnsupportedFeatureError
from .._params.axes import KernelAxes
from .._torch.modules import TorchModule
from .._torch.named_params import Base
from .._torch.names import Binding
from .mlx_files import MlxFiles

EXPERTS = KernelAxes((0,), (1,), (2,))

# The modules that hold packed experts.
_PACKING = ("switch_mlp", "switch_glu", "experts")
# What torch calls the parts of an expert in some models.
_PARTS = {
    "gate_proj": ("w1",), "up_proj": ("w3",), "down_proj": ("w2",),
    "fc1": ("up_proj",), "fc2": ("down_proj",),
}  # fmt: skip

# --- as modules ---


def of_module(name: str, files: MlxFiles) -> list[TorchModule]:
    """Returns the experts of a module, one by one."""
    pairs = zip(*files.experts[name], strict=True)
    return [
        TorchModule(name, a, b, files.scaling, expert=number)
        for number, (a, b) in enumerate(pairs)
    ]


def of_entry(entry: Any) -> list[TorchModule]:
    """Returns the experts of a kernel, one by one."""
    a, b = np.asarray(entry.a), np.asarray(entry.b)
    return [TorchModule("", *pair, entry.scaling) for pair in zip(a, b, strict=True)]


def is_packed(path: str, entry: Any) -> bool:
    """Returns whether an entry is that of experts, as MLX calls them."""
    below = path.split("/")[-3:-2]
    axes = getattr(entry, "axes", None)
    return below != [] and below[0] in _PACKING and axes == EXPERTS


# --- their places ---


def with_experts(base: Base, names: Collection[str]) -> Base:
    """Returns params in which some modules have an axis of experts.

    No family has experts under MLX's names, but paths may be these names.
    """
    bindings = dict(base.bindings)
    for name in names:
        for home in base.homes(f"{name}.weight"):
            bindings[home.path] = _as_parameter(bindings[home.path])
    return dataclasses.replace(base, bindings=bindings)


def _as_parameter(binding: Binding) -> Binding:
    """Returns the binding of a weight as that of a parameter that packs experts."""
    slots = [
        dataclasses.replace(slot, template=binding.parameter(slot.template))
        for slot in binding.slots
    ]
    steps = {**binding.steps, "experts": None}
    return dataclasses.replace(binding, slots=tuple(slots), steps=steps)


def named_in(names: Collection[str], files: MlxFiles) -> list[TorchModule]:
    """Returns each expert as a module under the name that it has in a base.

    Args:
        names: those of the base's tensors.
        files: the adapter.

    Raises:
        UnsupportedFeatureError: if torch has no name for some, and the base has not
            MLX's.
    """
    own = {name for name in files.experts if f"{name}.weight" in names}
    strange = [n for n in files.experts if n not in own and _inside(n) not in _PACKING]
    if strange:
        raise UnsupportedFeatureError(
            f"{files.where} has packed experts, {strange[:3]}, in none of "
            f"{list(_PACKING)}: torch's names for them are not known; merge the "
            "adapter by mlx-lm's `fuse`, or into a base that MLX saved, which has "
            f"{strange[0]}.weight"
        )
    return [
        dataclasses.replace(
            module,
            # Of a base with MLX's names it is one of several in a weight.
            name=f"{name}.{module.expert}"
            if name in own
            else _name_in_torch(name, module.expert, names),
            expert=None,
        )
        for name in files.experts
        for module in of_module(name, files)
    ]


def _inside(name: str) -> str:
    """Returns the last name but one: of what a part is a part of."""
    return name.split(".")[-2:-1][0] if "." in name else ""


def _name_in_torch(name: str, number: int | None, names: Collection[str]) -> str:
    """Returns what torch calls an expert's part.

    The experts of a layer are `experts` there, and those that are packed on disk are
    known by the same names.
    """
    inside, _, part = name.rpartition(".")
    layer = inside.rpartition(".")[0]
    owner = f"{layer.removesuffix('.experts')}.experts"
    others = [n for n in _PARTS.get(part, ()) if f"{owner}.0.{n}.weight" in names]
    return f"{owner}.{number}.{next(iter(others), part)}"

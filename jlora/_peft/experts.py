"""Adapted parameters, such as packed experts: PEFT's `target_parameters`.

A module several of whose parameters are adapted is wrapped once for each, and the
factors of all but the outermost are below `base_layer`.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from .._errors import AdapterError
from .._torch.modules import TorchModule
from .._torch.named_params import Base
from .config import PeftConfig
from .keys import warn_of_doubling

# --- reading ---


def parameters_of(
    modules: Mapping[str, TorchModule], config: PeftConfig, base: Base
) -> list[TorchModule]:
    """Returns the factors by module or, for `target_parameters`, by parameter.

    A module several of whose parameters are adapted is wrapped once for each, in the
    order in which the module defines them: the last is outermost, and the others are
    below `base_layer`.
    """
    wrapped: dict[str, dict[int, TorchModule]] = defaultdict(dict)
    found = []
    for module, tensors in modules.items():
        inner = module
        while inner.endswith(".base_layer"):
            inner = inner.removesuffix(".base_layer")
        if _parameters(inner, config, base):
            wrapped[inner][(len(module) - len(inner)) // len(".base_layer")] = tensors
        else:
            outer, _, inside = module.partition(".base_layer.")
            name = f"{outer}.{inside}" if inside else module
            if inside:
                warn_of_doubling(name)
            brought_by = outer if inside else ""
            found.append(dataclasses.replace(tensors, name=name, brought_by=brought_by))
    for module, by_depth in wrapped.items():
        names = _parameters(module, config, base)
        if sorted(by_depth) != list(range(len(names))):
            raise AdapterError(
                f"{module!r} has factors for {len(by_depth)} parameters; the config "
                f"names {names}"
            )
        order = [by_depth[depth] for depth in range(len(names))][::-1]
        pairs = zip(names, order, strict=True)
        found += [dataclasses.replace(m, name=name) for name, m in pairs]
    return found


def _parameters(module: str, config: PeftConfig, base: Base) -> list[str]:
    """Returns the adapted parameters of a module, in the order of the rules."""
    if not config.target_parameters:
        return []
    names: dict[str, int] = {}
    for path, binding in base.bindings.items():
        if "experts" in binding.steps:
            for _, name in base.names_of(path):
                if name.rpartition(".")[0] == module and config.selects_parameter(name):
                    names.setdefault(name, binding.order)
    return sorted(names, key=names.__getitem__)


def unpacked(module: TorchModule, n: int) -> list[TorchModule]:
    """Returns each of the `n` experts that a parameter packs.

    Raises:
        AdapterError: if the factors are not those of so many.
    """
    a, b = module.lora_a, module.lora_b
    if a.shape[0] % n or b.shape[1] % n:
        raise AdapterError(
            f"{module.name!r}: {a.shape} and {b.shape} are no factors of {n} experts"
        )
    a, b = a.reshape(n, -1, a.shape[1]), b.reshape(b.shape[0], -1, n)
    plain = dataclasses.replace(module, window=())
    return [
        dataclasses.replace(plain, a=a[e].T, b=b[:, :, e].T, expert=e) for e in range(n)
    ]


# --- writing ---


def packed(experts: Sequence[TorchModule]) -> tuple[np.ndarray, np.ndarray]:
    """Returns `lora_A (E·r, in)` and `lora_B (out, r·E)`, rank by rank."""
    a, b = [one.lora_a for one in experts], [one.lora_b for one in experts]
    if len(experts) == 1:
        return a[0], b[0]
    return np.concatenate(a), np.stack(b, -1).reshape(b[0].shape[0], -1)


def nesting(modules: Sequence[TorchModule]) -> dict[str, str]:
    """Returns where PEFT puts the factors of parameters: the last is outermost."""
    by_owner: dict[str, list[TorchModule]] = {}
    for module in modules:
        if module.is_parameter and not module.expert:  # the first stands for all
            by_owner.setdefault(module.name.rpartition(".")[0], []).append(module)
    places = {
        m.name: f"{m.owner}.base_layer{m.name.removeprefix(m.owner)}"
        for m in modules
        if m.brought_by
    }
    for owner, several in by_owner.items():
        ordered = sorted(several, key=_order, reverse=True)
        for depth, module in enumerate(ordered):
            places[module.name] = owner + ".base_layer" * depth
    return places


def _order(module: TorchModule) -> int:
    return module.binding.order if module.binding else 0

"""From the tensors of a PEFT adapter to a jlora adapter."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._adapter.config import LoraConfig
from .._adapter.factors import LoraFactors
from .._adapter.variants.layers import of_layers
from .._errors import AdapterError, UnsupportedFeatureError
from .._torch.assemble import Assembly
from .._torch.configs import configs_of
from .._torch.modules import TorchModule
from .._torch.named_params import Base
from .._torch.names import Binding
from .config import PeftConfig
from .experts import parameters_of, unpacked
from .keys import check_dora
from .lora_bias import read_lora_biases
from .whole import read_whole


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """What the files of an adapter hold, by the names of torch's modules.

    Attributes:
        config: what the config says.
        modules: the factors; their scalings the config has.
        whole: the tensors that are no factors.
        where: the name of the file, for messages.
        fan_in_fan_out: whether torch's weights are `(in, out)`.
        scalings: those that jlora noted, to the last bit.
    """

    config: PeftConfig
    modules: Mapping[str, TorchModule]
    whole: Mapping[str, np.ndarray]
    where: str
    fan_in_fan_out: bool = False
    scalings: Mapping[str, float] = dataclasses.field(default_factory=dict)


def adapter_of(files: AdapterFiles, base: Base) -> dict[str, Any]:
    """Returns the adapter in some files, in the order of the params, on the host.

    Raises:
        AdapterError: with everything that does not fit the params or the config.
    """
    factors: dict[str, Any] = {**read_factors(files, base)}
    if files.config.layers_to_transform is not None:
        own = files.config.layers_to_transform
        factors = {path: of_layers(entry, own) for path, entry in factors.items()}
    whole = read_whole(files.whole, files.modules, files.config, base, files.where)
    biases = read_lora_biases(
        files.modules, files.whole, files.config, base, files.where
    )
    both = {**factors, **whole, **biases}
    return {path: both[path] for path in base.leaves if path in both}


def configured_adapter(
    files: AdapterFiles, base: Base
) -> tuple[LoraConfig | tuple[LoraConfig, ...], dict[str, Any]]:
    """Returns the configs and the adapter in some files, on the host.

    Raises:
        AdapterError: as `adapter_of`.
    """
    entries, config = adapter_of(files, base), files.config
    configs = configs_of(
        entries,
        base,
        alphas={config.lora_alpha, *config.alpha_pattern.values()},
        rslora=config.use_rslora,
        dropout=config.lora_dropout,
    )
    return configs, entries


def read_factors(files: AdapterFiles, base: Base) -> dict[str, LoraFactors]:
    """Returns the factors by path.

    Raises:
        AdapterError: with everything that does not fit the params or the config.
    """
    assembly = Assembly(base)
    modules = parameters_of(files.modules, files.config, base)
    heads = _tied_heads(modules, files.config, base)
    for module in modules:
        if module.name not in heads:
            with assembly.noting():
                homes = assembly.homes(module)
                binding = base.bindings[homes[0].path]
                for one in _as_configured(module, binding, files, base):
                    assembly.place(one, homes)
    assembly.problems += _not_selected(assembly.owners, files.config)
    assembly.problems += _missing(assembly.owners, files.config, base)
    return assembly.factors(files.where)


def _tied_heads(
    modules: Sequence[TorchModule], config: PeftConfig, base: Base
) -> set[str]:
    """Returns the modules that repeat the factors of a table, which jlora has once.

    Raises:
        UnsupportedFeatureError: if the two differ, or only the lookup is adapted.
    """
    by_name = {module.name: module for module in modules}
    heads = set()
    for path, binding in base.bindings.items():
        head, table = binding.steps.get("tied"), by_name.get(binding.slots[0].template)
        if head is None or not (table or head in by_name):
            continue
        other = by_name.get(head)
        same = (
            table is not None
            and other is not None
            and np.array_equal(other.a, table.b.T)
            and np.array_equal(other.b, table.a.T)
        )
        if not (config.ensure_weight_tying and same):
            raise UnsupportedFeatureError(
                f"{path!r} is a table and torch's {head!r}, which have one delta in "
                f"jlora; the file adapts {'both, unlike' if other and table else 'one'}"
                ". Train it in PEFT with `ensure_weight_tying=True`, never one "
                "alone, or load it into params that are not tied"
            )
        heads.add(head)
    return heads


# --- what the config says of a module ---


def _as_configured(
    module: TorchModule, binding: Binding, files: AdapterFiles, base: Base
) -> list[TorchModule]:
    """Returns a module with its scaling; of packed experts each.

    Raises:
        AdapterError: if the config contradicts its factors.
        UnsupportedFeatureError: if PEFT means something else than jlora.
    """
    axes = base.experts(binding.path)
    plain = len(base.shape(binding.path)) == binding.n_fields + 2
    if axes is not None:
        each = unpacked(module, base.shape(binding.path)[axes[0]])
    elif plain and {"experts", "fan_in_fan_out"} <= set(binding.steps):
        # A parameter of two axes has no idea which is the input.
        each = [dataclasses.replace(module, a=module.b.T, b=module.a.T)]
    else:
        each = [module]
    return [_checked(one, binding, files) for one in each]


def _checked(module: TorchModule, binding: Binding, files: AdapterFiles) -> TorchModule:
    name, config, rank = module.name, files.config, module.rank
    if module.window and rank != module.b.shape[0]:
        raise UnsupportedFeatureError(
            f"{name!r} is a convolution with groups: PEFT's factors of ranks {rank} "
            f"and {module.b.shape[0]} cross them, and it cannot merge them"
        )
    module.check_ranks()
    expected = config.rank(module.owner)
    if rank != expected:
        raise AdapterError(
            f"{name!r} has factors of rank {rank}, and the config says {expected}"
        )
    scaling = files.scalings.get(module.owner)
    if scaling is None:
        scaling = config.scaling(module.owner, rank)
    if (module.magnitude is not None) != config.use_dora:
        has = "no magnitude" if module.magnitude is None else "a magnitude"
        raise AdapterError(
            f"{name!r} has {has}, and the config says that `use_dora` is "
            f"{config.use_dora}"
        )
    if config.use_dora:
        check_dora(binding.steps, name)
    return dataclasses.replace(module, scaling=scaling)


# --- what the config selects, and what the file holds ---


def _not_selected(owners: Mapping[str, str], config: PeftConfig) -> list[str]:
    """Returns the modules that the file adapts and the config does not."""
    return [
        f"{name!r} has factors, and the config does not select it"
        for name, owner in sorted(owners.items())
        if not (config.selects(owner) or config.selects_parameter(name))
    ]


def _missing(owners: Mapping[str, str], config: PeftConfig, base: Base) -> list[str]:
    """Returns what the config selects and the file does not adapt."""
    problems = []
    for path, binding in base.bindings.items():
        is_module = "experts" not in binding.steps and base.is_kernel(path)
        for _, parameter in base.names_of(path):
            chosen = [parameter] if config.selects_parameter(parameter) else []
            module = parameter.rpartition(".")[0] if is_module else ""
            if module and module not in owners and not config.all_linear:
                chosen += [module] if config.selects(module) else []
            problems += [
                f"the config selects {name!r} ({path!r}), and the file has no factors "
                "for it"
                for name in chosen
                if name not in owners
            ]
    return problems

"""From the tensors of a PEFT adapter to a jlora adapter."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from .._adapter.config import LoraConfig
from .._adapter.factors import LoraFactors
from .._adapter.variants.layers import of_layers
from .._errors import AdapterError, UnsupportedFeatureError
from .._params.paths import nearest
from .._torch.assemble import Assembly
from .._torch.configs import configs_of
from .._torch.modules import TorchModule
from .._torch.named_params import Base
from .._torch.names import Binding
from .config import PeftConfig
from .experts import parameters_of, unpacked
from .keys import check_dora
from .lora_bias import read_lora_biases
from .relatives import fitted
from .rows import read_rows
from .scales import scales_of
from .sides import NO_VERSION, Version, exchanged, refuse_square
from .tables import check_head
from .whole import read_whole


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """What the files of an adapter hold, by the names of torch's modules.

    Attributes:
        config: what the config says.
        modules: the factors; their scalings the config has.
        whole: the tensors that are no factors.
        where: the name of the file, for messages.
        rows: new rows of tables, by module.
        fan_in_fan_out: whether torch's weights are `(in, out)`.
        scalings: those that jlora noted, to the last bit.
        version: the release of PEFT that wrote them, if they say.
        exchanged: of parameters of experts, whether `lora_A` is at the outputs, where
            it is known already.
    """

    config: PeftConfig
    modules: Mapping[str, TorchModule]
    whole: Mapping[str, np.ndarray]
    where: str
    fan_in_fan_out: bool = False
    rows: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    scalings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    version: Version | None = None
    exchanged: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    kind: str = "LORA"


def without(files: AdapterFiles, left_out: Collection[str]) -> AdapterFiles:
    """Returns the files without some modules, such as a vision tower.

    Args:
        files: what the files hold.
        left_out: names of modules, or runs of whole parts of names.

    Raises:
        ValueError: if one is no name.
        AdapterError: if nothing in the files is in one of them.
    """
    if isinstance(left_out, str) or not all(left_out):
        raise ValueError(f"`leave_out` is a list of names, got {left_out!r}")
    config = dataclasses.replace(files.config, left_out=tuple(left_out))
    names = [*files.modules, *files.whole, *files.rows]
    for one in left_out:
        alone = dataclasses.replace(config, left_out=(one,))
        if not any(map(alone.is_left_out, names)):
            raise AdapterError(
                f"{files.where} has nothing in {one!r}, which `leave_out` names; the "
                f"nearest of its names: {nearest(one, names)}"
            )
    kept = lambda found: {n: v for n, v in found.items() if not config.is_left_out(n)}
    parts = {part: kept(getattr(files, part)) for part in ("modules", "whole", "rows")}
    return dataclasses.replace(files, config=config, **parts)


def adapter_of(files: AdapterFiles, base: Base) -> dict[str, Any]:
    """Returns the adapter in some files, in the order of the params, on the host.

    Raises:
        AdapterError: with everything that does not fit the params or the config.
    """
    factors: dict[str, Any] = {**read_factors(files, base)}
    if files.kind == "IA3":
        factors = {**scales_of(factors)}
    if files.config.layers_to_transform is not None:
        own = files.config.layers_to_transform
        factors = {path: of_layers(entry, own) for path, entry in factors.items()}
    whole = read_whole(files.whole, files.modules, files.config, base, files.where)
    biases = read_lora_biases(
        files.modules, files.whole, files.config, base, files.where
    )
    rows = read_rows(files.rows, files.config, base, files.where)
    check_head(whole, files.whole, files.config, base)
    if twice := sorted(set(rows) & {*factors, *whole}):
        raise AdapterError(f"{files.where} has rows of {twice[:5]}, and all of it, too")
    both = {**factors, **whole, **biases, **rows}
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
    sides = {**exchanged(modules, files.version, base), **files.exchanged}
    files = dataclasses.replace(files, exchanged=sides)
    for module in modules:
        if module.name not in heads:
            with assembly.noting():
                homes = assembly.homes(module)
                binding = base.bindings[homes[0].path]
                module = fitted(module, files.kind, homes, base)
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
        if module.name not in files.exchanged:
            refuse_square([module.name], NO_VERSION, files.where)
        if files.exchanged[module.name]:
            each = [dataclasses.replace(m, a=m.b.T, b=m.a.T) for m in each]
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
    if rank != expected and not config.decided_by_keys("r", "rank_pattern"):
        raise AdapterError(
            f"{name!r} has factors of rank {rank}, and the config says {expected}"
        )
    scaling = files.scalings.get(module.owner)
    if scaling is None:
        scaling = config.scaling(module.owner, rank)
    told = config.use_dora or config.decided_by_keys("use_dora")
    plain = module.magnitude is None
    if (plain and config.use_dora) or not (plain or told):
        has = "no magnitude" if plain else "a magnitude"
        raise AdapterError(
            f"{name!r} has {has}, and the config says that `use_dora` is "
            f"{config.use_dora}"
        )
    if module.magnitude is not None:
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

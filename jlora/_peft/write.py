"""From a jlora adapter to the tensors of a PEFT adapter, and what its config says."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._adapter.config import LoraConfig
from .._adapter.factors import LoraFactors
from .._adapter.variants import variant_of_config, variant_of_entry, variants
from .._errors import AdapterError, UnsupportedFeatureError
from .._files.patterns import layer_of
from .._torch.modules import TorchModule, by_name
from .._torch.named_params import Base
from .._torch.names import Binding
from .config import NO_MODULES, Patterns, PeftConfig, exact_keys, exact_names
from .experts import nesting, packed
from .keys import MAGNITUDE, PREFIX, check_dora, warn_of_doubling
from .rows import FIELD
from .sides import as_written


def check_writable(adapter: Mapping[str, Any], kind: str) -> None:
    """Refuses what is no factors without its kernel, and nothing that PEFT has.

    Args:
        adapter: the entries by path.
        kind: that of the files, as for `save`.

    Raises:
        UnsupportedFeatureError: with their paths.
    """
    for variant in variants():
        own = [p for p, entry in adapter.items() if variant_of_entry(entry) is variant]
        paths = sorted(path for path in own if variant.reads(adapter[path]))
        if paths and variant.peft not in (FIELD, kind):
            own_kind = f'or write them with `kind="{variant.peft}"`'
            raise UnsupportedFeatureError(
                f"{variant.plural or variant.name}"
                f"{'' if variant.reads_kernel else f' with a {variant.reads_for}'}, "
                f"{paths[:5]}, have no place in the files that jlora writes for PEFT; "
                f"merge them instead{', ' + own_kind if variant.peft else ''}"
            )


def check_some(modules: Sequence[TorchModule], entries: Mapping[str, Any]) -> None:
    """Refuses an adapter of which there is nothing to write.

    Raises:
        AdapterError: if it is empty, or a stack of which no layer has factors.
    """
    if modules or not all(isinstance(e, LoraFactors) for e in entries.values()):
        return
    told = f"all factors of {list(entries)[:5]} are zero" if entries else "it is empty"
    raise AdapterError(f"the adapter cannot be saved: {told}")


def with_attention_outputs(modules: Sequence[TorchModule]) -> list[TorchModule]:
    """Adds what PEFT adapts along with a fused attention: its output projection.

    Both have the rank and the alpha of the attention, so the smaller rank is padded;
    an output that is not adapted has factors of zero.
    """
    attentions = {m.name: m for m in modules if "mha" in m.steps}
    outputs = {
        m.name: m for m in modules if m.name.removesuffix(".out_proj") in attentions
    }
    found = [m for m in modules if m.name not in {*attentions, *outputs}]
    for name, attention in attentions.items():
        place = f"{name}.out_proj"
        output = outputs.get(place, attention.zeros(attention.a.shape[0]))
        if place in outputs:
            warn_of_doubling(place)
        rank = max(attention.rank, output.rank)
        output = output.scaled_to(attention.scaling).padded_to(rank)
        found.append(attention.padded_to(rank))
        found.append(
            dataclasses.replace(
                output,
                name=place,
                is_table=attention.is_table,
                brought_by=name,
                window=(),
                binding=without(attention.binding, "mha"),
            )
        )
    return found


def without(binding: Binding | None, step: str) -> Binding | None:
    """Returns what the rules say of a leaf, but for one transform."""
    if binding is None:
        return None
    steps = {k: v for k, v in binding.steps.items() if k != step}
    return dataclasses.replace(binding, steps=steps)


# --- tensors ---


def tensors_of(modules: Sequence[TorchModule]) -> dict[str, np.ndarray]:
    """Returns the factors under PEFT's keys."""
    nested = nesting(modules)
    found: dict[str, np.ndarray] = {}
    for name, experts in by_name(modules).items():
        experts = [as_written(one) for one in experts]
        first, rank = experts[0], _rank(experts)
        a, b = packed([one.padded_to(rank) for one in experts])
        plain = first.is_parameter and first.expert is None
        if plain and "fan_in_fan_out" in first.steps:
            a, b = b.T, a.T
        keys = ("lora_A.weight", "lora_B.weight")
        if first.is_table:
            keys = ("lora_embedding_A", "lora_embedding_B")
        place = PREFIX + nested.get(name, name)
        found[f"{place}.{keys[0]}"] = a
        found[f"{place}.{keys[1]}"] = b
        if first.lora_magnitude is not None:
            check_dora(first.steps, name)
            found[f"{place}.{MAGNITUDE}"] = first.lora_magnitude
        if head := first.steps.get("tied"):
            found[f"{PREFIX}{head}.lora_A.weight"] = b.T
            found[f"{PREFIX}{head}.lora_B.weight"] = a.T
    return found


def _rank(experts: Sequence[TorchModule]) -> int:
    """Returns the largest rank of a module's experts."""
    return max(one.rank for one in experts)


# --- the config ---


def config_of(
    modules: Sequence[TorchModule], configs: Sequence[LoraConfig], base: Base
) -> PeftConfig:
    """Returns what the config has to say of the modules: ranks, alphas, names."""
    rslora = bool(configs) and all(config.rslora for config in configs)
    own = by_name(module for module in modules if not module.brought_by)
    ranks = {name: _rank(experts) for name, experts in own.items()}
    scalings = {name: experts[0].scaling for name, experts in own.items()}
    alphas = {n: _alpha(ranks[n], s, configs, rslora) for n, s in scalings.items()}
    rank, alpha = commonest(ranks.values(), 8), commonest(alphas.values(), 8)
    dora = _one_of_all({m.name: m.magnitude is not None for m in modules})
    parameters = sorted({m.name for m in modules if m.is_parameter})
    return PeftConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        use_dora=dora,
        lora_dropout=_dropout(configs),
        target_modules=_target_modules(modules, base),
        target_parameters=tuple(parameters) or None,
        ensure_weight_tying=any("tied" in m.steps for m in modules),
        rank_pattern=exact_keys({n: r for n, r in ranks.items() if r != rank}),
        alpha_pattern=exact_keys({n: a for n, a in alphas.items() if a != alpha}),
    )


def layers_of(
    adapter: Mapping[str, Any], modules: Sequence[TorchModule]
) -> dict[str, Any]:
    """Returns PEFT's field for the layers, where all factors are of the same ones.

    What selects the modules names them one by one, and so it selects no others. PEFT
    finds the number of a layer in the name of each module, or takes none of them.
    """
    kinds = {path: variant_of_entry(entry) for path, entry in adapter.items()}
    found = {
        kind.settings_of(adapter[path]).get("layers")
        for path, kind in kinds.items()
        if kind.has_roles
    }
    layers = found.pop() if len(found) == 1 else None
    numbers = {layer_of(module.name, {}) for module in modules}
    if layers is None or not numbers <= set(layers):
        return {}
    if any(module.is_parameter for module in modules):
        return {}
    return {"layers_to_transform": tuple(layers)}


def _target_modules(modules: Sequence[TorchModule], base: Base) -> Patterns:
    """Returns what selects the modules alone.

    PEFT takes None as the targets that it knows for the kind of model, and an empty
    list only where parameters are adapted.
    """
    plain = [m.name for m in modules if not (m.is_parameter or m.brought_by)]
    if not (plain or modules):
        return NO_MODULES
    return exact_names(plain, _kernel_modules(base))


def _one_of_all(dora: Mapping[str, bool]) -> bool:
    """Returns whether the modules have magnitudes; PEFT has one answer for all."""
    if len(set(dora.values())) > 1:
        without = sorted(name for name, has in dora.items() if not has)
        raise UnsupportedFeatureError(
            "PEFT has DoRA for all modules or for none; these have no magnitude: "
            f"{without[:5]}"
        )
    return any(dora.values())


def _dropout(configs: Sequence[LoraConfig]) -> float:
    """Returns the rate of all configs that adapt a kernel."""
    adapting = [config for config in configs if variant_of_config(config).has_roles]
    rates = {config.dropout for config in adapting}
    if len(rates) > 1:
        raise UnsupportedFeatureError(
            f"PEFT has one dropout for all modules, and the configs have "
            f"{sorted(rates)}; save with configs of one rate"
        )
    return rates.pop() if rates else 0.0


def commonest(values: Iterable[Any], default: Any) -> Any:
    """Returns the value that comes most often, of several the first."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default


def _kernel_modules(base: Base) -> list[str]:
    return [
        name.rpartition(".")[0]
        for path, binding in base.bindings.items()
        if binding.leaf == "weight" and "experts" not in binding.steps
        for _, name in base.names_of(path)
    ]


def _alpha(
    rank: int, scaling: float, configs: Sequence[LoraConfig], rslora: bool
) -> float:
    """Returns the alpha from which PEFT computes exactly this scaling."""
    divisor = math.sqrt(rank) if rslora else rank
    own = [c.alpha for c in configs if c.rank == rank and c.rslora == rslora]
    guess = scaling * divisor
    near = [
        *own,
        round(guess),
        guess,
        math.nextafter(guess, 0.0),
        math.nextafter(guess, math.inf),
    ]
    return next((alpha for alpha in near if alpha / divisor == scaling), guess)

"""From a jlora adapter to the tensors of a PEFT adapter, and what its config says."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._adapter.config import LoraConfig
from .._adapter.factors import LoraFactors
from .._adapter.variants import VARIANTS, variant_of_config, variant_of_entry
from .._errors import AdapterError, UnsupportedFeatureError
from .._torch.fused import Pair, alike, join, split
from .._torch.layout import (
    factor_matrices,
    lora_a,
    lora_b,
    lora_magnitude,
    magnitudes,
    pack_a,
    pack_b,
    rope_order,
    sizes,
)
from .._torch.named_params import Base, Home, check_parts
from .._torch.names import Binding
from .config import NO_MODULES, Patterns, PeftConfig, exact_keys, exact_names
from .keys import MAGNITUDE, PREFIX, check_dora, warn_of_doubling

Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Module:
    """One torch module, or parameter, with its factors.

    Attributes:
        name: of the module or the parameter.
        pairs: the factors; of each expert, for a parameter that packs experts.
        binding: the rule of (one of) its leaves.
        inputs: the input axes of the kernel, of a convolution its window and channels.
        owner: the module that brings it along, or its own name.
    """

    name: str
    pairs: tuple[Pair, ...]
    binding: Binding
    inputs: tuple[int, ...]
    owner: str = ""

    def __post_init__(self) -> None:
        """A module owns itself unless it is told otherwise."""
        object.__setattr__(self, "owner", self.owner or self.name)

    @property
    def rank(self) -> int:
        """The largest rank of its experts."""
        return max(pair.rank for pair in self.pairs)

    @property
    def scaling(self) -> float:
        """The scaling of its factors."""
        return self.pairs[0].scaling

    @property
    def is_brought(self) -> bool:
        """Whether PEFT adapts it along with the attention that it is the output of."""
        return self.owner != self.name

    @property
    def is_parameter(self) -> bool:
        """Whether PEFT finds it by `target_parameters`."""
        return "experts" in self.binding.steps


def check_writable(adapter: Mapping[str, Any]) -> None:
    """Refuses what is no factors without its kernel, such as rows trained alone.

    Raises:
        UnsupportedFeatureError: with their paths.
    """
    kinds = {path: variant_of_entry(entry) for path, entry in adapter.items()}
    for variant in VARIANTS:
        paths = [path for path, kind in kinds.items() if kind is variant]
        if variant.reads_kernel and paths:
            peft = f" (`{variant.peft}`)" if variant.peft else ""
            raise UnsupportedFeatureError(
                f"{variant.plural or variant.name}, {paths[:5]}, have no place in the "
                f"files that jlora writes for PEFT{peft}; merge them instead"
            )


def check_some(modules: Sequence["Module"], entries: Mapping[str, Any]) -> None:
    """Refuses an adapter of which there is nothing to write.

    Raises:
        AdapterError: if it is empty, or a stack of which no layer has factors.
    """
    if modules or not all(isinstance(e, LoraFactors) for e in entries.values()):
        return
    told = f"all factors of {list(entries)[:5]} are zero" if entries else "it is empty"
    raise AdapterError(f"the adapter cannot be saved: {told}")


def modules_of(factors: Mapping[str, LoraFactors], base: Base) -> list[Module]:
    """Returns the torch modules that an adapter adapts, each with its own factors.

    Of a stack, layers whose factors are zero are left out, and padded ranks trimmed:
    so came those into being that a file had nothing for.

    Raises:
        AdapterError: if the names do not fit the axes, or are those of several leaves.
    """
    parts: dict[str, dict[Home, list[Pair]]] = {}
    for path, entry in factors.items():
        for home, name, pair in _pieces(path, entry, base):
            binding = base.bindings[path]
            module = name if "experts" in binding.steps else name.rpartition(".")[0]
            parts.setdefault(module, {}).setdefault(home, []).append(pair)
    for path in factors:
        base.check_use(path)
    modules = [_module(name, places, factors, base) for name, places in parts.items()]
    return _with_attention_outputs(modules)


def _pieces(
    path: str, entry: LoraFactors, base: Base
) -> Iterable[tuple[Home, str, Pair]]:
    """Yields the factors of each slot at each index of a leaf; experts one by one."""
    binding, axes = base.bindings[path], entry.axes
    a, b = alike(factor_matrices(entry))
    order = rope_order(binding, b.shape[-1], sizes(entry.kernel_shape, axes.out))
    b = b if order is None else b[..., order]
    norms = magnitudes(entry)
    norms = norms if order is None or norms is None else norms[..., order]
    batch, n = a.shape[:-2], binding.n_fields
    if len(batch) - n != ("experts" in binding.steps and len(batch) > n):
        raise AdapterError(
            f"{path!r} has {len(batch)} batch axes {batch}, and its module "
            f"{binding.slots[0].template!r} counts {n} of them; name a {{field}} for "
            "each in the rule"
        )
    packed = len(batch) > n
    for index in np.ndindex(batch):
        norm = None if norms is None else norms[index]
        pair, layer = Pair(a[index], b[index], entry.scaling, norm), index[:n]
        if n and norm is None and not (a[layer].any() or b[layer].any()):
            continue
        pair = pair.trimmed() if n else pair
        for number, part in enumerate(split_slots(pair, binding)):
            if part is None and packed:  # of all experts none may be left out
                width = binding.widths(b.shape[-1])[number]
                part = Pair(0 * pair.a, 0 * pair.b[:, :width], pair.scaling)
            if part is not None:
                home = Home(path, number, index[:n])
                slot = binding.slots[number].module(index[:n])
                yield home, binding.parameter(slot), part


def split_slots(pair: Pair, binding: Binding) -> list[Pair | None]:
    """Returns the factors of each module that a leaf is made of."""
    if len(binding.slots) == 1:
        return [pair]
    return split(pair, binding.widths(pair.b.shape[1]))


def _module(
    name: str,
    places: Mapping[Home, list[Pair]],
    factors: Mapping[str, LoraFactors],
    base: Base,
) -> Module:
    home = next(iter(places))
    binding, entry = base.bindings[home.path], factors[home.path]
    inputs = sizes(entry.kernel_shape, entry.axes.in_)
    homes = base.homes(binding.parameter(name))
    check_parts(base, homes, name)
    if binding.slots[home.slot].part is None:
        return Module(name, tuple(places[home]), binding, inputs)
    fan_in = places[home][0].a.shape[0]
    widths = [base.fan_out(other.path, fan_in) for other in homes]
    experts = range(max(map(len, places.values())))
    pairs = [
        join([places[h][e] if h in places else None for h in homes], widths)
        for e in experts
    ]
    return Module(name, tuple(pairs), binding, inputs)


def _with_attention_outputs(modules: Sequence[Module]) -> list[Module]:
    """Adds what PEFT adapts along with a fused attention: its output projection.

    Both have the rank and the alpha of the attention, so the smaller rank is padded;
    an output that is not adapted has factors of zero.
    """
    attentions = {m.name: m for m in modules if "mha" in m.binding.steps}
    outputs = {
        m.name: m for m in modules if m.name.removesuffix(".out_proj") in attentions
    }
    found = [m for m in modules if m.name not in {*attentions, *outputs}]
    for name, attention in attentions.items():
        (pair,), place = attention.pairs, f"{name}.out_proj"
        width = pair.a.shape[0]
        steps = {k: v for k, v in attention.binding.steps.items() if k != "mha"}
        plain = dataclasses.replace(attention.binding, steps=steps)
        none = Pair(
            np.zeros_like(pair.a),
            np.zeros((pair.rank, width), pair.b.dtype),
            pair.scaling,
        )
        output = outputs[place].pairs[0] if place in outputs else none
        if place in outputs:
            warn_of_doubling(place)
        rank = max(pair.rank, output.rank)
        output = output.scaled_to(pair.scaling).padded_to(rank)
        found.append(dataclasses.replace(attention, pairs=(pair.padded_to(rank),)))
        found.append(Module(place, (output,), plain, (width,), name))
    return found


# --- tensors ---


def tensors_of(modules: Sequence[Module]) -> dict[str, np.ndarray]:
    """Returns the factors under PEFT's keys."""
    nested = _nesting(modules)
    found: dict[str, np.ndarray] = {}
    for module in modules:
        pairs = [pair.padded_to(module.rank) for pair in module.pairs]
        binding, inputs = module.binding, module.inputs
        a = [lora_a(pair.a, binding, inputs) for pair in pairs]
        b = [lora_b(pair.b, binding, inputs) for pair in pairs]
        if "fan_in_fan_out" in binding.steps and module.is_parameter and len(a) == 1:
            a, b = [b[0].T], [a[0].T]
        keys = ("lora_A.weight", "lora_B.weight")
        if "embedding" in binding.steps:
            keys = ("lora_embedding_A", "lora_embedding_B")
        place = PREFIX + nested.get(module.name, module.name)
        found[f"{place}.{keys[0]}"] = pack_a(a) if len(a) > 1 else a[0]
        found[f"{place}.{keys[1]}"] = pack_b(b) if len(b) > 1 else b[0]
        norm = module.pairs[0].magnitude
        if norm is not None:
            check_dora(binding, module.name)
            found[f"{place}.{MAGNITUDE}"] = lora_magnitude(norm, binding, inputs)
        if head := binding.steps.get("tied"):
            found[f"{PREFIX}{head}.lora_A.weight"] = b[0].T
            found[f"{PREFIX}{head}.lora_B.weight"] = a[0].T
    return found


def _nesting(modules: Sequence[Module]) -> dict[str, str]:
    """Returns where PEFT puts the factors of parameters: the last is outermost."""
    by_owner: dict[str, list[Module]] = {}
    for module in modules:
        if module.is_parameter:
            by_owner.setdefault(module.name.rpartition(".")[0], []).append(module)
    places = {
        m.name: f"{m.owner}.base_layer{m.name.removeprefix(m.owner)}"
        for m in modules
        if m.is_brought
    }
    for owner, several in by_owner.items():
        ordered = sorted(several, key=lambda module: -module.binding.order)
        for depth, module in enumerate(ordered):
            places[module.name] = owner + ".base_layer" * depth
    return places


# --- the config ---


def config_of(
    modules: Sequence[Module], configs: Sequence[LoraConfig], base: Base
) -> PeftConfig:
    """Returns what the config has to say of the modules: ranks, alphas, names."""
    rslora = bool(configs) and all(config.rslora for config in configs)
    own = [module for module in modules if not module.is_brought]
    ranks = {module.name: module.rank for module in own}
    alphas = {m.name: _alpha(m.rank, m.scaling, configs, rslora) for m in own}
    rank, alpha = commonest(ranks.values(), 8), commonest(alphas.values(), 8)
    dora = _one_of_all({m.name: m.pairs[0].magnitude is not None for m in modules})
    packed = sorted(m.name for m in modules if m.is_parameter)
    return PeftConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        use_dora=dora,
        lora_dropout=_dropout(configs),
        target_modules=_target_modules(modules, base),
        target_parameters=tuple(packed) or None,
        ensure_weight_tying=any("tied" in m.binding.steps for m in modules),
        rank_pattern=exact_keys({n: r for n, r in ranks.items() if r != rank}),
        alpha_pattern=exact_keys({n: a for n, a in alphas.items() if a != alpha}),
    )


def _target_modules(modules: Sequence[Module], base: Base) -> Patterns:
    """Returns what selects the modules alone.

    PEFT takes None as the targets that it knows for the kind of model, and an empty
    list only where parameters are adapted.
    """
    plain = [m.name for m in modules if not (m.is_parameter or m.is_brought)]
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

"""From the tensors of a PEFT adapter to a jlora adapter."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .._adapter.factors import LoraFactors
from .._errors import AdapterError, UnsupportedFeatureError
from .._params.paths import nearest
from .._torch.fused import Pair, join, promoted, split
from .._torch.layout import (
    a_matrix,
    b_matrix,
    factors_from,
    rope_order,
    sizes,
    unpack,
)
from .._torch.named_params import Base, Home, check_parts
from .._torch.names import Binding
from .._torch.stacked import check_fit, stack, stacked_magnitude
from .config import PeftConfig
from .keys import ModuleTensors, check_dora, warn_of_doubling
from .lora_bias import read_lora_biases
from .whole import read_whole

Index = tuple[int, ...]
# The factors of a leaf: at each index along its batch axes, those of each slot.
Pieces = dict[str, dict[Index, dict[int, Pair]]]


@dataclasses.dataclass(frozen=True)
class Found:
    """One module's factors.

    Attributes:
        name: the name by which rules know it.
        tensors: the factors.
        owner: the name by which the config knows it: its own, or that of the attention
            that brings it along.
    """

    name: str
    tensors: ModuleTensors
    owner: str


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """What the files of an adapter hold, by the names of torch's modules.

    Attributes:
        config: what the config says.
        modules: the factors.
        whole: the tensors that are no factors.
        where: the name of the file, for messages.
        fan_in_fan_out: whether torch's weights are `(in, out)`.
        scalings: those that jlora noted, to the last bit.
    """

    config: PeftConfig
    modules: Mapping[str, ModuleTensors]
    whole: Mapping[str, np.ndarray]
    where: str
    fan_in_fan_out: bool = False
    scalings: Mapping[str, float] = dataclasses.field(default_factory=dict)


def adapter_of(files: AdapterFiles, base: Base) -> dict[str, Any]:
    """Returns the adapter in some files, in the order of the params, on the host.

    Raises:
        AdapterError: with everything that does not fit the params or the config.
    """
    factors = read_factors(files, base)
    whole = read_whole(files.whole, files.modules, files.config, base, files.where)
    biases = read_lora_biases(
        files.modules, files.whole, files.config, base, files.where
    )
    both = {**factors, **whole, **biases}
    return {path: both[path] for path in base.leaves if path in both}


def read_factors(files: AdapterFiles, base: Base) -> dict[str, LoraFactors]:
    """Returns the factors by path.

    Raises:
        AdapterError: with everything that does not fit the params or the config.
    """
    reader = _Reader(files, base)
    every = parameters_of(files.modules, files.config, base)
    heads = _tied_heads(every, files.config, base)
    for found in every:
        if found.name in heads:
            continue
        reader.collect(lambda found=found: reader.place(found))
    reader.check_selection()
    adapter = {}
    for path in base.leaves:
        if path in reader.pieces:
            reader.collect(
                lambda path=path: adapter.update({path: reader.assemble(path)})
            )
    if reader.problems:
        told = "\n".join(reader.problems[:50])
        raise AdapterError(f"{files.where} does not fit the params:\n{told}")
    return adapter


def parameters_of(
    modules: Mapping[str, ModuleTensors], config: PeftConfig, base: Base
) -> list[Found]:
    """Returns the factors by module or, for `target_parameters`, by parameter.

    A module several of whose parameters are adapted is wrapped once for each, in the
    order in which the module defines them: the last is outermost, and the others are
    below `base_layer`.
    """
    wrapped: dict[str, dict[int, ModuleTensors]] = defaultdict(dict)
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
            found.append(Found(name, tensors, outer))
    for module, by_depth in wrapped.items():
        names = _parameters(module, config, base)
        if sorted(by_depth) != list(range(len(names))):
            raise AdapterError(
                f"{module!r} has factors for {len(by_depth)} parameters; the config "
                f"names {names}"
            )
        order = [by_depth[depth] for depth in range(len(names))][::-1]
        found += [Found(n, t, n) for n, t in zip(names, order, strict=True)]
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


def _tied_heads(every: list[Found], config: PeftConfig, base: Base) -> set[str]:
    """Returns the modules that repeat the factors of a table, which jlora has once.

    Raises:
        UnsupportedFeatureError: if the two differ, or only the lookup is adapted.
    """
    by_name = {found.name: found.tensors for found in every}
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


class _Reader:
    """Collects the pieces of each leaf, and everything that does not fit."""

    def __init__(self, files: AdapterFiles, base: Base) -> None:
        self.config = files.config
        self.scalings = files.scalings
        self.base = base
        self.pieces: Pieces = {}
        self.seen: dict[str, str] = {}
        self.problems: list[str] = []

    def collect(self, act: Callable[[], Any]) -> None:
        """Runs `act`; what it raises about the adapter is kept for one error."""
        try:
            act()
        except UnsupportedFeatureError:
            raise
        except AdapterError as error:
            self.problems.append(str(error))

    # --- a module's factors go to their places ---

    def place(self, found: Found) -> None:
        """Takes the factors of one module apart into pieces of leaves."""
        homes = self._homes(found)
        binding = self.base.bindings[homes[0].path]
        self.seen[found.name] = found.owner
        self.base.check_use(binding.path)
        n = self._experts(binding)
        if n is None:
            pairs = [((), self._pair(found, binding, found.tensors))]
        else:
            a, b = found.tensors.a, found.tensors.b
            if a.shape[0] % n or b.shape[1] % n:
                raise AdapterError(
                    f"{found.name!r}: {a.shape} and {b.shape} are no factors of {n} "
                    "experts"
                )
            each = [
                dataclasses.replace(found.tensors, a=x, b=y) for x, y in unpack(a, b, n)
            ]
            pairs = [((e,), self._pair(found, binding, t)) for e, t in enumerate(each)]
        for expert, pair in pairs:
            for home, part in zip(homes, self._parts(homes, pair), strict=True):
                self._put(home, expert, part)

    def _homes(self, found: Found) -> list[Home]:
        name = found.name
        homes = [
            home
            for leaf in ("", ".weight", ".in_proj_weight")
            for home in self.base.homes(name + leaf)
            if "parameter" not in self.base.bindings[home.path].steps
        ]
        if not homes:
            known = [n for p in self.base.bindings for _, n in self.base.names_of(p)]
            raise AdapterError(
                f"no leaf of the params is torch's {name!r}; the nearest that rules "
                f"name: {nearest(name, known)}"
            )
        check_parts(self.base, homes, name)
        for home in homes:
            table = "embedding" in self.base.bindings[home.path].steps
            if table != found.tensors.is_table and len(homes) == 1:
                kinds = ("a kernel", "a table of rows that are looked up")
                raise AdapterError(
                    f"{name!r} is {kinds[found.tensors.is_table]} in the file and "
                    f"{home.path!r} {kinds[table]}"
                )
        return homes

    def _experts(self, binding: Binding) -> int | None:
        """Returns the number of experts that a parameter packs, if it does."""
        axes = self.base.experts(binding.path)
        return None if axes is None else self.base.shape(binding.path)[axes[0]]

    def _pair(self, found: Found, binding: Binding, tensors: ModuleTensors) -> Pair:
        name, a, b = found.name, a_matrix(tensors.a, binding), b_matrix(tensors.b)
        plain = len(self.base.shape(binding.path)) == binding.n_fields + 2
        if plain and {"experts", "fan_in_fan_out"} <= set(binding.steps):
            a, b = b.T, a.T  # a parameter of two axes has no idea which is the input
        if tensors.a.ndim > 2 and a.shape[1] != b.shape[0]:
            raise UnsupportedFeatureError(
                f"{name!r} is a convolution with groups: PEFT's factors of ranks "
                f"{a.shape[1]} and {b.shape[0]} cross them, and it cannot merge them"
            )
        if a.shape[1] != b.shape[0]:
            raise AdapterError(
                f"{name!r} has factors of the ranks {a.shape[1]} and {b.shape[0]}"
            )
        said = self.config.rank(found.owner)
        if a.shape[1] != said:
            raise AdapterError(
                f"{name!r} has factors of rank {a.shape[1]}, and the config says {said}"
            )
        scaling = self.scalings.get(found.owner)
        if scaling is None:
            scaling = self.config.scaling(found.owner, said)
        return Pair(a, b, scaling, self._magnitude(found, binding))

    def _magnitude(self, found: Found, binding: Binding) -> np.ndarray | None:
        magnitude, name = found.tensors.magnitude, found.name
        if (magnitude is not None) != self.config.use_dora:
            has = "no magnitude" if magnitude is None else "a magnitude"
            raise AdapterError(
                f"{name!r} has {has}, and the config says that `use_dora` is "
                f"{self.config.use_dora}"
            )
        if magnitude is None:
            return None
        check_dora(binding, name)
        return magnitude.reshape(-1)

    def _parts(self, homes: list[Home], pair: Pair) -> list[Pair | None]:
        if len(homes) == 1:
            return [pair]
        widths = [self.base.fan_out(home.path, pair.a.shape[0]) for home in homes]
        if sum(widths) != pair.b.shape[1]:
            told = [f"{h.path} {self.base.shape(h.path)}" for h in homes]
            raise AdapterError(
                f"{told} have {widths} outputs, and the module that they are parts of "
                f"{pair.b.shape[1]}"
            )
        return split(pair, widths)

    def _put(self, home: Home, expert: Index, pair: Pair | None) -> None:
        if pair is None:
            return
        slots = self.pieces.setdefault(home.path, {}).setdefault(
            home.index + expert, {}
        )
        if home.slot in slots:
            raise AdapterError(f"{home.path!r} has factors under two names in the file")
        slots[home.slot] = pair

    # --- what the config selects, and what the file holds ---

    def check_selection(self) -> None:
        """Notes modules that the file adapts and the config does not, or vice versa."""
        for name, owner in sorted(self.seen.items()):
            if not (self.config.selects(owner) or self.config.selects_parameter(name)):
                self.problems.append(
                    f"{name!r} has factors, and the config does not select it"
                )
        for path, binding in self.base.bindings.items():
            is_module = "experts" not in binding.steps and self.base.is_kernel(path)
            for _, name in self.base.names_of(path):
                module = name.rpartition(".")[0] if is_module else None
                self._check_missing(path, name, module)

    def _check_missing(self, path: str, parameter: str, module: str | None) -> None:
        missing = []
        if self.config.selects_parameter(parameter) and parameter not in self.seen:
            missing.append(parameter)
        if module and module not in self.seen and not self.config.all_linear:
            missing += [module] if self.config.selects(module) else []
        self.problems += [
            f"the config selects {name!r} ({path!r}), and the file has no factors for "
            "it"
            for name in missing
        ]

    # --- from pieces to the factors of a leaf ---

    def assemble(self, path: str) -> LoraFactors:
        """Returns the factors of a leaf from those at each index and slot."""
        pieces, binding = self.pieces[path], self.base.bindings[path]
        shape = self.base.shape(path)
        first = next(iter(next(iter(pieces.values())).values()))
        axes = self.base.axes(path, first.a.shape[0])
        fans = axes.fans(shape)
        batch = sizes(shape, axes.batch)
        wholes = [self._whole(binding, slots, fans) for slots in pieces.values()]
        pairs = dict(zip(pieces, promoted(wholes), strict=True))
        order = rope_order(binding, fans[1], sizes(shape, axes.out))
        check_fit(path, shape, fans, batch, pairs)
        a, b, scaling = stack(pairs, batch)
        magnitude = stacked_magnitude(path, pairs, batch)
        if order is not None:
            b = b[..., np.argsort(order)]
            magnitude = None if magnitude is None else magnitude[..., np.argsort(order)]
        if "conv" in binding.steps and len(axes.in_) < 2:
            raise AdapterError(f"{path!r} {shape} is no convolution's kernel")
        return factors_from(a, b, axes, shape, scaling, magnitude)

    def _whole(
        self, binding: Binding, slots: dict[int, Pair], fans: tuple[int, int]
    ) -> Pair:
        count = len(binding.slots)
        if count == 1:
            return slots[0]
        widths = binding.widths(fans[1])
        for number, pair in slots.items():
            if pair.b.shape[1] != widths[number]:
                raise AdapterError(
                    f"{binding.path!r}: part {number} has {pair.b.shape[1]} outputs in "
                    f"the file and {widths[number]} by the rule"
                )
        return join([slots.get(i) for i in range(count)], widths)

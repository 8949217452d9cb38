"""What an `adapter_config.json` says of each module: whether, its rank, its alpha."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from .._errors import UnsupportedFeatureError
from .._files.patterns import Endings, ends_of, file_pattern, heads_of, layer_of

Patterns = str | tuple[str, ...] | None
# What chooses modules, and what else the keys of a file tell as well.
_CHOOSING = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
_TOLD_BY_KEYS = (
    *_CHOOSING, "r", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias",
    "modules_to_save", "bias",
)  # fmt: skip
NO_MODULES = "dummy-target-modules"  # PEFT's word for `target_modules` that are none


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What an `adapter_config.json` says, as far as jlora acts on it.

    The fields have PEFT's names and meanings; one that a file lacks has PEFT's default.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: Patterns = None
    exclude_modules: Patterns = None
    target_parameters: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] | None = None
    bias: str = "none"
    ensure_weight_tying: bool = False
    init_lora_weights: bool | str = True
    lora_dropout: float = 0.0
    lora_bias: bool = False
    trainable_token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None = (
        None
    )
    # No fields of PEFT's: modules that the caller leaves out, and fields that he does
    # without.
    left_out: tuple[str, ...] = dataclasses.field(default=(), metadata={"own": True})

    ignored: frozenset[str] = dataclasses.field(
        default=frozenset(), metadata={"own": True}
    )

    def decided_by_keys(self, *names: str) -> bool:
        """Returns whether some fields are done without, so that the keys decide."""
        return not self.ignored.isdisjoint(names)

    def is_left_out(self, name: str) -> bool:
        """Returns whether a module, or what it has, is in one that is left out."""
        return any(f".{left}." in f".{name}." for left in self.left_out)

    def rank(self, module: str) -> int:
        """Returns the rank of a module.

        Raises:
            UnsupportedFeatureError: if it depends on the order of the patterns.
        """
        keys = self._rank_keys
        return _resolve("rank_pattern", self.rank_pattern, keys, module, self.r)

    def alpha(self, module: str) -> float:
        """Returns the alpha of a module.

        Raises:
            UnsupportedFeatureError: if it depends on the order of the patterns.
        """
        values, default = self.alpha_pattern, self.lora_alpha
        return _resolve("alpha_pattern", values, self._alpha_keys, module, default)

    def scaling(self, module: str, rank: int) -> float:
        """Returns the scaling of a module with a rank."""
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    @functools.cached_property
    def _rank_keys(self) -> Endings:
        with _patterns_of("rank_pattern"):
            return Endings(self.rank_pattern)

    @functools.cached_property
    def _alpha_keys(self) -> Endings:
        with _patterns_of("alpha_pattern"):
            return Endings(self.alpha_pattern)

    @property
    def all_linear(self) -> bool:
        """Whether the modules are chosen by their kind, which a name does not tell."""
        targets = self.target_modules
        if self.decided_by_keys(*_CHOOSING):
            return True
        return isinstance(targets, str) and targets.lower() == "all-linear"

    def selects(self, module: str) -> bool:
        """Returns whether the module is one of those that the file says it adapts."""
        listed, targets = self._listed, self._listed["target_modules"]
        if self.is_left_out(module):
            return False
        saved = any(_named(self._saved, around) for around in heads_of(module))
        if self.decided_by_keys(*_CHOOSING):
            return not saved
        excluded = saved or _named(listed["exclude_modules"], module)
        if excluded or targets == NO_MODULES:
            return False
        if self.all_linear:
            return True
        if not _named(targets, module):
            return False
        exact = isinstance(targets, str) or module in targets
        return exact or self._in_layers(module)

    def selects_parameter(self, name: str) -> bool:
        """Returns whether a parameter is one that the file says it adapts."""
        named = _named(self._listed["target_parameters"], name)
        return named and not self.is_left_out(name)

    def saves(self, module: str) -> bool:
        """Returns whether PEFT trains the module whole, or one that it is part of.

        Names in `modules_to_save` are ends of names, whether a dot is before them or
        not: "norm" is `final_norm`, too.
        """
        return not self.is_left_out(module) and any(
            around[len(around) - length :] in self._saved
            for around in heads_of(module)
            for length in self._saved_lengths
            if length <= len(around)
        )

    @functools.cached_property
    def _listed(self) -> dict[str, str | frozenset[str]]:
        """What the lists hold, to be looked up: one of a stranger's may be long."""
        fields = ("target_modules", "exclude_modules", "target_parameters")
        return {field: _lookup(getattr(self, field)) for field in fields}

    @functools.cached_property
    def _saved(self) -> frozenset[str]:
        return frozenset(self.modules_to_save or ())

    @functools.cached_property
    def _saved_lengths(self) -> frozenset[int]:
        return frozenset(map(len, self._saved))

    @functools.cached_property
    def _layers_pattern(self) -> dict[str, int]:
        names = dict.fromkeys(self.layers_pattern or ())
        return {name: order for order, name in enumerate(names)}

    def _in_layers(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        return layer_of(module, self._layers_pattern) in self.layers_to_transform


def told_by_keys(names: Collection[str]) -> frozenset[str]:
    """Returns the fields among some that are done without where they are ignored."""
    return frozenset(names) & frozenset(_TOLD_BY_KEYS)


def fields() -> list[str]:
    """Returns the names of PEFT's fields that jlora acts on."""
    own = dataclasses.fields(PeftConfig)
    return [field.name for field in own if not field.metadata]


def _lookup(patterns: Patterns) -> str | frozenset[str]:
    return patterns if isinstance(patterns, str) else frozenset(patterns or ())


def _named(patterns: str | frozenset[str], name: str) -> bool:
    """Whether a regex matches a whole name, or a set holds it or what ends it."""
    if isinstance(patterns, str):
        with _patterns_of("target_modules` or `exclude_modules"):
            return file_pattern(patterns)(name)
    return any(end in patterns for end in ends_of(name))


def _resolve(
    field: str, values: Mapping[str, Any], keys: Endings, module: str, default: Any
) -> Any:
    with _patterns_of(field):
        found = {key: values[key] for key in keys.of(module)}
    if len(set(found.values())) > 1:
        raise UnsupportedFeatureError(
            f"`{field}` gives {module!r} several values, {str(found)[:500]}: which one "
            "holds depends on the order of its keys, which PEFT's files do not keep. "
            "Name the module in one key"
        )
    return next(iter(found.values()), default)


@contextlib.contextmanager
def _patterns_of(field: str) -> Iterator[None]:
    """Says which field has the pattern that is not matched."""
    try:
        yield
    except ValueError as error:
        raise UnsupportedFeatureError(f"`{field}`: {error}") from error


# --- patterns that select just some modules ---


def exact_names(names: Sequence[str], others: Sequence[str]) -> Patterns:
    """Returns `target_modules` that select some modules and none of the others.

    The names in full, or a regex of them where one is the end of another's name.
    """
    chosen = frozenset(names)
    if not any(_named(chosen, other) for other in set(others) - chosen):
        return tuple(sorted(chosen))
    return "|".join(re.escape(name) for name in sorted(chosen))


def exact_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns patterns with a key for each module, which match it alone."""
    return {f"^{re.escape(name)}": value for name, value in sorted(values.items())}

"""What an `adapter_config.json` means to PEFT, in a few lines that don't use jlora."""

import re
from typing import Any, NamedTuple


class Meaning(NamedTuple):
    """What PEFT makes of a config for the modules of a model."""

    modules: dict[str, tuple[int, float]]
    parameters: dict[str, tuple[int, float]]
    saved: set[str]
    fields: dict[str, Any]


_FIELDS = ("bias", "ensure_weight_tying", "fan_in_fan_out", "peft_type", "task_type")
_FIELDS += ("use_rslora", "use_dora", "lora_bias", "trainable_token_indices")
_FIELDS += ("lora_dropout",)


def meaning(config: dict[str, Any], names: list[str]) -> Meaning:
    """Returns what a config selects of a model with these weights.

    Args:
        config: the parsed JSON.
        names: torch's names of the weights of the base.
    """
    modules = {name.rpartition(".")[0] for name in names}
    parameters = config["target_parameters"] or []
    return Meaning(
        {m: _numbers(config, m) for m in modules if _selects(config, m)},
        {n: _numbers(config, n) for n in names if _ends(n, parameters)},
        {m for m in modules if _ends(m, config["modules_to_save"] or [])},
        {field: config[field] for field in _FIELDS},
    )


def _numbers(config: dict[str, Any], name: str) -> tuple[int, float]:
    rank = by_pattern(config["rank_pattern"], name, config["r"])
    return rank, by_pattern(config["alpha_pattern"], name, config["lora_alpha"])


def by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """Returns the value of the first key that matches, as PEFT does."""
    found = (v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name))
    return next(found, default)


def _ends(name: str, several: list[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in several)


def _selects(config: dict[str, Any], name: str) -> bool:
    excluded, targets = config["exclude_modules"], config["target_modules"]
    if excluded and _ends(name, excluded):
        return False
    if targets == "all-linear":
        return True
    return selects(
        name, targets or [], config["layers_to_transform"], config["layers_pattern"]
    )


def selects(
    name: str,
    targets: str | list[str],
    layers: list[int] | None,
    patterns: str | list[str] | None,
) -> bool:
    """Returns whether PEFT adapts a module."""
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, name))
    if name in targets or not (layers and _ends(name, targets)):
        return _ends(name, targets)
    several = [patterns] if isinstance(patterns, str) else patterns or []
    several = [p for p in several if p] or [r"[^.]*"]
    found = (re.match(rf".*?\.{p}\.(\d+)\.", name) for p in several)
    return next((int(m[1]) in layers for m in found if m), False)

"""`adapter_config.json` as a file: every field is honoured or refused by name."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from .._errors import AdapterError, CorruptFileError, UnsupportedFeatureError
from .config import PeftConfig, fields, told_by_keys

RELEASE = "0.21.0"  # the release of PEFT whose files these are
RANK_LIMIT = 1 << 16

# What a file may say without an effect on what its tensors mean: where it comes from,
# how training began, how PEFT keeps it in memory.
_INERT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version",
    "revision", "task_type", "runtime_config", "megatron_core", "qalora_group_size",
    "eva_config", "corda_config", "lora_ga_config", "loftq_config", "merge_weights",
    "fan_in_fan_out",
}  # fmt: skip

# Initialisers that change the base: the adapter is relative to what they leave of it.
_MOVES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")

# The defaults of the fields that jlora has no other value for.
_REFUSED: dict[str, Any] = {
    "alora_invocation_tokens": None, "arrow_config": None, "kasa_config": None,
    "layer_replication": None, "megatron_config": None, "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False, "velora_config": None,
}  # fmt: skip


# --- reading ---


def parse_config(values: Any, where: str, ignore: Collection[str] = ()) -> PeftConfig:
    """Returns what a parsed `adapter_config.json` says.

    Args:
        values: the parsed JSON.
        where: the name of the file, for messages.
        ignore: fields that the caller knows of and does without.

    Raises:
        CorruptFileError: if a field has a type or a value that no file may have.
        UnsupportedFeatureError: if a field asks for what jlora has not.
        AdapterError: if it is the config of something else than LoRA.
    """
    if not isinstance(values, dict):
        raise CorruptFileError(f"{where} holds no object")
    if values.get("peft_type") != "LORA":
        raise AdapterError(
            f"{where} is of type {str(values.get('peft_type'))[:50]!r}; jlora reads "
            "'LORA', and of PEFT's folders 'LOHA', 'LOKR', 'VERA' and 'IA3'. Of those "
            "of other types that change weights PEFT makes one: "
            "`peft.save_as_lora(path, model, rank)`"
        )
    known = set(fields())
    ignored = told_by_keys(ignore)
    given = {k: v for k, v in values.items() if k in known - ignored}
    bad = [p for k, v in given.items() if (p := _type_problem(k, v))]
    if bad:
        raise CorruptFileError(f"{where}: " + "; ".join(bad))
    config = PeftConfig(**{k: _tidy(k, v) for k, v in given.items()}, ignored=ignored)
    rest = {k: v for k, v in values.items() if k not in known | _INERT | {"peft_type"}}
    problems = [
        p for p in (*_strangers(rest), *_unsupported(config)) if p[0] not in ignore
    ]
    if problems:
        told = "; ".join(text for _, text in problems)
        raise UnsupportedFeatureError(f"{where}: {told}")
    return config


def _strangers(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Fields that jlora does not act on, unless they say nothing."""
    return [
        (key[:100], f"`{key[:100]}` is {str(value)[:100]}, which jlora has not")
        for key, value in values.items()
        if value not in (None, False, 0, "", [], {}) and value != _REFUSED.get(key)
    ]


def _unsupported(config: PeftConfig) -> list[tuple[str, str]]:
    problems = []
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(_MOVES_BASE):
        told = (
            f"`init_lora_weights` is {start!r}: the adapter belongs to a base that its "
            "initialiser changed. Save it in PEFT with "
            "`path_initial_model_for_weight_conversion`"
        )
        problems.append(("init_lora_weights", told))
    of_regex = "has no effect beside a regex in `target_modules`, and PEFT refuses both"
    alone = "has no effect without `layers_to_transform`, and PEFT refuses it alone"
    for field in ("layers_to_transform", "layers_pattern"):
        value = getattr(config, field)
        if value and isinstance(config.target_modules, str):
            problems.append((field, f"`{field}` is {str(value)[:100]}: it {of_regex}"))
    if config.layers_pattern and config.layers_to_transform is None:
        value = str(config.layers_pattern)[:100]
        problems.append(("layers_pattern", f"`layers_pattern` is {value}: it {alone}"))
    return problems


_LISTS = {
    "target_modules": str, "exclude_modules": str, "target_parameters": str,
    "layers_to_transform": int, "layers_pattern": str, "modules_to_save": str,
}  # fmt: skip


_OR_ONE = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}


_KEEP_TEXT = {"target_modules", "exclude_modules"}  # text is a regex, not a list of one


def _type_problem(key: str, value: Any) -> str | None:
    problem = f"`{key}` is {str(value)[:100]!r}"
    if key in _LISTS:
        one = key in _OR_ONE and _is(value, _LISTS[key])
        many = isinstance(value, list) and all(_is(v, _LISTS[key]) for v in value)
        return None if value is None or one or many else problem
    if key in ("rank_pattern", "alpha_pattern"):
        number = _rank if key == "rank_pattern" else _alpha
        fine = isinstance(value, dict) and all(map(number, value.values()))
        return None if fine or value is None else problem
    if key == "trainable_token_indices":
        several = list(value.values()) if isinstance(value, dict) else [value]
        fine = value is None or all(map(_are_rows, several))
        return None if fine else problem
    return None if _SCALARS[key](value) else problem


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and all(_is(v, int) and v >= 0 for v in value)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _rank(value: Any) -> bool:
    return _is(value, int) and 1 <= value <= RANK_LIMIT


def _alpha(value: Any) -> bool:
    return (_is(value, int) or _is(value, float)) and 1e-30 < value < 1e30


_SCALARS = {
    "r": _rank,
    "lora_alpha": _alpha,
    "use_rslora": lambda value: isinstance(value, bool),
    "use_dora": lambda value: isinstance(value, bool),
    "lora_bias": lambda value: isinstance(value, bool),
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "ensure_weight_tying": lambda value: isinstance(value, bool),
    "init_lora_weights": lambda value: isinstance(value, bool | str),
    "lora_dropout": lambda v: (_is(v, int) or _is(v, float)) and 0 <= v < 1,
}


def _tidy(key: str, value: Any) -> Any:
    if key in ("rank_pattern", "alpha_pattern"):
        return value or {}
    if isinstance(value, dict):  # rows by the name of a table
        return {name: tuple(rows) for name, rows in value.items()}
    if isinstance(value, list):
        # An empty list of layers is none, as PEFT has it.
        return tuple(value) if value or key not in ("layers_to_transform",) else None
    if key in _OR_ONE - _KEEP_TEXT and value is not None:
        return (value,) if value != "" else None  # no pattern, as PEFT has it
    return value


# --- writing ---


def config_json(
    config: PeftConfig,
    *,
    fan_in_fan_out: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
) -> bytes:
    """Returns the bytes of the file, every field of PEFT's in it, in PEFT's order."""
    own = {field: _plain(getattr(config, field)) for field in fields()}
    values = {
        **dict.fromkeys(("auto_mapping", "corda_config", "eva_config", "revision")),
        **_REFUSED,
        **own,
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "loftq_config": {},
        "lora_ga_config": None,
        "megatron_core": "megatron.core",
        "peft_type": "LORA",
        "peft_version": RELEASE,
        "qalora_group_size": 16,
        "task_type": task_type,
    }
    return json.dumps(values, indent=2, sort_keys=True).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)  # as PEFT has it where a rank and an alpha are integers
    return value

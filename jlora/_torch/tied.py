"""The table of a language model that is its head, too, and no tensor of its own."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from .model_types import ModelTypes

FIELD = "tie_word_embeddings"

# Kinds that are tied where their config does not say, as transformers has it.
_BY_DEFAULT = frozenset(
    """
    aya_vision bigbird_pegasus biogpt bloom cohere cohere2 cohere2_vision cpmant ctrl
    ernie4_5 falcon falcon_mamba gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text
    gemma4 gemma4_text got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo granite_speech internvl
    jetmoe lfm2 lfm2_moe lfm2_vl mamba mistral3 modernbert-decoder mpt openai-gpt opt
    ovis2 paligemma recurrent_gemma shieldgemma2 smollm3 starcoder2 t5gemma vaultgemma
    xglm zamba zamba2
    """.split()
)
# What tables are called, and what stands between the prefix of a model and them.
_TABLE = re.compile(
    r"(?P<prefix>(?:.*\.)?)"
    r"(?P<body>model\.language_model|model\.decoder|model|transformer|backbone|rwkv)\."
    r"(?P<table>embed_tokens|wte|word_embeddings|embeddings?|tokens_embed)\.weight"
)
# Masked language models, of which the head is there if its other layers are.
_MASKED = {
    "bert.embeddings.word_embeddings.weight": ("cls.predictions.", "decoder"),
    "roberta.embeddings.word_embeddings.weight": ("lm_head.", "decoder"),
}
_HEADED = re.compile(r".*(?:LM|ForConditionalGeneration|ForPreTraining)\w*")


@dataclasses.dataclass(frozen=True)
class Tied:
    """The names of two tensors that are one on disk.

    Attributes:
        table: the one that is there.
        head: the one that a model makes of it.
    """

    table: str
    head: str


def tied_tables(config: Mapping[str, Any], names: Collection[str]) -> Tied | None:
    """Returns the tied table and head of a model, if it has them.

    Args:
        config: what its `config.json` says.
        names: those of its tensors, as modules have them.

    Example:
        >>> config = {"model_type": "llama", "tie_word_embeddings": True}
        >>> tied_tables(config, ["model.embed_tokens.weight", "model.norm.weight"])
        Tied(table='model.embed_tokens.weight', head='lm_head.weight')
        >>> tied_tables({"model_type": "llama"}, ["model.embed_tokens.weight"])
    """
    if not is_tied(config) or not _may_have_head(config):
        return None
    for name in names:
        if name in _MASKED:
            start, end = _MASKED[name]
            if any(other.startswith(start) for other in names):
                return Tied(name, f"{start}{end}.weight")
        elif found := _TABLE.fullmatch(name):
            return Tied(name, f"{found['prefix']}lm_head.weight")
    return None


def has_unknown_table(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Returns whether a model is tied and none of its tensors is known as the table."""
    known = any(name in _MASKED or _TABLE.fullmatch(name) for name in names)
    return is_tied(config) and _may_have_head(config) and not known


def is_tied(config: Mapping[str, Any]) -> bool:
    """Returns whether a model's `config.json` says that its head is the table."""
    said = [part[FIELD] for part in _parts(config) if isinstance(part.get(FIELD), bool)]
    return any(said) if said else bool(ModelTypes.of(config).kinds & _BY_DEFAULT)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same `config.json` of a model whose head is a tensor of its own."""
    said = {
        key: {**value, FIELD: False} if _is_part(key, value) else value
        for key, value in config.items()
    }
    return {**said, FIELD: False}


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config, *(v for k, v in config.items() if _is_part(k, v))]


def _is_part(key: str, value: Any) -> bool:
    """Whether a value is the config of a part that may have a head."""
    known = isinstance(value, dict) and (FIELD in value or "vocab_size" in value)
    return known and not re.search("vision|audio|encoder", key)


def _may_have_head(config: Mapping[str, Any]) -> bool:
    """Whether the class of the model has one, as far as its config says."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes:
        return True
    return any(isinstance(name, str) and _HEADED.fullmatch(name) for name in classes)

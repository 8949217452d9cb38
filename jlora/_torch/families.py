"""Rules for the modules of well-known Hugging Face models.

A row says what torch calls a module, and what Flax models call it: a regex for the
segments of its path. Rows of a layer stand below a numbered or a scanned stack.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .names import Rule, rule_of

Rows = tuple[tuple[str | tuple[str, ...], str], ...]

_ATTENTION = r"(?:self_attn|self_attention|attention|attn)"
_MLP = r"(?:mlp|feed_forward|ffn)"

_LLAMA_LAYER: Rows = (
    ("self_attn.q_proj", rf"{_ATTENTION}/(?:q_proj|query|q|wq|q_einsum)"),
    ("self_attn.k_proj", rf"{_ATTENTION}/(?:k_proj|key|k|wk)"),
    ("self_attn.v_proj", rf"{_ATTENTION}/(?:v_proj|value|v|wv)"),
    (("self_attn.k_proj", "self_attn.v_proj"), rf"{_ATTENTION}/kv_einsum"),
    ("self_attn.o_proj", rf"{_ATTENTION}/(?:o_proj|out|o|wo|attn_vec_einsum)"),
    ("self_attn.q_norm", rf"{_ATTENTION}/_?(?:q_norm|query_norm)"),
    ("self_attn.k_norm", rf"{_ATTENTION}/_?(?:k_norm|key_norm)"),
    (("mlp.gate_proj", "mlp.up_proj"), rf"{_MLP}/gating_einsum"),
    ("mlp.gate_proj", rf"{_MLP}/(?:gate_proj|gate|wi_0|w1)"),
    ("mlp.up_proj", rf"{_MLP}/(?:up_proj|up|wi_1|w3)"),
    ("mlp.down_proj", rf"{_MLP}/(?:down_proj|down|wo|w2|linear)"),
    (
        "input_layernorm",
        r"(?:input_layernorm|pre_self_attention_(?:layer_)?norm|attention_norm"
        r"|pre_attention_norm)",
    ),
)
_LLAMA_NORMS: Rows = (
    (
        "post_attention_layernorm",
        r"(?:post_attention_layernorm|post_self_attention_(?:layer_)?norm|mlp_norm"
        r"|ffn_norm|pre_ffw_norm|pre_mlp_norm)",
    ),
)
_GEMMA2_NORMS: Rows = (
    (
        "post_attention_layernorm",
        r"(?:post_attention_layernorm|post_attention_norm"
        r"|post_self_attention_(?:layer_)?norm)",
    ),
    ("pre_feedforward_layernorm", r"(?:pre_feedforward_layernorm|pre_ffw_norm)"),
    ("post_feedforward_layernorm", r"(?:post_feedforward_layernorm|post_ffw_norm)"),
)
_LLAMA_REST: Rows = (
    (
        "model.embed_tokens",
        r"(?:embed_tokens|embed|token_embedder|embedder|tok_embeddings)",
    ),
    ("model.norm", r"(?:norm|final_norm|decoder_norm)"),
    ("lm_head", r"(?:lm_head|logits_dense|output)"),
)

_GPT2_LAYER: Rows = (
    ("attn.c_attn", r"attn/c_attn"),
    ("attn.c_attn[0]", r"attn/(?:q_proj|query|q)"),
    ("attn.c_attn[1]", r"attn/(?:k_proj|key|k)"),
    ("attn.c_attn[2]", r"attn/(?:v_proj|value|v)"),
    ("attn.c_proj", r"attn/(?:c_proj|o_proj|out|o)"),
    ("mlp.c_fc", r"mlp/(?:c_fc|up|fc1)"),
    ("mlp.c_proj", r"mlp/(?:c_proj|down|fc2)"),
    ("ln_1", r"ln_1"),
    ("ln_2", r"ln_2"),
)
_GPT2_REST: Rows = (
    ("transformer.wte", r"wte"),
    ("transformer.wpe", r"wpe"),
    ("transformer.ln_f", r"ln_f"),
    ("lm_head", r"lm_head"),
)

_BERT_LAYER: Rows = (
    ("attention.self.query", r"attention/(?:self/)?query"),
    ("attention.self.key", r"attention/(?:self/)?key"),
    ("attention.self.value", r"attention/(?:self/)?value"),
    ("attention.output.dense", r"attention/(?:output/dense|out)"),
    ("attention.output.LayerNorm", r"attention/output/LayerNorm"),
    ("intermediate.dense", r"intermediate/dense"),
    ("output.dense", r"output/dense"),
    ("output.LayerNorm", r"output/LayerNorm"),
)
_BERT_REST: Rows = (
    ("bert.embeddings.word_embeddings", r"embeddings/word_embeddings"),
    ("bert.embeddings.position_embeddings", r"embeddings/position_embeddings"),
    ("bert.embeddings.token_type_embeddings", r"embeddings/token_type_embeddings"),
    ("bert.embeddings.LayerNorm", r"embeddings/LayerNorm"),
    ("bert.pooler.dense", r"pooler/dense"),
    ("classifier", r"classifier"),
)

_VIT_LAYER: Rows = (
    ("attention.q_proj", r"attention/(?:attention/)?(?:q_proj|query)"),
    ("attention.k_proj", r"attention/(?:attention/)?(?:k_proj|key)"),
    ("attention.v_proj", r"attention/(?:attention/)?(?:v_proj|value)"),
    ("attention.o_proj", r"attention/(?:o_proj|output/dense|out)"),
    ("mlp.fc1", r"(?:mlp/fc1|intermediate/dense)"),
    ("mlp.fc2", r"(?:mlp/fc2|output/dense)"),
    ("layernorm_before", r"layernorm_before"),
    ("layernorm_after", r"layernorm_after"),
)
# What transformers called these modules before its version 5, as do adapters of then.
_VIT4 = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_VIT_REST: Rows = (
    ("vit.layernorm", r"layernorm"),
    ("classifier", r"classifier"),
)
_VIT_RULES = (
    Rule(
        r"(?:.*/)?patch_embeddings/projection",
        "vit.embeddings.patch_embeddings.projection",
        "conv",
    ),
    Rule(r"(?:.*/)?cls_token", "vit.embeddings.cls_token", "parameter"),
    Rule(
        r"(?:.*/)?position_embeddings",
        "vit.embeddings.position_embeddings",
        "parameter",
    ),
)

# Whose kernels have several input axes, heads and their features, in some models.
_JOINS = ("self_attn.o_proj", "attention.output.dense", "attention.o_proj")

_STACK = r"(?:.*/)?(?:layers?|blocks?|h)"


@dataclasses.dataclass(frozen=True)
class _Family:
    """The rows of one family, and where torch has its layers."""

    stack: str
    layer: Rows
    rest: Rows
    transform: str | None = None
    more: tuple[Rule, ...] = ()


_FAMILIES = {
    "llama": _Family("model.layers", _LLAMA_LAYER + _LLAMA_NORMS, _LLAMA_REST),
    "gemma2": _Family("model.layers", _LLAMA_LAYER + _GEMMA2_NORMS, _LLAMA_REST),
    "gpt2": _Family("transformer.h", _GPT2_LAYER, _GPT2_REST, "fan_in_fan_out"),
    "bert": _Family("bert.encoder.layer", _BERT_LAYER, _BERT_REST),
    "vit": _Family("vit.layers", _VIT_LAYER, _VIT_REST, more=_VIT_RULES),
    "vit4": _Family(
        "vit.encoder.layer",
        tuple((_VIT4.get(str(m), m), path) for m, path in _VIT_LAYER),
        _VIT_REST,
        more=_VIT_RULES,
    ),
}
# Families whose modules have the names of another's.
_SAME = {
    "mistral": "llama", "qwen2": "llama", "qwen3": "llama", "gemma": "llama",
    "gemma3": "gemma2",
}  # fmt: skip
FAMILIES = (*_FAMILIES, *_SAME)


def names(
    family: str | Sequence[Rule | tuple[Any, ...]],
    *,
    rope: str = "halves",
    head_dim: int | None = None,
    prefix: str | None = None,
) -> list[Rule]:
    """Returns the rules for the modules of a Hugging Face model.

    They know the usual names on the Flax side: those of Hugging Face's Flax models, of
    MaxText, Tunix and the Gemma library, numbered (`layers/0`, `layers_0`, `block_0`)
    or scanned (`layers`, `blocks`). Rules of your own go before them.

    What a kernel of several axes, or one that is not called `kernel`, has as inputs and
    outputs a plan tells: give one where the params alone are in doubt. Hugging Face's
    Flax GPT-2 needs one, too, or rules of your own: its kernels are `(out, in)`, unlike
    those of other models, and a square one, such as `attn/c_proj`, does not show it.

    Args:
        family: "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
            "gpt2", "bert", "vit", or "vit4" for ViT before transformers 5. Or rules of
            your own, to give them a prefix.
        rope: which features the JAX model rotates together: "halves" (i and i + half,
            as in Hugging Face), or "interleaved" (2i and 2i + 1), for which queries and
            keys are reordered.
        head_dim: the size of a head for "interleaved", where kernels have no axis of
            heads.
        prefix: where torch has the model within one that wraps it: what stands in place
            of "model" ("transformer", "bert", "vit"), such as "model.language_model"
            for the language model of Gemma 3 with images, and "language_model.model"
            before transformers 4.52. Of rules of your own, what stands before all of
            their modules.

    Raises:
        ValueError: if the family is unknown.

    Example:
        >>> rules = names("llama")
        >>> [rule.module for rule in rules if "query" in rule.path][:1]
        ['model.layers.{layer}.self_attn.q_proj']
    """
    before = (prefix or "").removesuffix(".")
    if not isinstance(family, str):
        move = lambda name: f"{before}.{name}" if before else name
        return [_moved(rule_of(rule), move) for rule in family]
    found = _FAMILIES.get(_SAME.get(family, family))
    if found is None:
        known = sorted({*_FAMILIES, *_SAME})
        raise ValueError(f"`family` is one of {known}, got {family!r}")
    if rope not in ("halves", "interleaved"):
        raise ValueError(f'`rope` is "halves" or "interleaved", got {rope!r}')
    turned = None
    if rope == "interleaved":
        turned = f"rope({head_dim})" if head_dim else "rope"
    rules = [*_layer_rules(found, turned), *found.more, *_rest_rules(found)]
    root = found.stack.partition(".")[0]
    return [_moved(rule, _mover(root, before)) for rule in rules] if before else rules


def _mover(root: str, prefix: str) -> Callable[[str], str]:
    """Returns what moves a module into another: the head goes beside the model."""
    beside = prefix.removesuffix(root) if f".{prefix}".endswith(f".{root}") else ""

    def move(name: str) -> str:
        inside = name.removeprefix(f"{root}.")
        return f"{beside}{name}" if inside == name else f"{prefix}.{inside}"

    return move


def _moved(rule: Rule, move: Callable[[str], str]) -> Rule:
    several = (rule.module,) if isinstance(rule.module, str) else rule.module
    moved = tuple(map(move, several))
    transform = rule.transform
    if head := rule.steps().get("tied"):
        transform = str(transform).replace(f"tied({head})", f"tied({move(head)})")
    return Rule(rule.path, moved[0] if len(moved) == 1 else moved, transform)


def _layer_rules(family: _Family, turned: str | None) -> Iterator[Rule]:
    for module, path in family.layer:
        several = (module,) if isinstance(module, str) else module
        inside = tuple(f"{family.stack}.{{layer}}.{name}" for name in several)
        template = inside[0] if len(inside) == 1 else inside
        rotated = several[0].endswith(("q_proj", "k_proj", "q_norm", "k_norm"))
        joins = "linear" if several[0] in _JOINS else None
        steps = [family.transform or joins, turned if rotated else None]
        transform = "+".join(step for step in steps if step) or None
        # A numbered stack names the layer; in a scanned one it is a batch axis.
        yield Rule(rf"{_STACK}[_/](?P<layer>\d+)/{path}", template, transform)
        yield Rule(rf"{_STACK}/{path}", template, transform)


def _rest_rules(family: _Family) -> Iterator[Rule]:
    for module, path in family.rest:
        # An embedding's own segment may be the last: `embedder/input_embedding`.
        yield Rule(rf"(?:.*/)?{path}(?:/input_embedding)?", module)

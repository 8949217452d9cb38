"""What tensors are called on disk, and what the modules of a model are called.

Checkpoints keep the names that they were published with; transformers renames modules
and maps the old names when it reads and writes them. An adapter has the names of the
modules that it was trained on. What transformers 4.52 to 5.24 do is here, by the kind
of model; the experts of a layer, which it packs since version 5, are packed of all
kinds that have them apart.
"""

import functools
import re
from collections.abc import Iterable

from .model_types import ModelTypes

Renames = tuple[tuple[str, str], ...]

# What modules may be called: as tensors are on disk; as transformers has them since
# 4.52 and since 5; as in the language model alone, of a model that wraps one; as in a
# wrapper, old or new, of a model that is one.
ERAS = ("disk", "4", "5", "text", "wrapped", "wrapped before 4.52")

_LLAVA4: Renames = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.(?:model\.)?", "model.language_model."),
    (
        r"^((?:vision|image|video|audio)_tower|vision_model|multi_modal_projector"
        r"|vision_embed_tokens|image_newline)\b",
        r"model.\1",
    ),
)
_LLAVA5: Renames = (
    *_LLAVA4,
    (r"^(model\.(?:vision|image|video)_tower)\.vision_model\.", r"\1."),
)
_QWEN_VL: Renames = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)
_OMNI: Renames = (
    (r"^thinker\.", ""),
    (r"^(visual|audio_tower)\.", r"model.\1."),
    (r"^model\.(?!language_model\.|visual\.|audio_tower\.)", "model.language_model."),
)
_EMU: Renames = (
    (r"^text_model\.lm_head\.", "lm_head."),
    (r"^text_model\.(?:model\.)?", "model.text_model."),
    (r"^vqmodel\.", "model.vqmodel."),
)
_DENSE: Renames = (
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
_VIT: Renames = (
    (r"\bencoder\.layer\.", "layers."),
    (r"\battention\.query\b", "q_proj"),
    (r"\battention\.key\b", "k_proj"),
    (r"\battention\.value\b", "v_proj"),
    *_DENSE,
)
_DINOV2: Renames = (
    (r"\battention\.attention\.query\b", "attention.q_proj"),
    (r"\battention\.attention\.key\b", "attention.k_proj"),
    (r"\battention\.attention\.value\b", "attention.v_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bmlp\.weights_out\b", "mlp.down_proj"),
)
_SELF: Renames = (
    (r"\battention\.self\.query\b", "attention.q_proj"),
    (r"\battention\.self\.key\b", "attention.k_proj"),
    (r"\battention\.self\.value\b", "attention.v_proj"),
)
_SEGFORMER: Renames = (
    (r"\bencoder\.patch_embeddings\.(\d+)\.", r"stages.\1.patch_embeddings."),
    (r"\bencoder\.block\.(\d+)\.", r"stages.\1.blocks."),
    (r"\bencoder\.layer_norm\.(\d+)\b", r"stages.\1.layer_norm"),
    *_SELF,
    (r"\battention\.self\.sr\b", "attention.sequence_reduction.sequence_reduction"),
    (r"\battention\.self\.layer_norm\b", "attention.sequence_reduction.layer_norm"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bmlp\.dense([12])\b", r"mlp.fc\1"),
    (r"\blayer_norm_1\b", "layernorm_before"),
    (r"\blayer_norm_2\b", "layernorm_after"),
)
_MOE = "block_sparse_moe"
_GRANITE: Renames = (
    (rf"\b{_MOE}\.input_linear\.weight$", f"{_MOE}.experts.gate_up_proj"),
    (rf"\b{_MOE}\.output_linear\.weight$", f"{_MOE}.experts.down_proj"),
    (rf"\b{_MOE}\.router\.layer\.weight$", f"{_MOE}.router.weight"),
)
_ARIA: Renames = (
    (r"\bmlp\.experts\.fc1\.weight$", "mlp.experts.gate_up_proj"),
    (r"\bmlp\.experts\.fc2\.weight$", "mlp.experts.down_proj"),
)
_MIXTRAL: Renames = ((r"\.block_sparse_moe\.", ".mlp."),)
_PHIMOE: Renames = (*_MIXTRAL, (r"\.mlp\.gate\.weight$", ".mlp.router.weight"))
_EXAONE: Renames = (
    (r"^transformer\.wte\.", "model.embed_tokens."),
    (r"^transformer\.h\.", "model.layers."),
    (r"^transformer\.ln_f\.", "model.norm."),
    (r"\.attn\.attention\.", ".self_attn."),
    (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
    (r"\.ln_1\.", ".input_layernorm."),
    (r"\.ln_2\.", ".post_attention_layernorm."),
    (r"\.mlp\.c_fc_0\.", ".mlp.gate_proj."),
    (r"\.mlp\.c_fc_1\.", ".mlp.up_proj."),
    (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
)

_LLAVA_LIKE = """
    aria aya_vision fuyu gemma3 got_ocr2 internvl llava llava_next llava_next_video
    llava_onevision mistral3 mllama paligemma pp_chart2table qwen2_audio video_llava
    vipllava voxtral
"""
_VIT_LIKE = "audio-spectrogram-transformer beit deit ijepa vit vit_mae vit_msn vivit"
# The names since 4.52 and since 5, by kind.
_KINDS: dict[str, tuple[Renames, Renames]] = {
    **dict.fromkeys(_LLAVA_LIKE.split(), (_LLAVA4, _LLAVA5)),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), (_QWEN_VL, _QWEN_VL)),
    **dict.fromkeys(
        ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe"), (_OMNI, _OMNI)
    ),
    "emu3": (_EMU, _EMU),
    **dict.fromkeys(_VIT_LIKE.split(), ((), _VIT)),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), ((), _DINOV2)),
    "swin": ((), (*_SELF, *_DENSE)),
    "segformer": ((), _SEGFORMER),
    **dict.fromkeys(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"), ((), _GRANITE)
    ),
    "aria_text": ((), _ARIA),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), ((), _MIXTRAL)),
    "phimoe": ((), _PHIMOE),
    "gpt_neox": ((), ((r"^embed_out\.", "lm_head."),)),
    "nemotron_h": ((), ((r"^backbone\.", "model."),)),
    "exaone": ((), _EXAONE),
}
# In these the renames of parts go together: what wraps a language model comes first.
_AFTER: dict[str, Renames] = {
    "text": ((r"^model\.language_model\.", "model."),),
    "wrapped": ((r"^model\.(?!language_model\.)", "model.language_model."),),
    "wrapped before 4.52": (
        (r"^model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    ),
}


def renamer(types: ModelTypes, era: str) -> "Renamer":
    """Returns what renames the tensors of a kind of model.

    Args:
        types: the kinds of the model and its parts.
        era: one of `ERAS`.

    Example:
        >>> rename = renamer(ModelTypes({"": "qwen2_vl"}), "5")
        >>> rename("model.layers.0.self_attn.q_proj.weight")
        'model.language_model.layers.0.self_attn.q_proj.weight'
    """
    return Renamer(types, era)


class Renamer:
    """Renames tensors, from their names on disk to those of modules."""

    def __init__(self, types: ModelTypes, era: str) -> None:
        """Takes the kinds of a model and one of `ERAS`."""
        number = 0 if era == "4" else 1
        parts = [] if era == "disk" else sorted(types.by_part.items())
        self._steps = [
            # The weights of a part have its name before theirs, but for those of
            # `text_config` and the like.
            ("" if part.endswith("_config") else f"{part}.".lstrip("."), pattern, new)
            for part, kind in parts
            for pattern, new in _KINDS.get(kind, ((), ()))[number]
        ]
        self._steps += [("", *rename) for rename in _AFTER.get(era, ())]

    def __call__(self, name: str) -> str:
        """Returns the name of a tensor among the modules."""
        for prefix, pattern, new in self._steps:
            if name.startswith(prefix):
                rest = _compiled(pattern).sub(new, name[len(prefix) :])
                name = prefix + rest
        return name


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


# --- packed experts ---

# Experts are apart on disk under three sets of names; what is packed of them, in order.
_PACKS: dict[frozenset[str], dict[str, tuple[str, ...]]] = {
    frozenset(("gate_proj", "up_proj", "down_proj")): {
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
    },
    frozenset(("w1", "w2", "w3")): {
        "gate_up_proj": ("w1", "w3"),
        "down_proj": ("w2",),
    },
    frozenset(("up_proj", "down_proj")): {
        "up_proj": ("up_proj",),
        "down_proj": ("down_proj",),
    },
}
_EXPERT = re.compile(
    r"(?P<owner>.+\.experts)\.(?P<number>0|[1-9]\d{0,5})\.(?P<part>\w+)\.weight"
)
# Kinds whose experts are of two sorts, one after the other.
_UNPACKED = frozenset(("ernie4_5_vl_moe", "ernie4_5_moe_vl"))


def is_packed(types: ModelTypes, era: str) -> bool:
    """Returns whether the experts of a layer are parameters of one module."""
    return era not in ("disk", "4") and not types.kinds & _UNPACKED


def packs(names: Iterable[str]) -> dict[str, list[tuple[str, ...]]]:
    """Returns the packed parameters that experts make, by name.

    Args:
        names: those of tensors, among modules.

    Returns:
        For each expert the tensors that are one after the other in its part of the
        parameter, along the outputs.

    Example:
        >>> names = [f"experts.{e}.w{n}.weight" for e in "01" for n in "123"]
        >>> names = [f"mlp.{name}" for name in names]
        >>> packs(names)["mlp.experts.gate_up_proj"][1]
        ('mlp.experts.1.w1.weight', 'mlp.experts.1.w3.weight')
    """
    owners: dict[str, dict[int, set[str]]] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            experts = owners.setdefault(match["owner"], {})
            experts.setdefault(int(match["number"]), set()).add(match["part"])
    found = {}
    for owner, experts in owners.items():
        kinds = set(map(frozenset, experts.values()))
        if len(kinds) != 1 or sorted(experts) != list(range(len(experts))):
            continue
        for parameter, parts in _PACKS.get(kinds.pop(), {}).items():
            found[f"{owner}.{parameter}"] = [
                tuple(f"{owner}.{e}.{part}.weight" for part in parts)
                for e in range(len(experts))
            ]
    return found


def part_of_pack(part: str) -> dict[str, tuple[int, int]]:
    """Returns which part of how many an expert's weight is, by packed parameter.

    Example:
        >>> part_of_pack("up_proj")
        {'gate_up_proj': (1, 2), 'up_proj': (0, 1)}
    """
    return {
        parameter: (parts.index(part), len(parts))
        for kind in _PACKS.values()
        for parameter, parts in kind.items()
        if part in parts
    }


# --- parts of a tensor ---


def halves(types: ModelTypes, era: str, name: str) -> tuple[str, str] | None:
    """Returns the two tensors that one on disk is, the first half of its rows first."""
    if era not in ("disk", "4") and types.kinds & {"dinov2", "dinov2_with_registers"}:
        if match := re.fullmatch(r"(.+\.mlp)\.weights_in\.(weight|bias)", name):
            return f"{match[1]}.gate_proj.{match[2]}", f"{match[1]}.up_proj.{match[2]}"
    return None

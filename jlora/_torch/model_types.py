"""What the kind of a Hugging Face model says of the layouts of its weights.

Its `config.json` names the kind in `model_type`, of each part of it, too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

# Kinds whose blocks are made of `Conv1D`, which keeps its weight as (in, out), and what
# they call these modules. Others are linear layers in the same models.
_CONV1D = frozenset(
    ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
)
_CONV1D_NAMES = frozenset(("c_attn", "q_attn", "c_fc", "c_proj"))
# Kinds with linear layers of these names.
_LINEAR = frozenset(("gpt_bigcode", "gpt_neo", "starcoder2"))

# Kinds whose experts are (experts, in, out), and whose modules say so to PEFT.
_IN_FIRST = frozenset(("gpt_oss", "aria", "aria_text", "openai_privacy_filter"))
# Kinds whose experts are (experts, in, out), and whose modules do not say so to PEFT.
_SWAPPED = frozenset(("llama4", "llama4_text"))
# Other kinds with packed experts: (experts, out, in), or nothing tells PEFT otherwise.
_PACKED = frozenset(
    """
    afmoe axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_ocr2 deepseek_v2
    deepseek_v3 deepseek_v32 deepseek_v4 diffusion_gemma dots1 dots3_note ernie4_5_moe
    ernie4_5_vl_moe exaone_moe flex_olmo flint gemma4 gemma4_text glm4_moe glm4_moe_lite
    glm4v_moe glm4v_moe_text glm5_next glm_moe_dsa granitemoe granitemoe_swa
    granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 hy_v4_vl inkling
    inkling2 jamba jetmoe kimi_linear laguna lfm2_moe llama4 llama4_text longcat_flash
    mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl mistral4 mixtral nemotron_h
    olmoe phimoe qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next
    qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker solar_open step3p7
    unlimited_ocr
    """.split()
)


@dataclasses.dataclass(frozen=True)
class ModelTypes:
    """The kinds of a model and of its parts.

    Attributes:
        by_part: `model_type` by the name of the part in `config.json`; that of the
            whole under "".
    """

    by_part: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ModelTypes":
        """Returns what a `config.json` says.

        Example:
            >>> ModelTypes.of({"model_type": "a", "decoder": {"model_type": "b"}})
            ModelTypes(by_part={'': 'a', 'decoder': 'b'})
        """
        parts = {"": config, **{k: v for k, v in config.items() if _is_part(v)}}
        kinds = {part: values.get("model_type") for part, values in parts.items()}
        return cls({part: kind for part, kind in kinds.items() if _is_name(kind)})

    def __str__(self) -> str:
        """Returns the kinds, for messages."""
        return ", ".join(map(repr, dict.fromkeys(self.by_part.values()))) or "not said"

    def is_conv1d(self, module: str) -> bool | None:
        """Returns whether a module keeps its weight as (in, out); None if unknown.

        Args:
            module: the name of a module with a weight of two axes.
        """
        head = module.partition(".")[0]
        part = {self.by_part[head]} if head in self.by_part else self.kinds
        if self.kinds & _CONV1D:
            return bool(part & _CONV1D) and has_conv1d_name(module)
        return False if self.kinds & _LINEAR else None

    def experts_in_first(self) -> bool | None:
        """Returns whether experts are (experts, in, out) to PEFT; None if unknown."""
        if self.kinds & _IN_FIRST:
            return True
        return False if self.kinds & _PACKED else None

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of all parts."""
        return frozenset(self.by_part.values())


def swaps_experts(kind: str | None) -> bool:
    """Returns whether PEFT takes inputs for outputs in the experts of a kind."""
    return kind in _SWAPPED


def has_conv1d_name(module: str) -> bool:
    """Returns whether a module is called as GPT-2 calls its `Conv1D`s."""
    return module.rpartition(".")[2] in _CONV1D_NAMES


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)

"""Tiny models of transformers, adapted and merged by PEFT: `python families.py FOLDER`.

Each family gets FOLDER/<name>/base, peft and merged, as `save_pretrained` writes them.
Without torch this is a table of names, kinds and sizes.
"""

import sys
from pathlib import Path
from typing import Any

TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
}  # fmt: skip
GPT2 = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 48, "n_inner": 32,
    "n_positions": 32,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
DEEPSEEK = {
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "shared_expert_intermediate_size": 32,
}  # fmt: skip
ROPE = {
    "rope_parameters": {
        "rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0
    }
}  # fmt: skip
CAUSAL, IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"
CLASSES, PICTURES = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
)
LINEAR = ["q_proj", "v_proj", "o_proj"]
PACKED = ["experts.gate_up_proj", "experts.down_proj"]

# By name: the class of the model, its kind, its config, and PEFT's.
Family = tuple[str, str, dict[str, Any], dict[str, Any]]
FAMILIES: dict[str, Family] = {}


def _moe(kind: str, **more: Any) -> None:
    modules = ["q_proj", "o_proj", "q_a_proj"]
    lora = {"target_modules": modules, "target_parameters": PACKED}
    FAMILIES[kind] = (CAUSAL, kind, {**TEXT, **EXPERTS, **more}, lora)


def _images(kind: str, vision: str, text: str, **more: Any) -> None:
    config = {
        "vision_config": {**VISION, "model_type": vision},
        "text_config": {**TEXT, "model_type": text, "head_dim": 8},
        **more,
    }
    modules = [*LINEAR, "k_proj", "fc1", "fc2"]
    FAMILIES[kind] = (IMAGES, kind, config, {"target_modules": modules})


def _llama(name: str, tied: bool = True, **lora: Any) -> None:
    config = {**TEXT, "tie_word_embeddings": tied}
    FAMILIES[name] = (CAUSAL, "llama", config, {"target_modules": LINEAR, **lora})


_llama("llama", tied=False)
_llama("llama_head", tied=False, target_modules=[*LINEAR, "lm_head"])
_llama("llama_table", modules_to_save=["embed_tokens"])
_llama("llama_both", modules_to_save=["embed_tokens", "lm_head"])
_llama("llama_tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
_llama("llama_rows", trainable_token_indices=[5, 1])
_llama("llama_resized")
FAMILIES["gpt2_head"] = (
    CAUSAL, "gpt2", {**GPT2, "tie_word_embeddings": False},
    {"target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"]},
)  # fmt: skip
FAMILIES["gpt2_classes"] = (
    CLASSES, "gpt2", {**GPT2, "num_labels": 3},
    {"target_modules": ["c_attn", "c_proj"], "task_type": "SEQ_CLS"},
)  # fmt: skip
for _bias in ("all", "lora_only"):
    FAMILIES[f"bert_{_bias}"] = (
        CLASSES, "bert", {**TEXT, "num_labels": 3},
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": _bias},
    )  # fmt: skip
FAMILIES["captioner"] = (
    "VisionEncoderDecoderModel", "vision-encoder-decoder",
    {
        "encoder": {**VISION, "model_type": "vit"},
        "decoder": {**GPT2, "model_type": "gpt2", "add_cross_attention": True,
                    "is_decoder": True},
    },
    {"target_modules": ["q_proj", "c_attn", "c_proj"]},
)  # fmt: skip
for _kind in ("vit", "beit", "dinov2", "dinov2_with_registers"):
    _config = {**VISION, "num_labels": 3, "use_swiglu_ffn": _kind == "dinov2"}
    _lora = {"target_modules": "all-linear", "modules_to_save": ["classifier"]}
    FAMILIES[_kind] = (PICTURES, _kind, _config, _lora)
for _kind in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "gpt_oss"):
    _moe(_kind, head_dim=8)
_moe("granitemoe")
_moe("llama4_text", head_dim=8, intermediate_size_mlp=32)
_moe("glm4_moe", head_dim=8, first_k_dense_replace=1, n_group=1, topk_group=1)
_moe("deepseek_v3", **DEEPSEEK)
_moe("qwen3_5_moe_text", head_dim=8, **DELTA)
_images("gemma3", "siglip_vision_model", "gemma3_text", mm_tokens_per_image=4)
_images("paligemma", "siglip_vision_model", "gemma")
_images("llava", "clip_vision_model", "llama")
_images("llava_onevision", "siglip_vision_model", "qwen2")
_images("mistral3", "pixtral", "mistral")
FAMILIES["qwen2_vl"] = (
    IMAGES, "qwen2_vl",
    {
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32,
                          "num_heads": 4, "patch_size": 8},
        "text_config": {**TEXT, "model_type": "qwen2_vl_text", **ROPE},
    },
    {"target_modules": [*LINEAR, "qkv", "proj"]},
)  # fmt: skip
FAMILIES["gpt_neox"] = (
    CAUSAL, "gpt_neox", TEXT, {"target_modules": ["query_key_value", "lm_head"]}
)  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Writes the three folders of a family."""
    import peft
    import torch
    import transformers

    kind_of_class, kind, config, lora = FAMILIES[name]
    torch.manual_seed(0)
    whole = transformers.CONFIG_MAPPING[kind](**config)
    cls = getattr(transformers, kind_of_class)
    model = cls.from_config(whole) if kind_of_class[:4] == "Auto" else cls(config=whole)
    _fill(model.parameters())
    base = str(folder / "base")
    model.save_pretrained(base)
    model = type(model).from_pretrained(base).eval()
    if name.endswith("resized"):
        model.resize_token_embeddings(51, mean_resizing=False)
    own = peft.LoraConfig(r=2, lora_alpha=6, base_model_name_or_path=base, **lora)
    adapted = peft.get_peft_model(model, own)
    _fill(p for p in adapted.parameters() if p.requires_grad)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(folder / "peft"))
    adapted.merge_and_unload().save_pretrained(str(folder / "merged"))


def _fill(parameters: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.3)


if __name__ == "__main__":
    for one in sys.argv[2:] or FAMILIES:
        make(one, Path(sys.argv[1]) / one)

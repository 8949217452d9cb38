"""Tiny models of transformers, adapted and merged by PEFT.

    python families.py make FOLDER [NAME ...]
    python families.py check FOLDER [NAME ...]

`make` writes FOLDER/<name>/base, peft and merged, as `save_pretrained` writes them, and
the outputs `base.npy` and `adapted.npy`; `tree.npz` and `tree_merged.npz` have the same
weights by the names of modules, of whose classes `kinds.json` tells. `check` reads what
jlora made of these, the model `jlora` and the adapter `again`, and writes their outputs
likewise. It is for transformers 4.57 and later; without torch this is a table of names,
kinds and sizes.
"""

import json
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
_SECTIONS = {"rope_type": "default", "mrope_section": [2, 1, 1]}
ROPE = {
    "rope_parameters": {**_SECTIONS, "rope_theta": 10000.0},
    "rope_scaling": _SECTIONS,  # before transformers 5
}
CAUSAL, IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"
CLASSES, PICTURES = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
)
LINEAR = ["q_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
PACKED = ["experts.gate_up_proj", "experts.down_proj"]

# What experts are before transformers packed them.
APART = ["w1", "w2", "w3", *MLP]
# Kinds that are newer than the releases of transformers 4.
NEW = frozenset(("qwen3_5_moe_text",))

# By name: the class of the model, its kind, its config, and PEFT's.
Family = tuple[str, str, dict[str, Any], dict[str, Any]]
FAMILIES: dict[str, Family] = {}


def _moe(kind: str, name: str | None = None, **more: Any) -> None:
    modules = ["q_proj", "o_proj", "q_a_proj"]
    lora = {"target_modules": modules, "target_parameters": PACKED}
    FAMILIES[name or kind] = (CAUSAL, kind, {**TEXT, **EXPERTS, **more}, lora)


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
_WIDE = {"intermediate_size": 24, "moe_intermediate_size": 24, "head_dim": 8}
for _kind in ("mixtral", "qwen3_moe", "gpt_oss"):  # whose experts are not square
    _moe(_kind, f"{_kind}_wide", **_WIDE)
for _kind in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"):
    _lora = {"target_modules": [*LINEAR, *MLP]}
    FAMILIES[_kind] = (CAUSAL, _kind, {**TEXT, "head_dim": 8}, _lora)
FAMILIES["phi3"] = (
    CAUSAL, "phi3", TEXT,
    {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]},
)  # fmt: skip
FAMILIES["roberta"] = (
    CLASSES, "roberta", {**TEXT, "num_labels": 3},
    {"target_modules": ["query", "key", "dense"], "task_type": "SEQ_CLS"},
)  # fmt: skip
FAMILIES["t5"] = (
    "AutoModelForSeq2SeqLM", "t5",
    {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
     "vocab_size": 48, "decoder_start_token_id": 0},
    {"target_modules": ["q", "v", "wi", "wo"]},
)  # fmt: skip
FAMILIES["whisper"] = (
    "AutoModelForSpeechSeq2Seq", "whisper",
    {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 48,
     "encoder_attention_heads": 4, "decoder_attention_heads": 4,
     "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
     "max_source_positions": 10, "max_target_positions": 16, "pad_token_id": 0,
     "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
     "suppress_tokens": None, "begin_suppress_tokens": None},
    {"target_modules": ["q_proj", "v_proj", "fc1"]},
)  # fmt: skip
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
_config = {
    "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48,
                      "num_heads": 4, "patch_size": 8, "out_hidden_size": 32,
                      "fullatt_block_indexes": [1]},
    "text_config": {**TEXT, "model_type": "qwen2_5_vl_text", **ROPE},
}  # fmt: skip
_lora = {"target_modules": [*LINEAR, *MLP, "qkv", "proj"]}
FAMILIES["qwen2_5_vl"] = (IMAGES, "qwen2_5_vl", _config, _lora)
FAMILIES["gpt_neox"] = (
    CAUSAL, "gpt_neox", TEXT, {"target_modules": ["query_key_value", "lm_head"]}
)  # fmt: skip

# What `docs/guide/families.md` says in other words than "yes", and the tests do.
_CONVOLVED = {"save": 'a plan, or the rule "conv"', "convert": "`--convolutions`"}
_LOST = 'yes; of 0.18 `ignore=["bias"]`'
TOLD: dict[str, dict[str, str]] = {
    "llama_both": {"load": "refused where both are one leaf", "save": "no adapter"},
    "llama_rows": {"convert": "refused: no file has the size of the table"},
    "llama_resized": {"merge": "`extend_tables=True`"},
    "bert_lora_only": {
        "load": _LOST, "merge": _LOST, "convert": "yes; of 0.18 `--ignore bias`",
    },
    "llama4_text": {"convert": "yes; of 0.21 `--model-type llama4_text`"},
    "qwen2_vl": _CONVOLVED,
    "qwen2_5_vl": _CONVOLVED,
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """Writes the folders of a family, and the outputs with and without the adapter."""
    import peft
    import torch
    import transformers

    kind_of_class, kind, config, lora = FAMILIES[name]
    old = transformers.__version__.startswith("4.")
    if old and kind in NEW:
        return
    if old and lora.get("target_parameters") == PACKED:
        lora = {**lora, "target_modules": [*lora["target_modules"], *APART]}
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
    _write(model, folder / "base.npy")
    _write_tree(model, folder, "tree")
    adapted = peft.get_peft_model(model, own)
    _fill(p for p in adapted.parameters() if p.requires_grad)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(folder / "peft"))
    if lora.get("bias") == "lora_only":  # which PEFT 0.18 does not save
        model = type(model).from_pretrained(base).eval()
        adapted = peft.PeftModel.from_pretrained(model, str(folder / "peft"))
    adapted.eval()
    _write(adapted, folder / "adapted.npy")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(str(folder / "merged"))
    _write_tree(merged, folder, "tree_merged")


def check(name: str, folder: Path) -> dict[str, Any]:
    """Writes the outputs of what jlora made, and returns what was said of it."""
    import peft
    import transformers

    cls = getattr(transformers, FAMILIES[name][0])
    said: dict[str, Any] = {}
    if (folder / "jlora").exists():
        place = str(folder / "jlora")
        model, loading = cls.from_pretrained(place, output_loading_info=True)
        said["jlora"] = {k: sorted(map(str, v)) for k, v in loading.items() if v}
        _write(model.eval(), folder / "jlora.npy")
    if (folder / "again").exists():
        model = cls.from_pretrained(str(folder / "base")).eval()
        if name.endswith("resized"):
            model.resize_token_embeddings(51, mean_resizing=False)
        adapted = peft.PeftModel.from_pretrained(model, str(folder / "again")).eval()
        _write(adapted, folder / "again.npy")
    return said


def _write_tree(model: Any, folder: Path, name: str) -> None:
    """Writes the parameters by the names that they have in the modules."""
    import numpy as np

    state = {n: p.detach().float().numpy() for n, p in model.named_parameters()}
    np.savez(folder / f"{name}.npz", **state)
    owners = {n: n.rpartition(".")[0] for n in state}
    kinds = {n: type(model.get_submodule(o)).__name__ for n, o in owners.items()}
    if name == "tree":
        (folder / "kinds.json").write_text(json.dumps(kinds))


def _write(model: Any, file: Path) -> None:
    import numpy as np
    import torch

    with torch.no_grad():
        np.save(file, model(**_inputs(model)).logits.float().numpy())


def _inputs(model: Any) -> dict[str, Any]:
    """Returns what a model takes: a picture or a sound, and tokens."""
    import torch

    tokens = torch.tensor([[3, 7, 11, 5, 9, 2]])
    numbers = torch.linspace(-1, 1, 3 * 16 * 16)
    kinds = {
        "pixel_values": ({"pixel_values": numbers.reshape(1, 3, 16, 16)}),
        "input_features": ({"input_features": numbers[:160].reshape(1, 8, 20)}),
        "input_ids": ({"input_ids": tokens}),
    }
    found = dict(kinds[model.main_input_name])
    if model.config.is_encoder_decoder:
        found["decoder_input_ids"] = tokens
    if model.main_input_name == "input_ids":
        model.config.get_text_config().use_cache = False
    return found


def _fill(parameters: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.3)


def main(mode: str, folder: Path, *names: str) -> None:
    """Makes or checks families; what is said of them is the last line."""
    said: dict[str, Any] = {}
    for name in names or FAMILIES:
        try:
            said[name] = {"make": make, "check": check}[mode](name, folder / name)
        except Exception as error:  # the test of this family fails with it
            said[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])

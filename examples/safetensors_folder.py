"""Reads a Llama from a folder in the layout of Hugging Face."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import Checkpoint
from llama import LlamaConfig
from safetensors import safe_open
from tokenizers import Tokenizer


def read_safetensors(folder: Path) -> Checkpoint:
    """Returns the checkpoint of a folder; its tensors are read when asked for.

    Raises:
        FileNotFoundError: If the folder lacks its config, tokenizer or weights.
        ValueError: If it holds another architecture.
    """
    needed = ("config.json", "tokenizer.json", "*.safetensors")
    missing = [pattern for pattern in needed if not any(folder.glob(pattern))]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', no '.join(missing)}")
    config = _config(json.loads((folder / "config.json").read_text("utf-8")))
    # The flax reader, because numpy has no bfloat16 of its own.
    shards = [safe_open(f, "flax") for f in sorted(folder.glob("*.safetensors"))]
    homes = {key.removesuffix(".weight"): f for f in shards for key in f.keys()}

    def weight(name: str) -> np.ndarray:
        return np.asarray(homes[name].get_tensor(f"{name}.weight"), np.float32)

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Checkpoint(config, homes.keys(), weight, tokenizer)


def _config(values: dict[str, Any]) -> LlamaConfig:
    rope = values.get("rope_parameters") or {}  # transformers 5; before: rope_scaling
    scaling = (values.get("rope_scaling") or rope).get("rope_type", "default")
    if values.get("model_type") != "llama" or scaling != "default":
        raise ValueError(
            f"config.json: model_type {values.get('model_type')!r} with rope scaling "
            f"{scaling!r}; this example reads 'llama' without scaling"
        )
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    return LlamaConfig(
        vocab=values["vocab_size"],
        hidden=hidden,
        mlp=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or hidden // heads,
        rope_base=rope.get("rope_theta") or values.get("rope_theta") or 10_000.0,
        norm_eps=values["rms_norm_eps"],
        tied=values.get("tie_word_embeddings", False),
    )

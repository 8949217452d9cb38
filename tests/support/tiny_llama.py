"""A Llama of a few thousand weights, written in both formats that examples/ read."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from paths import EXAMPLES
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers

sys.path.insert(0, str(EXAMPLES))

import gguf_file
import llama

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
# No two sizes are equal, so that no transposition can hide.
CONFIG = llama.LlamaConfig(
    vocab=len(TOKENS),
    hidden=96,
    mlp=160,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=32,
    rope_base=1000.0,
    norm_eps=2.0**-16,  # exact in float32, which is what GGUF stores
)

# What the corpus looks like: conversations of a question and two replies.
TALKS = [
    [f"{opening} number {i}?", f"reply {i}", f"and {i} again"]
    for i in range(20)
    for opening in ("hello", "bye")
]


def random_weights() -> dict[str, np.ndarray]:
    """The weights of a tiny Llama under their Hugging Face names."""
    random = np.random.default_rng(0)
    c, q, kv = CONFIG, CONFIG.heads * CONFIG.head_dim, CONFIG.kv_heads * CONFIG.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (c.vocab, c.hidden),
        "model.norm": (c.hidden,),
    }
    for i in range(c.layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm"] = (c.hidden,)
        shapes[layer + "self_attn.q_proj"] = (q, c.hidden)
        shapes[layer + "self_attn.k_proj"] = (kv, c.hidden)
        shapes[layer + "self_attn.v_proj"] = (kv, c.hidden)
        shapes[layer + "self_attn.o_proj"] = (c.hidden, q)
        shapes[layer + "post_attention_layernorm"] = (c.hidden,)
        shapes[layer + "mlp.gate_proj"] = (c.mlp, c.hidden)
        shapes[layer + "mlp.up_proj"] = (c.mlp, c.hidden)
        shapes[layer + "mlp.down_proj"] = (c.hidden, c.mlp)
    scale = lambda shape: 0.1 if len(shape) == 2 else 1.0
    return {
        f"{name}.weight": (scale(shape) * random.normal(size=shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def pairs_from_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to queries and keys when it converts to GGUF."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    weights: dict[str, np.ndarray],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
) -> Path:
    """Writes `weights`; matrices are stored as `kind`."""
    c, writer = CONFIG, gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(c.hidden)
    writer.add_feed_forward_length(c.mlp)
    writer.add_block_count(c.layers)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_base)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    normal = [gguf.TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL))
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + normal)
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            heads = c.heads if "q_proj" in name else c.kv_heads
            weight = pairs_from_halves(weight, heads)
        stored = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = quantize(weight, stored)
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor, by the gguf package's own map."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.layers)
    return names.get_name(name, try_suffixes=(".weight",)) or name


def write_folder(folder: Path, weights: dict[str, np.ndarray]) -> Path:
    """Writes `weights` in two shards, with a config and a tokenizer."""
    folder.mkdir()
    c, names = CONFIG, sorted(weights)
    for i, part in enumerate((names[::2], names[1::2])):
        shard = {name: weights[name] for name in part}
        save_file(shard, folder / f"model-{i}.safetensors")
    config = {
        "model_type": "llama",
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rope_theta": c.rope_base,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": "lm_head.weight" not in weights,
    }
    (folder / "config.json").write_text(json.dumps(config))
    source = write_gguf(folder / "tokenizer.gguf", weights)
    tokenizer = gguf_file.read_gguf(source).tokenizer
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder

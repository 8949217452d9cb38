"""Reads a Llama and its tokenizer from a GGUF file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from checkpoints import Checkpoint
from gguf.quants import dequantize
from llama import LlamaConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
Read = Callable[[str], Any]


def read_gguf(path: Path) -> Checkpoint:
    """Returns the checkpoint of a GGUF file, dequantized as it is read.

    Raises:
        ValueError: If it holds another architecture or tokenizer than SmolLM2's.
    """
    reader = gguf.GGUFReader(path)

    def read(key: str) -> Any:
        return reader.fields[key].contents() if key in reader.fields else None

    tensors = {_name(t.name): t for t in reader.tensors}
    config = _config(path, read, tied="lm_head" not in tensors)

    def weight(name: str) -> np.ndarray:
        values = dequantize(tensors[name].data, tensors[name].tensor_type)
        if name.endswith("q_proj"):
            return halves_from_pairs(values, config.heads)
        if name.endswith("k_proj"):
            return halves_from_pairs(values, config.kv_heads)
        return values

    return Checkpoint(config, tensors.keys(), weight, _tokenizer(read))


def _name(name: str) -> str:
    """Returns the Hugging Face name of a GGUF tensor, or its own if it has none."""
    plain = name.removesuffix(".weight")
    block, _, rest = plain.removeprefix("blk.").partition(".")
    if rest in LAYER_NAMES:
        return f"model.layers.{block}.{LAYER_NAMES[rest]}"
    return TOP_NAMES.get(plain, name)


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns a query or key weight (heads * dim, in) for the rotary layout in halves.

    In the GGUF of a Llama the two features of a rotary pair are neighbours; in llama.py
    and at Hugging Face they are half a head apart. The maps are the same but for the
    order of the features, which queries and keys share, so that their product, which
    is all that attention sees, is the same.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _config(path: Path, read: Read, *, tied: bool) -> LlamaConfig:
    architecture = read("general.architecture")
    scaling = read("llama.rope.scaling.type")
    if architecture != "llama" or scaling not in (None, "none"):
        raise ValueError(
            f"{path}: architecture {architecture!r} with rope scaling {scaling!r}; "
            "this example reads 'llama' without scaling"
        )
    hidden, heads = read("llama.embedding_length"), read("llama.attention.head_count")
    return LlamaConfig(
        vocab=len(read("tokenizer.ggml.tokens")),
        hidden=hidden,
        mlp=read("llama.feed_forward_length"),
        layers=read("llama.block_count"),
        heads=heads,
        kv_heads=read("llama.attention.head_count_kv") or heads,
        head_dim=read("llama.rope.dimension_count") or hidden // heads,
        rope_base=read("llama.rope.freq_base") or 10_000.0,
        norm_eps=read("llama.attention.layer_norm_rms_epsilon"),
        tied=tied,
    )


def _tokenizer(read: Read) -> Tokenizer:
    """Returns the byte-level BPE tokenizer of the file: digits stand alone."""
    kind = (read("tokenizer.ggml.model"), read("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer {kind}; this example reads ('gpt2', 'smollm')")
    tokens = read("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, read("tokenizer.ggml.token_type"), strict=True)
    control = [token for token, kind in kinds if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in control])
    return tokenizer

"""The JAX twins of tiny models of transformers: Llama, GPT-2, BERT and ViT."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from paths import EXAMPLES
from peft_twin import (
    Bias,
    Conv,
    Dense,
    Fused,
    Names,
    Plain,
    Stacked,
    Table,
    Tree,
    Twin,
    affine,
    attend,
    biased,
    norm,
    normed,
)

sys.path.insert(0, str(EXAMPLES))

import llama

# Llama, of the examples.

_LLAMA = llama.LlamaConfig(
    vocab=41,
    hidden=24,
    mlp=36,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    rope_base=10000.0,
    norm_eps=1e-5,
    tied=False,
    scan=False,
)


def llama_of(**overrides: Any) -> Callable[[Tree, jax.Array], jax.Array]:
    """Returns the apply function of a tiny Llama."""
    return llama.Llama(dataclasses.replace(_LLAMA, **overrides)).apply


def _block_leaves(module: str) -> dict[str, Any]:
    attn, feed = f"{module}.self_attn", f"{module}.mlp"
    return {
        "attention_norm/scale": Plain(f"{module}.input_layernorm.weight"),
        "attention/q_proj/kernel": Dense(f"{attn}.q_proj", (24, 4, 8)),
        "attention/k_proj/kernel": Dense(f"{attn}.k_proj", (24, 2, 8)),
        "attention/v_proj/kernel": Dense(f"{attn}.v_proj", (24, 2, 8)),
        "attention/o_proj/kernel": Dense(f"{attn}.o_proj", (4, 8, 24)),
        "mlp_norm/scale": Plain(f"{module}.post_attention_layernorm.weight"),
        "mlp/gate_proj/kernel": Dense(f"{feed}.gate_proj"),
        "mlp/up_proj/kernel": Dense(f"{feed}.up_proj"),
        "mlp/down_proj/kernel": Dense(f"{feed}.down_proj"),
    }


def _llama_leaves(n_layers: int, scan: bool, tied: bool) -> dict[str, Any]:
    leaves: dict[str, Any] = {
        "params/embed/embedding": Table("model.embed_tokens"),
        "params/norm/scale": Plain("model.norm.weight"),
    }
    if not tied:
        leaves["params/lm_head/kernel"] = Dense("lm_head")
    each = [_block_leaves(f"model.layers.{i}") for i in range(n_layers)]
    for name in each[0]:
        if scan:
            layers_ = tuple(block[name] for block in each)
            leaves[f"params/blocks/{name}"] = Stacked(layers_)
        else:
            named = {f"params/block_{i}/{name}": b[name] for i, b in enumerate(each)}
            leaves |= named
    return leaves


def llama_names(scan: bool) -> Names:
    """Returns the rules of the Llama of the examples."""
    block = "blocks" if scan else r"block_(?P<layer>\d+)"
    layer = "model.layers.{layer}"
    return [
        (r"params/embed", "model.embed_tokens"),
        (r"params/norm", "model.norm"),
        (r"params/lm_head", "lm_head"),
        (rf"params/{block}/attention_norm", f"{layer}.input_layernorm"),
        (rf"params/{block}/mlp_norm", f"{layer}.post_attention_layernorm"),
        (rf"params/{block}/attention/(?P<name>\w+)", f"{layer}.self_attn.{{name}}"),
        (rf"params/{block}/mlp/(?P<name>\w+)", f"{layer}.mlp.{{name}}"),
    ]


# Llama once more, with q, k and v and gate and up fused in JAX.


def fused_llama(variables: Tree, tokens: jax.Array) -> jax.Array:
    """The tiny Llama of plain functions, over fused kernels of two axes."""
    params, config = variables["params"], _LLAMA
    x = params["embed"]["embedding"][tokens]
    for i in range(config.layers):
        block = params[f"block_{i}"]
        x = x + _fused_attention(block, _rms(block["attention_norm"], x))
        both = affine(block["gate_up"], _rms(block["mlp_norm"], x))
        gate, up = jnp.split(both, 2, axis=-1)
        x = x + affine(block["down"], jax.nn.silu(gate) * up)
    return affine(params["lm_head"], _rms(params["norm"], x))


def _rms(params: Tree, x: jax.Array) -> jax.Array:
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + _LLAMA.norm_eps)
    return x * jnp.broadcast_to(params["scale"], x.shape)


def _fused_attention(params: Tree, x: jax.Array) -> jax.Array:
    heads, kv, dim = _LLAMA.heads, _LLAMA.kv_heads, _LLAMA.head_dim
    y = affine(params["qkv"], x).reshape(*x.shape[:2], -1, dim)
    q, k, v = jnp.split(y, (heads, heads + kv), axis=2)
    positions = jnp.arange(x.shape[1])
    q, k = (llama.rotate(h, positions, _LLAMA.rope_base) for h in (q, k))
    k, v = (jnp.repeat(h, heads // kv, axis=2) for h in (k, v))
    return affine(params["o"], attend(q, k, v, causal=True).reshape(*x.shape[:2], -1))


def _fused_llama_leaves() -> dict[str, Any]:
    leaves: dict[str, Any] = {
        "params/embed/embedding": Table("model.embed_tokens"),
        "params/norm/scale": Plain("model.norm.weight"),
        "params/lm_head/kernel": Dense("lm_head"),
    }
    for i in range(_LLAMA.layers):
        path, module = f"params/block_{i}", f"model.layers.{i}"
        attn = [Dense(f"{module}.self_attn.{n}_proj") for n in "qkv"]
        feed = [Dense(f"{module}.mlp.{n}_proj") for n in ("gate", "up")]
        norms = ("input_layernorm", "post_attention_layernorm")
        leaves |= {
            f"{path}/attention_norm/scale": Plain(f"{module}.{norms[0]}.weight"),
            f"{path}/mlp_norm/scale": Plain(f"{module}.{norms[1]}.weight"),
            f"{path}/qkv/kernel": Fused(tuple(attn), (32, 16, 16)),
            f"{path}/o/kernel": Dense(f"{module}.self_attn.o_proj"),
            f"{path}/gate_up/kernel": Fused(tuple(feed), (36, 36)),
            f"{path}/down/kernel": Dense(f"{module}.mlp.down_proj"),
        }
    return leaves


_BLOCK = r"params/block_(?P<i>\d+)"
FUSED_NAMES: Names = [
    (
        rf"{_BLOCK}/qkv",
        tuple(
            f"model.layers.{{i}}.self_attn.{n}_proj={width}"
            for n, width in zip("qkv", (32, 16, 16), strict=True)
        ),
    ),
    (
        rf"{_BLOCK}/gate_up",
        tuple(f"model.layers.{{i}}.mlp.{n}_proj" for n in ("gate", "up")),
    ),
    (rf"{_BLOCK}/o", "model.layers.{i}.self_attn.o_proj"),
    (rf"{_BLOCK}/down", "model.layers.{i}.mlp.down_proj"),
    (rf"{_BLOCK}/attention_norm", "model.layers.{i}.input_layernorm"),
    (rf"{_BLOCK}/mlp_norm", "model.layers.{i}.post_attention_layernorm"),
    (r"params/embed", "model.embed_tokens"),
    (r"params/norm", "model.norm"),
    (r"params/lm_head", "lm_head"),
]


# GPT-2, with c_attn as one kernel or as three.


def gpt2(variables: Tree, tokens: jax.Array) -> jax.Array:
    """One layer of three heads, whose q, k and v are one kernel or three."""
    params = variables["params"]
    table = params["wte"]["embedding"]
    x = table[tokens] + params["wpe"]["embedding"][: tokens.shape[1]][None]
    block = params["h_0"]
    x = x + _gpt2_attention(block, norm(block["ln_1"], x, 1e-5))
    hidden = affine(block["c_fc"], norm(block["ln_2"], x, 1e-5))
    x = x + affine(block["c_proj"], jax.nn.gelu(hidden, approximate=True))
    return norm(params["ln_f"], x, 1e-5) @ table.T


def _gpt2_attention(block: Tree, x: jax.Array) -> jax.Array:
    if "c_attn" in block:
        parts = jnp.split(affine(block["c_attn"], x), 3, axis=-1)
    else:
        parts = [affine(block[name], x) for name in ("query", "key", "value")]
    q, k, v = (part.reshape(*x.shape[:2], 3, 8) for part in parts)
    return affine(block["out"], attend(q, k, v, causal=True), 2)


def _gpt2_leaves(apart: bool) -> dict[str, Any]:
    leaves = {
        "params/wte/embedding": Table("transformer.wte"),
        "params/wpe/embedding": Table("transformer.wpe"),
        **normed("params/ln_f", "transformer.ln_f"),
    }
    path, module = "params/h_0", "transformer.h.0"
    for name in ("ln_1", "ln_2"):
        leaves |= normed(f"{path}/{name}", f"{module}.{name}")
    for name in ("c_fc", "c_proj"):
        kernel = Dense(f"{module}.mlp.{name}", turned=True)
        leaves |= biased(f"{path}/{name}", f"{module}.mlp.{name}", kernel)
    kernel = Dense(f"{module}.attn.c_proj", (3, 8, 24), turned=True)
    leaves |= biased(f"{path}/out", f"{module}.attn.c_proj", kernel)
    return leaves | _c_attn_leaves(path, f"{module}.attn.c_attn", apart)


def _c_attn_leaves(path: str, module: str, apart: bool) -> dict[str, Any]:
    if not apart:
        return biased(f"{path}/c_attn", module, Dense(module, turned=True))
    leaves: dict[str, Any] = {}
    for i, name in enumerate(("query", "key", "value")):
        kernel = Dense(module, turned=True, part=(i, 3))
        leaves[f"{path}/{name}/kernel"] = kernel
        leaves[f"{path}/{name}/bias"] = Bias(f"{module}.bias", (24,), (i, 3))
    return leaves


_H = r"params/h_(?P<i>\d+)"
_H_NAME = "transformer.h.{i}"
GPT2_NAMES: Names = [
    (r"params/(?P<name>wte|wpe|ln_f)", "transformer.{name}"),
    (rf"{_H}/(?P<name>ln_\d)", f"{_H_NAME}.{{name}}"),
    (rf"{_H}/(?P<name>c_fc|c_proj)", f"{_H_NAME}.mlp.{{name}}", "fan_in_fan_out"),
    (rf"{_H}/out", f"{_H_NAME}.attn.c_proj", "fan_in_fan_out"),
    (rf"{_H}/c_attn", f"{_H_NAME}.attn.c_attn", "fan_in_fan_out"),
    (rf"{_H}/query", f"{_H_NAME}.attn.c_attn[0]", "fan_in_fan_out"),
    (rf"{_H}/key", f"{_H_NAME}.attn.c_attn[1]", "fan_in_fan_out"),
    (rf"{_H}/value", f"{_H_NAME}.attn.c_attn[2]", "fan_in_fan_out"),
]


# BERT and ViT, with heads as axes of their kernels.

_QKV = ("query", "key", "value")


def _heads_attention(params: Tree, x: jax.Array) -> jax.Array:
    q, k, v = (affine(params[name], x) for name in _QKV)
    return affine(params["out"], attend(q, k, v), 2)


def bert(variables: Tree, tokens: jax.Array) -> jax.Array:
    """One layer, a pooler and a classifier."""
    params = variables["params"]
    x = params["words"]["embedding"][tokens]
    x = x + params["positions"]["embedding"][: tokens.shape[1]][None]
    x = norm(params["norm"], x + params["types"]["embedding"][:1][None], 1e-12)
    block = params["layer_0"]
    x = norm(block["norm_1"], x + _heads_attention(block, x), 1e-12)
    hidden = jax.nn.gelu(affine(block["up"], x), approximate=False)
    x = norm(block["norm_2"], x + affine(block["down"], hidden), 1e-12)
    return affine(params["classifier"], jnp.tanh(affine(params["pooler"], x[:, 0])))


def _heads(path: str, module: str) -> dict[str, Any]:
    kernel = Dense(module, (24, 3, 8))
    return {f"{path}/kernel": kernel, f"{path}/bias": Bias(f"{module}.bias", (3, 8))}


def _bert_leaves() -> dict[str, Any]:
    table = "bert.embeddings.{}_embeddings".format
    path, module = "params/layer_0", "bert.encoder.layer.0"
    dense = f"{module}.attention.output.dense"
    leaves = {
        "params/words/embedding": Table(table("word")),
        "params/positions/embedding": Table(table("position")),
        "params/types/embedding": Table(table("token_type")),
        **normed("params/norm", "bert.embeddings.LayerNorm"),
        **biased("params/pooler", "bert.pooler.dense"),
        **biased("params/classifier", "classifier"),
        **biased(f"{path}/out", dense, Dense(dense, (3, 8, 24))),
        **biased(f"{path}/up", f"{module}.intermediate.dense"),
        **biased(f"{path}/down", f"{module}.output.dense"),
        **normed(f"{path}/norm_1", f"{module}.attention.output.LayerNorm"),
        **normed(f"{path}/norm_2", f"{module}.output.LayerNorm"),
    }
    for name in _QKV:
        leaves |= _heads(f"{path}/{name}", f"{module}.attention.self.{name}")
    return leaves


_B = r"params/layer_(?P<i>\d+)"
_B_NAME = "bert.encoder.layer.{i}"
BERT_NAMES: Names = [
    (r"params/words", "bert.embeddings.word_embeddings"),
    (r"params/positions", "bert.embeddings.position_embeddings"),
    (r"params/types", "bert.embeddings.token_type_embeddings"),
    (r"params/norm", "bert.embeddings.LayerNorm"),
    (r"params/pooler", "bert.pooler.dense"),
    (r"params/classifier", "classifier"),
    (rf"{_B}/(?P<name>query|key|value)", f"{_B_NAME}.attention.self.{{name}}"),
    (rf"{_B}/out", f"{_B_NAME}.attention.output.dense"),
    (rf"{_B}/up", f"{_B_NAME}.intermediate.dense"),
    (rf"{_B}/down", f"{_B_NAME}.output.dense"),
    (rf"{_B}/norm_1", f"{_B_NAME}.attention.output.LayerNorm"),
    (rf"{_B}/norm_2", f"{_B_NAME}.output.LayerNorm"),
]


def vit(variables: Tree, images: jax.Array) -> jax.Array:
    """One layer on four patches and a token, and a classifier."""
    params = variables["params"]
    patches = nn.Conv(24, (4, 4), strides=4, padding="VALID")
    x = patches.apply({"params": params["patches"]}, jnp.moveaxis(images, 1, -1))
    x = x.reshape(x.shape[0], -1, 24)
    first = jnp.broadcast_to(params["cls"], (x.shape[0], 1, 24))
    x = jnp.concatenate([first, x], axis=1)
    x = x + jnp.broadcast_to(params["positions"], x.shape)
    block = params["layer_0"]
    x = x + _heads_attention(block, norm(block["norm_1"], x, 1e-12))
    hidden = affine(block["up"], norm(block["norm_2"], x, 1e-12))
    x = x + affine(block["down"], jax.nn.gelu(hidden, approximate=False))
    return affine(params["classifier"], norm(params["norm"], x, 1e-12)[:, 0])


def _vit_leaves() -> dict[str, Any]:
    patches = "vit.embeddings.patch_embeddings.projection"
    path, module = "params/layer_0", "vit.layers.0"
    out = f"{module}.attention.o_proj"
    leaves = {
        "params/cls": Plain("vit.embeddings.cls_token"),
        "params/positions": Plain("vit.embeddings.position_embeddings"),
        **biased("params/patches", patches, Conv(patches)),
        **normed("params/norm", "vit.layernorm"),
        **biased("params/classifier", "classifier"),
        **biased(f"{path}/out", out, Dense(out, (3, 8, 24))),
        **biased(f"{path}/up", f"{module}.mlp.fc1"),
        **biased(f"{path}/down", f"{module}.mlp.fc2"),
        **normed(f"{path}/norm_1", f"{module}.layernorm_before"),
        **normed(f"{path}/norm_2", f"{module}.layernorm_after"),
    }
    for name in _QKV:
        leaves |= _heads(f"{path}/{name}", f"{module}.attention.{name[0]}_proj")
    return leaves


_V = r"params/layer_(?P<i>\d+)"
_V_NAME = "vit.layers.{i}"
VIT_NAMES: Names = [
    (r"params/cls", "vit.embeddings.cls_token", "parameter"),
    (r"params/positions", "vit.embeddings.position_embeddings", "parameter"),
    (r"params/patches", "vit.embeddings.patch_embeddings.projection", "conv"),
    (r"params/norm", "vit.layernorm"),
    (r"params/classifier", "classifier"),
    (rf"{_V}/query", f"{_V_NAME}.attention.q_proj"),
    (rf"{_V}/key", f"{_V_NAME}.attention.k_proj"),
    (rf"{_V}/value", f"{_V_NAME}.attention.v_proj"),
    (rf"{_V}/out", f"{_V_NAME}.attention.o_proj"),
    (rf"{_V}/up", f"{_V_NAME}.mlp.fc1"),
    (rf"{_V}/down", f"{_V_NAME}.mlp.fc2"),
    (rf"{_V}/norm_1", f"{_V_NAME}.layernorm_before"),
    (rf"{_V}/norm_2", f"{_V_NAME}.layernorm_after"),
]


# --- all of them, by name ---


def transformer_twins() -> dict[str, Twin]:
    """Returns the twins by name, the case and what is different about its params."""
    table = "model.embed_tokens.lora_embedding_"
    tied = {"lm_head.lora_A.weight": f"{table}B", "lm_head.lora_B.weight": f"{table}A"}
    return {
        "embedding_tied": Twin(
            "embedding_tied",
            llama_of(layers=1, tied=True),
            _llama_leaves(1, scan=False, tied=True),
            [
                (r"params/embed", "model.embed_tokens", "tied(lm_head)"),
                *(llama_names(scan=False) or ()),
            ],
            tied,
        ),
        "llama": Twin(
            "llama", llama_of(), _llama_leaves(2, False, False), llama_names(False)
        ),
        "llama/scan": Twin(
            "llama",
            llama_of(scan=True),
            _llama_leaves(2, True, False),
            llama_names(True),
        ),
        "llama/fused": Twin("llama", fused_llama, _fused_llama_leaves(), FUSED_NAMES),
        "gpt2": Twin("gpt2", gpt2, _gpt2_leaves(apart=False), GPT2_NAMES),
        "gpt2/apart": Twin("gpt2", gpt2, _gpt2_leaves(apart=True), GPT2_NAMES),
        "bert": Twin("bert", bert, _bert_leaves(), BERT_NAMES),
        "vit": Twin("vit", vit, _vit_leaves(), VIT_NAMES),
    }

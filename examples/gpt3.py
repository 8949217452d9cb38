"""GPT-3 in Flax Linen: plain code that knows nothing of LoRA.

The decoder of GPT-2 at the sizes of GPT-3: biases everywhere, norms before each part,
learned positions, and the table of tokens as output head. Attention is dense in every
layer, where GPT-3 alternates with sparse patterns that have the same weights. The
layers are a stack under `nn.scan`, every leaf with a leading layer axis.

References:
    Brown et al., Language Models are Few-Shot Learners
    <https://arxiv.org/abs/2005.14165>, 2020.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from llama import place


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT3Config:
    """The sizes of a GPT-3; the defaults are those of the largest, 175B.

    `dtype` is the type of the computation, not of the parameters; `remat` computes each
    layer again in the backward pass. `activations` and `embeddings` are shardings, as
    in `llama.LlamaConfig`.
    """

    vocab: int = 50257
    hidden: int = 12288
    layers: int = 96
    heads: int = 96
    positions: int = 2048
    dtype: Any = jnp.float32
    remat: bool = False
    activations: Any = None
    embeddings: Any = None


class Attention(nn.Module):
    """Causal self-attention."""

    config: GPT3Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = functools.partial(nn.DenseGeneral, dtype=c.dtype)
        shape = (c.heads, c.hidden // c.heads)
        q, k, v = (dense(shape, name=f"{name}_proj")(x) for name in "qkv")
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return dense(c.hidden, axis=(-2, -1), name="o_proj")(y)


class Mlp(nn.Module):
    """The feed-forward layer, four times as wide as the model."""

    config: GPT3Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        up = nn.Dense(4 * c.hidden, dtype=c.dtype, name="up_proj")(x)
        return nn.Dense(c.hidden, dtype=c.dtype, name="down_proj")(nn.gelu(up))


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added after."""

    config: GPT3Config

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        c = self.config
        norm = functools.partial(nn.LayerNorm, dtype=c.dtype)
        attention, mlp = Attention(c, name="attention"), Mlp(c, name="mlp")
        x = place(x + attention(norm(name="attention_norm")(x)), c.activations)
        return place(x + mlp(norm(name="mlp_norm")(x)), c.activations), None


class GPT3(nn.Module):
    """The decoder, from tokens (batch, time) to logits (batch, time, vocab)."""

    config: GPT3Config

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits of tokens of shape (batch, time)."""
        c = self.config
        embed = nn.Embed(c.vocab, c.hidden, dtype=c.dtype, name="embed")
        places = nn.Embed(c.positions, c.hidden, dtype=c.dtype, name="positions")
        x = place(embed(tokens), c.embeddings)
        x = place(x + places(jnp.arange(tokens.shape[1]))[None], c.activations)
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False) if c.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.layers,
        )
        x, _ = stack(c, name="blocks")(x, None)
        return embed.attend(nn.LayerNorm(dtype=c.dtype, name="norm")(x))

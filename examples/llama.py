"""A Llama in Flax Linen: plain code that knows nothing of LoRA.

The parameter names and the rotary layout (two halves, not interleaved pairs) are those
of Hugging Face checkpoints, so that weights load and adapters export without a map.
One switch, `LlamaConfig.scan`, chooses between a stack of layers under `nn.scan`
(`params/blocks/...`, every leaf with a leading layer axis; fast to compile) and one
module per layer (`params/block_0/...`). `unstack_blocks` gives the params of the second
from those of the first.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The sizes of a Llama; the defaults are SmolLM2-135M.

    `dtype` is the type of the computation, not of the parameters. `tied` uses the
    embedding table as the output head, and `remat` computes each layer again in the
    backward pass instead of keeping what is inside of it. `activations` is the sharding
    of what flows from layer to layer, (batch, time, hidden), and `embeddings` that of
    the embeddings before; None leaves it to XLA. `attention` is the implementation of
    `jax.nn.dot_product_attention` where no mask is given, such as "cudnn".
    """

    vocab: int = 49152
    hidden: int = 576
    mlp: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    rope_base: float = 100_000.0
    norm_eps: float = 1e-5
    tied: bool = True
    scan: bool = True
    dtype: Any = jnp.float32
    remat: bool = False
    activations: Any = None
    embeddings: Any = None
    attention: str | None = None


class KVCache(NamedTuple):
    """Keys and values of the tokens read so far.

    `keys` and `values` are (layers, batch, length, kv_heads, head_dim); `index` is the
    number of positions in use.
    """

    keys: jax.Array
    values: jax.Array
    index: jax.Array


def empty_cache(config: LlamaConfig, batch: int, length: int) -> KVCache:
    """Returns a cache with room for `length` tokens in each of `batch` rows."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.dtype)
    return KVCache(zeros, zeros, jnp.zeros((), jnp.int32))


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Returns `x` (batch, time, heads, dim) turned by its positions (time,).

    Feature i is paired with feature i + dim/2.

    References:
        Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding
        <https://arxiv.org/abs/2104.09864>, 2021.
    """
    half = x.shape[-1] // 2
    angles = positions[:, None] * base ** (-jnp.arange(half) / half)[None]
    angles = angles[None, :, None]  # (1, time, 1, half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def place(x: jax.Array, sharding: Any) -> jax.Array:
    """Returns `x` with a sharding, or as it is for None.

    Without one, XLA follows the kernels: sharded over their inputs, these make it sum
    whole activations over devices instead of gathering the smaller kernels.
    """
    return x if sharding is None else lax.with_sharding_constraint(x, sharding)


class Attention(nn.Module):
    """Causal self-attention; `heads // kv_heads` queries share a key and a value."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Any, mask: jax.Array | None, positions: jax.Array
    ) -> tuple[jax.Array, Any]:
        c = self.config
        dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=c.dtype)
        q = dense((c.heads, c.head_dim), name="q_proj")(x)
        k = dense((c.kv_heads, c.head_dim), name="k_proj")(x)
        v = dense((c.kv_heads, c.head_dim), name="v_proj")(x)
        q, k = (rotate(h, positions, c.rope_base) for h in (q, k))
        if cache is not None:
            write = functools.partial(
                lax.dynamic_update_slice_in_dim, start_index=positions[0], axis=1
            )
            k, v = cache = (write(cache[0], k), write(cache[1], v))
        attend = jax.nn.dot_product_attention
        if mask is None:
            y = attend(q, k, v, is_causal=True, implementation=c.attention)
        else:
            y = attend(q, k, v, mask=mask[:, None])
        return dense(c.hidden, axis=(-2, -1), name="o_proj")(y), cache


class Mlp(nn.Module):
    """The gated feed-forward layer, `down(silu(gate(x)) * up(x))`."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        dense = functools.partial(nn.Dense, use_bias=False, dtype=c.dtype)
        gate = dense(c.mlp, name="gate_proj")(x)
        up = dense(c.mlp, name="up_proj")(x)
        return dense(c.hidden, name="down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added after."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Any, mask: jax.Array | None, positions: jax.Array
    ) -> tuple[jax.Array, Any]:
        c = self.config
        norm = functools.partial(nn.RMSNorm, epsilon=c.norm_eps, dtype=c.dtype)
        attention = Attention(c, name="attention")
        y, cache = attention(norm(name="attention_norm")(x), cache, mask, positions)
        x = place(x + y, c.activations)
        y = Mlp(c, name="mlp")(norm(name="mlp_norm")(x))
        return place(x + y, c.activations), cache


class Llama(nn.Module):
    """The decoder, from tokens (batch, time) to logits (batch, time, vocab)."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        mask: jax.Array | None = None,
        at: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Returns the logits, and with a `cache` the pair (logits, new cache).

        Args:
            tokens: (batch, time) token ids.
            mask: (batch, time, keys), True where a token may look; causal by default.
            at: (batch, n) positions whose logits are wanted; all by default. The head
                is a fifth of the work, and a loss rarely needs every position.
            cache: what was read before; `keys` in `mask` is then its length.
        """
        c = self.config
        start = 0 if cache is None else cache.index
        positions = start + jnp.arange(tokens.shape[1])
        if mask is None and cache is not None:
            keys = jnp.arange(cache.keys.shape[2])
            mask = (keys[None] <= positions[:, None])[None]
        embed = nn.Embed(c.vocab, c.hidden, dtype=c.dtype, name="embed")
        x = place(place(embed(tokens), c.embeddings), c.activations)
        x, layers = self._blocks(x, cache, mask, positions)
        if at is not None:
            x = jnp.take_along_axis(x, at[..., None], axis=1)
        x = nn.RMSNorm(epsilon=c.norm_eps, dtype=c.dtype, name="norm")(x)
        head = nn.Dense(c.vocab, use_bias=False, dtype=c.dtype, name="lm_head")
        logits = embed.attend(x) if c.tied else head(x)
        if cache is None:
            return logits
        return logits, KVCache(*layers, start + tokens.shape[1])

    def _blocks(
        self,
        x: jax.Array,
        cache: KVCache | None,
        mask: jax.Array | None,
        positions: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """Returns the output of all layers, and their keys and values stacked."""
        c = self.config
        layers = None if cache is None else (cache.keys, cache.values)
        block = nn.remat(Block, prevent_cse=not c.scan) if c.remat else Block
        if c.scan:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=c.layers,
            )
            return stack(c, name="blocks")(x, layers, mask, positions)
        outs = []
        for i in range(c.layers):
            layer = jax.tree.map(lambda v, i=i: v[i], layers)
            x, out = block(c, name=f"block_{i}")(x, layer, mask, positions)
            outs.append(out)
        return x, jax.tree.map(lambda *v: jnp.stack(v), *outs)


def unstack_blocks(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the params of the unrolled model from those of the scanned one."""
    rest = {k: v for k, v in params.items() if k != "blocks"}
    blocks = params["blocks"]
    for i in range(jax.tree.leaves(blocks)[0].shape[0]):
        rest[f"block_{i}"] = jax.tree.map(lambda v, i=i: v[i], blocks)
    return rest


LLAMA_70B = LlamaConfig(
    vocab=128256,
    hidden=8192,
    mlp=28672,
    layers=80,
    heads=64,
    kv_heads=8,
    head_dim=128,
    rope_base=500_000.0,
    tied=False,
)

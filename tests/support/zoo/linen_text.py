"""Linen models of text: decoders, an encoder, a cached step, a two-tower model."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze

from .case import (
    DENSE,
    JOIN,
    SPLIT,
    TABLE,
    Axes,
    Built,
    Case,
    normal,
    stacked,
    tokens,
    under,
    variables,
)

BATCH, TIME, VOCAB, WIDTH, HIDDEN = 4, 6, 23, 14, 17
HEADS, KV_HEADS, HEAD_DIM = 15, 5, 8
LAYERS = 3

ATTENTION = {
    "query/kernel": SPLIT,
    "key/kernel": SPLIT,
    "value/kernel": SPLIT,
    "out/kernel": JOIN,
}
MLP = {"gate/kernel": DENSE, "up/kernel": DENSE, "down/kernel": DENSE}
BLOCK = {**under("attention", ATTENTION), **under("mlp", MLP)}


def rope(x: jax.Array, base: float = 100.0) -> jax.Array:
    """Rotates pairs of features by their position; x: (batch, time, heads, dim)."""
    half = x.shape[-1] // 2
    rates = base ** (-jnp.arange(half) / half)
    angles = (jnp.arange(x.shape[1])[:, None] * rates)[:, None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


def logical(*names: str) -> Any:
    return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)


class Attention(nn.Module):
    """Grouped queries: each of the few keys and values serves several heads."""

    boxed: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = logical if self.boxed else lambda *_: nn.initializers.lecun_normal()
        split = partial(nn.DenseGeneral, use_bias=False, dtype=self.dtype)
        heads = partial(split, kernel_init=init("embed", "heads", "dim"))
        q = rope(heads((HEADS, HEAD_DIM), name="query")(x))
        k = rope(heads((KV_HEADS, HEAD_DIM), name="key")(x))
        v = heads((KV_HEADS, HEAD_DIM), name="value")(x)
        q = q.reshape(*q.shape[:2], KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
        scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k) / HEAD_DIM**0.5
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
        y = jnp.einsum("bkgqs,bskd->bqkgd", nn.softmax(scores), v)
        y = y.reshape(*y.shape[:2], HEADS, HEAD_DIM)
        joined = init("heads", "dim", "embed")
        return split(WIDTH, axis=(-2, -1), kernel_init=joined, name="out")(y)


class Mlp(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        gate = nn.silu(dense(HIDDEN, name="gate")(x))
        return dense(WIDTH, name="down")(gate * dense(HIDDEN, name="up")(x))


class Block(nn.Module):
    boxed: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        norm = partial(nn.RMSNorm, dtype=self.dtype)
        attention = Attention(self.boxed, self.dtype, name="attention")
        x = x + attention(norm(name="before_attention")(x))
        mlp = Mlp(self.dtype, name="mlp")
        return x + mlp(norm(name="before_mlp")(x)), None


class TiedDecoder(nn.Module):
    """Unrolled blocks between the two uses of one table."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCAB, WIDTH, name="embed")
        x = embed(ids)
        for i in range(2):
            x, _ = Block(name=f"block_{i}")(x)
        return embed.attend(nn.RMSNorm(name="norm")(x))


class ScannedDecoder(nn.Module):
    """A scan over rematerialised blocks, in bfloat16, with boxed kernels."""

    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        init = logical("vocab", "embed")
        x = nn.Embed(VOCAB, WIDTH, embedding_init=init, dtype=self.dtype)(ids)
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = blocks(True, self.dtype, name="blocks")(x, None)
        head = partial(nn.Dense, kernel_init=logical("embed", "vocab"), name="head")
        return head(VOCAB, dtype=self.dtype)(x)


class Encoder(nn.Module):
    """Flax's own attention with dropout; positions are a table that is only added."""

    @nn.compact
    def __call__(self, ids: jax.Array, segments: jax.Array, *, train: bool) -> Any:
        drop = nn.Dropout(0.3, deterministic=not train)
        init = nn.initializers.normal(0.5)
        positions = self.param("positions", init, (2 * TIME, WIDTH))
        x = nn.Embed(VOCAB, WIDTH, name="words")(ids) + positions[: ids.shape[1]]
        x = drop(x + nn.Embed(7, WIDTH, name="segments")(segments))
        attention = nn.MultiHeadDotProductAttention(
            HEADS,
            qkv_features=HEADS * HEAD_DIM,
            dropout_rate=0.2,
            deterministic=not train,
        )
        x = nn.LayerNorm()(x + attention(x, mask=(ids > 0)[:, None, None, :]))
        h = drop(nn.gelu(nn.Dense(HIDDEN, name="grow")(x)))
        x = nn.LayerNorm()(x + nn.Dense(WIDTH, name="shrink")(h))
        return {"hidden": x, "pooled": nn.tanh(nn.Dense(11, name="pooler")(x[:, 0]))}


class CachedStep(nn.Module):
    """One step of decoding that writes keys and values into the cache."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.MultiHeadDotProductAttention(
            HEADS, qkv_features=HEADS * HEAD_DIM, decode=True, name="attention"
        )(x)
        return nn.Dense(VOCAB, name="head")(x + y)


class TwoTowers(nn.Module):
    """Set up by `setup`, run through a method that is not `__call__`; a box."""

    def setup(self) -> None:
        self.words = nn.Embed(VOCAB, WIDTH)
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "out"))
        self.left, self.right = nn.Dense(11, kernel_init=init), nn.Dense(11)

    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return self.score(a, b)

    def encode(self, ids: jax.Array, tower: str) -> jax.Array:
        x = getattr(self, tower)(self.words(ids)).mean(axis=1)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def score(self, a: jax.Array, b: jax.Array, *, sharpness: float = 3.0) -> Any:
        left, right = self.encode(a, "left"), self.encode(b, "right")
        return sharpness * left @ right.T, (left, None)


def tied_decoder() -> Built:
    ids = tokens(2, (BATCH, TIME), VOCAB)
    model = TiedDecoder()
    expected = {
        "params/embed/embedding": TABLE,
        **under("params/block_0", BLOCK),
        **under("params/block_1", BLOCK),
    }
    return Built(model.apply, variables(model, ids), (ids,), expected, target=".*")


def scanned_decoder(dtype: Any) -> Built:
    ids = tokens(2, (BATCH, TIME), VOCAB)
    model = ScannedDecoder(dtype)
    expected = {f"params/blocks/{k}": stacked(v) for k, v in BLOCK.items()}
    expected |= {"params/Embed_0/embedding": TABLE, "params/head/kernel": DENSE}
    return Built(
        model.apply,
        variables(model, ids),
        (ids,),
        expected,
        target=".*",
        exact=ScannedDecoder(jnp.float32).apply if dtype == jnp.bfloat16 else None,
    )


def encoder() -> Built:
    ids, segments = tokens(2, (BATCH, TIME), VOCAB), tokens(3, (BATCH, TIME), 7)
    model = Encoder()
    params = freeze(variables(model, ids, segments, train=False))
    attention = under("params/MultiHeadDotProductAttention_0", ATTENTION)
    expected: dict[str, Axes] = {
        "params/words/embedding": TABLE,
        "params/segments/embedding": TABLE,
        "params/grow/kernel": DENSE,
        "params/shrink/kernel": DENSE,
        "params/pooler/kernel": DENSE,
        **attention,
    }
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(5)}}
    return Built(
        model.apply, params, (ids, segments), expected, kwargs, target="params/.*"
    )


def cached_step() -> Built:
    model = CachedStep()
    tree = variables(model, jnp.zeros((BATCH, TIME, WIDTH)))
    # Three tokens have been read; with none, the scores would be of no account.
    fill = lambda x: normal(3, *x.shape) if x.ndim else jnp.asarray(3, x.dtype)
    tree["cache"] = jax.tree.map(fill, tree["cache"])
    x = normal(2, BATCH, 1, WIDTH)
    expected = {"params/head/kernel": DENSE, **under("params/attention", ATTENTION)}
    return Built(model.apply, tree, (x,), expected, {"mutable": ["cache"]})


def two_towers() -> Built:
    a, b = tokens(2, (BATCH, TIME), VOCAB), tokens(3, (BATCH + 2, TIME), VOCAB)
    model = TwoTowers()
    expected = {"params/left/kernel": DENSE, "params/right/kernel": DENSE}
    kwargs = {"method": TwoTowers.score, "sharpness": 2.0}
    return Built(model.apply, variables(model, a, b), (a, b), expected, kwargs)


CASES = [
    Case("linen-decoder-gqa-rope-tied", tied_decoder),
    Case("linen-decoder-scan-remat-boxed-bf16", partial(scanned_decoder, jnp.bfloat16)),
    Case("linen-decoder-scan-remat-boxed-f32", partial(scanned_decoder, jnp.float32)),
    Case("linen-encoder-dropout-frozendict", encoder),
    Case("linen-cached-step-mutable", cached_step),
    Case("linen-two-towers-method", two_towers),
]

"""NNX models, run through split and merge; state that changes is an argument."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .case import (
    CONV2D,
    DENSE,
    TABLE,
    Axes,
    Built,
    Case,
    begin,
    normal,
    randomize,
    stacked,
    tokens,
    under,
)
from .linen_text import (
    ATTENTION,
    BATCH,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    TIME,
    VOCAB,
    WIDTH,
    rope,
)

BLOCK = {**under("attention", ATTENTION), "up/kernel": DENSE, "down/kernel": DENSE}


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        few, many = (KV_HEADS, HEAD_DIM), (HEADS, HEAD_DIM)
        self.query = nnx.LinearGeneral(WIDTH, many, rngs=rngs)
        self.key = nnx.LinearGeneral(WIDTH, few, rngs=rngs)
        self.value = nnx.LinearGeneral(WIDTH, few, rngs=rngs)
        self.out = nnx.LinearGeneral(many, WIDTH, axis=(-2, -1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        repeat = lambda x: jnp.repeat(x, HEADS // KV_HEADS, axis=2)
        q, k = rope(self.query(x)), repeat(rope(self.key(x)))
        y = jax.nn.dot_product_attention(q, k, repeat(self.value(x)), is_causal=True)
        return self.out(y)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = Attention(rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x)


class ScannedDecoder(nnx.Module):
    """The layers are one module whose params have an axis more."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        split = nnx.split_rngs(splits=LAYERS)
        self.blocks = split(nnx.vmap(Block, in_axes=(0,)))(rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        return self.head(run(self.blocks, self.embed(ids)))


class ConvNet(nnx.Module):
    """Batch statistics and the count of the dropout's stream change when it runs."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 6, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.grouped = nnx.Conv(6, 10, (3, 3), feature_group_count=2, rngs=rngs)
        self.up = nnx.ConvTranspose(10, 7, (4, 4), strides=(2, 2), rngs=rngs)
        self.drop = nnx.Dropout(0.4, rngs=rngs)
        self.head = nnx.Linear(7, 11, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.relu(self.up(nnx.relu(self.grouped(x))))
        return self.head(self.drop(x.mean(axis=(1, 2))))


class Encoder(nnx.Module):
    """Flax's attention, an Einsum layer with a kernel of five axes, and dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, HEADS * HEAD_DIM, decode=False, dropout_rate=0.2, rngs=rngs
        )
        # Three views of each token, mixed over the views at the end.
        self.views = nnx.Einsum("btd,dvhk->btvhk", (WIDTH, 3, 7, 11), rngs=rngs)
        self.back = nnx.Einsum("btvhk,vhkf->btf", (3, 7, 11, HIDDEN), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(x, deterministic=False)
        return self.back(nnx.gelu(self.views(x)))


class Experts(nnx.Module):
    """A copy of one module per group of inputs."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        split = nnx.split_rngs(splits=LAYERS)
        self.experts = split(nnx.vmap(Expert, in_axes=(0,)))(rngs)
        self.head = nnx.Linear(WIDTH, 11, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        run = nnx.vmap(lambda expert, x: expert(x), in_axes=(0, 0))
        return self.head(run(self.experts, x))


class Expert(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


class Reader(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.GRUCell(WIDTH, 11, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(11, HIDDEN, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.rnn(x)[:, -1])


def build(
    make: Callable[[nnx.Rngs], nnx.Module],
    x: jax.Array,
    expected: dict[str, Axes],
    **settings: Any,
) -> Built:
    """A model as `fn(params, rest, x)`, which returns the rest as it left it."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params: nnx.State, rest: nnx.State, x: jax.Array) -> Any:
        model = nnx.merge(graph, params, rest)
        y = model(x)
        return y, nnx.split(model, nnx.Param, ...)[2]

    return Built(
        fn, randomize(params), (jax.tree.map(begin, rest), x), expected, **settings
    )


def decoder() -> Built:
    expected = {"embed/embedding": TABLE}
    expected |= {f"blocks/{i}/{k}": v for i in range(2) for k, v in BLOCK.items()}
    return build(Decoder, tokens(2, (BATCH, TIME), VOCAB), expected, target=".*")


def scanned_decoder() -> Built:
    expected = {f"blocks/{k}": stacked(v) for k, v in BLOCK.items()}
    expected |= {"head/kernel": DENSE}
    return build(ScannedDecoder, tokens(2, (BATCH, TIME), VOCAB), expected)


def conv_net() -> Built:
    names = ("stem", "grouped", "up")
    expected = {f"{name}/kernel": CONV2D for name in names}
    expected["head/kernel"] = DENSE
    return build(ConvNet, normal(2, 4, 8, 10, 3), expected)


def encoder() -> Built:
    expected = under("attention", ATTENTION)
    expected["views/kernel"] = Axes((), (0,), (1, 2, 3))
    expected["back/kernel"] = Axes((), (0, 1, 2), (3,))
    return build(Encoder, normal(2, BATCH, TIME, WIDTH), expected)


def experts() -> Built:
    expected = {f"experts/{name}/kernel": stacked(DENSE) for name in ("up", "down")}
    x = normal(2, LAYERS, BATCH, WIDTH)
    return build(Experts, x, expected, target="experts")


def reader() -> Built:
    names = ("rnn/cell/dense_i", "rnn/cell/dense_h", "head")
    expected = {f"{name}/kernel": DENSE for name in names}
    return build(Reader, normal(2, BATCH, TIME, WIDTH), expected)


CASES = [
    Case("nnx-decoder-gqa-rope-tied", decoder),
    Case("nnx-decoder-scan-remat", scanned_decoder),
    Case("nnx-convnet-batchnorm-dropout", conv_net),
    Case("nnx-encoder-einsum-dropout", encoder),
    Case("nnx-vmapped-experts", experts),
    Case("nnx-gru", reader),
]

"""Recurrent models: the kernel is used once per step and is a constant of the loop."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from .case import (
    DENSE,
    TABLE,
    Axes,
    Built,
    Case,
    normal,
    tokens,
    under,
    variables,
)

BATCH, TIME, VOCAB, WIDTH, HIDDEN = 3, 5, 19, 7, 11
LSTM = {f"{side}{gate}/kernel": DENSE for side in "hi" for gate in "ifgo"}
GRU = {f"{side}{gate}/kernel": DENSE for side in "hi" for gate in "rzn"}


class Seq2Seq(nn.Module):
    """An LSTM reads, another writes from its last state and looks back.

    `OptimizedLSTMCell` joins the kernels of its four gates before one product.
    """

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        table = nn.Embed(VOCAB, WIDTH, name="table")
        reader = nn.RNN(nn.OptimizedLSTMCell(HIDDEN, name="reader"), return_carry=True)
        carry, memory = reader(table(source))
        writer = nn.RNN(nn.LSTMCell(HIDDEN, name="writer"))
        states = writer(table(target), initial_carry=carry)
        keys = nn.Dense(HIDDEN, use_bias=False, name="look_back")(memory)
        weights = nn.softmax(jnp.einsum("bth,bsh->bts", states, keys))
        seen = jnp.einsum("bts,bsh->bth", weights, memory)
        joined = nn.tanh(
            nn.Dense(13, name="join")(jnp.concatenate([states, seen], axis=-1))
        )
        return nn.Dense(VOCAB, name="head")(joined)


class Tagger(nn.Module):
    """A GRU in both directions, of sequences of different lengths."""

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        both = nn.Bidirectional(
            nn.RNN(nn.GRUCell(HIDDEN, name="forward")),
            nn.RNN(nn.GRUCell(HIDDEN, name="backward")),
        )
        return nn.Dense(13, name="head")(both(x, seq_lengths=lengths))


def minimal_gated_unit(params: dict[str, Any], x: jax.Array) -> dict[str, jax.Array]:
    """A gated cell of one page: state and input joined, one kernel with both gates."""

    def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        both = jnp.concatenate([h, x], axis=-1)
        forget, candidate = jnp.split(both @ params["w"] + params["b"], 2, axis=-1)
        gate = jax.nn.sigmoid(forget)
        h = (1 - gate) * h + gate * jnp.tanh(candidate)
        return h, h @ params["out"]

    start = jnp.zeros((x.shape[1], HIDDEN))
    last, outputs = lax.scan(step, start, x)
    return {"last": last, "outputs": outputs}


def seq2seq() -> Built:
    model = Seq2Seq()
    args = tokens(2, (BATCH, TIME), VOCAB), tokens(3, (BATCH, TIME + 1), VOCAB)
    expected: dict[str, Axes] = {"params/table/embedding": TABLE}
    expected |= under("params/reader", LSTM) | under("params/writer", LSTM)
    heads = ("look_back", "join", "head")
    expected |= {f"params/{name}/kernel": DENSE for name in heads}
    # The gates of the reader in one: no sum may be formed in that shape either.
    watched = ((WIDTH, 4 * HIDDEN), (HIDDEN, 4 * HIDDEN))
    tree = variables(model, *args)
    return Built(model.apply, tree, args, expected, target=".*", watched=watched)


def tagger() -> Built:
    model = Tagger()
    args = normal(2, BATCH, TIME, WIDTH), jnp.array([2, 5, 4])
    expected = {"params/head/kernel": DENSE}
    for side in ("forward", "backward"):
        expected |= under(f"params/{side}", GRU)
    return Built(model.apply, variables(model, *args), args, expected)


def gated_unit() -> Built:
    params = {
        "w": normal(3, HIDDEN + WIDTH, 2 * HIDDEN) / 4,
        "b": normal(4, 2 * HIDDEN),
        "out": normal(5, HIDDEN, 13) / 3,
    }
    expected = {"w": DENSE, "out": DENSE}
    x = normal(2, TIME, BATCH, WIDTH)
    return Built(minimal_gated_unit, params, (x,), expected)


CASES = [
    Case("linen-lstm-seq2seq", seq2seq),
    Case("linen-gru-bidirectional", tagger),
    Case("plain-recurrent-cell", gated_unit),
]

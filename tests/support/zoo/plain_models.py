"""Models in plain JAX: dicts, lists, dataclasses and an Equinox module."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from .case import DENSE, TABLE, Axes, Built, Case, normal, stacked, tokens

BATCH, TIME, VOCAB, WIDTH, HIDDEN = 4, 5, 23, 14, 17
HEADS, HEAD_DIM, LAYERS = 7, 6, 3
ROWS_OUT = Axes((), (1,), (0,))  # `w @ x`
OIHW = Axes((), (1, 2, 3), (0,))

Tree = dict[str, Any]


def block(layer: Tree, x: jax.Array) -> jax.Array:
    """One fused kernel for q, k and v; everything by einsum."""
    y = x * lax.rsqrt((x**2).mean(axis=-1, keepdims=True)) * layer["scale"]
    q, k, v = jnp.einsum("btd,dchk->cbthk", y, layer["qkv"])
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / HEAD_DIM**0.5
    mask = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    x = x + jnp.einsum("bhqs,bshk,hkd->bqd", weights, v, layer["out"])
    return x + jax.nn.gelu(x @ layer["up"] + layer["bias"]) @ layer["down"]


def scanned_gpt(params: Tree, ids: jax.Array) -> jax.Array:
    x = params["table"][ids]
    step = lambda x, layer: (block(layer, x), None)
    x, _ = lax.scan(step, x, params["layers"])
    return x @ params["table"].T


def indexed_gpt(params: Tree, ids: jax.Array) -> jax.Array:
    """The same, with layer i taken out of the stack inside of the loop."""

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        return block(jax.tree.map(lambda w: w[i], params["layers"]), x)

    x = lax.fori_loop(0, LAYERS, step, params["table"][ids])
    return jnp.einsum("btd,vd->btv", x, params["table"])


def gpt_params(table: str = "table") -> Tree:
    layers = {
        "scale": 1 + normal(1, LAYERS, WIDTH) / 5,
        "qkv": normal(2, LAYERS, WIDTH, 3, HEADS, HEAD_DIM) / 4,
        "out": normal(3, LAYERS, HEADS, HEAD_DIM, WIDTH) / 7,
        "up": normal(4, LAYERS, WIDTH, HIDDEN) / 4,
        "bias": normal(5, LAYERS, HIDDEN),
        "down": normal(6, LAYERS, HIDDEN, WIDTH) / 4,
    }
    return {table: normal(7, VOCAB, WIDTH), "layers": layers}


def gpt(fn: Any) -> Built:
    expected = {
        "table": TABLE,
        "layers/qkv": stacked(Axes((), (0,), (1, 2, 3))),
        "layers/out": stacked(Axes((), (0, 1), (2,))),
        "layers/up": stacked(DENSE),
        "layers/down": stacked(DENSE),
    }
    ids = tokens(2, (BATCH, TIME), VOCAB)
    return Built(fn, gpt_params(), (ids,), expected, target=".*")


@partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=["act"])
@dataclass(frozen=True)
class Layer:
    w: jax.Array
    b: jax.Array
    act: str = "tanh"


def autoencoder(params: list[Any], x: jax.Array) -> tuple[jax.Array, ...]:
    """Written for one example; the last kernel is the first one, backwards."""
    first, middle, (scale, bias) = params

    def one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = getattr(jnp, first.act)(first.w @ x + first.b)
        h = getattr(jnp, middle.act)(h @ middle.w + middle.b)
        return h, scale * (h @ first.w) + bias

    return jax.vmap(one)(x)


def dataclasses() -> Built:
    params = [
        Layer(normal(1, 11, 7) / 3, normal(2, 11)),
        Layer(normal(3, 11, 11) / 3, normal(4, 11), act="sin"),
        (jnp.float32(1.5), normal(5, 7)),
    ]
    expected = {"0/w": ROWS_OUT, "1/w": DENSE}
    return Built(autoencoder, params, (normal(6, 5, 7),), expected)


def refiner(
    params: Tree, image: jax.Array, kind: jax.Array, *, half: Any = jnp.float16
) -> jax.Array:
    """Channels first; a branch chosen at run time; the same kernel three times."""
    conv = partial(lax.conv_general_dilated, dimension_numbers=("NCHW", "OIHW", "NCHW"))
    x = conv(image, params["stem"], (2, 1), "SAME")
    wide = lambda x: conv(x, params["wide"], (1, 1), "SAME", rhs_dilation=(1, 2))
    near = lambda x: jnp.einsum("nchw,cd->ndhw", x, params["near"])
    x = lax.switch(kind, [wide, near, lambda x: x / 2], x)

    @jax.checkpoint
    def step(_: int, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(jnp.tensordot(params["again"], x, (1, 1)).swapaxes(0, 1))

    x = lax.fori_loop(0, 3, step, x)
    # A quarter of the last kernel, in half precision, is enough.
    last = (0.25 * params["last"][:, :9]).astype(half)
    return x.mean(axis=(2, 3)).astype(half) @ last


def refining(kind: int) -> Built:
    params = {
        "stem": normal(1, 11, 5, 3, 3) / 4,
        "wide": normal(2, 11, 11, 1, 5) / 7,
        "near": normal(3, 11, 11) / 3,
        "again": normal(4, 11, 11) / 3,
        "last": normal(5, 11, 13),
    }
    expected = {
        "stem": OIHW,
        "wide": OIHW,
        "near": DENSE,
        "again": ROWS_OUT,
        "last": DENSE,
    }
    args = (normal(6, 4, 5, 6, 5), jnp.int32(kind))
    exact = partial(refiner, half=jnp.float32)
    return Built(refiner, params, args, expected, exact=exact)


class Classifier(eqx.Module):
    """Equinox: every layer is a module that is called on one example."""

    embed: eqx.nn.Embedding
    conv: eqx.nn.Conv1d
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm

    def __init__(self, key: jax.Array) -> None:
        keys = iter(jax.random.split(key, 4))
        self.embed = eqx.nn.Embedding(VOCAB, 10, key=next(keys))
        self.conv = eqx.nn.Conv1d(10, WIDTH, 3, padding=1, key=next(keys))
        self.attention = eqx.nn.MultiheadAttention(
            HEADS, WIDTH, qk_size=5, vo_size=6, output_size=12, key=next(keys)
        )
        self.mlp = eqx.nn.MLP(12, 11, HIDDEN, depth=1, key=next(keys))
        self.norm = eqx.nn.LayerNorm(WIDTH)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.conv(jax.vmap(self.embed)(ids).T).T
        x = jax.vmap(self.norm)(x)
        return self.mlp(self.attention(x, x, x).mean(axis=0))


def equinox() -> Built:
    model = Classifier(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params: Classifier, ids: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(ids)

    names = [f"attention/{name}_proj" for name in ("query", "key", "value", "output")]
    names += ["mlp/layers/0", "mlp/layers/1"]
    expected = {f"{name}/weight": ROWS_OUT for name in names}
    expected |= {"conv/weight": Axes((), (1, 2), (0,)), "embed/weight": TABLE}
    ids = tokens(2, (BATCH, TIME), VOCAB)
    return Built(fn, params, (ids,), expected, target=".*")


CASES = [
    Case("plain-gpt-scan", partial(gpt, scanned_gpt)),
    Case("plain-gpt-fori-loop", partial(gpt, indexed_gpt)),
    Case("plain-dataclasses-tied", dataclasses),
    Case("plain-refiner-switch-wide", partial(refining, 0)),
    Case("plain-refiner-switch-near", partial(refining, 1)),
    Case("equinox-classifier", equinox),
]

"""The models of the benchmarks, as plain functions of a tree of arrays.

Every use of a kernel goes through a `Linears` function: `(x, layer, names) -> outputs`,
the products of `x` with the kernels `names` of one layer. `plain` is what a model that
knows nothing of LoRA does; the rivals pass their own.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Params = dict[str, Any]
Layer = Mapping[str, Any]
Linears = Callable[[jax.Array, Layer, Sequence[str]], list[jax.Array]]


def plain(x: jax.Array, layer: Layer, names: Sequence[str]) -> list[jax.Array]:
    """The frozen products."""
    return [x @ layer[name] for name in names]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """A dense Llama-like decoder: RMS norms, rotary attention, a gated MLP.

    `loss_chunks` splits the tokens of the head's loss, so that the logits of one chunk
    exist at a time. A head has `d / heads` features, or `head_dim`. On a mesh, `rows`
    is the layout of the embedded tokens, and `features` theirs as they come out of the
    table (`placing.on_mesh`).
    """

    d: int = 512
    ffn: int = 1536
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    head_dim: int | None = None
    vocab: int = 2048
    batch: int = 4
    seq: int = 256
    dtype: Any = jnp.float32
    scan: bool = True
    remat: bool = False
    loss_chunks: int = 1
    rows: Any = dataclasses.field(default=None, repr=False)
    features: Any = dataclasses.field(default=None, repr=False)

    kernels = ("q", "k", "v", "o", "gate", "up", "down")

    @property
    def tokens(self) -> int:
        """The tokens of a batch."""
        return self.batch * self.seq

    @property
    def features_of_head(self) -> int:
        """The features of one head of the attention."""
        return self.head_dim or self.d // self.heads

    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (d_in, d_out) of each kernel of a layer."""
        d, dim = self.d, self.features_of_head
        q, kv = dim * self.heads, dim * self.kv_heads
        attention = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d)}
        return attention | {
            "gate": (d, self.ffn),
            "up": (d, self.ffn),
            "down": (self.ffn, d),
        }

    def init(self, key: jax.Array) -> Params:
        """Returns random params; layers are stacked, or a list where not scanned."""
        keys = jax.random.split(key, 3)

        def normal(key: jax.Array, *shape: int) -> jax.Array:
            scale = jnp.asarray(1 / math.sqrt(shape[-2]), self.dtype)
            return jax.random.normal(key, shape, self.dtype) * scale

        def layer(key: jax.Array) -> Params:
            own = jax.random.split(key, len(self.kernels))
            shapes = self.kernel_shapes()
            made = {n: normal(k, *shapes[n]) for n, k in zip(shapes, own, strict=True)}
            norms = {n: jnp.ones(self.d, self.dtype) for n in ("norm_1", "norm_2")}
            return made | norms

        each = jax.random.split(keys[0], self.layers)
        # `lax.map` draws one layer at a time: random bits take more room than weights.
        layers = lax.map(layer, each) if self.scan else [layer(k) for k in each]
        return {
            "embedding": normal(keys[1], self.vocab, self.d),
            "layers": layers,
            "norm": jnp.ones(self.d, self.dtype),
            "head": normal(keys[2], self.d, self.vocab),
        }

    def data(self, key: jax.Array) -> jax.Array:
        """Returns a batch of tokens (batch, seq + 1)."""
        return jax.random.randint(key, (self.batch, self.seq + 1), 0, self.vocab)

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        """Returns the inputs of the first layer, (batch, seq, d)."""
        x = params["embedding"][tokens[:, :-1]]
        if self.rows is None:
            return x
        x = lax.with_sharding_constraint(x, self.features)
        return lax.with_sharding_constraint(x, self.rows)

    def loss(
        self,
        params: Params,
        tokens: jax.Array,
        inputs: jax.Array | None = None,
        linears: Linears = plain,
    ) -> jax.Array:
        """Returns the mean cross-entropy of the next token."""
        x = self.embed(params, tokens) if inputs is None else inputs
        body = lambda x, layer: (self.layer(x, layer, linears), None)
        if self.remat:
            body = jax.checkpoint(body, prevent_cse=not self.scan)
        if self.scan:
            x, _ = lax.scan(body, x, params["layers"])
        else:
            for layer in params["layers"]:
                x, _ = body(x, layer)
        x = rms_norm(x, params["norm"])
        return cross_entropy(x, params["head"], tokens[:, 1:], self.loss_chunks)

    def layer(self, x: jax.Array, layer: Layer, linears: Linears) -> jax.Array:
        """One layer."""
        h = rms_norm(x, layer["norm_1"])
        q, k, v = linears(h, layer, ("q", "k", "v"))
        heads = lambda y, n: y.reshape(*y.shape[:-1], n, self.features_of_head)
        q, k = rotate(heads(q, self.heads)), rotate(heads(k, self.kv_heads))
        mixed = self.mix(q, k, heads(v, self.kv_heads))
        mixed = mixed.reshape(*x.shape[:-1], -1)
        x = x + linears(mixed, layer, ("o",))[0]
        return x + self.mlp(rms_norm(x, layer["norm_2"]), layer, linears)

    def mix(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """The attention, (batch, seq, heads, dim)."""
        return attention(q, k, v)

    def mlp(self, x: jax.Array, layer: Layer, linears: Linears) -> jax.Array:
        """The gated MLP of a layer."""
        gate, up = linears(x, layer, ("gate", "up"))
        return linears(jax.nn.silu(gate) * up, layer, ("down",))[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """Square linears with tanh between them, the case without anything else."""

    d: int = 512
    layers: int = 6
    batch: int = 4
    seq: int = 256
    dtype: Any = jnp.float32
    kernels = ("w",)

    @property
    def tokens(self) -> int:
        """The rows of a batch."""
        return self.batch * self.seq

    def init(self, key: jax.Array) -> Params:
        """Returns random params."""
        each = jax.random.split(key, self.layers)
        draw = lambda k: jax.random.normal(k, (self.d, self.d), self.dtype)
        return {"layers": [{"w": draw(k) / math.sqrt(self.d)} for k in each]}

    def data(self, key: jax.Array) -> jax.Array:
        """Returns a batch (batch, seq, d)."""
        return jax.random.normal(key, (self.batch, self.seq, self.d), self.dtype)

    def embed(self, params: Params, batch: jax.Array) -> jax.Array:
        """Returns the inputs of the first layer."""
        return batch

    def loss(
        self,
        params: Params,
        batch: jax.Array,
        inputs: jax.Array | None = None,
        linears: Linears = plain,
    ) -> jax.Array:
        """Returns the mean square of the output."""
        x = batch if inputs is None else inputs
        for layer in params["layers"]:
            (x,) = linears(jnp.tanh(x), layer, ("w",))
        return jnp.mean(jnp.square(x.astype(jnp.float32)))


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square norm, computed in float32."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * lax.rsqrt(mean + 1e-6)).astype(x.dtype) * scale


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions on (batch, seq, heads, dim), two halves."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention; cuDNN's on GPUs, in the dtypes that it has."""
    fast = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
    implementation = "cudnn" if fast else None
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation=implementation
    )


def cross_entropy(
    x: jax.Array, head: jax.Array, targets: jax.Array, chunks: int
) -> jax.Array:
    """Mean cross-entropy of `x·head`, over chunks of the tokens."""

    def part(both: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, wanted = both
        logits = (hidden @ head).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked)

    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    if chunks == 1:
        return part((x, targets)) / len(x)
    split = (x.reshape(chunks, -1, x.shape[-1]), targets.reshape(chunks, -1))
    return jnp.sum(lax.map(jax.checkpoint(part), split)) / len(x)

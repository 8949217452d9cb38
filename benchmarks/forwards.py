"""Forward passes of the decoder: a prompt, and one more token with a cache.

Each is `fn(params, ...)` over the plain model, so that `jlora.lora` adapts it and the
base is timed by the same function.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from models import Decoder, Layer, Params, plain, rms_norm
from steps import lora_of

import jlora

Forward = Callable[..., Any]
SIZES = ("d", "ffn", "layers", "heads", "kv_heads", "vocab")


def parser(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """Returns a parser with the flags that the scripts share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--out", type=Path, help="the folder of the results")
    for size in SIZES:
        made.add_argument(f"--{size.replace('_', '-')}", type=int)
    return made


def decoder(flags: argparse.Namespace, **more: Any) -> Decoder:
    """Returns the decoder of the machine, with the sizes that the flags name."""
    sizes: dict[str, Any] = {}
    if jax.default_backend() != "cpu":
        sizes = {"d": 2048, "ffn": 5632, "layers": 16, "heads": 16, "kv_heads": 16}
        sizes |= {"vocab": 32000, "dtype": jnp.bfloat16, "remat": True}
    named = {size: getattr(flags, size) for size in SIZES}
    sizes |= {size: value for size, value in named.items() if value is not None}
    return Decoder(**sizes, **more)


def prefill(model: Decoder) -> Forward:
    """Returns `fn(params, tokens) -> logits` of the token after each prompt.

    `tokens: (batch, seq + 1)` as `model.data` draws them, `logits: (batch, vocab)`.
    """

    def fn(params: Params, tokens: jax.Array) -> jax.Array:
        x = model.embed(params, tokens)
        if model.scan:
            body = lambda x, layer: (model.layer(x, layer, plain), None)
            x, _ = lax.scan(body, x, params["layers"])
        else:
            for layer in params["layers"]:
                x = model.layer(x, layer, plain)
        return rms_norm(x[:, -1], params["norm"]) @ params["head"]

    return fn


Cache = list[tuple[jax.Array, jax.Array]]


def unrolled(model: Decoder, params: Params) -> tuple[Decoder, Params]:
    """Returns a scanned decoder and its params with a list of layers, to decode with.

    A scan copies each layer's kernels and its part of the cache at every token, which
    a server would not bear: beside such a base an adapter looks cheaper than it is.
    """
    layers = [
        jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        for i in range(model.layers)
    ]
    return dataclasses.replace(model, scan=False), {**params, "layers": layers}


def empty_cache(model: Decoder, length: int) -> Cache:
    """Returns keys and values, (batch, kv_heads, length, head size), of each layer."""
    shape = (model.batch, model.kv_heads, length, model.features_of_head)
    zeros = lambda: jnp.zeros(shape, model.dtype)
    return [(zeros(), zeros()) for _ in range(model.layers)]


def decode(model: Decoder) -> Forward:
    """Returns `fn(params, tokens, cache, position) -> (tokens, cache)`, greedy.

    Of an unrolled model. `tokens: (batch,)` stand at `position: ()`; the cache is read
    up to there, and is updated in place where it is donated.
    """

    def fn(params: Params, tokens: jax.Array, cache: Cache, position: jax.Array) -> Any:
        x, new = params["embedding"][tokens][:, None], []
        for layer, own in zip(params["layers"], cache, strict=True):
            x, own = decode_layer(model, x, layer, own, position)
            new.append(own)
        logits = rms_norm(x[:, 0], params["norm"]) @ params["head"]
        return jnp.argmax(logits, axis=-1).astype(tokens.dtype), new

    return fn


def decode_layer(
    model: Decoder, x: jax.Array, layer: Layer, cache: Any, position: jax.Array
) -> tuple[jax.Array, Any]:
    """`Decoder.layer` for one token: `x: (batch, 1, d)`, one layer's part of the cache.

    Returns:
        The outputs and the cache with this token in it.
    """
    h = rms_norm(x, layer["norm_1"])
    q, k, v = plain(h, layer, ("q", "k", "v"))
    heads = lambda y, n: y.reshape(*y.shape[:-1], n, model.features_of_head)
    new = rotate_at(heads(k, model.kv_heads), position), heads(v, model.kv_heads)
    put = lambda old, one: put_at(old, one.swapaxes(1, 2), position, axis=2)
    keys, values = map(put, cache, new)
    q = rotate_at(heads(q, model.heads), position)
    x = x + plain(attend(q, keys, values, position), layer, ("o",))[0]
    h = rms_norm(x, layer["norm_2"])
    gate, up = plain(h, layer, ("gate", "up"))
    x = x + plain(jax.nn.silu(gate) * up, layer, ("down",))[0]
    return x, (keys, values)


def put_at(old: jax.Array, one: jax.Array, position: jax.Array, axis: int) -> jax.Array:
    """Writes `one` into `old` at a position along an axis, under `jax.vmap` too.

    There JAX makes a scatter of it, though all examples share the position. And XLA:GPU
    computes what was written again where it is read, unless there is a barrier: twice
    the time of attention's product with the keys (jax 0.11.2, an H200).
    """

    def write(*given: jax.Array) -> jax.Array:
        return lax.optimization_barrier(lax.dynamic_update_slice_in_dim(*given, axis))

    mappable = custom_vmap(write)

    @mappable.def_vmap
    def rule(size: int, mapped: list[bool], *given: jax.Array) -> tuple[Any, bool]:
        if mapped == [True, True, False]:
            return put_at(*given, axis=axis + 1), True
        axes = [0 if one else None for one in mapped]
        return jax.vmap(write, in_axes=axes, axis_size=size)(*given), True

    return mappable(old, one, position)


def attend(
    q: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array
) -> jax.Array:
    """Attention of one token, (batch, 1, heads, dim), over a cache: (batch, 1, d)."""
    batch, kv_heads, length, dim = keys.shape
    q = q.reshape(batch, kv_heads, -1, dim)
    logits = jnp.einsum("bhgd,bhsd->bhgs", q, keys, preferred_element_type=jnp.float32)
    seen = jnp.arange(length) <= position
    weights = jax.nn.softmax(jnp.where(seen, logits / dim**0.5, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bhgs,bhsd->bhgd", weights.astype(values.dtype), values)
    return mixed.reshape(batch, 1, -1)


def rotate_at(x: jax.Array, position: jax.Array) -> jax.Array:
    """`models.rotate` of one token, (batch, 1, heads, dim), at its position."""
    half = x.shape[-1] // 2
    angles = position * 1e4 ** (-jnp.arange(half) / half)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def served(model: Decoder, fn: Forward, **options: Any) -> jlora.Lora:
    """Returns a forward pass adapted, factors in the dtype of the base as to serve.

    Options are those of `jlora.lora`.
    """
    return lora_of(model, fn=fn, dtype=model.dtype, **options)

"""Two more models with the interface of `models.Decoder`: a ViT and experts."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from models import (
    Decoder,
    Layer,
    Linears,
    Params,
    cross_entropy,
    plain,
)

Batch = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTransformer:
    """A ViT with pre-norm layers and biases, a class token, a linear head.

    The default is small; `d=768, layers=12, heads=12, ffn=3072, patches=196` is ViT-B.
    """

    d: int = 192
    ffn: int = 768
    layers: int = 4
    heads: int = 3
    patches: int = 196
    patch_size: int = 768
    classes: int = 1000
    batch: int = 4
    dtype: Any = jnp.float32

    kernels = ("q", "k", "v", "o", "up", "down")

    @property
    def tokens(self) -> int:
        """The tokens of a batch, class tokens included."""
        return self.batch * (self.patches + 1)

    def init(self, key: jax.Array) -> Params:
        """Returns random params; the layers are stacked."""
        keys = jax.random.split(key, 5)
        d, ffn = self.d, self.ffn

        def normal(key: jax.Array, *shape: int) -> jax.Array:
            scale = jnp.asarray(1 / math.sqrt(shape[-2]), self.dtype)
            return jax.random.normal(key, shape, self.dtype) * scale

        def layer(key: jax.Array) -> Params:
            shapes = dict.fromkeys("qkvo", (d, d)) | {"up": (d, ffn), "down": (ffn, d)}
            own = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
            made = {name: normal(own[name], *shape) for name, shape in shapes.items()}
            for name, (_, width) in shapes.items():
                made[f"{name}_bias"] = jnp.zeros(width, self.dtype)
            return made | {name: self.norm() for name in ("norm_1", "norm_2")}

        return {
            "patch": normal(keys[0], self.patch_size, d),
            "class": normal(keys[1], 1, d),
            "positions": normal(keys[2], self.patches + 1, d),
            "layers": lax.map(layer, jax.random.split(keys[3], self.layers)),
            "norm": self.norm(),
            "head": normal(keys[4], d, self.classes),
        }

    def norm(self) -> Params:
        """Returns the params of a layer norm."""
        ones = jnp.ones(self.d, self.dtype)
        return {"scale": ones, "bias": jnp.zeros_like(ones)}

    def data(self, key: jax.Array) -> Batch:
        """Returns patches (batch, patches, patch_size) and labels (batch,)."""
        shape = (self.batch, self.patches, self.patch_size)
        labels = jax.random.randint(key, (self.batch,), 0, self.classes)
        return jax.random.normal(key, shape, self.dtype), labels

    def embed(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the inputs of the first layer, (batch, patches + 1, d)."""
        x = batch[0] @ params["patch"]
        first = jnp.broadcast_to(params["class"], (self.batch, 1, self.d))
        return jnp.concatenate([first, x], axis=1) + params["positions"]

    def loss(
        self,
        params: Params,
        batch: Batch,
        inputs: jax.Array | None = None,
        linears: Linears = plain,
    ) -> jax.Array:
        """Returns the mean cross-entropy of the labels."""
        x = self.embed(params, batch) if inputs is None else inputs
        body = lambda x, layer: (self.layer(x, layer, linears), None)
        x, _ = lax.scan(body, x, params["layers"])
        x = layer_norm(x[:, 0], params["norm"])
        return cross_entropy(x, params["head"], batch[1], 1)

    def layer(self, x: jax.Array, layer: Layer, linears: Linears) -> jax.Array:
        """One layer."""

        def biased(x: jax.Array, *names: str) -> list[jax.Array]:
            outputs = linears(x, layer, names)
            biases = [layer[f"{name}_bias"] for name in names]
            return [y + bias for y, bias in zip(outputs, biases, strict=True)]

        heads = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
        q, k, v = map(heads, biased(layer_norm(x, layer["norm_1"]), *"qkv"))
        # Not cuDNN's, which has no backward pass for an odd number of tokens.
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + biased(mixed, "o")[0]
        (up,) = biased(layer_norm(x, layer["norm_2"]), "up")
        return x + biased(jax.nn.gelu(up), "down")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureOfExperts(Decoder):
    """A decoder whose MLPs are experts, with kernels (experts, d_in, d_out).

    Each expert gets an equal share of the batch, which is what a router with capacity
    one does after its dispatch: the products are the same, and no router is timed.
    """

    d: int = 256
    ffn: int = 512
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    experts: int = 4

    def kernel_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each kernel of a layer."""
        shapes: dict[str, tuple[int, ...]] = dict(super().kernel_shapes())
        for name in ("gate", "up", "down"):
            shapes[name] = (self.experts, *shapes[name])
        return shapes

    def mlp(self, x: jax.Array, layer: Layer, linears: Linears) -> jax.Array:
        """The experts, (experts, tokens, ffn) inside."""
        shared = x.reshape(self.experts, -1, self.d)
        return super().mlp(shared, layer, linears).reshape(x.shape)


def layer_norm(x: jax.Array, params: Params) -> jax.Array:
    """Layer norm, computed in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = (centred * lax.rsqrt(variance + 1e-6)).astype(x.dtype)
    return normed * params["scale"] + params["bias"]

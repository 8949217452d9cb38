"""`models.Decoder` as a Flax Linen module, with its linears left to a choice.

What happens between the products is `Decoder.layer` itself, so that the two differ in
nothing but where params live and who multiplies them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from models import Decoder, Layer, Params, cross_entropy, rms_norm

NORMS = ("norm_1", "norm_2")
Dense = Callable[..., nn.Module]


class LoraDense(nn.Module):
    """A linear layer with low-rank factors, as one writes it by hand.

    Attributes:
        features: d_out.
        rank: of the factors `a` (d_in, rank) and `b` (rank, d_out), which are a
            collection of their own, `lora`.
        scaling: of their product.
        dtype: of the kernel; the factors are cast to that of the inputs.
    """

    features: int
    rank: int
    scaling: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `x·W + (s·x·a)·b`, (..., features)."""
        init, ins = nn.initializers.lecun_normal(), x.shape[-1]
        kernel = self.param("kernel", init, (ins, self.features), self.dtype)
        draw = lambda *shape: init(self.make_rng("lora"), shape)
        a = self.variable("lora", "a", draw, ins, self.rank).value.astype(x.dtype)
        b = self.variable("lora", "b", draw, self.rank, self.features)
        return x @ kernel + (self.scaling * (x @ a)) @ b.value.astype(x.dtype)


class LinenLayer(nn.Module):
    """One layer; `dense(features, name=...)` makes its linears."""

    model: Decoder
    dense: Dense

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        """Returns the outputs (batch, seq, d), and nothing for `nn.scan` to stack."""
        dtype, shapes = self.model.dtype, self.model.kernel_shapes()
        norm = lambda name: self.param(
            name, nn.initializers.ones, (x.shape[-1],), dtype
        )

        def linears(x: jax.Array, _: Layer, names: Sequence[str]) -> list[jax.Array]:
            return [self.dense(shapes[name][1], name=name)(x) for name in names]

        return self.model.layer(x, {name: norm(name) for name in NORMS}, linears), None


class LinenDecoder(nn.Module):
    """The decoder and its loss, scanned and rematerialized as `model` says."""

    model: Decoder
    dense: Dense

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the mean cross-entropy of tokens (batch, seq + 1)."""
        model, init = self.model, nn.initializers.lecun_normal()
        own = lambda name, *shape: self.param(name, init, shape, model.dtype)
        embedding = own("embedding", model.vocab, model.d)
        x = model.embed({"embedding": embedding}, tokens)
        layer = LinenLayer
        if model.remat:
            layer = nn.remat(layer, prevent_cse=not model.scan)
        if model.scan:
            axes = {"params": 0, "lora": 0}
            rngs = {"params": True, "lora": True}
            layer = nn.scan(
                layer, variable_axes=axes, split_rngs=rngs, length=model.layers
            )
            x, _ = layer(model, self.dense, name="layers")(x, None)
        else:
            for i in range(model.layers):
                x, _ = layer(model, self.dense, name=f"layers_{i}")(x)
        norm = self.param("norm", nn.initializers.ones, (model.d,), model.dtype)
        head, targets = own("head", model.d, model.vocab), tokens[:, 1:]
        return cross_entropy(rms_norm(x, norm), head, targets, model.loss_chunks)


def plain_dense(model: Decoder) -> Dense:
    """Returns what makes Flax's own linears."""

    def make(features: int, name: str) -> nn.Module:
        return nn.Dense(features, use_bias=False, param_dtype=model.dtype, name=name)

    return make


def linen_params(model: Decoder, params: Params) -> Params:
    """Returns the decoder's params as the Linen module names them, the same arrays."""
    rest = {name: params[name] for name in ("embedding", "norm", "head")}
    layers = params["layers"]
    if model.scan:
        return {**rest, "layers": linen_layer(layers)}
    return rest | {f"layers_{i}": linen_layer(layer) for i, layer in enumerate(layers)}


def linen_layer(layer: Layer) -> Params:
    """Returns one layer's params, or all stacked ones."""
    norms = {name: layer[name] for name in NORMS}
    kernels = {name: {"kernel": layer[name]} for name in Decoder.kernels}
    return norms | kernels


def linen_factors(adapter: Any, names: Sequence[str]) -> Params:
    """Returns jlora's adapter as a tree of the Linen module.

    Args:
        adapter: paths as jlora has them, `layers/q` or `layers/0/q`.
        names: what the leaves `a` and `b` are called.
    """
    tree: Params = {}
    for path, factors in adapter.items():
        *place, kernel = path.split("/")
        layer = tree.setdefault("_".join(place), {})
        layer[kernel] = dict(zip(names, (factors.a, factors.b), strict=True))
    return tree

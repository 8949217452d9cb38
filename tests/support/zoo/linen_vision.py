"""Linen models of images: ViT, ResNet, U-Net, Mixer, ConvNeXt."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .case import (
    CONV2D,
    DENSE,
    JOIN,
    SPLIT,
    Axes,
    Built,
    Case,
    normal,
    under,
    variables,
)

BATCH = 3
HEADS, HEAD_DIM = 5, 4
ATTENTION = {
    "query/kernel": SPLIT,
    "key/kernel": SPLIT,
    "value/kernel": SPLIT,
    "out/kernel": JOIN,
}
# `transpose_kernel=True` stores the kernel of the opposite convolution.
CONV2D_TRANSPOSED = Axes((), (0, 1, 3), (2,))


class ViT(nn.Module):
    """Patches by a strided convolution, a class token, added positions."""

    width: int = 14
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, dtype=self.dtype)
        patches = partial(nn.Conv, strides=(4, 4), dtype=self.dtype, name="patches")
        x = patches(self.width, (4, 4))(images)
        x = x.reshape(x.shape[0], -1, self.width)
        init = nn.initializers.normal(0.5)
        first = self.param("class_token", init, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(first, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", init, (1, x.shape[1], self.width))
        for i in range(2):
            y = nn.LayerNorm()(x)
            attention = partial(nn.MultiHeadDotProductAttention, dtype=self.dtype)
            features = HEADS * HEAD_DIM
            name = f"attention_{i}"
            x = x + attention(HEADS, qkv_features=features, name=name)(y)
            h = nn.gelu(dense(19, name=f"grow_{i}")(nn.LayerNorm()(x)))
            x = x + dense(self.width, name=f"shrink_{i}")(h)
        return dense(11, name="head")(x[:, 0])


class Residual(nn.Module):
    features: int
    stride: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False)
        norm = partial(nn.BatchNorm, use_running_average=not self.train)
        strides = (self.stride, self.stride)
        y = nn.relu(norm()(conv(self.features, (3, 3), strides, name="first")(x)))
        y = norm()(conv(self.features, (3, 3), name="second")(y))
        if x.shape != y.shape:
            x = norm()(conv(self.features, (1, 1), strides, name="project")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Batch statistics change with the forward pass."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(7, (5, 5), 2, padding=((2, 2), (1, 3)), name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (2, 2), (1, 1), "SAME")
        for i, (features, stride) in enumerate([(7, 1), (11, 2), (13, 2)]):
            x = Residual(features, stride, train, name=f"stage_{i}")(x)
        return nn.Dense(17, name="head")(x.mean(axis=(1, 2)))


class UNet(nn.Module):
    """Down by strides, across by dilation, up by transposed convolutions."""

    @nn.compact
    def __call__(self, x: jax.Array, *, noise: jax.Array) -> jax.Array:
        angles = noise[:, None] * 2.0 ** jnp.arange(5)
        time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        time = nn.silu(nn.Dense(19, name="time")(time))
        high = nn.silu(nn.Conv(7, (3, 3), name="enter")(x))
        low = nn.Conv(8, (3, 3), strides=(2, 2), name="down")(high)
        low = low + nn.Dense(8, name="condition")(time)[:, None, None, :]
        low = nn.silu(nn.GroupNorm(num_groups=4)(low))
        dilated = nn.Conv(14, (3, 3), kernel_dilation=(2, 2), name="dilated")
        low = nn.silu(dilated(low))
        up = nn.ConvTranspose(9, (4, 4), strides=(2, 2), name="up")(low)
        x = jnp.concatenate([high, up], axis=-1)
        flipped = nn.ConvTranspose(10, (3, 3), transpose_kernel=True, name="flipped")
        return nn.Conv(5, (3, 3), padding="VALID", name="leave")(nn.silu(flipped(x)))


class Mixer(nn.Module):
    """Dense layers over patches, then over channels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(13, (2, 2), strides=(2, 2), name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        y = nn.gelu(nn.Dense(17, name="across_patches")(y))
        x = x + nn.Dense(x.shape[1], name="back_to_patches")(y).swapaxes(1, 2)
        y = nn.gelu(nn.Dense(19, name="across_channels")(nn.LayerNorm()(x)))
        x = x + nn.Dense(x.shape[2], name="back_to_channels")(y)
        return nn.Dense(11, name="head")(x.mean(axis=1))


class ConvNeXt(nn.Module):
    """A depthwise, a grouped and a pointwise convolution, with a layer scale."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(12, (4, 4), strides=(2, 2), name="stem")(x)
        y = nn.Conv(12, (5, 5), feature_group_count=12, name="depthwise")(x)
        y = nn.Dense(21, name="expand")(nn.LayerNorm()(y))
        y = nn.Conv(18, (3, 3), feature_group_count=3, name="grouped")(nn.gelu(y))
        y = nn.Conv(12, (1, 1), name="contract")(y)
        scale = self.param("scale", nn.initializers.constant(0.5), (12,))
        return nn.Dense(11, name="head")((x + scale * y).mean(axis=(1, 2)))


def vit(dtype: Any) -> Built:
    model, images = ViT(dtype=dtype), normal(2, BATCH, 12, 8, 3)
    expected = {"params/patches/kernel": CONV2D, "params/head/kernel": DENSE}
    for i in range(2):
        expected |= under(f"params/attention_{i}", ATTENTION)
        expected |= {f"params/{n}_{i}/kernel": DENSE for n in ("grow", "shrink")}
    exact = ViT(dtype=None).apply if dtype == jnp.bfloat16 else None
    tree = variables(model, images)
    return Built(model.apply, tree, (images,), expected, exact=exact)


def resnet() -> Built:
    model, images = ResNet(), normal(2, BATCH, 14, 14, 3)
    convs = {"stem": ["kernel"], "stage_0": ["first/kernel", "second/kernel"]}
    for i in (1, 2):
        names = ("first", "second", "project")
        convs[f"stage_{i}"] = [f"{name}/kernel" for name in names]
    expected = {f"params/{a}/{b}": CONV2D for a, bs in convs.items() for b in bs}
    expected["params/head/kernel"] = DENSE
    return Built(
        model.apply,
        variables(model, images, train=False),
        (images,),
        expected,
        {"train": True, "mutable": ["batch_stats"]},
    )


def unet() -> Built:
    model, images, noise = UNet(), normal(2, BATCH, 8, 6, 5), normal(3, BATCH)
    names = ("enter", "down", "dilated", "up", "leave")
    expected = {f"params/{name}/kernel": CONV2D for name in names}
    expected["params/flipped/kernel"] = CONV2D_TRANSPOSED
    expected |= {f"params/{name}/kernel": DENSE for name in ("time", "condition")}
    tree = variables(model, images, noise=noise)
    return Built(model.apply, tree, (images,), expected, {"noise": noise})


def mixer() -> Built:
    model, images = Mixer(), normal(2, BATCH, 6, 14, 5)
    names = ("across_patches", "back_to_patches", "across_channels")
    names = (*names, "back_to_channels")
    expected = {f"params/{name}/kernel": DENSE for name in names}
    exclude = "patches|head"
    tree = variables(model, images)
    return Built(model.apply, tree, (images,), expected, target=".*", exclude=exclude)


def convnext() -> Built:
    model, images = ConvNeXt(), normal(2, BATCH, 8, 10, 3)
    names = ("stem", "depthwise", "grouped", "contract")
    expected: dict[str, Axes] = {f"params/{name}/kernel": CONV2D for name in names}
    expected |= {f"params/{name}/kernel": DENSE for name in ("expand", "head")}
    formed = frozenset({"params/depthwise/kernel"})
    tree: Any = variables(model, images)
    return Built(model.apply, tree, (images,), expected, formed=formed)


CASES = [
    Case("linen-vit", partial(vit, None)),
    Case("linen-vit-bf16", partial(vit, jnp.bfloat16)),
    Case("linen-resnet-batchnorm-train", resnet),
    Case("linen-unet", unet),
    Case("linen-mlp-mixer-exclude", mixer),
    Case("linen-convnext-depthwise-grouped", convnext),
]

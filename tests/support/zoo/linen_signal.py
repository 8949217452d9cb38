"""Linen models of sound and motion: 1-D and 3-D convolutions, diffusion attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from .case import (
    CONV1D,
    CONV3D,
    DENSE,
    JOIN,
    SPLIT,
    Axes,
    Built,
    Case,
    normal,
    variables,
)

BATCH = 3


class WaveNet(nn.Module):
    """Causal, dilated and gated; the gate is the other half of one convolution."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(7, (1,), name="enter")(x)
        for i in range(2):
            y = nn.Conv(
                22, (3,), kernel_dilation=2**i, padding="CAUSAL", name=f"dilated_{i}"
            )(x)
            value, gate = jnp.split(y, 2, axis=-1)
            y = nn.tanh(value) * nn.sigmoid(gate)
            x = x + nn.Dense(7, name=f"residual_{i}")(y)
        x = nn.ConvTranspose(5, (4,), strides=(2,), name="upsample")(x)
        return nn.Conv(13, (3,), padding="CIRCULAR", name="leave")(x)


class VideoNet(nn.Module):
    """Three spatial axes, of which time is one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(7, (4, 3, 3), strides=(1, 2, 2), name="stem")(x))
        x = nn.relu(nn.Conv(11, (3, 1, 1), padding="VALID", name="over_time")(x))
        return nn.Dense(13, name="head")(x.mean(axis=(1, 2, 3)))


class CrossAttention(nn.Module):
    """An image attends to a text of other width, as in latent diffusion."""

    heads: int = 5
    head_dim: int = 6

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        shape = (self.heads, self.head_dim)
        q = nn.DenseGeneral(shape, name="to_q", use_bias=False)(x)
        k = nn.DenseGeneral(shape, name="to_k", use_bias=False)(context)
        v = nn.DenseGeneral(shape, name="to_v", use_bias=False)(context)
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        out = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="to_out")
        return out(y)


class DiffusionBlock(nn.Module):
    """DiT: shift, scale and gate come from the noise level, by one fused layer.

    A mixing layer contracts both axes of the latent grid and makes both anew.
    """

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, noise: jax.Array) -> jax.Array:
        rows, columns, width = x.shape[1:]
        level = nn.silu(nn.Dense(11, name="level")(noise))
        modulation = nn.Dense(3 * width, name="modulate")(level)
        shift, scale, gate = jnp.split(modulation[:, None, :], 3, axis=-1)
        flat = x.reshape(x.shape[0], rows * columns, width)
        y = nn.LayerNorm(use_bias=False, use_scale=False)(flat) * (1 + scale) + shift
        flat = flat + gate * CrossAttention(name="cross")(y, text)
        grid = flat.reshape(x.shape)
        mix = nn.DenseGeneral((4, 3), axis=(1, 2), name="mix")  # (batch, width, 4, 3)
        return jnp.moveaxis(mix(grid), 1, -1)


def wavenet() -> Built:
    model, x = WaveNet(), normal(2, BATCH, 9, 4)
    names = ("enter", "dilated_0", "dilated_1", "upsample", "leave")
    expected = {f"params/{name}/kernel": CONV1D for name in names}
    expected |= {f"params/residual_{i}/kernel": DENSE for i in range(2)}
    return Built(model.apply, variables(model, x), (x,), expected)


def video() -> Built:
    model, x = VideoNet(), normal(2, BATCH, 6, 8, 6, 5)
    expected = {f"params/{name}/kernel": CONV3D for name in ("stem", "over_time")}
    expected["params/head/kernel"] = DENSE
    return Built(model.apply, variables(model, x), (x,), expected)


def diffusion() -> Built:
    model = DiffusionBlock()
    x, text, noise = normal(2, BATCH, 8, 5, 14), normal(3, BATCH, 9, 10), normal(4, 3)
    noise = noise[:, None] * jnp.arange(1, 8)
    cross = dict.fromkeys(("to_q", "to_k", "to_v"), SPLIT) | {"to_out": JOIN}
    expected: dict[str, Axes] = {
        f"params/cross/{k}/kernel": v for k, v in cross.items()
    }
    expected |= {f"params/{name}/kernel": DENSE for name in ("level", "modulate")}
    expected["params/mix/kernel"] = Axes((), (0, 1), (2, 3))
    args = (x, text, noise)
    return Built(model.apply, variables(model, *args), args, expected)


CASES = [
    Case("linen-wavenet-conv1d", wavenet),
    Case("linen-video-conv3d", video),
    Case("linen-diffusion-densegeneral", diffusion),
]

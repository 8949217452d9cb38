"""Convolutions of one to three axes, in many layouts and with every setting."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from use import normal, use


def _conv(layout: tuple[str, str, str], **settings: Any) -> Callable[..., Array]:
    """A convolution that casts as Flax does; stride 1 and "SAME" unless told."""
    rank = len(layout[0]) - 2
    strides = settings.pop("strides", (1,) * rank)
    padding = settings.pop("padding", "SAME")

    def fn(w: Array, x: Array) -> Array:
        dtype = jnp.promote_types(w.dtype, x.dtype)
        return lax.conv_general_dilated(
            x.astype(dtype),
            w.astype(dtype),
            strides,
            padding,
            dimension_numbers=layout,
            **settings,
        )

    return fn


def _conv_transpose(**settings: Any) -> Callable[..., Array]:
    def fn(w: Array, x: Array) -> Array:
        dtype = jnp.promote_types(w.dtype, x.dtype)
        args = x.astype(dtype), w.astype(dtype), (2, 2), "SAME"
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_transpose(*args, dimension_numbers=layout, **settings)

    return fn


def _patches(w: Array, x: Array) -> Array:
    """A convolution with circular padding, then an activation, then itself again."""
    conv = _conv(NHWC, padding="VALID")
    wrap = lambda y: jnp.pad(y, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="wrap")
    return conv(w, jnp.tanh(conv(w, wrap(x)))[..., :5])


def _flat(shape: tuple[int, ...], layout: tuple[str, str, str], **settings: Any) -> Any:
    """A convolution whose window lies with its outputs in an axis of the leaf."""
    conv = _conv(layout, **settings)
    return lambda w, x: conv(w.reshape(shape), x)


def _mapped_too(w: Array, x: Array) -> Array:
    """A kernel that maps channels to a window of outputs, and is convolved with."""
    conv = _conv(("NWC", "IWO", "NWC"))
    return jnp.einsum("nwc,cko->nwko", x, w) + conv(w, x)[:, :, None]


NWC = ("NWC", "WIO", "NWC")
NCW = ("NCW", "OIW", "NCW")
NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
ODD = ("HNWC", "OHIW", "CNHW")
NDHWC = ("NDHWC", "DHWIO", "NDHWC")
HWIO = "hwir,ro->hwio"
IMAGE = normal(3, 9, 8, 5)

CONVS = [
    use("conv_1d", _conv(NWC), normal(4, 11, 5), w=(3, 5, 7), delta="wir,ro->wio"),
    use(
        "conv_1d_causal",
        _conv(NWC, padding=[(6, 0)], rhs_dilation=(3,)),
        normal(4, 11, 5),
        w=(3, 5, 7),
        delta="wir,ro->wio",
    ),
    use(
        "conv_1d_ncw",
        _conv(NCW, strides=(2,)),
        normal(4, 5, 11),
        w=(7, 5, 3),
        delta="iwr,ro->oiw",
    ),
    use(
        "conv_1d_window_of_outputs",
        _flat((5, 3, 4), ("NWC", "IWO", "NWC"), strides=(2,)),
        normal(4, 11, 5),
        w=(5, 12),
        dora=False,
    ),
    use(
        "conv_1d_window_of_outputs_transposed",
        _flat(
            (4, 3, 5),
            ("NCW", "OWI", "NCW"),
            padding=[(2, 1)],
            lhs_dilation=(2,),
        ),
        normal(3, 5, 9),
        w=(12, 5),
        delta="ir,ro->oi",
        dora=False,
    ),
    use(
        "conv_2d_window_on_both_sides",
        _flat(
            (5, 2, 3, 4),
            ("NHWC", "IHWO", "NHWC"),
            strides=(2, 1),
            padding=[(1, 2), (0, 1)],
            rhs_dilation=(1, 2),
        ),
        IMAGE,
        w=(10, 12),
        dora=False,
    ),
    use(
        "conv_1d_that_is_mapped_with",
        _mapped_too,
        normal(4, 11, 5),
        w=(5, 3, 7),
        delta="ir,rwo->iwo",
        dora=False,
    ),
    use("conv_2d", _conv(NHWC), IMAGE, w=(3, 4, 5, 7), delta=HWIO),
    use(
        "conv_2d_strided",
        _conv(NHWC, strides=(2, 3), padding="VALID"),
        IMAGE,
        w=(3, 4, 5, 7),
        delta=HWIO,
    ),
    use(
        "conv_2d_nchw",
        _conv(NCHW, padding="VALID"),
        normal(3, 5, 9, 8),
        w=(7, 5, 3, 4),
        delta="ihwr,ro->oihw",
    ),
    use(
        "conv_2d_odd_layout",
        _conv(ODD, strides=(1, 2)),
        normal(9, 3, 8, 5),
        w=(7, 3, 5, 4),
        delta="hiwr,ro->ohiw",
    ),
    use(
        "conv_2d_padding",
        _conv(NHWC, padding=[(2, 0), (-1, 3)]),
        IMAGE,
        w=(3, 4, 5, 7),
        delta=HWIO,
    ),
    use(
        "conv_2d_lhs_dilation",
        _conv(NHWC, padding=[(2, 2), (1, 3)], lhs_dilation=(2, 3)),
        IMAGE,
        w=(3, 4, 5, 7),
        delta=HWIO,
    ),
    use(
        "conv_2d_rhs_dilation",
        _conv(NHWC, rhs_dilation=(2, 1)),
        IMAGE,
        w=(3, 4, 5, 7),
        delta=HWIO,
    ),
    use(
        "conv_2d_precision",
        _conv(NHWC, precision="highest", preferred_element_type=jnp.float32),
        IMAGE,
        w=(3, 4, 5, 7),
        delta=HWIO,
    ),
    use(
        "conv_2d_groups",
        _conv(NHWC, feature_group_count=3),
        normal(4, 9, 8, 15),
        w=(3, 4, 5, 21),
        delta=HWIO,
    ),
    use(
        "conv_2d_groups_nchw",
        _conv(NCHW, feature_group_count=3, strides=(2, 1)),
        normal(4, 15, 9, 8),
        w=(21, 5, 3, 4),
        delta="ihwr,ro->oihw",
    ),
    use(
        "conv_2d_depthwise",
        _conv(NHWC, feature_group_count=5),
        IMAGE,
        w=(3, 4, 1, 5),
        delta=HWIO,
        formed=True,
    ),
    use(
        "conv_2d_depthwise_multiplier",
        _conv(NHWC, feature_group_count=5),
        IMAGE,
        w=(3, 4, 1, 15),
        delta=HWIO,
        formed=True,
    ),
    use(
        "conv_1d_depthwise_causal",
        _conv(NWC, padding=[(3, 0)], feature_group_count=5),
        normal(3, 11, 5),
        w=(4, 1, 5),
        delta="wir,ro->wio",
        formed=True,
    ),
    use(
        "conv_1x1",
        _conv(NHWC),
        IMAGE,
        w=(1, 1, 5, 7),
        delta=HWIO,
    ),
    use(
        "conv_patches",
        _conv(NHWC, strides=(4, 4), padding="VALID"),
        normal(5, 8, 12, 3),
        w=(4, 4, 3, 7),
        delta=HWIO,
    ),
    use(
        "conv_3d",
        _conv(NDHWC, strides=(1, 2, 1)),
        normal(3, 5, 6, 7, 4),
        w=(3, 3, 3, 4, 5),
        delta="dhwir,ro->dhwio",
    ),
    use("conv_transpose", _conv_transpose(), IMAGE, w=(3, 4, 5, 7), delta=HWIO),
    use(
        "conv_transpose_kernel",
        _conv_transpose(transpose_kernel=True),
        IMAGE,
        w=(3, 4, 7, 5),
        delta="hwir,ro->hwoi",
    ),
    use("conv_twice_circular", _patches, IMAGE, w=(3, 3, 5, 7), delta=HWIO),
    use(
        "conv_of_transposed_kernel",
        lambda w, x: _conv(NHWC)(w.transpose(2, 3, 1, 0), x),
        IMAGE,
        w=(7, 5, 3, 4),
        delta="ihwr,ro->oihw",
    ),
    use(
        "conv_of_scaled_kernel",
        lambda w, x: _conv(NHWC)(w * 0.25, x),
        IMAGE,
        w=(3, 4, 5, 7),
        delta=HWIO,
    ),
    use(
        "conv_vmap",
        lambda w, x: jax.vmap(lambda y: _conv(NHWC)(w, y[None])[0])(x),
        IMAGE,
        w=(3, 4, 5, 7),
        delta=HWIO,
    ),
]

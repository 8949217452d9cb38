"""Kernels that are cast, moved, cut, joined or scaled before the product."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from releases import is_before
from use import Kernel, Use, normal, use


def _split(w: Array, x: Array) -> tuple[Array, Array]:
    left, right = jnp.split(w, [3], axis=1)
    return x @ left, jnp.tanh(x @ right)


def _barrier(w: Array, x: Array) -> Array:
    w, x = lax.optimization_barrier((w, x))
    return x @ w


def _with_scale(
    name: str, shape: tuple[int, ...], fn: Callable[[Array, Array, Array], Array]
) -> Use:
    """A use whose scale is another leaf of params."""
    return Use(
        name=name,
        fn=lambda layer, x: fn(layer["w"], layer["s"], x),
        kernels={"w": Kernel((5, 7))},
        extra={"s": shape},
        inputs=(normal(3, 5),),
    )


def _two(*shapes: tuple[int, ...]) -> dict[str, Kernel]:
    return {name: Kernel(shape) for name, shape in zip("wv", shapes, strict=True)}


CARRIED = [
    use(
        "cast_to_input",
        lambda w, x: x @ w.astype(x.dtype),
        normal(3, 5),
        w=(5, 7),
    ),
    use(
        "cast_and_back",
        lambda w, x: x @ w.astype(jnp.bfloat16).astype(x.dtype),
        normal(3, 5),
        w=(5, 7),
        loose=True,
    ),
    use(
        "reduce_precision",
        lambda w, x: x @ lax.reduce_precision(w, exponent_bits=8, mantissa_bits=7),
        normal(3, 5),
        w=(5, 7),
        loose=True,
    ),
    use(
        "transpose",
        lambda w, x: jnp.einsum("bi,oih->bho", x, jnp.transpose(w, (2, 0, 1))),
        normal(4, 5),
        w=(5, 3, 7),
        delta="ir,rho->iho",
    ),
    use(
        "reshape_splits_out",
        lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(5, 3, 7)),
        normal(4, 5),
        w=(5, 21),
    ),
    use(
        "reshape_joins_out",
        lambda w, x: x @ w.reshape(5, 21),
        normal(4, 5),
        w=(5, 3, 7),
        delta="ir,rhd->ihd",
    ),
    use(
        "reshape_splits_in",
        lambda w, x: jnp.einsum("bhd,hdo->bo", x, w.reshape(3, 7, 5)),
        normal(4, 3, 7),
        w=(21, 5),
    ),
    use(
        "reshape_joins_in",
        lambda w, x: x @ w.reshape(-1, 5),
        normal(4, 21),
        w=(3, 7, 5),
        delta="hdr,ro->hdo",
    ),
    use(
        "reshape_splits_both",
        lambda w, x: jnp.einsum("bhd,hdkl->bkl", x, w.reshape(3, 7, 5, 11)),
        normal(4, 3, 7),
        w=(21, 55),
    ),
    use(
        "reshape_transpose_reshape",
        lambda w, x: x @ w.reshape(5, 3, 7).transpose(0, 2, 1).reshape(5, 21),
        normal(4, 5),
        w=(5, 21),
    ),
    use("slice_out", lambda w, x: x @ w[:, 1:4], normal(6, 5), w=(5, 7)),
    use(
        "slices_out",
        lambda w, x: (x @ w[:, :3]) * (x @ w[:, 3:6]),
        normal(4, 5),
        w=(5, 7),
    ),
    use("slice_out_strided", lambda w, x: x @ w[:, ::3], normal(4, 5), w=(5, 7)),
    use("slice_in", lambda w, x: x @ w[1:4], normal(6, 3), w=(5, 7)),
    use(
        "slices_in",
        lambda w, x, y: x @ w[:3] + y @ w[3:],
        normal(4, 3),
        normal(4, 4),
        w=(7, 5),
    ),
    use(
        "slice_dynamic_out",
        lambda w, x: x @ lax.dynamic_slice_in_dim(w, 2, 3, axis=1),
        normal(4, 5),
        w=(5, 7),
    ),
    use("split_out", _split, normal(6, 5), w=(5, 7)),
    Use(
        name="concatenate_kernels",
        fn=lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], axis=1),
        kernels=_two((5, 7), (5, 11)),
        inputs=(normal(3, 5),),
    ),
    Use(
        name="concatenate_with_array",
        fn=lambda p, x: x @ jnp.concatenate([p["plain"], p["w"]], axis=1),
        kernels={"w": Kernel((5, 7))},
        extra={"plain": (5, 4)},
        inputs=(normal(3, 5),),
    ),
    use(
        "concatenate_with_itself",
        lambda w, x: x @ jnp.concatenate([w[:, 3:], w[:, :3]], axis=1),
        normal(4, 5),
        w=(5, 7),
    ),
    Use(
        name="stack_kernels",
        fn=lambda p, x: jnp.einsum("bi,cio->cbo", x, jnp.stack([p["w"], p["v"]])),
        kernels=_two((5, 7), (5, 7)),
        inputs=(normal(3, 5),),
    ),
    use("scale_number", lambda w, x: x @ (w * 0.5), normal(3, 5), w=(5, 7)),
    use("scale_number_first", lambda w, x: x @ (0.5 * w), normal(3, 5), w=(5, 7)),
    _with_scale("scale_traced", (), lambda w, s, x: x @ (s * w)),
    use("scale_divided", lambda w, x: x @ (w / 4.0), normal(3, 5), w=(5, 7)),
    _with_scale("scale_divided_traced", (), lambda w, s, x: x @ (w / (s * s + 1))),
    use(
        "scale_from_input",
        lambda w, s, x: x @ (s * w),
        normal(),
        normal(3, 5),
        w=(5, 7),
        formed=True,
    ),
    use("scale_negative", lambda w, x: x @ -w, normal(3, 5), w=(5, 7)),
    _with_scale("scale_columns", (7,), lambda w, s, x: x @ (w * s[None, :])),
    use(
        "pad_out",
        lambda w, x: x @ jnp.pad(w, ((0, 0), (1, 3))),
        normal(3, 5),
        w=(5, 7),
    ),
    use("reverse_out", lambda w, x: x @ w[:, ::-1], normal(3, 5), w=(5, 7)),
    use("reverse_in", lambda w, x: x @ lax.rev(w, (0,)), normal(3, 5), w=(5, 7)),
    use(
        "squeeze",
        lambda w, x: x @ w[0, 0],
        normal(3, 5),
        w=(1, 1, 5, 7),
        delta="hwir,hwro->hwio",
    ),
    use(
        "expand_dims",
        lambda w, x: jnp.einsum("nbi,nio->nbo", x, w[None]),
        normal(1, 3, 5),
        w=(5, 7),
    ),
    use(
        "unit_axis_in_the_middle",
        lambda w, x: x @ jnp.squeeze(w[:, None], 1),
        normal(3, 5),
        w=(5, 7),
    ),
    use(
        "optimization_barrier",
        _barrier,
        normal(3, 5),
        w=(5, 7),
        # Up to jax 0.10 a barrier with x turns the zero tangent of w into an array,
        # and then its cotangent, which nobody asked for, is formed too.
        formed=is_before("jax", "0.11.0"),
    ),
    Use(
        name="device_put_of_several",
        fn=lambda p, x: (lambda q: x @ q["w"] @ q["v"])(jax.device_put(p)),
        kernels=_two((5, 7), (7, 6)),
        inputs=(normal(3, 5),),
    ),
    use("copy", lambda w, x: x @ jnp.array(w, copy=True), normal(3, 5), w=(5, 7)),
    use(
        "stop_gradient_of_kernel",
        lambda w, x: x @ lax.stop_gradient(w) + jnp.tanh(x) @ w,
        normal(3, 5),
        w=(5, 7),
    ),
    use(
        "carried_then_used_twice",
        lambda w, x: jnp.tanh(x @ (v := 0.5 * w.T)) @ v.T,
        normal(3, 7),
        w=(5, 7),
        delta="ir,ro->oi",
    ),
]

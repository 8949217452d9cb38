"""Kernels with axes that a config names as batch axes, though the program does not."""

import jax
import jax.numpy as jnp
from jax import lax
from use import Kernel, Use, fixed, ids, normal, use

Array = jax.Array
OWN = "eir,ero->eio"


def _layers(w: Array, x: Array) -> Array:
    """A scan of layers, each of which computes all of its experts."""

    def body(h: Array, layer: Array) -> tuple[Array, None]:
        new = jnp.tanh(jnp.einsum("td,edf->tef", h, layer)).mean(1)
        return new.astype(h.dtype), None

    return lax.scan(body, x, w)[0]


def _there_and_back(w: Array, x: Array) -> Array:
    """All experts, and the transposed use that sums over them."""
    up = jnp.tanh(jnp.einsum("td,edf->tef", x, w))
    return jnp.einsum("tef,edf->td", up, w)


def _gated(layer: dict[str, Array], x: Array) -> Array:
    gate, up = (jnp.einsum("td,edf->tef", x, layer[name]) for name in ("gate", "up"))
    return jnp.einsum("tef,efd->td", jax.nn.silu(gate) * up, layer["down"])


def _halves(w: Array, x: Array) -> Array:
    """A fused kernel that is split after a cast and a transpose."""
    left, right = jnp.split(w.transpose(1, 0, 2), [3], axis=2)
    product = lambda w: jnp.einsum("td,def->tef", x, w)
    return jnp.concatenate([product(left), 2 * product(right)], axis=2)


# Each with the axes that `LoraConfig.batch` names.
BATCHED: list[tuple[Use, int | tuple[int, ...]]] = [
    (
        use(
            "outputs",
            lambda w, x: jnp.einsum("td,edf->tef", x, w),
            normal(3, 5),
            w=(4, 5, 7),
            delta=OWN,
        ),
        0,
    ),
    (
        use(
            "kernel_on_the_left",
            lambda w, x: lax.dot_general(w, x, (((1,), (1,)), ((), ()))),
            normal(3, 5),
            w=(4, 5, 7),
            delta=OWN,
        ),
        -3,
    ),
    (
        use(
            "vmap_of_a_shared_input",
            jax.vmap(lambda w, x: x @ w, in_axes=(0, None)),
            normal(3, 5),
            w=(4, 5, 7),
            delta=OWN,
        ),
        (0,),
    ),
    (
        use(
            "vmap_of_the_last_axis",
            jax.vmap(lambda w, x: x @ w, in_axes=(2, None), out_axes=1),
            normal(3, 5),
            w=(5, 7, 4),
            delta="eir,ero->ioe",
        ),
        -1,
    ),
    (
        use(
            "inputs",
            lambda w, x: jnp.einsum("tef,efd->td", x, w),
            normal(3, 4, 5),
            w=(4, 5, 7),
            delta=OWN,
        ),
        0,
    ),
    (
        use(
            "heads_in_the_middle",
            lambda w, x: jnp.einsum("btd,dhk->bthk", x, w),
            normal(2, 3, 5),
            w=(5, 4, 7),
            delta="hir,hro->iho",
        ),
        1,
    ),
    (
        use(
            "two_axes",
            lambda w, x: jnp.einsum("td,cedf->tcef", x, w),
            normal(3, 5),
            w=(4, 6, 5, 7),
            delta="ceir,cero->ceio",
        ),
        (1, 0),
    ),
    (
        use(
            "an_input_and_an_output",
            lambda w, x: jnp.einsum("tcd,cedf->tef", x, w),
            normal(3, 4, 5),
            w=(4, 6, 5, 7),
            delta="ceir,cero->ceio",
        ),
        (0, 1),
    ),
    (
        use(
            "beside_one_that_is_told",
            lambda w, x: jnp.einsum("gtd,gedf->gtef", x, w),
            normal(4, 3, 5),
            w=(4, 6, 5, 7),
            delta="geir,gero->geio",
        ),
        1,
    ),
    (
        use(
            "told_already",
            lambda w, x: jnp.einsum("etd,edf->etf", x, w),
            normal(4, 3, 5),
            w=(4, 5, 7),
            delta=OWN,
        ),
        0,
    ),
    (
        use(
            "ragged",
            lambda w, sizes, x: lax.ragged_dot(x, w, sizes),
            fixed(3, 0, 4, 2),
            normal(9, 5),
            w=(4, 5, 7),
            delta=OWN,
        ),
        0,
    ),
    (
        use(
            "layers_of_a_scan",
            _layers,
            normal(6, 5),
            w=(3, 4, 5, 5),
            delta="leir,lero->leio",
        ),
        1,
    ),
    (
        use(
            "transposed_besides",
            _there_and_back,
            normal(3, 5),
            w=(4, 5, 7),
            delta=OWN,
        ),
        0,
    ),
    (
        Use(
            name="gated",
            fn=_gated,
            kernels={
                "gate": Kernel((4, 5, 7), OWN),
                "up": Kernel((4, 5, 7), OWN),
                "down": Kernel((4, 7, 5), OWN),
            },
            inputs=(normal(6, 5),),
        ),
        0,
    ),
    (
        use("split_after_moves", _halves, normal(6, 7), w=(4, 7, 8), delta=OWN),
        0,
    ),
    (
        use(
            "lookup",
            lambda w, i: jnp.take(w, i, axis=1, mode="clip"),
            ids(9, 6),
            w=(4, 9, 7),
            delta=OWN,
        ),
        0,
    ),
]

"""Products: the kernel on either side, any number of in, out and batch axes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from use import Kernel, Use, fixed, normal, use


def _einsum(spec: str) -> Any:
    """A use ``einsum(spec, x, w)``."""
    return lambda w, x: jnp.einsum(spec, x, w)


def _dot(w: Array, x: Array) -> Array:
    """A product with its own precision and output dtype."""
    numbers = (((1,), (0,)), ((), ()))
    return lax.dot_general(
        x, w, numbers, lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _siblings(layer: dict[str, Array], x: Array) -> dict[str, Any]:
    """Query, key and value of one input; the output is a tree with a None in it."""
    return {"qk": (x @ layer["q"], x @ layer["k"]), "v": x @ layer["v"], "no": None}


def _physics(layer: dict[str, Array], x: Array) -> Array:
    """The derivative of a network with respect to its input (PINN)."""

    def network(point: Array) -> Array:
        return jnp.tanh(jnp.tanh(point @ layer["w"]) @ layer["v"]).sum()

    return jax.vmap(jax.grad(network))(x)


@functools.partial(jax.jit, static_argnames="train")
def _jitted(w: Array, x: Array, *, train: bool) -> Array:
    return jnp.tanh(jax.jit(jnp.matmul)(x, w)) if train else x @ w


DENSE = [
    use("matmul", lambda w, x: x @ w, normal(3, 5), w=(5, 7)),
    use("matmul_many_axes", lambda w, x: x @ w, normal(3, 4, 5), w=(5, 7)),
    use("matmul_vector", lambda w, x: x @ w, normal(5), w=(5, 7)),
    use("matmul_left", lambda w, x: w @ x, normal(5, 3), w=(7, 5), delta="ir,ro->oi"),
    use(
        "matmul_left_vector", lambda w, x: w @ x, normal(5), w=(7, 5), delta="ir,ro->oi"
    ),
    use("transposed", lambda w, x: x @ w.T, normal(3, 5), w=(7, 5), delta="ir,ro->oi"),
    use("dot_vmap", lambda w, x: jax.vmap(lambda v: v @ w)(x), normal(3, 5), w=(5, 7)),
    use("dot_settings", _dot, normal(3, 5), w=(5, 7)),
    use(
        "einsum_left",
        lambda w, x: jnp.einsum("oi,bi->bo", w, x),
        normal(3, 5),
        w=(7, 5),
        delta="ir,ro->oi",
    ),
    use(
        "dense_general_two_out",
        _einsum("bi,ihd->bhd"),
        normal(4, 5),
        w=(5, 3, 7),
        delta="ir,rhd->ihd",
    ),
    use(
        "dense_general_two_in",
        lambda w, x: jnp.tensordot(x, w, axes=((1, 2), (0, 1))),
        normal(4, 3, 7),
        w=(3, 7, 5),
        delta="hdr,ro->hdo",
    ),
    use(
        "dense_general_two_in_two_out",
        _einsum("bij,ijkl->bkl"),
        normal(4, 3, 5),
        w=(3, 5, 7, 11),
        delta="ijr,rkl->ijkl",
    ),
    use(
        "dense_general_batch",
        _einsum("nbi,nio->nbo"),
        normal(3, 4, 5),
        w=(3, 5, 7),
        delta="nir,nro->nio",
    ),
    use(
        "dense_general_batch_in_the_middle",
        _einsum("bni,ino->bno"),
        normal(4, 3, 5),
        w=(5, 3, 7),
        delta="nir,nro->ino",
    ),
    use(
        "dense_general_two_batch",
        _einsum("bmni,minoh->bmnoh"),
        normal(4, 3, 5, 7),
        w=(3, 7, 5, 11, 6),
        delta="mnir,mnroh->minoh",
    ),
    use(
        "einsum_btnh",
        _einsum("btd,ndh->btnh"),
        normal(4, 6, 5),
        w=(3, 5, 7),
        delta="dr,rnh->ndh",
    ),
    use(
        "einsum_nhd",
        _einsum("btnh,nhd->btd"),
        normal(4, 6, 3, 7),
        w=(3, 7, 5),
        delta="nhr,rd->nhd",
    ),
    use(
        "einsum_fused_ckdh",
        _einsum("bsd,ckdh->cbskh"),
        normal(3, 6, 5),
        w=(4, 3, 5, 7),
        delta="dr,rckh->ckdh",
    ),
    use(
        "einsum_gating",
        _einsum("bd,chd->cbh"),
        normal(3, 5),
        w=(4, 7, 5),
        delta="dr,rch->chd",
    ),
    use(
        "einsum_out_between_in",
        _einsum("bij,ioj->bo"),
        normal(4, 3, 5),
        w=(3, 7, 5),
        delta="ijr,ro->ioj",
    ),
    use(
        "einsum_in_axes_swapped",
        _einsum("bji,ijo->bo"),
        normal(4, 5, 3),
        w=(3, 5, 7),
        delta="ijr,ro->ijo",
    ),
    use(
        "einsum_bilinear",
        lambda w, x, y: jnp.einsum("bi,io,bo->b", x, w, y),
        normal(3, 5),
        normal(3, 7),
        w=(5, 7),
        delta="ir,ro->oi",  # the einsum starts with y
    ),
    use(
        "vmap_over_kernel_with_one_input",
        lambda w, x: jax.vmap(lambda v: x @ v)(w),
        normal(3, 5),
        w=(4, 5, 7),
        delta="ir,rlo->lio",
    ),
    use(
        "twice_there_and_back",
        lambda w, x: jnp.tanh(x @ w) @ w.T,
        normal(3, 5),
        w=(5, 7),
    ),
    use(
        "twice_other_inputs",
        lambda w, x, y: jnp.tanh(x @ w) + jnp.einsum("io,bi->bo", w, y),
        normal(3, 5),
        normal(3, 5),
        w=(5, 7),
    ),
    Use(
        name="siblings",
        fn=_siblings,
        kernels={"q": Kernel((5, 7)), "k": Kernel((5, 11)), "v": Kernel((5, 3))},
        inputs=(normal(4, 5),),
    ),
    Use(
        name="chain",
        fn=lambda layer, x: jnp.tanh(x @ layer["w"]) @ layer["v"],
        kernels={"w": Kernel((5, 7)), "v": Kernel((7, 11))},
        inputs=(normal(3, 5),),
    ),
    Use(
        name="derivative_inside",
        fn=_physics,
        kernels={"w": Kernel((5, 7)), "v": Kernel((7, 11))},
        inputs=(normal(3, 5),),
    ),
    use(
        "nested_jit",
        lambda w, x: _jitted(w, x, train=True) + _jitted(w, x, train=False),
        normal(3, 5),
        w=(5, 7),
    ),
    use("argnum", lambda w, x: x @ w, normal(3, 5), w=(5, 7), argnum=1),
    use(
        "cond_both_branches",
        lambda w, n, x: lax.cond(
            n > 0, lambda w, x: x @ w, lambda w, x: 2.0 * (x @ w), w, x
        ),
        fixed(1),
        normal(3, 5),
        w=(5, 7),
    ),
    use(
        "cond_one_branch",
        lambda w, y, n, x: lax.cond(n > 0, lambda: jnp.tanh(x @ w), lambda: y + 1),
        normal(3, 7),
        fixed(1),
        normal(3, 5),
        w=(5, 7),
    ),
    use(
        "switch",
        lambda w, n, x: lax.switch(
            n,
            [lambda: x @ w, lambda: jnp.sin(x) @ w, lambda: (x @ w) * (x @ w)],
        ),
        fixed(2),
        normal(3, 5),
        w=(5, 7),
    ),
    use(
        "stop_gradient_of_input",
        lambda w, x: lax.stop_gradient(x) @ w + jnp.tanh(x) @ w,
        normal(3, 5),
        w=(5, 7),
    ),
]

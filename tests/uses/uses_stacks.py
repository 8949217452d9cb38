"""Kernels with batch axes: experts, layers, and loops over them."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from use import Kernel, Use, fixed, ids, normal, use

STACK = "lir,lro->lio"
Layer = dict[str, Array]
_LAYERS = {"w": Kernel((4, 5, 7), STACK), "v": Kernel((4, 7, 5), STACK)}


def _block(h: Array, w: Array, v: Array) -> Array:
    return jnp.tanh(jnp.tanh(h @ w) @ v).astype(h.dtype)


def _scan(layer: Layer, x: Array, **settings: object) -> tuple[Array, Array]:
    """A stack of layers as `xs` of a scan; every layer also puts something out."""

    def body(h: Array, pair: Layer) -> tuple[Array, Array]:
        h = _block(h, pair["w"], pair["v"])
        return h, h.sum(0)

    return lax.scan(body, x, {"w": layer["w"], "v": layer["v"]}, **settings)


def _fori(layer: Layer, x: Array, steps: int | Array = 4) -> Array:
    body = lambda i, h: _block(h, layer["w"][i], layer["v"][i])
    return lax.fori_loop(0, steps, body, x)


def _loop(layer: Layer, x: Array) -> Array:
    for i in range(4):
        x = _block(x, layer["w"][i], layer["v"][i])
    return x


def _unpacked(layer: Layer, x: Array) -> Array:
    for w, v in zip(layer["w"], layer["v"], strict=True):
        x = _block(x, w, v)
    return x


def _halves(layer: Layer, x: Array) -> Array:
    """Two scans, each over one half of the stack."""
    for part in (slice(0, 3), slice(3, None)):
        x, _ = _scan({name: w[part] for name, w in layer.items()}, x)
    return x


def _groups(layer: Layer, x: Array) -> Array:
    """A scan over groups of layers, as for local and global attention."""

    def body(h: Array, group: Layer) -> tuple[Array, None]:
        for i in range(3):
            h = _block(h, group["w"][i], group["v"][i])
        return h, None

    groups = {name: w.reshape(4, 3, *w.shape[1:]) for name, w in layer.items()}
    return lax.scan(body, x, groups)[0]


def _second_axis(w: Array, x: Array) -> Array:
    """A stack whose layer axis is not the first."""
    body = lambda h, k: (_block(h, k, k.T), None)
    return lax.scan(body, x, jnp.moveaxis(w, 1, 0))[0]


def _cell(h: Array, x: Array, w: Array, v: Array) -> Array:
    return jnp.tanh(x @ w + h @ v).astype(h.dtype)


def _recurrent(layer: Layer, h: Array, x: Array) -> tuple[Array, Array]:
    """A recurrent cell: the kernels are constants of the scan over time."""

    def step(h: Array, x: Array) -> tuple[Array, Array]:
        h = _cell(h, x, layer["w"], layer["v"])
        return h, h

    return lax.scan(step, h, x)


def _recurrent_stack(layer: Layer, start: Array, x: Array) -> Array:
    """Layers times time: a scan in a scan."""

    def body(x: Array, pair: Layer) -> tuple[Array, None]:
        h = _recurrent(pair, start, x @ pair["up"])[1]
        return (h @ pair["down"]).astype(x.dtype), None

    return lax.scan(body, x, layer)[0]


def _while(w: Array, x: Array) -> Array:
    """A loop whose condition and body both use the kernel."""
    body = lambda state: (state[0] + 1, _block(state[1], w, w.T))
    cond = lambda state: (state[0] < 3) & ((state[1] @ w).sum() < 1e9)
    return lax.while_loop(cond, body, (0, x))[1]


def _experts(h: Array, w: Array) -> Array:
    """Up and down in every expert with one kernel."""
    up = jnp.tanh(jnp.einsum("ebi,eio->ebo", h, w))
    return jnp.einsum("ebo,eio->ebi", up, w).astype(h.dtype)


def _router(w: Array, x: Array, expert: Array) -> Array:
    """Tokens sorted by expert, then one ragged product."""
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=4)
    return lax.ragged_dot(x[order], w, sizes)[jnp.argsort(order)]


def _through_carry(w: Array, x: Array) -> Array:
    """Params that travel unchanged through the carry of a loop."""
    body = lambda _, carry: (carry[0], _block(carry[1], carry[0], carry[0].T))
    return lax.fori_loop(0, 3, body, (w, x))[1]


STACKS = [
    use(
        "experts_einsum",
        lambda w, x: jnp.einsum("ecd,edf->ecf", x, w),
        normal(4, 3, 5),
        w=(4, 5, 7),
        delta=STACK,
    ),
    use(
        "experts_dense",
        lambda w, x: jnp.einsum("td,edf->tef", x, w),
        normal(3, 5),
        w=(4, 5, 7),
        delta="ir,reo->eio",
    ),
    use(
        "experts_vmap",
        jax.vmap(lambda w, x: x @ w),
        normal(4, 3, 5),
        w=(4, 5, 7),
        delta=STACK,
    ),
    use(
        "experts_vmap_second_axis",
        jax.vmap(lambda w, x: x @ w, in_axes=(1, 0)),
        normal(4, 3, 5),
        w=(5, 4, 7),
        delta="lir,lro->ilo",
    ),
    use(
        "experts_ragged",
        lambda w, sizes, x: lax.ragged_dot(x, w, sizes),
        fixed(3, 0, 4, 2),
        normal(9, 5),
        w=(4, 5, 7),
        delta=STACK,
    ),
    use(
        "experts_ragged_in_batches",
        lambda w, sizes, x: jax.vmap(lax.ragged_dot)(x, w, sizes.reshape(2, 3)),
        fixed(2, 0, 1, 1, 1, 1),
        normal(2, 3, 5),
        w=(2, 3, 5, 7),
        delta="beir,bero->beio",
        dora=False,
    ),
    use(
        "experts_routed",
        _router,
        normal(9, 5),
        ids(4, 9),
        w=(4, 5, 7),
        delta=STACK,
    ),
    use(
        "experts_selected",
        lambda w, i, x: jnp.einsum("bi,bio->bo", x, w[i]),
        ids(4, 3),
        normal(3, 5),
        w=(4, 5, 7),
        delta=STACK,
    ),
    use(
        "experts_top_k",
        lambda w, i, x: jnp.einsum("bi,bkio->bko", x, jnp.take(w, i, axis=0)),
        ids(4, 3, 6),
        normal(3, 5),
        w=(4, 5, 7),
        delta=STACK,
    ),
    use(
        "experts_selected_vmap",
        lambda w, i, x: jax.vmap(lambda i, x: x @ w[i])(i, x),
        ids(4, 3),
        normal(3, 5),
        w=(4, 5, 7),
        delta=STACK,
    ),
    use(
        "experts_map",
        lambda w, x: lax.map(lambda pair: pair[1] @ pair[0], (w, x)),
        normal(4, 3, 5),
        w=(4, 5, 7),
        delta=STACK,
    ),
    use(
        "experts_switch",
        lambda w, i, x: lax.switch(i, [lambda k=k: x @ w[k] for k in range(4)]),
        fixed(2),
        normal(3, 5),
        w=(4, 5, 7),
        delta=STACK,
    ),
    use(
        "index_traced",
        lambda w, i, x: x @ w[i],
        fixed(-2),
        normal(3, 5),
        w=(4, 5, 7),
        delta=STACK,
    ),
    use(
        "map_over_inputs",
        lambda w, x: lax.map(lambda row: jnp.tanh(row @ w), x),
        normal(3, 4, 5),
        w=(5, 7),
    ),
    Use(name="scan_stack", fn=_scan, kernels=_LAYERS, inputs=(normal(3, 5),)),
    Use(
        name="scan_stack_reverse_unrolled",
        fn=lambda layer, x: _scan(layer, x, reverse=True, unroll=2),
        kernels=_LAYERS,
        inputs=(normal(3, 5),),
    ),
    use(
        "scan_second_axis",
        _second_axis,
        normal(3, 5),
        w=(5, 4, 7),
        delta="lir,lro->ilo",
    ),
    Use(name="scan_halves", fn=_halves, kernels=_LAYERS, inputs=(normal(3, 5),)),
    Use(
        name="scan_groups",
        fn=_groups,
        kernels={"w": Kernel((12, 5, 7), STACK), "v": Kernel((12, 7, 5), STACK)},
        inputs=(normal(6, 5),),
    ),
    use(
        "scan_of_experts",
        lambda w, x: lax.scan(lambda h, k: (_experts(h, k), None), x, w)[0],
        normal(6, 3, 5),
        w=(4, 6, 5, 7),
        delta="leir,lero->leio",
    ),
    Use(name="index_fori", fn=_fori, kernels=_LAYERS, inputs=(normal(3, 5),)),
    Use(
        name="index_fori_traced_bound",
        fn=lambda layer, n, x: _fori(layer, x, n),
        kernels=_LAYERS,
        inputs=(fixed(3), normal(3, 5)),
        reverse=False,
    ),
    Use(name="index_loop", fn=_loop, kernels=_LAYERS, inputs=(normal(3, 5),)),
    Use(name="unpacked", fn=_unpacked, kernels=_LAYERS, inputs=(normal(3, 5),)),
    Use(
        name="recurrent",
        fn=_recurrent,
        kernels={"w": Kernel((5, 7)), "v": Kernel((7, 7))},
        inputs=(normal(3, 7), normal(6, 3, 5)),
    ),
    Use(
        name="recurrent_stack",
        fn=_recurrent_stack,
        kernels={
            "up": Kernel((4, 5, 11), STACK),
            "w": Kernel((4, 11, 7), STACK),
            "v": Kernel((4, 7, 7), STACK),
            "down": Kernel((4, 7, 5), STACK),
        },
        inputs=(normal(3, 7), normal(6, 3, 5)),
    ),
    use("unchanged_in_carry", _through_carry, normal(3, 5), w=(5, 7)),
    use(
        "unchanged_in_carry_of_while",
        lambda w, n, x: lax.while_loop(
            lambda c: c[0] < n,
            lambda c: (c[0] + 1, c[1], _block(c[2], c[1], c[1].T)),
            (0, w, x),
        )[2],
        fixed(3),
        normal(3, 5),
        w=(5, 7),
        reverse=False,
    ),
    use("while_loop", _while, normal(3, 5), w=(5, 7), reverse=False),
]

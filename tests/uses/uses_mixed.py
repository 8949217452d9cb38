"""Kernels that frozen values reorder, mix, sum over or are added to before the product.

The roles of the axes are those of the product with the activations.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from use import Kernel, Maker, Use, ids, normal, use


def _order(n: int) -> Array:
    """A permutation of n numbers, of which 3 does not divide n."""
    return (3 * jnp.arange(n) + 1) % n


def _with(
    name: str,
    fn: Callable[..., Any],
    *inputs: Maker,
    w: tuple[int, ...],
    m: tuple[int, ...],
    delta: str = "ir,ro->io",
    **settings: Any,
) -> Use:
    """A use of `w` beside a frozen leaf `m`."""
    return Use(
        name=name,
        fn=lambda p, *inputs: fn(p["w"], p["m"], *inputs),
        kernels={"w": Kernel(w, delta)},
        extra={"m": m},
        inputs=inputs,
        **settings,
    )


MIXED = [
    use("ordered_out", lambda w, x: x @ w[:, _order(7)], normal(4, 5), w=(5, 7)),
    use("ordered_in", lambda w, x: x @ w[_order(7)], normal(4, 7), w=(7, 5)),
    use(
        "ordered_by_take",
        lambda w, x: x @ jnp.take(w, _order(7), axis=1),
        normal(4, 5),
        w=(5, 7),
    ),
    use(
        "repeated_by_index",
        lambda w, x: jnp.einsum("bi,ihd->bhd", x, w[:, jnp.arange(6) // 2]),
        normal(4, 5),
        w=(5, 3, 7),
        delta="ir,rhd->ihd",
    ),
    use(
        "ordered_in_a_loop",
        lambda w, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w[_order(7)]), x),
        normal(4, 7),
        w=(7, 7),
        reverse=False,
    ),
    use(
        "ordered_twice",
        lambda w, x: x @ w[:, _order(7)][:, _order(4)],
        normal(6, 5),
        w=(5, 7),
    ),
    use(
        "rows_by_fixed_numbers",
        lambda w, x: jnp.tanh(x + w[_order(5)[:3]]),
        normal(3, 7),
        w=(5, 7),
    ),
    _with(
        "mixed_out",
        lambda w, m, x: x @ (w @ m),
        normal(4, 5),
        w=(5, 7),
        m=(7, 6),
        dora=False,
    ),
    _with("mixed_in", lambda w, m, x: x @ (m @ w), normal(4, 6), w=(5, 7), m=(6, 5)),
    _with(
        "mixed_and_ordered",
        lambda w, m, x: x @ (w[:, _order(7)] @ m),
        normal(4, 5),
        w=(5, 7),
        m=(7, 6),
        dora=False,
    ),
    _with(
        "mixed_and_transposed",
        lambda w, m, x: x @ (w @ m).T,
        normal(4, 6),
        w=(5, 7),
        m=(7, 6),
        delta="ir,ro->oi",
    ),
    _with(
        "mixed_away",
        lambda w, m, x: x @ (w @ m),
        normal(4, 5),
        w=(5, 7),
        m=(7,),
        dora=False,
    ),
    _with(
        "mixed_in_jit",
        lambda w, m, x: x @ jax.jit(jnp.matmul)(w, m),
        normal(4, 5),
        w=(5, 7),
        m=(7, 6),
        dora=False,
    ),
    _with(
        "mixed_heads",
        lambda w, m, x: jnp.einsum("bi,ihd->bhd", x, jnp.einsum("ihe,hed->ihd", w, m)),
        normal(4, 5),
        w=(5, 3, 7),
        m=(3, 7, 6),
        delta="ir,rhe->ihe",
        dora=False,
    ),
    _with(
        "basis_of_kernels",
        lambda w, m, x: jnp.einsum("ni,rio->rno", x, jnp.einsum("rb,bio->rio", m, w)),
        normal(4, 5),
        w=(3, 5, 7),
        m=(6, 3),
        delta="bir,bro->bio",
        dora=False,
    ),
    _with(
        "basis_of_experts",
        lambda w, m, x: jnp.einsum("rni,rio->rno", x, jnp.einsum("rb,bio->rio", m, w)),
        normal(6, 4, 5),
        w=(3, 5, 7),
        m=(6, 3),
        delta="bir,bro->bio",
        dora=False,
    ),
    _with(
        "weighted_sum_of_kernels",
        lambda w, m, x: x @ jnp.einsum("b,bio->io", m, w),
        normal(4, 5),
        w=(3, 5, 7),
        m=(3,),
        delta="bir,bro->bio",
        formed=True,
        dora=False,
    ),
    _with(
        "mixed_in_and_transposed",
        lambda w, m, x: jnp.einsum("lo,bo->bl", m @ w, x),
        normal(4, 7),
        w=(5, 7),
        m=(6, 5),
        delta="ir,ro->oi",
        dora=False,
    ),
    _with(
        "learned_queries",
        lambda w, m, x: jnp.einsum("lhd,bhd->hbl", (m @ w).reshape(6, 2, 4), x),
        normal(11, 2, 4),
        w=(5, 8),
        m=(6, 5),
    ),
    _with(
        "learned_queries_of_heads",
        lambda w, m, x: jnp.einsum("lhd,bhd->hbl", jnp.einsum("li,ihd->lhd", m, w), x),
        normal(11, 2, 4),
        w=(5, 2, 4),
        m=(6, 5),
        delta="ir,rhd->ihd",
    ),
    _with(
        "learned_queries_with_a_nonlinearity",
        lambda w, m, x: jnp.tanh(m @ w) @ x,
        normal(7, 4),
        w=(5, 7),
        m=(6, 5),
    ),
    _with(
        "rotated_heads",
        lambda w, m, x: jnp.einsum("bi,ihd->bhd", x, jnp.einsum("ihe,ed->ihd", w, m)),
        normal(4, 5),
        w=(5, 3, 7),
        m=(7, 6),
        delta="ir,rhe->ihe",
        dora=False,
    ),
    _with(
        "mixed_heads_together",
        lambda w, m, x: jnp.einsum("bi,igd->bgd", x, jnp.einsum("ihd,hg->igd", w, m)),
        normal(4, 5),
        w=(5, 3, 7),
        m=(3, 6),
        delta="ir,rhd->ihd",
        dora=False,
    ),
    use(
        "sum_over_out",
        lambda w, x: jnp.einsum("bi,io->b", x, w),
        normal(4, 5),
        w=(5, 7),
        dora=False,
    ),
    use(
        "sum_over_all",
        lambda w, x: jnp.einsum("bi,io->", x, w),
        normal(4, 5),
        w=(5, 7),
        dora=False,
    ),
    use(
        "mean_over_out", lambda w, x: x @ w.mean(1), normal(4, 5), w=(5, 7), dora=False
    ),
    use(
        "contracted_whole",
        lambda w, x: jnp.einsum("io,io->", jnp.outer(x[0, :5], x[1]), w),
        normal(4, 7),
        w=(5, 7),
        formed=True,
    ),
    _with(
        "added",
        lambda w, m, x: x @ (w + m),
        normal(4, 5),
        w=(5, 7),
        m=(5, 7),
        dora=False,
    ),
    _with(
        "taken_off",
        lambda w, m, x: x @ (m - w),
        normal(4, 5),
        w=(5, 7),
        m=(5, 7),
        dora=False,
    ),
    Use(
        name="sum_of_two",
        fn=lambda p, x: x @ (p["w"] - p["v"]),
        kernels={"w": Kernel((5, 7)), "v": Kernel((5, 7))},
        inputs=(normal(4, 5),),
        dora=False,
    ),
    use("first_power", lambda w, x: x @ w**1, normal(4, 5), w=(5, 7)),
    use("tiled_out", lambda w, x: x @ jnp.tile(w, (1, 2)), normal(4, 5), w=(5, 7)),
    use("tiled_in", lambda w, x: x @ jnp.tile(w, (2, 1)), normal(4, 10), w=(5, 7)),
    _with(
        "scale_written_out",
        lambda w, m, x: x @ (w * jnp.broadcast_to(m, w.shape)),
        normal(4, 5),
        w=(5, 7),
        m=(7,),
    ),
    _with(
        "scale_mapped",
        lambda w, m, x: jax.vmap(lambda s: x @ (w * s))(m),
        normal(4, 5),
        w=(5, 7),
        m=(3,),
        formed=True,
    ),
    use(
        "rows_of_a_table_and_their_product",
        lambda w, ids, x: jnp.tanh(w[ids]) @ x + w[_order(5)[:2]] @ x,
        ids(5, 2),
        normal(7, 3),
        w=(5, 7),
    ),
]

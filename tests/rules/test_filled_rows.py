"""Rows out of bounds that a lookup fills in: what comes back to them is dropped.

The functions normalise first and mask afterwards, so that NaN comes back to each row
that was filled in. The reference is `jax.grad` of the function of `W + s·a·b`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from oracle import relative_error
from releases import since

import jlora

RANK, ALPHA = 2, 3.0
IDS = jnp.array([[0, 3], [2, 99], [-77, 1]])
pytestmark = pytest.mark.usefixtures("fast_compile")


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A function of one table, and how `a·b` is laid out as the table."""

    fn: Callable[[Any], Any]
    table: tuple[int, ...]
    delta: str = "ir,ro->io"


def masked(rows: Any, mask: Any) -> jax.Array:
    """Normalises all rows, and then leaves those out that are none."""
    rows = rows / jnp.sqrt(jnp.sum(rows**2, -1, keepdims=True))
    mask = mask.reshape(*mask.shape, *[1] * (rows.ndim - mask.ndim))
    return jnp.where(mask, rows, 0) ** 2 + jnp.where(mask, rows, 0)


def inside(ids: Any, size: int) -> Any:
    return (ids >= -size) & (ids < size)


def get(**mode: Any) -> Callable[[Any], Any]:
    return lambda w: masked(w.at[IDS].get(**mode), inside(IDS, 6))


def batched(w: Any) -> Any:
    ids = jnp.stack([IDS, IDS + 1])
    rows = jax.vmap(lambda table, ids: jnp.take(table, ids, axis=0))(w, ids)
    return masked(rows, inside(ids, 6))


def scanned(w: Any) -> Any:
    def step(n: Any, table: Any) -> Any:
        return n + 1, masked(jnp.take(table, IDS, axis=0), inside(IDS, 6))

    return lax.scan(step, 0, w)[1]


def in_two_steps(w: Any) -> Any:
    i, j = jnp.array([1, 8, 0]), jnp.array([2, 0, 9, 1])
    rows = jnp.take(jnp.take(w, i, axis=0), j, axis=1)
    return masked(rows, inside(i, 4)[:, None] & inside(j, 3)[None])


def both_axes(w: Any) -> Any:
    i, j = jnp.array([1, 8, 0]), jnp.array([2, 0, 1])
    return masked(w.at[i, j].get(mode="fill"), inside(i, 4) & inside(j, 3))


def experts(w: Any) -> Any:
    ids, x = jnp.array([0, 9, 2]), 1 + jnp.arange(12.0).reshape(3, 4) / 12
    return masked(jnp.einsum("ni,nio->no", x, jnp.take(w, ids, axis=0)), inside(ids, 3))


def one_expert(w: Any) -> Any:
    """Neither factor has an axis that is longer than one where rows are taken."""
    ids, x = jnp.array([0, 9, 0]), 1 + jnp.arange(12.0).reshape(3, 4) / 12
    return masked(jnp.einsum("ni,nio->no", x, jnp.take(w, ids, axis=0)), ids == 0)


def columns(w: Any) -> Any:
    return masked(jnp.moveaxis(jnp.take(w.T, IDS, axis=1), 0, -1), inside(IDS, 6))


LOOKUPS = {
    "take": Lookup(lambda w: masked(jnp.take(w, IDS, axis=0), inside(IDS, 6)), (6, 5)),
    "fill": Lookup(get(mode="fill"), (6, 5)),
    "fill_value": Lookup(get(mode="fill", fill_value=0.0), (6, 5)),
    "clip": Lookup(get(mode="clip"), (6, 5)),
    "promised": Lookup(lambda w: w.at[IDS % 6].get(mode="promise_in_bounds"), (6, 5)),
    "unsigned": Lookup(
        lambda w: masked(
            w.at[jnp.array([0, 250, 7], jnp.uint8)].get(mode="fill"),
            jnp.array([True, True, True]),
        ),
        (300, 5),
    ),
    "columns": Lookup(columns, (6, 5)),
    "scaled": Lookup(
        lambda w: masked(jnp.take(2 * w.astype("float32"), IDS, axis=0), IDS == 3),
        (6, 5),
    ),
    "batched": Lookup(batched, (2, 6, 5), "eir,ero->eio"),
    "layer": Lookup(
        lambda w: masked(jnp.take(w[1], IDS, axis=0), inside(IDS, 6)),
        (2, 6, 5),
        "eir,ero->eio",
    ),
    "scanned": Lookup(scanned, (2, 6, 5), "eir,ero->eio"),
    "in_two_steps": Lookup(in_two_steps, (4, 3, 5), "jr,rio->ijo"),
    "both_axes": Lookup(both_axes, (4, 3, 5), "ijr,ro->ijo"),
    "experts": Lookup(experts, (3, 4, 5), "eir,ero->eio"),
    "one_expert": Lookup(one_expert, (1, 4, 5), "eir,ero->eio"),
}
WRAPPERS: dict[str, Callable[..., Any]] = {
    "plain": lambda fn: fn,
    "remat": lambda fn: jax.jit(jax.checkpoint(fn)),
    "cond": lambda fn: lambda w: lax.cond(IDS[0, 0] < 1, fn, lambda w: 2 * fn(w), w),
}


def prepared(
    use: Lookup, fn: Callable[..., Any], backward: Any = "custom", **config: Any
) -> Any:
    """Returns the adapted function of an adapter, the merged one, and an adapter."""
    rng = np.random.default_rng(2)
    normal = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"table": normal(use.table)}
    whole = lambda p: fn(p["table"])
    given = config if "rows" in config else {"rank": RANK, "alpha": ALPHA, **config}
    lora = jlora.lora(whole, jlora.LoraConfig("table", **given), backward=backward)
    adapter = lora.init(jax.random.key(0), params)
    adapter = jax.tree.map(lambda v: normal(v.shape), adapter)

    def merged(adapter: Any) -> Any:
        entry, table = adapter["table"], params["table"]
        if "rows" in config:
            return whole({"table": table.at[jnp.array(entry.rows)].set(entry.values)})
        change = jnp.einsum(use.delta, entry.a, entry.b, precision="highest")
        table = table + ALPHA / RANK * change
        if entry.magnitude is not None:
            norm = jnp.sqrt(jnp.sum(table**2, entry.axes.in_))
            fixed = entry.magnitude / lax.stop_gradient(norm)
            table = table * jnp.expand_dims(fixed, entry.axes.in_)
        return whole({"table": table})

    return lambda a: lora.apply(params, a), merged, adapter


def check(use: Lookup, fn: Callable[..., Any], **config: Any) -> None:
    """Values, gradients and tangents are those of the sum, and finite."""
    mine, merged, adapter = prepared(use, fn, **config)
    close(jax.jit(mine)(adapter), jax.jit(merged)(adapter), 1e-5)
    grad = lambda f: jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(f(a)))))(adapter)
    got, want = grad(mine), grad(merged)
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(want))
    jax.tree.map(lambda g, w: close(g, w, 1e-4), got, want)
    mine, *_ = prepared(use, fn, "autodiff", **config)
    change = jax.tree.map(lambda v: 1 + v**2, adapter)
    push = lambda f: jax.jit(lambda a: jax.jvp(f, (a,), (change,)))(adapter)[1]
    close(push(mine), push(merged), 1e-4)


def close(got: Any, want: Any, rtol: float) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert relative_error(got, want) < rtol


MIXED_UP = since("jax", "0.8.2", "its XLA mixes up rows of constants, adapted or not")
NAMES = [
    pytest.param(name, marks=MIXED_UP) if name in ("in_two_steps", "columns") else name
    for name in LOOKUPS
]


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("name", NAMES)
def test_what_comes_back_to_filled_rows_is_dropped(name: str, dora: bool):
    check(LOOKUPS[name], LOOKUPS[name].fn, dora=dora)


@pytest.mark.parametrize("wrapper", ["remat", "cond"])
@pytest.mark.parametrize(
    "name",
    ["take", "fill_value", "batched", pytest.param("in_two_steps", marks=MIXED_UP)],
)
def test_inside(name: str, wrapper: str):
    check(LOOKUPS[name], WRAPPERS[wrapper](LOOKUPS[name].fn))


@pytest.mark.parametrize(
    "name", ["take", "fill", "clip", pytest.param("columns", marks=MIXED_UP)]
)
def test_rows_that_are_trained_whole(name: str):
    check(LOOKUPS[name], LOOKUPS[name].fn, rows=[3, 0])


def test_many_adapters_at_once():
    """`jax.vmap` over adapters: each gradient leaves the filled rows out."""
    mine, merged, adapter = prepared(LOOKUPS["take"], LOOKUPS["take"].fn)
    stacked = jax.tree.map(lambda v: jnp.stack([v, 2 * v, -v]), adapter)
    grads = [
        jax.jit(jax.vmap(jax.grad(lambda a, f=f: jnp.sum(f(a)))))(stacked)
        for f in (mine, merged)
    ]
    jax.tree.map(lambda g, w: close(g, w, 1e-4), *grads)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("sharded", ["rows", "columns", "ids"])
def test_on_a_mesh(kind: str, sharded: str):
    mesh = jax.make_mesh(
        (2, 2), ("x", "y"), (getattr(jax.sharding.AxisType, kind),) * 2
    )
    specs = {"rows": (("x", None), (None,)), "columns": ((None, "y"), (None,))}
    of_table, of_ids = specs.get(sharded, ((None, None), ("x",)))
    if kind == "Explicit" and sharded == "rows":
        pytest.skip("JAX has no gather from rows that are sharded")
    out = {"out_sharding": jax.P("x", None)} if kind == "Explicit" else {}
    out = out if sharded == "ids" else {}
    rng = np.random.default_rng(0)
    place = lambda v, spec: jax.device_put(
        jnp.asarray(v), jax.NamedSharding(mesh, jax.P(*spec))
    )
    with jax.set_mesh(mesh):
        table = place(rng.normal(size=(6, 4)).astype("float32"), of_table)
        ids = place(np.array([0, 3, 2, 99]), of_ids)
        rows = lambda p, ids: p["t"].at[ids].get(mode="fill", **out)
        fn = lambda p, ids: masked(rows(p, ids), inside(ids, 6))
        lora = jlora.lora(fn, jlora.LoraConfig("t", rank=RANK, alpha=ALPHA))
        adapter = lora.init(jax.random.key(0), {"t": table}, ids)
        adapter = jax.tree.map(lambda v: v + 0.1, adapter)
        change = lambda e: jax.sharding.reshard(
            ALPHA / RANK * jnp.einsum("ir,ro->io", e.a, e.b), jax.typeof(table).sharding
        )
        formed = lambda a: fn({"t": table + change(a["t"])}, ids)
        grad = lambda f: jax.jit(jax.grad(lambda a: jnp.sum(f(a))))(adapter)
        got = grad(lambda a: lora.apply({"t": table}, a, ids))
        want = grad(formed)
    jax.tree.map(lambda g, w: close(g, w, 1e-4), got, want)

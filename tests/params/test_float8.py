"""Kernels of eight bits: their sums are formed in float32 and rounded once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_close

import jlora
import jlora.optim

pytestmark = pytest.mark.usefixtures("fast_compile")
each_dtype = pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])


def project(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"].astype(x.dtype)


def raw(params: Any, x: jax.Array) -> jax.Array:
    """A product in which the kernel keeps its eight bits."""
    dims = ((1,), (0,)), ((), ())
    w = params["w"]
    return jax.lax.dot_general(
        x.astype(w.dtype), w, dims, preferred_element_type=jnp.float32
    )


def case(dtype: Any, getkey: Callable[[], jax.Array], fn: Any = project, **kw: Any):
    """A function with its params, an adapter and an input."""
    config = jlora.LoraConfig("w", rank=2, alpha=3.0, dora=kw.pop("dora", False))
    lora = jlora.lora(fn, config, **kw)
    params = {"w": jax.random.normal(getkey(), (6, 5)).astype(dtype)}
    x = jax.random.normal(getkey(), (3, 6))
    adapter = lora.init(getkey(), params, x)
    noise = lambda v: v + 0.3 * jax.random.normal(getkey(), v.shape)
    return lora, params, jax.tree.map(noise, adapter), x


@each_dtype
@pytest.mark.parametrize("settings", [{}, {"dora": True}])
@pytest.mark.parametrize("make", [jnp.asarray, np.asarray])
def test_merge_rounds_once(dtype: Any, settings: Any, make: Any, getkey):
    """To the bit what ml_dtypes makes of a sum in double precision."""
    _, params, adapter, _ = case(dtype, getkey, **settings)
    entry, old = adapter["w"], np.asarray(params["w"], np.float64)
    total = old + np.asarray(jlora.delta(entry), np.float64)
    if "dora" in settings:
        norm = np.linalg.norm(total, axis=0)
        total *= np.asarray(entry.magnitude, np.float64) / norm
    merged = jlora.merge({"w": make(params["w"])}, adapter)["w"]
    assert type(merged) is type(make(params["w"])) and merged.dtype == dtype
    # Within half a step of the exact sum, and a little for what float32 loses of it.
    wanted, near = total.astype(dtype), np.float64(1 + 1e-5)
    low, high = ((total * c).astype(dtype) for c in (1 / near, near))
    same = [np.asarray(merged) == value for value in (wanted, low, high)]
    assert np.logical_or.reduce(same).all()


@each_dtype
def test_dora_and_what_is_materialized(dtype: Any, getkey):
    def sorts(params: Any, x: jax.Array) -> Any:
        return project(params, x), jnp.sort(params["w"].astype(x.dtype), 0)

    settings: Any = {"dora": True, "materialize": "allow"}
    lora, params, adapter, x = case(dtype, getkey, sorts, **settings)
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    wanted = sorts(jlora.merge(wide, adapter), x)
    assert_close(lora.apply(params, adapter, x), wanted, 1e-5)


def test_the_merged_form(getkey):
    settings: Any = {"contraction": "merged"}
    lora, params, adapter, x = case(jnp.float8_e4m3fn, getkey, raw, **settings)
    wanted = raw(jlora.merge(params, adapter), x)
    assert_close(lora.apply(params, adapter, x), wanted, 1e-6)


def test_the_base_moves(getkey):
    """The residual is rounded once; the norms of the change are finite."""
    lora, params, _, x = case(jnp.float8_e4m3fn, getkey)
    moved, adapter = jlora.pissa(params, lora.init(getkey(), params, x))
    assert moved["w"].dtype == params["w"].dtype
    rest = jnp.float32(params["w"]) - jlora.delta(adapter["w"])
    assert_close(jnp.float32(moved["w"]), rest, 0.07)
    norms = jlora.optim.delta_norms(params, adapter)
    assert all(jnp.isfinite(v) for v in norms.values())


def test_a_delta_may_be_asked_for_in_eight_bits(getkey):
    _, _, adapter, _ = case(jnp.float8_e4m3fn, getkey)
    narrow = jlora.delta(adapter["w"], dtype=jnp.float8_e4m3fn)
    wanted = np.asarray(jlora.delta(adapter["w"])).astype(jnp.float8_e4m3fn)
    np.testing.assert_array_equal(np.float32(narrow), np.float32(wanted))

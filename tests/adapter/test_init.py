"""Initialisers that look at nothing but shapes: values, ΔW, keys, stacks, meshes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

Key = Callable[[], jax.Array]
pytestmark = pytest.mark.usefixtures("fast_compile")
NAMES = ("kaiming_uniform", "gaussian", "orthogonal", "zero_a")
RANK = 4
SHAPES: dict[str, tuple[int, ...]] = {
    "dense": (6, 10),
    "heads": (6, 2, 5),
    "stack": (3, 10, 7),
}
X = jnp.ones((2, 6))


def model(params: Any, x: jax.Array) -> jax.Array:
    """A dense kernel, one with two output axes, and a scanned stack."""
    h = jnp.tanh(x @ params["dense"]) + jnp.einsum(
        "bi,ihd->bhd", x, params["heads"]
    ).reshape(2, 10)
    step = lambda h, w: (jnp.tanh(h @ w @ w.T), None)
    return jax.lax.scan(step, h, params["stack"])[0]


def make_params(key: jax.Array, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Random params."""
    keys = jax.random.split(key, len(SHAPES))
    pairs = zip(keys, SHAPES.items(), strict=True)
    return {n: 0.3 * jax.random.normal(k, s, dtype) for k, (n, s) in pairs}


def adapted(init: str, **settings: Any) -> jlora.Lora:
    """The model with all kernels adapted."""
    config = jlora.LoraConfig(init=init, rank=RANK, alpha=6.0, **settings)
    return jlora.lora(model, config)


@pytest.mark.parametrize("init", NAMES)
def test_delta_is_zero_and_so_is_the_change_of_the_output(
    init: str, getkey: Key
) -> None:
    params, lora = make_params(getkey()), adapted(init)
    adapter = lora.init(getkey(), params, X)
    for path, entry in adapter.items():
        assert (entry.a.any() or init == "zero_a") and entry.a.shape[-1] == RANK
        np.testing.assert_allclose(jlora.delta(entry), 0, atol=1e-7, err_msg=path)
    expected = model(params, X)
    np.testing.assert_allclose(lora.apply(params, adapter, X), expected, atol=1e-6)


@pytest.mark.parametrize("init", NAMES)
def test_which_factors_get_a_gradient_at_the_first_step(init: str, getkey: Key) -> None:
    params, lora = make_params(getkey()), adapted(init)
    adapter = lora.init(getkey(), params, X)
    grads = jax.grad(lambda a: lora.apply(params, a, X).sum())(adapter)
    for entry in grads.values():
        assert bool(entry.a.any()) == (init in ("orthogonal", "zero_a"))
        assert bool(entry.b.any()) == (init != "zero_a")


def test_orthogonal_factors_are_those_of_peft(getkey: Key) -> None:
    """Both lie in complementary halves of a space of the rank, scaled by a tenth."""
    config = jlora.LoraConfig(init="orthogonal", rank=RANK)
    lora = jlora.lora(lambda p, x: x @ p["w"], config)
    params, x = {"w": jnp.ones((3, 400, 500))}, jnp.ones((3, 2, 400))
    entry = lora.init(getkey(), params, x)["w"]
    a, b = (np.asarray(v, np.float64) for v in (entry.a, entry.b))
    np.testing.assert_allclose(a @ b, 0, atol=1e-6)
    for wide, size in ((np.swapaxes(a, 1, 2), 400), (b, 500)):
        values = np.linalg.svd(wide, compute_uv=False)
        assert (values[:, RANK // 2 :] < 1e-5).all()  # half of the rank each
        assert np.allclose(values[:, : RANK // 2], size**0.5 / 10, rtol=0.2)
    # Each slice has an orthogonal matrix of its own.
    spaces = [v.T @ v for v in b[:, :, :1].transpose(0, 2, 1)]
    assert not np.allclose(spaces[0], spaces[1])


def test_zero_a_is_scaled_by_the_rank_alone(getkey: Key) -> None:
    config = jlora.LoraConfig(init="zero_a", rank=RANK)
    lora = jlora.lora(lambda p, x: x @ p["w"], config)
    entry = lora.init(getkey(), {"w": jnp.ones((3, 60, 500))}, jnp.ones((3, 2, 60)))
    b = np.asarray(entry["w"].b)
    assert not entry["w"].a.any()
    assert np.abs(b).max() <= RANK**-0.5
    np.testing.assert_allclose(b.std(), (3 * RANK) ** -0.5, rtol=0.05)


@pytest.mark.parametrize("init", NAMES)
def test_a_target_does_not_change_the_factors_of_another(
    init: str, getkey: Key
) -> None:
    params, key = make_params(getkey()), getkey()
    every = adapted(init).init(key, params, X)
    one = adapted(init, target="heads").init(key, params, X)
    assert (one["heads"].a == every["heads"].a).all()
    assert (one["heads"].b == every["heads"].b).all()


@pytest.mark.parametrize("init", NAMES)
def test_factors_have_the_dtype_of_the_config(init: str, getkey: Key) -> None:
    params = make_params(getkey(), jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):
        entries = adapted(init, dtype=dtype).init(getkey(), params, x).values()
        assert {v.dtype for e in entries for v in (e.a, e.b)} == {jnp.dtype(dtype)}


def test_orthogonal_needs_an_even_rank() -> None:
    with pytest.raises(ValueError, match="even rank, got 3"):
        jlora.LoraConfig("w", rank=3, init="orthogonal")
    with pytest.raises(ValueError, match=r"one of .*'orthogonal', 'zero_a'"):
        jlora.LoraConfig("w", init="pissa")


@pytest.mark.parametrize("init", NAMES)
def test_on_an_explicit_mesh_factors_lie_like_their_kernels(
    init: str, getkey: Key
) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Explicit,) * 2)
    kernel = jax.random.normal(getkey(), (2, 4, 6))
    lora = jlora.lora(
        lambda p, x: jnp.einsum("lbi,lio->lbo", x, p["w"], out_sharding=P("x")),
        jlora.LoraConfig("w", rank=2, init=init),
    )
    key, x = getkey(), jnp.ones((2, 3, 4))
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(kernel, NamedSharding(mesh, P("x", None, "y")))}
        entry = lora.init(key, params, jax.device_put(x, P("x")))["w"]
        assert tuple(entry.a.sharding.spec)[:1] == ("x",)
        assert tuple(entry.b.sharding.spec) == ("x", None, "y")
    plain = jlora.lora(lambda p, x: jnp.einsum("lbi,lio->lbo", x, p["w"]), lora.configs)
    alone = plain.init(key, {"w": kernel}, x)["w"]
    whole = dataclasses.replace(entry, a=np.asarray(entry.a), b=np.asarray(entry.b))
    np.testing.assert_allclose(whole.a, alone.a, atol=1e-6)
    np.testing.assert_allclose(whole.b, alone.b, atol=1e-6)

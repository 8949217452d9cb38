"""Every feature of the public surface where JAX compiles nothing, and with 64 bits."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from surface_all import FEATURES, Place

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")

MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "disable_jit": jax.disable_jit,
    "enable_x64": lambda: jax.enable_x64(True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_runs(name: str, mode: str) -> None:
    with MODES[mode]():
        FEATURES[name](Place())


def test_nothing_that_is_compiled_changes_a_value() -> None:
    """`jax.disable_jit` is how one looks into a model: siblings, and a gradient."""
    params = {"q": jnp.arange(35.0).reshape(5, 7) / 35, "k": jnp.ones((5, 4))}
    x = jnp.linspace(-1, 1, 15).reshape(3, 5)
    model = lambda p, x: (jnp.tanh(x @ p["q"]).sum() + (x @ p["k"]).sum()) ** 2
    lora = jlora.lora(model, jlora.LoraConfig(rank=2, alpha=3.0))
    adapter = lora.init(jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda v: v + 0.1, adapter)
    run = lambda a: lora.apply(params, a, x)
    with jax.disable_jit():
        found = jax.value_and_grad(run)(adapter)
    wanted = jax.value_and_grad(lambda a: model(jlora.merge(params, a), x))(adapter)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found, wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16], ids=str)
def test_moments_of_inputs_with_64_bits(dtype: Any) -> None:
    with jax.enable_x64(True):
        x = jnp.linspace(-1, 1, 15, dtype=dtype).reshape(3, 5)
        lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig(rank=2))
        (found,) = lora.inputs({"w": jnp.ones((5, 4), dtype)}, x).values()
        wide = np.asarray(x, np.float64)
        np.testing.assert_allclose(found.moment, wide.T @ wide, rtol=1e-6)

"""Every feature of the public surface where JAX promotes no dtypes by itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from surface_all import FEATURES, Place

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_needs_no_promotion(name: str):
    with jax.numpy_dtype_promotion("strict"):
        FEATURES[name](Place())


@pytest.mark.parametrize("variant", [{}, {"dora": True}, {"dropout": 0.3}])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64], ids=str)
def test_16_bit_kernels_and_complex_inputs(variant: Any, dtype: Any) -> None:
    """DoRA's scale is wider than its value; factors are real beside complex inputs."""
    w = jnp.arange(35.0).reshape(5, 7) / 35 - 0.4
    params = {"w": w.astype(jnp.bfloat16) if dtype == jnp.bfloat16 else w}
    x = jnp.linspace(-1, 1, 15).reshape(3, 5).astype(dtype)
    model = lambda p, x: jnp.abs(x @ p["w"].astype(dtype)).astype(jnp.float32)
    lora = jlora.lora(model, jlora.LoraConfig("w", rank=2, alpha=3.0, **variant))
    adapter = lora.init(jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda v: v + 0.1, adapter)
    key = jax.random.key(1)
    run = lambda a: lora.apply(params, a, x, lora_dropout_key=key).sum()
    expected = jax.value_and_grad(run)(adapter)
    with jax.numpy_dtype_promotion("strict"):
        found = jax.value_and_grad(run)(adapter)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

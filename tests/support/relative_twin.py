"""The twin in JAX of the model whose adapters are `tests/data/peft_relatives`."""

from typing import Any

import jax
import jax.numpy as jnp


def model(params: Any, x: jax.Array) -> jax.Array:
    """The twin of `Model` in make_relatives.py."""
    image = jnp.tanh(x @ params["up"]["kernel"]).reshape(-1, 6, 3, 5)
    image = jnp.pad(image, ((0, 0), (0, 0), (0, 0), (0, 1)))
    layout = ("NCHW", "HWIO", "NCHW")
    image = jax.lax.conv_general_dilated(
        image, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=layout
    )
    return jnp.tanh(image).reshape(len(x), -1) @ params["down"]["kernel"]


def params_of(arrays: Any) -> dict[str, Any]:
    """The params of the twin from torch's weights."""
    up, down = (jnp.asarray(arrays[f"{name}.weight"].T) for name in ("up", "down"))
    conv = jnp.asarray(arrays["conv.weight"].transpose(2, 3, 1, 0))
    return {n: {"kernel": v} for n, v in (("up", up), ("conv", conv), ("down", down))}

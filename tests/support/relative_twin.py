"""The twin in JAX of the model whose adapters are `tests/data/peft_relatives`."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from paths import ORACLE
from torch_python import oracle_python


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


def output_of_peft(folder: Path, arrays: Mapping[str, Any]) -> jax.Array:
    """What real PEFT computes with the adapter in a folder, for weights and an `x`."""
    np.savez(folder / "arrays.npz", **arrays)
    done = subprocess.run(
        [oracle_python(), str(ORACLE / "make_relatives.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return jnp.asarray(json.loads(done.stdout.splitlines()[-1]))

"""Adapters, and training states that hold one, in `flax.serialization`."""

import dataclasses
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from paths import ROOT

import jlora
from jlora import LoraConfig

PARAMS = {
    "w": jax.random.normal(jax.random.key(1), (5, 7)),
    "table": jax.random.normal(jax.random.key(2), (11, 5)),
    "bias": jnp.ones(7),
}
X = jnp.array([1, 4, 9])


def fn(params: Any, x: jax.Array) -> jax.Array:
    return params["table"][x] @ params["w"] + params["bias"][None]


CONFIGS = {
    "factors": LoraConfig("w", rank=2),
    "dora": LoraConfig("w", rank=2, dora=True),
    "slices": LoraConfig("w", rank=2, slices=[(0, 2), (4, 7)]),
    "rows": LoraConfig("table", rows=[1, 4]),
    "whole": LoraConfig("bias", full=True),
    "biases": [LoraConfig("w|table", rank=3), LoraConfig("bias", full=True)],
}


def made(config: Any, seed: int = 0) -> Any:
    """A lora and an adapter of random values."""
    lora = jlora.lora(fn, config)
    adapter = lora.init(jax.random.key(0), PARAMS, X)
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return lora, treedef.unflatten([jax.random.normal(k, v.shape) for k, v in pairs])


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name: str) -> None:
    _, adapter = made(CONFIGS[name])
    _, other = made(CONFIGS[name], seed=1)
    assert_same(
        serialization.from_bytes(other, serialization.to_bytes(adapter)), adapter
    )
    state = serialization.to_state_dict(adapter)
    assert set(state) == set(adapter)
    assert_same(serialization.from_state_dict(other, state), adapter)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_state(name: str) -> None:
    lora, adapter = made(CONFIGS[name])
    tx = optax.adam(1e-3)
    state = TrainState.create(apply_fn=lora.apply, params=adapter, tx=tx)
    grads = jax.grad(lambda a: (lora.apply(PARAMS, a, X) ** 2).sum())(adapter)
    state = state.apply_gradients(grads=grads)
    new = TrainState.create(
        apply_fn=lora.apply, params=made(CONFIGS[name], 1)[1], tx=tx
    )
    found = serialization.from_bytes(new, serialization.to_bytes(state))
    assert_same(found.params, state.params)
    assert_same(found.opt_state, state.opt_state)
    assert found.step == 1


def test_triplets() -> None:
    _, adapter = made(CONFIGS["factors"])
    svd = jlora.adalora.init(jax.random.key(0), adapter)
    found = serialization.from_bytes(svd, serialization.to_bytes(svd))
    assert_same(found, svd)


def test_what_belongs_to_another_config_is_refused() -> None:
    _, adapter = made(CONFIGS["factors"])
    state = serialization.to_state_dict(adapter)
    with pytest.raises(ValueError, match="other shapes"):
        serialization.from_state_dict(made(LoraConfig("w", rank=3))[1], state)
    with pytest.raises(ValueError, match="magnitude"):
        serialization.from_state_dict(made(CONFIGS["dora"])[1], state)


@pytest.mark.parametrize("first", ["jlora", "flax.serialization"])
def test_no_door_need_be_opened(first: str) -> None:
    code = f"""if True:
        import {first}, jlora, jax, jax.numpy as jnp
        from flax import serialization
        lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=2))
        params, x = {{"w": jnp.ones((5, 7))}}, jnp.ones((3, 5))
        adapter = lora.init(jax.random.key(0), params, x)
        serialization.from_bytes(adapter, serialization.to_bytes(adapter))
        """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_classes_of_entries_are_all_dataclasses() -> None:
    _, adapter = made(CONFIGS["factors"])
    assert dataclasses.is_dataclass(adapter["w"])

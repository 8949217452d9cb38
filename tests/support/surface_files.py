"""Features of `surface`: norms, optimizers and files."""

import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from surface import EVERY, FEATURES, KERNELS, Feature, Place, config, feature

import jlora
import jlora.checkpoint
import jlora.optim
import jlora.peft


@feature
def norms(place: Place) -> Any:
    full = jlora.LoraConfig("dense/bias", full=True)
    rows = jlora.LoraConfig("table", rows=[0, 3])
    lora = jlora.lora(place.model, [config(KERNELS, dora=True), full, rows])
    params, adapter = place.params(), place.adapter(lora)
    plain = place.adapter(place.lora(EVERY))
    return (
        jlora.optim.adapter_norms(adapter),
        jlora.optim.delta_norms(params, adapter),
        jax.jit(jlora.optim.delta_norms)(params, plain),
    )


def _optimized(make: Callable[[], Any]) -> Feature:
    def run(place: Place) -> Any:
        full = jlora.LoraConfig("dense/bias", full=True)
        lora = jlora.lora(place.model, [config(EVERY, dora=True), full])
        params, ids, weights, tx = place.params(), place.ids(), place.weights(), make()
        adapter = place.adapter(lora)
        state = tx.init(adapter)
        if place.mesh is not None:
            how = {"replicate": not place.follow, "spread": place.spread}
            placed = jlora.shardings(params, adapter, **how)
            places = jlora.state_shardings(tx, adapter, placed)
            state = jax.jit(tx.init, out_shardings=places)(adapter)

        @jax.jit
        def step(adapter: Any, state: Any, params: Any) -> Any:
            loss = lambda a: place.loss(lora.apply(params, a, ids), weights)
            updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
            return jax.tree.map(lambda v, u: v + u, adapter, updates), state

        for _ in range(2):
            adapter, state = step(adapter, state, params)
        return adapter

    return run


def _sgd() -> Any:
    return jlora.optim.lora_plus(lambda rate: optax.sgd(rate, momentum=0.9), 1e-2)


def _clipped() -> Any:
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.1, jlora.optim.decay_mask),
        optax.sgd(0.1, momentum=0.9),
    )


FEATURES["lora_plus"] = _optimized(_sgd)
FEATURES["clip_and_decay"] = _optimized(_clipped)


@feature
def freeze_base(place: Place) -> Any:
    lora, ids, weights = place.lora(EVERY), place.ids(), place.weights()
    tree = {"params": place.params(), "lora": place.adapter(lora)}
    tx = jlora.optim.freeze_base(optax.sgd(0.1, momentum=0.9))
    state = jax.jit(tx.init)(tree)

    @jax.jit
    def step(tree: Any, state: Any) -> Any:
        run = lambda t: lora.apply(t["params"], t["lora"], ids)
        grads = jax.grad(lambda t: place.loss(run(t), weights))(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates)

    return step(tree, state)


@feature
def checkpoint(place: Place) -> Any:
    configs = [
        config(KERNELS, dora=True),
        jlora.LoraConfig("dense/bias", full=True),
        jlora.LoraConfig("table", rows=[0, 3]),
    ]
    lora, params = jlora.lora(place.model, configs), place.params()
    adapter = place.adapter(lora)
    with tempfile.TemporaryDirectory() as folder:
        jlora.checkpoint.save(folder, adapter, config=configs, base=params)
        found = jlora.checkpoint.restore(folder, base=params, like=adapter)
        record = jlora.checkpoint.describe(folder)
    # Digests are of the values to the last bit, which are not those without a mesh.
    text = re.sub(r"\b[0-9a-f]{16,}\b", "", f"{list(record.entries)} {record}")
    return found, _as_numbers(text)


def _as_numbers(text: Any) -> np.ndarray:
    """Returns text as numbers that can be compared."""
    return np.frombuffer(str(text).encode(), np.uint8).astype(np.float32)


@feature
def peft(place: Place) -> Any:
    lora = place.lora("dense/kernel")
    params, adapter = place.params(), place.adapter(lora)
    with tempfile.TemporaryDirectory() as folder:
        jlora.peft.save(f"{folder}/one", params, adapter, lora.configs)
        return jlora.peft.load(f"{folder}/one", params)[1]


@feature
def plan_and_memory(place: Place) -> Any:
    lora, params = place.lora(EVERY), place.params()
    plan = lora.plan(params, place.ids())
    assert str(plan)
    assert plan._repr_html_()
    assert str(plan.memory(optimizer=optax.adam(1e-3)))
    return np.float32(plan.trainable)

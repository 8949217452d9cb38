"""Features of `surface`: what is done to adapters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from surface import (
    EVERY,
    FEATURES,
    KERNELS,
    SLICES,
    Feature,
    Place,
    config,
    feature,
    several,
)

import jlora


@feature
def merge(place: Place) -> Any:
    full = jlora.LoraConfig("dense/bias", full=True)
    rows = jlora.LoraConfig("table", rows=[0, 3])
    lora = jlora.lora(place.model, [config(KERNELS, dora=True), full, rows])
    params, adapter = place.params(), place.adapter(lora)
    return jlora.merge(params, adapter), jax.jit(jlora.merge)(params, adapter)


@feature
def merge_slices(place: Place) -> Any:
    lora, params = place.lora("dense/kernel", slices=SLICES), place.params()
    adapter = place.adapter(lora)
    lowered = jlora.delta(adapter["dense/kernel"].lowered())
    return jlora.merge(params, adapter), lowered


@feature
def delta(place: Place) -> Any:
    adapter = place.adapter(place.lora(EVERY))
    run = lambda a: {path: jlora.delta(entry) for path, entry in a.items()}
    return run(adapter), jax.jit(run)(adapter)


@feature
def algebra(place: Place) -> Any:
    one, two, _ = several(place, place.lora(EVERY))
    two = {p: dataclasses.replace(f, scaling=0.7) for p, f in two.items()}
    factor = jnp.float32(0.3)
    return (
        jlora.add(one, two),
        jlora.subtract(one, two),
        jlora.scale(one, 2.0),
        jlora.scale(one, factor),
        jax.jit(jlora.add)(one, two),
    )


@feature
def truncate(place: Place) -> Any:
    adapter = place.adapter(place.lora(EVERY))
    cut = lambda a: {p: jlora.delta(e) for p, e in a.items()}
    under_jit = jax.jit(lambda a: cut(jlora.truncate(a, 2)))(adapter)
    return (
        cut(jlora.truncate(adapter, 2)),
        under_jit,
        cut(jlora.truncate(adapter, energy=0.9)),
    )


@feature
def spectrum(place: Place) -> Any:
    adapter = place.adapter(place.lora(EVERY))
    values = jlora.spectrum(adapter)
    told = (jlora.effective_rank, jlora.stable_rank, jlora.entropy_rank)
    ranks = [{p: one(v) for p, v in values.items()} for one in told]
    kept = {p: jlora.energy_kept(v, 2) for p, v in values.items()}
    return values, jax.jit(jlora.spectrum)(adapter), ranks, kept


def _combined(method: str, **settings: Any) -> Feature:
    def run(place: Place) -> Any:
        adapters, weights = several(place, place.lora(EVERY)), [0.5, -0.25, 1.0]
        join = lambda x, w: jlora.combine(x, w, method=method, **settings)
        return join(adapters, weights), jax.jit(join)(adapters, jnp.asarray(weights))

    return run


_KEY = {"density": 0.5, "key": jax.random.key(2)}
FEATURES["combine_sum"] = _combined("sum")
FEATURES["combine_linear"] = _combined("linear")
FEATURES["combine_magnitude_prune"] = _combined("magnitude_prune", density=0.5)
FEATURES["combine_ties"] = _combined("ties", density=0.5)
FEATURES["combine_ties_frequency"] = _combined(
    "ties", density=0.5, majority="frequency"
)
FEATURES["combine_dare_linear"] = _combined("dare_linear", **_KEY)
FEATURES["combine_dare_ties"] = _combined("dare_ties", **_KEY)


@feature
def adalora(place: Place) -> Any:
    lora, params = place.lora(EVERY), place.params()
    ids, weights, tool = place.ids(), place.weights(), jlora.adalora
    fresh = tool.init(jax.random.key(9), lora.init(jax.random.key(3), params, ids))
    svd = tool.from_factors(place.adapter(lora))
    state = tool.start(svd)

    def loss(svd: Any, params: Any) -> Any:
        out = lora.apply(params, tool.to_factors(svd), ids)
        return place.loss(out, weights) + 0.1 * tool.orthogonality_penalty(svd)

    @jax.jit
    def step(svd: Any, state: Any, params: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(svd, params)
        state = tool.update(state, svd, grads)
        svd = jax.tree.map(lambda v, g: v - 0.01 * g, svd, grads)
        scores = tool.scores(state)
        kept = tool.allocate(scores, 20)
        return value, tool.masked(svd, kept), kept, state

    value, svd, kept, state = step(svd, state, params)
    merged = jlora.merge(params, tool.prune(svd, kept))
    return value, merged, kept, jlora.merge(params, tool.to_factors(fresh))

"""Features of `surface`: adapted functions, and many adapters at once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from surface import EVERY, FEATURES, SLICES, Place, config, feature, several, trained
from use import RANK

import jlora


def _each_training(name: str, target: Any = None, **settings: Any) -> None:
    FEATURES[name] = lambda place: trained(place, place.lora(target, **settings))


_each_training("train")
_each_training("train_every", EVERY)
_each_training("train_table", "table")
_each_training("train_autodiff", EVERY, backward="autodiff")
_each_training("train_merged", EVERY, contraction="merged")
_each_training("train_auto", EVERY, contraction="auto")
_each_training("train_fused", EVERY, contraction="fused")
_each_training("train_dora", EVERY, dora=True)
_each_training("train_rslora", rslora=True)
_each_training("train_bfloat16_factors", EVERY, dtype=jnp.bfloat16)
_each_training("train_rows", "table", rows=[1, 5, 7])
_each_training("train_slices", "dense/kernel", slices=SLICES)
_each_training("train_slices_heads", "heads", slices=SLICES)
_each_training("train_bias_adapted", "dense/kernel", bias="adapted")
_each_training("train_bias_all", "heads", bias="all")
_each_training("train_full", "dense|table|layers/up", full=True)
_each_training("train_zero_a", EVERY, init="zero_a")
_each_training("train_orthogonal", EVERY, init="orthogonal", rank=4)
_each_training("train_gaussian", EVERY, init="gaussian")
VARIANTS = ("loha", "lokr", "vera", "lora_fa", "lora_xs", "ia3")
for _variant in VARIANTS:
    _each_training(f"train_{_variant}", EVERY, variant=_variant)


@feature
def init(place: Place) -> Any:
    key, params, ids = jax.random.key(5), place.params(), place.ids()
    found = {}
    for name in ("kaiming_uniform", "gaussian", "orthogonal", "zero_a"):
        lora = place.lora(EVERY, init=name, rank=4)
        found[name] = lora.init(key, params, ids)
        jitted = jax.jit(lora.init)(key, params, ids)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        jax.tree.map(close, found[name], jitted)
    return found


@feature
def dropout(place: Place) -> Any:
    lora = place.lora(dropout=0.5)
    return trained(place, lora, lora_dropout_key=jax.random.key(7))


@feature
def eager(place: Place) -> Any:
    lora, params = place.lora(EVERY), place.params()
    return lora.apply(params, place.adapter(lora), place.ids())


@feature
def remat(place: Place) -> Any:
    model = jax.checkpoint(place.model)
    return trained(place, jlora.lora(model, config(EVERY)))


@feature
def params_trained_too(place: Place) -> Any:
    lora, params, ids, weights = (
        place.lora(EVERY),
        place.params(),
        place.ids(),
        place.weights(),
    )
    adapter = place.adapter(lora)
    loss = lambda p, a: place.loss(lora.apply(p, a, ids), weights)
    return jax.jit(jax.grad(loss, (0, 1)))(params, adapter)


@feature
def jvp(place: Place) -> Any:
    lora, params, ids = (
        place.lora(EVERY, backward="autodiff"),
        place.params(),
        place.ids(),
    )
    adapter = place.adapter(lora)
    run = lambda adapter: lora.apply(params, adapter, ids)
    return jax.jit(lambda a: jax.jvp(run, (a,), (a,)))(adapter)


@feature
def second_derivatives(place: Place) -> Any:
    lora, params, ids = place.lora(backward="autodiff"), place.params(), place.ids()
    adapter, weights = place.adapter(lora), place.weights()
    loss = lambda a: place.loss(lora.apply(params, a, ids), weights)
    norm = lambda a: sum((g**2).sum() for g in jax.tree.leaves(jax.grad(loss)(a)))
    return jax.jit(jax.grad(norm))(adapter)


@feature
def stack(place: Place) -> Any:
    lora = place.lora(EVERY)
    one, two, three = several(place, lora)
    del two["heads"]
    three["dense/kernel"] = dataclasses.replace(three["dense/kernel"], scaling=0.5)
    stacked = jlora.stack([one, two, three], rank=RANK + 2)
    new = jax.jit(jlora.put)(stacked, jnp.asarray(1), three)
    return (
        stacked,
        jlora.unstack(stacked),
        jlora.unstack(stacked, trim=True),
        jlora.put(stacked, 0, two),
        new,
        jlora.take(stacked, 2),
        jax.jit(jlora.take)(stacked, jnp.asarray(2)),
    )


@feature
def vmap_of_stacked(place: Place) -> Any:
    lora, params, ids = place.lora(EVERY), place.params(), place.ids()
    stacked = jlora.stack(several(place, lora))
    return jax.jit(jax.vmap(lora.apply, (None, 0, None)))(params, stacked, ids)


def _mixed(place: Place, rows: Any, **settings: Any) -> Any:
    lora = place.lora(**settings)
    full = jlora.LoraConfig("dense/bias", full=True)
    lora = jlora.lora(place.model, [*lora.configs, full])
    params, ids, weights = place.params(), place.ids(), place.weights()
    stacked = jlora.stack(several(place, lora))
    index = place.put(np.array([0, 1, 2, -1] * 2, np.int32), rows)
    loss = lambda a, i: place.loss(lora.apply_mixed(params, a, i, ids), weights)
    out = jax.jit(lora.apply_mixed)(params, stacked, index, ids)
    return out, jax.jit(jax.grad(loss))(stacked, index)


@feature
def mixed(place: Place) -> Any:
    return _mixed(place, place.rows)


@feature
def mixed_every(place: Place, **settings: Any) -> Any:
    return _mixed(place, place.rows, target=EVERY, **settings)


for _variant in VARIANTS:
    FEATURES[f"mixed_{_variant}"] = functools.partial(mixed_every, variant=_variant)


@feature
def mixed_whole_index(place: Place) -> Any:
    return _mixed(place, None)


@feature
def mixed_sharded_index(place: Place) -> Any:
    return _mixed(place, "data" if place.mesh is not None else None)


@feature
def mixed_dropout(place: Place) -> Any:
    lora, params, ids = place.lora(dropout=0.5), place.params(), place.ids()
    stacked = jlora.stack(several(place, lora))
    index = place.put(np.array([0, 1, 2, -1] * 2, np.int32), place.rows)
    run = lambda key: lora.apply_mixed(
        params, stacked, index, ids, lora_dropout_key=key
    )
    return jax.jit(run)(jax.random.key(11))

"""Features of `surface`: quantised bases, and the initialisers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from surface import EVERY, FEATURES, Feature, Place, feature, trained
from use import RANK

import jlora
import jlora.optim


def _quantized(qtype: str, planned: bool) -> Feature:
    def run(place: Place) -> Any:
        params, lora = place.params(), place.lora(EVERY)
        which = lora.plan(params, place.ids()) if planned else EVERY
        params = jlora.quantize(params, which, qtype, tile=4)
        adapter = place.adapter(lora, params=params)
        step = trained(place, lora, params)
        merged = jlora.merge(params, adapter, dequantize=True)
        inputs = jax.jit(lora.inputs)(params, place.ids())
        return step, merged, inputs, jlora.optim.delta_norms(params, adapter)

    return run


for _qtype in ("nf4", "int8", "int4", "fp8"):
    FEATURES[f"quantize_{_qtype}"] = _quantized(_qtype, planned=True)
FEATURES["quantize_by_pattern"] = _quantized("nf4", planned=False)


@feature
def quantize_under_jit(place: Place) -> Any:
    lora, params = place.lora(EVERY), place.params()
    plan = lora.plan(params, place.ids())
    params = jax.jit(lambda p: jlora.quantize(p, plan, "int8", tile=4))(params)
    return trained(place, lora, params)


@feature
def quantize_dora(place: Place) -> Any:
    lora, params = place.lora(dora=True), place.params()
    params = jlora.quantize(params, lora.plan(params, place.ids()), "nf4", tile=4)
    return trained(place, lora, params)


@feature
def quantize_autodiff(place: Place) -> Any:
    lora, params = place.lora(EVERY, backward="autodiff"), place.params()
    params = jlora.quantize(params, lora.plan(params, place.ids()), "nf4", tile=4)
    return trained(place, lora, params)


def _start(place: Place, rank: int = RANK) -> tuple[Any, Any, Any]:
    lora, params = place.lora(EVERY, rank=rank), place.params()
    return lora, params, lora.init(jax.random.key(3), params, place.ids())


def meaning(params: Any, adapter: Any) -> Any:
    """Signs of singular vectors are free: what counts is the kernel and the change."""
    return params, {path: jlora.delta(entry) for path, entry in adapter.items()}


def _moving(name: str, **settings: Any) -> Feature:
    def run(place: Place) -> Any:
        _, params, adapter = _start(place)
        start = lambda p, a: getattr(jlora, name)(p, a, **settings)
        return meaning(*start(params, adapter)), meaning(
            *jax.jit(start)(params, adapter)
        )

    return run


_quarters = lambda w: jnp.round(4 * w) / 4
FEATURES["pissa"] = _moving("pissa")
FEATURES["pissa_fast"] = _moving("pissa", method="fast", key=jax.random.key(1))
FEATURES["milora"] = _moving("milora")
FEATURES["olora"] = _moving("olora")
FEATURES["loftq"] = _moving("loftq", quantize=_quarters, steps=2)


@feature
def loftq_quantized(place: Place) -> Any:
    _, params, adapter = _start(place)
    quantize = lambda w: qwix.quantize(w, "int8", channelwise_axes=[w.ndim - 1])
    params, adapter = jlora.loftq(
        params, adapter, quantize=quantize, dequantize=qwix.dequantize, steps=2
    )
    return meaning(jax.tree.map(lambda v: v.astype(jnp.float32), params), adapter)


@feature
def inputs(place: Place) -> Any:
    lora, params, ids = place.lora(EVERY), place.params(), place.ids()
    return lora.inputs(params, ids), jax.jit(lora.inputs)(params, ids)


@feature
def inputs_sketch(place: Place) -> Any:
    lora, params, ids = place.lora(EVERY), place.params(), place.ids()
    return lora.inputs(params, ids, lora_sketch=5)


def _energy(adapter: Any) -> Any:
    """Projections on the columns of `a`, whose signs are free."""
    square = lambda a: jnp.einsum("...ir,...jr->...ij", a, a)
    matrix = lambda e: jnp.asarray(
        np.asarray(e.a).reshape(*e.a.shape[: len(e.axes.batch)], -1, e.rank)
    )
    return {path: square(matrix(e)) for path, e in adapter.items()}


@feature
def eva(place: Place) -> Any:
    lora, params, adapter = _start(place)
    stats = lora.inputs(params, place.ids())
    return _energy(jlora.eva(adapter, stats)), _energy(jlora.eva(adapter, stats, rho=1))


@feature
def corda(place: Place) -> Any:
    lora, params, adapter = _start(place)
    stats = lora.inputs(params, place.ids())
    found = [
        jlora.corda(params, adapter, stats, mode=mode, damping=0.5)
        for mode in ("knowledge", "instruction")
    ]
    return [meaning(*one) for one in found]


@feature
def lora_ga(place: Place) -> Any:
    _, params, adapter = _start(place, rank=2)
    ids, weights = place.ids(), place.weights()
    loss = lambda p: place.loss(place.model(p, ids), weights)
    grads = _by_path(jax.jit(jax.grad(loss))(params))
    found = jlora.lora_ga(params, adapter, grads)
    return {p: jnp.abs(jnp.asarray(np.asarray(e.a))) for p, e in found[1].items()}


def _by_path(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): leaf for path, leaf in flat}

"""What `tpu_compile.py` compiles: steps as shapes with places, and no array.

One layer on one chip, forward and backward to its input, without an optimizer; and
whole models on meshes, scanned and rematerialized, with AdamW.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from linen_decoder import LinenLayer, linen_factors, linen_layer, plain_dense
from models import Decoder, plain
from other_models import MixtureOfExperts
from placing import mesh_of, on_mesh, placed, places_of, rows_of, whole_on
from programs import FACTORED, FROZEN, FULL, JLORA, MERGED, abstract_key, shapes_of
from rivals import QWIX_NAMES, joined, qwix_provider
from steps import (
    OPTIMIZER,
    SPREAD,
    as_layers,
    factored,
    frozen_step,
    jitted,
    lora_of,
    low_rank_losses,
    merged,
    trained_step,
    where,
)

import jlora

QWIX = "Qwix, Linen"
OF_A_LAYER = (FROZEN, JLORA, FACTORED, MERGED, QWIX, FULL)
OF_A_MODEL = (FROZEN, JLORA, SPREAD, FULL)


def chips_of(topology: str) -> list[Any]:
    """Returns the chips of a topology; none of them is there."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


# One layer on one chip.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linears(Decoder):
    """A decoder whose attention is elementwise, so that linears are what counts."""

    def mix(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """A product in place of the softmax; as many keys as queries."""
        return jnp.tanh(q) * k + v


def layer_of(d: int, tokens: int) -> Linears:
    """Returns the layer of a width, with the MLP of TinyLlama or Llama."""
    ffn = {2048: 5632, 4096: 11008}.get(d, 11 * d // 4)
    size = {"d": d, "ffn": ffn, "heads": max(d // 128, 1), "kv_heads": max(d // 128, 1)}
    rest = {"layers": 1, "vocab": 8, "batch": 1, "seq": tokens, "scan": False}
    return Linears(**size, **rest, dtype=jnp.bfloat16)


def layer_step(name: str, model: Linears, topology: str) -> tuple[Any, tuple[Any, ...]]:
    """Returns a contender's jitted step, and its arguments as shapes with places."""
    one = NamedSharding(Mesh(np.array(chips_of(topology)[:1]), "chip"), P())
    layer = jax.eval_shape(model.init, abstract_key())["layers"][0]
    x = jax.ShapeDtypeStruct((model.batch, model.seq, model.d), model.dtype)
    args = _layer_arguments(name, model, {"layers": [layer]}, x)
    grads = jax.value_and_grad(args[0], 1 if name == FROZEN else (0, 1))
    return jax.jit(grads), placed(args[1:], one)


def _layer_arguments(name: str, model: Linears, params: Any, x: Any) -> tuple[Any, ...]:
    """Returns the loss of a contender and the shapes of its arguments."""

    def loss(params: Any, x: jax.Array, linears: Any = plain) -> jax.Array:
        y = model.layer(x, params["layers"][0], linears)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    if name in (FROZEN, FULL):
        return loss, params, x
    lora = lora_of(model, fn=loss)
    adapter = jax.eval_shape(lora.init, abstract_key(), params, x)
    if name == JLORA:
        return (lambda a, x, p: lora.apply(p, a, x)), adapter, x, params
    if name == QWIX:
        return _qwix_arguments(model, params, adapter, x)
    linears = {FACTORED: factored, MERGED: merged}[name]
    by_hand = lambda a, x, p: loss(as_layers(a, p), x, linears)
    return by_hand, adapter, x, params


def _qwix_arguments(
    model: Linears, params: Any, adapter: Any, x: Any
) -> tuple[Any, ...]:
    import qwix

    module = LinenLayer(model, plain_dense(model))
    module = qwix.apply_lora_to_model(module, qwix_provider())

    def loss(factors: Any, x: jax.Array, frozen: Any) -> jax.Array:
        y, _ = module.apply({"params": joined(frozen, factors)}, x)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    half = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.dtype)
    factors = linen_factors(jax.tree.map(half, adapter), QWIX_NAMES)["layers_0"]
    return loss, factors, x, linen_layer(params["layers"][0])


# Models on meshes.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts(MixtureOfExperts):
    """Experts by ragged products: each has an equal share of the tokens."""

    def mlp(self, x: jax.Array, layer: Any, linears: Any) -> jax.Array:
        """The experts, on rows in the order of their experts."""
        del linears
        rows = x.reshape(-1, self.d)
        sizes = jnp.full(self.experts, len(rows) // self.experts, jnp.int32)
        dot = lambda x, name: jax.lax.ragged_dot(x, layer[name], sizes)
        y = jax.nn.silu(dot(rows, "gate")) * dot(rows, "up")
        return dot(y, "down").reshape(x.shape)


def model_step(
    name: str, model: Any, topology: str, sizes: dict[str, int]
) -> tuple[Any, tuple[Any, ...]]:
    """Returns a contender's jitted step, and its arguments as shapes with places."""
    mesh = mesh_of(chips_of(topology), sizes)
    rows = rows_of(mesh)
    model = on_mesh(model, mesh) if isinstance(model, Decoder) else model
    *state, params, batch = shapes_of(JLORA if name == SPREAD else name, model)
    batch = placed(batch, rows)
    full = name == FULL
    base = state[0] if full else params
    places = places_of(base, mesh)
    if name == FROZEN:
        (value, inputs), step = state[0], frozen_step(model)
        state = [(placed(value, whole_on(mesh)), placed(inputs, rows))]
    elif full:
        step = trained_step(lambda p, _, batch: model.loss(p, batch))
        state = _with_moments(base, places)
    else:
        loss, own = low_rank_losses(model)[JLORA], jlora.shardings(places, state[0])
        if name == SPREAD:
            loss = functools.partial(_gathered, loss, own)
            own = jlora.shardings(places, state[0], spread=True)
        step = trained_step(loss)
        state = _with_moments(state[0], own)
    params = None if full else placed(params, places)
    args = (*state, params, batch)
    out = where(tuple(state))
    return jitted(step, len(state), out), args


def _gathered(loss: Any, at_use: Any, adapter: jlora.Adapter, *args: Any) -> jax.Array:
    """Returns the loss of spread factors, which are gathered on purpose."""
    return loss(jax.lax.with_sharding_constraint(adapter, at_use), *args)


def _with_moments(trained: Any, places: Any) -> list[Any]:
    """Returns what is trained, and the state of its optimizer, each at its place."""
    moments = jlora.state_shardings(OPTIMIZER, trained, places)
    state = jax.eval_shape(OPTIMIZER.init, trained)
    return [placed(trained, places), placed(state, moments)]

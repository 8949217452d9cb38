"""A training step of a planned model as shapes with places, ready to be compiled."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from placement import EMBEDDINGS, ROWS

import jlora


def model_on(model: nn.Module, mesh: Mesh) -> nn.Module:
    """Returns a model with remat, and activations that stay where their rows are."""
    on = lambda spec: NamedSharding(mesh, spec)
    changes = {"activations": on(ROWS), "embeddings": on(EMBEDDINGS)}
    return type(model)(dataclasses.replace(model.config, remat=True, **changes))


def placed(tree: Any, places: Any) -> Any:
    """Returns the shapes of a tree, each with its place."""
    return jax.tree.map(
        lambda v, place: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place),
        tree,
        places,
    )


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of each token after the first."""
    logits = logits[:, :-1].astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def step_on(
    mesh: Mesh, lora: jlora.Lora, tx: Any, params: Any, tokens: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a jitted step of training an adapter, and its arguments.

    Args:
        mesh: the devices, which need not be there.
        lora: the adapted model.
        tx: an optimizer of optax.
        params: the variables, as shapes with places.
        tokens: the shape of the batch, (rows, length).
    """
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, tokens)
    state = jax.eval_shape(tx.init, adapter)
    factors = jlora.shardings(params, adapter)
    moments = jlora.state_shardings(tx, adapter, factors)

    def step(adapter: Any, state: Any, params: Any, tokens: jax.Array) -> Any:
        loss = lambda a: next_token_loss(lora.apply(params, a, tokens), tokens)
        updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(factors, moments))
    batch = placed(tokens, NamedSharding(mesh, ROWS))
    args = placed(adapter, factors), placed(state, moments), params, batch
    return jitted, args

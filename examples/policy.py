"""The loss and the step of a policy beside its reference, both on one base.

The policy is the base with an adapter and the reference is the base alone: a step calls
both with the same weights, which are an argument of it once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rollouts import Rollout


def make_log_probabilities(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns a function of weights and a rollout: (rows, length, vocabulary)."""

    def log_probabilities(weights: Sequence[Any], rollout: Rollout) -> jax.Array:
        tokens = jnp.concatenate([rollout.prompts, rollout.replies], axis=1)
        (rows, time), length = tokens.shape, rollout.replies.shape[1]
        causal = jnp.tril(jnp.ones((1, time, time), bool))
        real = jnp.arange(time)[None] >= rollout.padding[:, None]
        at = jnp.arange(time - length, time)[None] - 1
        logits = apply(
            *weights,
            tokens,
            mask=causal & real[:, None],
            at=jnp.broadcast_to(at, (rows, length)),
        )
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    return log_probabilities


def make_loss(
    policy: Callable[..., jax.Array],
    reference: Callable[..., jax.Array],
    beta: float,
) -> Callable[..., Any]:
    """Returns `loss(adapter, variables, rollout)`, with KL(policy ‖ reference).

    `policy(variables, adapter, ...)` and `reference(variables, ...)` get the same
    variables. The loss is that of REINFORCE, the mean of -advantage · log p over the
    sampled tokens, plus `beta` times the mean KL there.

    References:
        Williams, Simple Statistical Gradient-Following Algorithms for Connectionist
        Reinforcement Learning, Machine Learning 8, 1992.
    """
    of_policy = make_log_probabilities(policy)
    of_reference = make_log_probabilities(reference)

    def loss(adapter: Any, variables: Any, rollout: Rollout) -> Any:
        new = of_policy((variables, adapter), rollout)
        old = of_reference((variables,), rollout)
        chosen = jnp.take_along_axis(new, rollout.replies[..., None], axis=-1)[..., 0]
        mean = lambda x: jnp.sum(x * rollout.replied) / jnp.sum(rollout.replied)
        divergence = mean(jnp.sum(jnp.exp(new) * (new - old), axis=-1))
        gain = mean(rollout.advantages[:, None] * chosen)
        return beta * divergence - gain, divergence

    return loss


def make_step(
    loss: Callable[..., Any], tx: optax.GradientTransformation
) -> Callable[..., Any]:
    """Returns `step(adapter, state, variables, rollout)`: the first two, and KL."""

    @jax.jit(donate_argnums=(0, 1))
    def step(adapter: Any, state: Any, variables: Any, rollout: Rollout) -> Any:
        grad = jax.grad(loss, has_aux=True)
        grads, divergence = grad(adapter, variables, rollout)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, divergence

    return step

"""The loss of packed chats, its mean over held-out ones, and the training loop."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from chat_data import IGNORED, Batch, Example, all_batches
from pretrained import Pretrained
from progress import progress_bar
from rich.console import Console


def make_loss(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns `loss(adapter, variables, batch)`: per reply token, and their number."""

    def loss(adapter: Any, variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        mask = packed_mask(batch.segments)
        logits = apply(variables, adapter, batch.tokens, mask=mask, at=batch.at)
        wanted = batch.targets != IGNORED
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), jnp.where(wanted, batch.targets, 0)
        )
        count = jnp.sum(wanted)
        return jnp.sum(losses * wanted) / jnp.maximum(count, 1), count

    return loss


def packed_mask(segments: jax.Array) -> jax.Array:
    """Returns the mask (batch, time, keys) under which pairs don't see each other."""
    time = segments.shape[1]
    causal = jnp.tril(jnp.ones((1, time, time), bool))
    return causal & (segments[:, :, None] == segments[:, None, :])


def make_held_out_loss(
    loss: Callable[..., Any],
    base: Pretrained,
    examples: Sequence[Example],
) -> Callable[[Any], float]:
    """Returns a function from an adapter to the loss per held-out reply token."""
    evaluate = jax.jit(loss)
    batches = all_batches(examples)

    def held_out_loss(adapter: Any) -> float:
        found = [evaluate(adapter, base.variables, batch) for batch in batches]
        return float(sum(v * n for v, n in found) / sum(n for _, n in found))

    return held_out_loss


def fit(
    loss: Callable[..., Any],
    adapter: Any,
    variables: Any,
    batches: Iterator[Any],
    steps: int,
    lr: float,
    console: Console,
    *,
    count_tokens: Callable[[Any], Any] = lambda batch: (batch.segments > 0).sum(),
) -> Any:
    """Returns the adapter after `steps` steps of AdamW, with a progress bar."""
    schedule = optax.warmup_cosine_decay_schedule(
        lr / 10, lr, warmup_steps=steps // 10, decay_steps=steps, end_value=lr / 10
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    # The base is an argument, not a constant; what is trained is donated.
    @jax.jit(donate_argnums=(0, 1))
    def step(adapter: Any, state: Any, variables: Any, batch: Any) -> Any:
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, _), grads = grad(adapter, variables, batch)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state = tx.init(adapter)
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=steps)
        for _ in range(steps):
            began, batch = time.perf_counter(), next(batches)
            adapter, state, value = step(adapter, state, variables, batch)
            value = float(value)  # waits for the step
            speed = count_tokens(batch) / (time.perf_counter() - began)
            bar.update(task, advance=1, loss=value, speed=speed)
    return adapter

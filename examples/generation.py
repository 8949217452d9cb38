"""Replies of a chat model, greedy or sampled, from a key-value cache."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from llama import LlamaConfig, empty_cache
from tokenizers import Tokenizer

Generate = Callable[..., jax.Array]


def make_generate(
    apply: Callable[..., Any], config: LlamaConfig, *, stop: int, length: int
) -> Generate:
    """Returns a jitted `generate(weights, tokens, padding, key=None)`.

    `apply(*weights, tokens, mask=, at=, cache=)` is `model.apply` or that of an adapted
    model, and `weights` its arguments before the tokens: arguments here too, never
    constants of the compiled program.

    Args:
        apply: The model.
        config: Its sizes.
        stop: The token that ends a reply.
        length: The number of tokens of a reply at most.

    Returns:
        A function of the weights, prompts (batch, time) padded on the left, the width
        of each prompt's padding, and a random key: with one each token is sampled, and
        without it is the likeliest. It gives the replies (batch, length), filled up
        with `stop`.
    """

    def generate(
        weights: tuple[Any, ...],
        tokens: jax.Array,
        padding: jax.Array,
        key: jax.Array | None = None,
    ) -> jax.Array:
        batch, time = tokens.shape
        keys = jnp.arange(time + length)[None, None]
        real = keys >= padding[:, None, None]  # (batch, 1, keys)

        def visible(positions: jax.Array) -> jax.Array:
            return real & (keys <= positions[None, :, None])

        def step(state: Any) -> Any:
            i, last, reply, cache = state
            mask = visible(time + i[None] - 1)
            logits, cache = apply(*weights, last[:, None], mask=mask, cache=cache)
            token = jnp.where(last == stop, stop, _choose(logits, key, i))
            return i + 1, token, reply.at[:, i].set(token), cache

        def unfinished(state: Any) -> jax.Array:
            i, last, _, _ = state
            return (i < length) & jnp.any(last != stop)

        logits, cache = apply(
            *weights,
            tokens,
            mask=visible(jnp.arange(time)),
            at=jnp.full((batch, 1), time - 1),
            cache=empty_cache(config, batch, time + length),
        )
        first = _choose(logits, key, 0)
        reply = jnp.full((batch, length), stop).at[:, 0].set(first)
        state = (jnp.int32(1), first, reply, cache)
        return lax.while_loop(unfinished, step, state)[2]

    return jax.jit(generate)


def _choose(logits: jax.Array, key: jax.Array | None, i: jax.Array | int) -> jax.Array:
    """Returns token i of each reply: the likeliest one, or with a key a sample."""
    last = logits[:, -1]
    if key is None:
        return jnp.argmax(last, axis=-1).astype(jnp.int32)
    own = jax.random.fold_in(key, i)
    return jax.random.categorical(own, last.astype(jnp.float32)).astype(jnp.int32)


def pad_left(
    tokenizer: Tokenizer, prompts: Sequence[str], time: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens of the prompts, padded on the left, and by how much.

    They are as wide as the longest one, or `time`.
    """
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    time = max(map(len, encoded)) if time is None else time
    padding = np.array([time - len(ids) for ids in encoded])
    tokens = np.array([[0] * (time - len(ids)) + ids for ids in encoded])
    return jnp.asarray(tokens), jnp.asarray(padding)


def replies(
    generate: Generate,
    weights: tuple[Any, ...],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
) -> list[str]:
    """Returns the text that `generate` replies to each of `prompts`."""
    found = generate(weights, *pad_left(tokenizer, prompts))
    return [tokenizer.decode(row).strip() for row in np.asarray(found).tolist()]

"""Prompts and their replies as texts to match: batches, the loss, and recall."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import chat_data
import encoder
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer


class Matches(NamedTuple):
    """Prompts and replies; row i of one belongs to row i of the other."""

    prompts: encoder.Texts
    replies: encoder.Texts


def tokenize(
    tokenizer: Tokenizer, pairs: Sequence[chat_data.Pair], length: int
) -> Matches:
    """Returns the first `length` tokens of both sides of each pair."""
    sides = zip(*pairs, strict=True)
    return Matches(*(encoder.tokenize(tokenizer, side, length) for side in sides))


def different(pairs: Sequence[chat_data.Pair], count: int) -> list[chat_data.Pair]:
    """Returns the first `count` pairs that share neither prompt nor reply.

    The other replies of a batch count as wrong ones, so that none may be the same.
    """
    seen: set[str] = set()
    found = []
    for pair in pairs:
        both = {pair.prompt.casefold(), pair.reply.casefold()}
        if len(found) < count and not both & seen:
            found.append(pair)
            seen |= both
    return found


def batches(
    tokenizer: Tokenizer,
    pairs: Sequence[chat_data.Pair],
    seed: int,
    rows: int,
    length: int,
) -> Iterator[Matches]:
    """Yields `rows` different pairs at a time for ever."""
    order = random.Random(seed)
    while True:
        drawn = different(order.sample(pairs, len(pairs)), rows)
        yield tokenize(tokenizer, drawn, length)


def make_embed(encode: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `embed(variables, texts)`: what is encoded, less `variables["mean"]`.

    A pretrained model gives all texts nearly the same direction; the rest tells them
    apart, and cosines of what is left spread over more of their range.
    """

    def embed(variables: Any, texts: encoder.Texts) -> jax.Array:
        return encode({"params": variables["params"]}, texts) - variables["mean"][None]

    return embed


def mean_of(encode: Callable[..., jax.Array], variables: Any, some: Matches) -> Any:
    """Returns the mean of what is encoded of all texts, prompts and replies."""
    return jnp.concatenate([jax.jit(encode)(variables, side) for side in some]).mean(0)


def make_similarities(embed: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns a function of weights and matches: the cosines, (prompts, replies)."""

    def similarities(weights: Sequence[Any], matches: Matches) -> jax.Array:
        sides = (embed(*weights, side) for side in matches)
        prompts, replies = (
            v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in sides
        )
        return prompts @ replies.T

    return similarities


def make_loss(
    embed: Callable[..., jax.Array], temperature: float
) -> Callable[..., Any]:
    """Returns `loss(adapter, variables, matches)`: per prompt, and their number.

    It is InfoNCE: the cross-entropy of the reply of each prompt among all replies of
    the batch.

    References:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding
        <https://arxiv.org/abs/1807.03748>, 2018.
    """
    similarities = make_similarities(embed)

    def loss(adapter: Any, variables: Any, matches: Matches) -> tuple[jax.Array, int]:
        logits = similarities((variables, adapter), matches) / temperature
        own = jnp.diagonal(jax.nn.log_softmax(logits, axis=1))
        return -own.mean(), len(own)

    return loss


def recall(cosines: Any, nearest: int = 1) -> float:
    """Returns the share of the prompts whose own reply is among the nearest ones."""
    order = np.argsort(-np.asarray(cosines), axis=1)[:, :nearest]
    return float((order == np.arange(len(order))[:, None]).any(axis=1).mean())

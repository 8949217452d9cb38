"""A pretrained encoder with a new head, and its loss and accuracy on tweets."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import encoder
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pretrained
import sentiment_data

EVALUATED = 50  # rows of a batch that is only predicted


class Batch(NamedTuple):
    """Texts and the index of the label of each."""

    texts: encoder.Texts
    labels: np.ndarray


class Task(NamedTuple):
    """What all methods start from; `predict(variables, texts)` gives logits."""

    predict: Callable[..., jax.Array]
    variables: Any
    as_batch: Callable[[Sequence[sentiment_data.Tweet]], Batch]
    train: Sequence[sentiment_data.Tweet]
    held_out: Sequence[sentiment_data.Tweet]


def make_task(
    args: argparse.Namespace, base: pretrained.Pretrained | None = None
) -> Task:
    """Returns the encoder with a new head and new biases, and the tweets.

    Args:
        args: the options.
        base: the language model; by default that of `--model`.
    """
    tweets = sentiment_data.load_tweets()
    train, held_out = sentiment_data.split(tweets, args.seed, args.held_out)
    if args.rows > len(train):
        raise ValueError(f"`--rows` {args.rows} is more than {len(train)} tweets")
    base = encoder.first_layers(base or pretrained.load(args.model), args.layers)

    def as_batch(some: Sequence[sentiment_data.Tweet]) -> Batch:
        words, labels = zip(*some, strict=True)
        texts = encoder.tokenize(base.tokenizer, words, args.length)
        return Batch(texts, np.array(labels))

    encode = jax.jit(encoder.make_encode(base.model))
    features = encode(base.variables, as_batch(train[:EVALUATED]).texts)
    labels = len(sentiment_data.LABELS)
    variables = {
        "params": encoder.new_biases(base.variables["params"]),
        "scaler": {"mean": features.mean(0), "std": features.std(0)},
        "head": {
            "kernel": jnp.zeros((base.model.config.hidden, labels)),
            "bias": jnp.zeros(labels),
        },
    }
    predict = make_predict(encoder.with_biases(encoder.make_encode(base.model)))
    return Task(predict, variables, as_batch, train, held_out)


def make_predict(encode: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `predict(variables, texts)`: the logits of the head on the encoder.

    Features are standardized as those of the base are: a few of them are a hundred
    times as large as the others, and a linear head would be slow to learn from these.
    """

    def predict(variables: Any, texts: encoder.Texts) -> jax.Array:
        head, scaler = variables["head"], variables["scaler"]
        features = encode({"params": variables["params"]}, texts)
        features = (features - scaler["mean"][None]) / (scaler["std"][None] + 1e-6)
        return features @ head["kernel"] + head["bias"][None]

    return predict


def make_loss(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Returns `loss(adapter, variables, batch)`: per text, and their number."""

    def loss(adapter: Any, variables: Any, batch: Batch) -> tuple[jax.Array, int]:
        logits = apply(variables, adapter, batch.texts)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean(), len(batch.labels)

    return loss


def held_out_accuracy(
    apply: Callable[..., jax.Array], task: Task, adapter: Any
) -> float:
    """Returns the share of the held-out tweets whose label is predicted."""
    best = jax.jit(lambda *inputs: jnp.argmax(apply(*inputs), axis=1))
    right = []
    for i in range(0, len(task.held_out), EVALUATED):
        batch = task.as_batch(task.held_out[i : i + EVALUATED])
        right.extend(best(task.variables, adapter, batch.texts) == batch.labels)
    return float(np.mean(right))


def timed(batches: Iterator[Any], moments: list[float]) -> Iterator[Any]:
    """Yields the batches and notes when each was asked for."""
    for batch in batches:
        moments.append(time.perf_counter())
        yield batch

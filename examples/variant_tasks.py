"""For compare_variants.py: replies of a language model, and the sentiment of tweets.

By default the base is the one of the notebooks, which is pretrained in seconds; with
`--smollm2` it is SmolLM2-135M-Instruct, and an encoder of its first layers.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chat_data
import classification
import jax
import jax.numpy as jnp
import pretrained
import sentiment_data
import small_base
import training
from pretrained import Pretrained

import jlora

HELD_OUT = 200  # tweets, or pairs of a prompt and a reply, to measure the loss on


class Task(NamedTuple):
    """What is trained, of which model and on what."""

    name: str
    apply: Callable[..., Any]
    example: tuple[Any, ...]  # the params and an input
    target: str
    besides: tuple[jlora.LoraConfig, ...]  # what every variant trains
    make_loss: Callable[..., Any]  # from an `apply` to `loss(adapter, params, batch)`
    batches: Callable[[int], Iterator[Any]]  # of a seed
    held_out: list[Any]  # batches

    def held_out_loss(self, loss: Callable[..., Any], adapter: Any) -> float:
        """Returns the mean over what is held out; `loss` is compiled."""
        found = [loss(adapter, self.example[0], batch) for batch in self.held_out]
        return float(sum(v * n for v, n in found) / sum(n for _, n in found))


def load_base(args: argparse.Namespace) -> tuple[Pretrained, Any]:
    """Returns the language model, and examples that it has not seen.

    Raises:
        ValueError: if rows are shorter than the examples of the small base.
    """
    if args.smollm2:
        base = pretrained.load()
        data = chat_data.load_examples(base.tokenizer, seed=0, length=args.length)
        return base, data
    if args.length < small_base.LENGTH:
        raise ValueError(f"`--length` must be at least {small_base.LENGTH}")
    tokenizer, data = small_base.load_data(("english", "spanish"))
    base = small_base.pretrain(tokenizer, data["english"], steps=args.pretrain)
    return base, data["spanish"]


def replies(base: Pretrained, data: Any, args: argparse.Namespace) -> Task:
    """Returns the task of replying in another language, or tone, than it knows."""
    train, held_out = data
    return Task(
        "language model",
        base.model.apply,
        (base.variables, jnp.zeros((1, 8), jnp.int32)),
        "kernel",
        (),
        training.make_loss,
        lambda seed: chat_data.training_batches(train, seed, args.rows, args.length),
        chat_data.all_batches(held_out[:HELD_OUT], args.rows, args.length),
    )


def sentiment(base: Pretrained, args: argparse.Namespace) -> Task:
    """Returns the task of telling negative tweets from positive ones."""
    options = argparse.Namespace(
        seed=0,
        held_out=HELD_OUT,
        rows=args.rows,
        layers=min(args.layers, base.model.config.layers),
        length=min(args.length, 32),
    )
    task = classification.make_task(options, base)
    rows = classification.EVALUATED
    return Task(
        "sentiment",
        task.predict,
        (task.variables, task.as_batch(task.train[: args.rows]).texts),
        "params/.*kernel",
        (jlora.LoraConfig("head/(kernel|bias)", full=True),),
        classification.make_loss,
        lambda seed: map(
            task.as_batch, sentiment_data.batches(task.train, seed, args.rows)
        ),
        [task.as_batch(some) for some in _batched(task.held_out, rows)],
    )


def _batched(values: Any, size: int) -> Iterator[Any]:
    for i in range(0, len(values), size):
        yield values[i : i + size]


def whole_bytes(tree: Any) -> int:
    """Returns the bytes of the arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

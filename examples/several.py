"""Several adapters trained at once on one frozen base: what sweep.py and rank_study.py
share. One vmapped step trains them all, and each base kernel enters one product for all
of them."""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora

try:
    import chat_data
    import pretrained
    import training
    from progress import progress_bar
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

SCALING = 2.0  # the same for all ranks, so that the factors of all train alike
HELD_OUT_ROWS = 8


class Run(NamedTuple):
    """What one adapter is trained with; the seed is that of factors and data."""

    rank: int
    rate: float
    seed: int


def make_parser(description: str, *, steps: int) -> argparse.ArgumentParser:
    """Returns a parser of the options that both scripts have."""
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=steps, help="training steps")
    add("--length", type=int, default=48, help="tokens of a row; a step has one each")
    add("--seed", type=int, default=0, help="seed of the split and the first adapter")
    add("--target", help="regex of the kernels to adapt; every linear by default")
    add("--model", help="GGUF file, safetensors folder or hub id; SmolLM2 by default")
    return parser


class Study:
    """A base, its data (train, held out) and one stacked adapter for several runs.

    Base and data are those of the options, unless they are given.
    """

    def __init__(
        self, args: Any, runs: Sequence[Run], *, base: Any = None, data: Any = None
    ) -> None:
        self.base = base = base or pretrained.load(args.model)
        self.runs, self.length = runs, args.length
        data = data or chat_data.load_examples(base.tokenizer, args.seed, args.length)
        self.train, held_out = data
        if not all(data):
            raise ValueError(f"`--length` {args.length} is too short for the pairs")
        rows = chat_data.all_batches(held_out, HELD_OUT_ROWS, args.length)
        self.held_out = rows[0]
        example = jnp.zeros((1, 8), jnp.int32)

        def lora_of(rank: int) -> jlora.Lora:
            config = jlora.LoraConfig(args.target, rank=rank, alpha=SCALING * rank)
            return jlora.lora(base.model.apply, config)

        fresh = [
            lora_of(run.rank).init(jax.random.key(run.seed), base.variables, example)
            for run in runs
        ]
        self.adapters = jlora.stack(fresh)
        self.sizes = [sum(v.size for v in jax.tree.leaves(one)) for one in fresh]
        # Which adapter it is given decides its rank: one `lora` serves them all.
        self.loss = training.make_loss(lora_of(1).apply)
        schedule = optax.warmup_cosine_decay_schedule(
            0.1, 1.0, args.steps // 10, args.steps, 0.1
        )
        self.tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def step(
        self, adapter: Any, state: Any, rate: Any, variables: Any, batch: Any
    ) -> tuple[Any, Any, jax.Array]:
        """One step of one adapter."""
        grad = jax.value_and_grad(self.loss, has_aux=True)
        (value, _), grads = grad(adapter, variables, batch)
        updates, state = self.tx.update(grads, state, adapter)
        updates = jax.tree.map(lambda update: rate * update, updates)
        return optax.apply_updates(adapter, updates), state, value

    def start(self) -> tuple[Any, Any, jax.Array]:
        """Returns what a step of all takes before the base: adapters, state, rates."""
        state = jax.vmap(self.tx.init)(self.adapters)
        return self.adapters, state, jnp.asarray([run.rate for run in self.runs])

    def compiled(self, step: Callable[..., Any], *state: Any) -> Callable[..., Any]:
        """Returns a step, compiled for the base and a state (adapter, ..., batch)."""
        *before, batch = state
        return jax.jit(step).lower(*before, self.base.variables, batch).compile()

    @functools.cached_property
    def step_of_all(self) -> Callable[..., Any]:
        """The step of all adapters at once, compiled."""
        together = jax.vmap(self.step, in_axes=(0, 0, 0, None, 0))
        return self.compiled(together, *self.start(), next(self.batches()))

    def batches(self) -> Iterator[chat_data.Batch]:
        """Yields batches for ever, a row for each adapter, in the order of its seed."""
        each = [
            chat_data.training_batches(self.train, run.seed, 1, self.length)
            for run in self.runs
        ]
        for rows in zip(*each, strict=True):
            yield jax.tree.map(lambda *row: np.stack(row), *rows)

    def fit(self, steps: int, console: Console) -> tuple[Any, np.ndarray]:
        """Returns the trained adapters, and their losses of every step."""
        program, data = self.step_of_all, self.batches()
        adapters, state, rates = self.start()
        losses = []
        with progress_bar(console) as bar:
            name = f"training {len(self.runs)} adapters"
            task = bar.add_task(name, total=steps)
            for batch in itertools.islice(data, steps):
                began = time.perf_counter()
                adapters, state, values = program(
                    adapters, state, rates, self.base.variables, batch
                )
                losses.append(np.asarray(values))  # waits for the step
                speed = (batch.segments > 0).sum() / (time.perf_counter() - began)
                bar.update(task, advance=1, loss=losses[-1].mean(), speed=speed)
        return adapters, np.stack(losses, axis=1)

    def held_out_losses(self) -> Callable[[Any], np.ndarray]:
        """Returns a function from stacked adapters to their held-out losses."""
        evaluate = jax.jit(jax.vmap(self.loss, in_axes=(0, None, None)))
        return lambda adapters: np.asarray(
            evaluate(adapters, self.base.variables, self.held_out)[0]
        )

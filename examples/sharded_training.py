"""The training of an adapter on a mesh: how it starts, its step, and its loop."""

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import placement
import saving
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from progress import progress_bar
from rich.console import Console
from sources import Source

import jlora


class Trained(NamedTuple):
    """What a step changes; or, in the same structure, the shardings of that."""

    adapter: Any
    state: Any


class Run(NamedTuple):
    """A run that is ready to go on after `begin` steps."""

    mesh: Mesh
    source: Source
    loss: Callable[..., Any]
    tx: optax.GradientTransformation
    placed: Trained
    trained: Trained
    begin: int
    history: saving.History
    checkpoints: saving.Checkpoints


def optimizer(lr: float) -> optax.GradientTransformation:
    """Returns AdamW; its rate ignores `--steps`, which a resumed run may raise."""
    rate = optax.warmup_constant_schedule(lr / 5, lr, warmup_steps=5)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))


def start(
    lora: jlora.Lora, tx: optax.GradientTransformation, variables: Any, args: Namespace
) -> tuple[Trained, Trained]:
    """Returns a new adapter and its state, made where they live, and where that is."""
    inputs = (
        jax.random.key(args.seed),
        variables,
        jnp.zeros((args.batch, args.length), jnp.int32),
    )
    abstract = jax.eval_shape(lora.init, *inputs)
    factors = jlora.shardings(variables, abstract, replicate=args.replicate)
    adapter = jax.jit(lora.init, out_shardings=factors)(*inputs)
    moments = jlora.state_shardings(tx, abstract, factors)
    state = jax.jit(tx.init, out_shardings=moments)(adapter)
    return Trained(adapter, state), Trained(factors, moments)


def make_step(run: Run) -> Callable[..., Any]:
    """Returns `step(trained, variables, batch)`: what comes after it, and the loss."""

    def step(trained: Trained, variables: Any, batch: Any) -> tuple[Trained, Any]:
        grad = jax.value_and_grad(run.loss, has_aux=True)
        (value, _), grads = grad(trained.adapter, variables, batch)
        updates, state = run.tx.update(grads, trained.state, trained.adapter)
        return Trained(optax.apply_updates(trained.adapter, updates), state), value

    # The base is an argument, not a constant; what is trained is donated.
    base, rows, whole = input_shardings(run)
    return jax.jit(
        step,
        in_shardings=(run.placed, base, rows),
        out_shardings=(run.placed, whole),
        donate_argnums=0,
    )


def make_held_out_loss(run: Run) -> Callable[[Any], float]:
    """Returns a function from an adapter to the loss per held-out target."""
    base, rows, whole = input_shardings(run)
    evaluate = jax.jit(
        run.loss,
        in_shardings=(run.placed.adapter, base, rows),
        out_shardings=(whole, whole),
    )
    batches = [placement.put_batch(batch, run.mesh) for batch in run.source.held_out]

    def held_out_loss(adapter: Any) -> float:
        found = [evaluate(adapter, run.source.variables, batch) for batch in batches]
        return float(sum(v * n for v, n in found) / sum(n for _, n in found))

    return held_out_loss


def input_shardings(run: Run) -> tuple[Any, NamedSharding, NamedSharding]:
    """Returns the shardings of the base, of a batch, and of what is whole."""
    base = jax.tree.map(lambda v: v.sharding, run.source.variables)
    return base, placement.rows(run.mesh), NamedSharding(run.mesh, P())


def fit(args: Namespace, run: Run, console: Console) -> list[tuple[int, float]]:
    """Takes the steps that are left; returns the tokens and the seconds of each.

    The losses go into `run.history`. After each evaluation a checkpoint is written.
    """
    step, held_out_loss = make_step(run), make_held_out_loss(run)
    trained, history = run.trained, run.history
    if not history["evals"]:
        history["evals"].append([0, held_out_loss(trained.adapter)])
    batches, timings = run.source.batches(run.begin), []
    with progress_bar(console) as bar:
        task = bar.add_task("training", total=args.steps, completed=run.begin)
        for number in range(run.begin + 1, args.steps + 1):
            began, batch = time.perf_counter(), next(batches)
            placed = placement.put_batch(batch, run.mesh)
            trained, value = step(trained, run.source.variables, placed)
            history["losses"].append(float(value))  # waits for the step
            count, seconds = run.source.count(batch), time.perf_counter() - began
            timings.append((count, seconds))
            bar.update(task, advance=1, loss=float(value), speed=count / seconds)
            if number % args.eval_every == 0 or number == args.steps:
                history["evals"].append([number, held_out_loss(trained.adapter)])
                saving.save(run.checkpoints, number, trained._asdict(), history)
    return timings

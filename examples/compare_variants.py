"""Compares the variants of LoRA that jlora has, at about as many trained values.

Two tasks: a language model learns replies in another language than its own, and an
encoder the sentiment of tweets. Each variant gets the rank at which it trains what LoRA
does, several learning rates and several seeds; of the rates the one with the lowest
training loss counts. The table has the held-out loss, the seconds of a step, the bytes
of the adapter, and what XLA says that a step needs besides the base. On a CPU it takes
some minutes; with `--smollm2` the base is SmolLM2-135M-Instruct, and it takes hours.
The packages are those of requirements-finetune.txt.

    python examples/compare_variants.py --variants lora dora loha --steps 20 --seeds 3
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

try:
    import parsing
    import progress
    import variant_budget
    import variant_tasks
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from variant_budget import Entrant
    from variant_tasks import Task
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

console = Console(soft_wrap=True, highlight=False)


class Result(NamedTuple):
    """What came out of a variant: its losses have one value for each seed."""

    entrant: Entrant
    rate: float
    training: np.ndarray
    held_out: np.ndarray
    seconds: float  # of a step, the median
    adapter_bytes: int
    step_bytes: int  # beside its arguments


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = parsing.new_parser(__doc__)
    add = parser.add_argument
    add("--variants", nargs="+", help="which ones; all by default")
    add("--steps", type=int, default=30, help="training steps of each run")
    add("--seeds", type=int, default=2, help="runs at each learning rate")
    add("--rates", type=float, nargs="+", default=[3e-3, 1e-2], help="of Adam")
    add("--rank", type=int, default=4, help="rank of LoRA, which sets the budget")
    add("--rows", type=int, default=8, help="rows of a batch")
    add("--length", type=int, default=64, help="tokens of a row")
    add("--layers", type=int, default=6, help="layers of the encoder, at most")
    add("--pretrain", type=int, default=200, help="steps that make the small base")
    add("--smollm2", action="store_true", help="SmolLM2 in place of the small base")
    add("--plot", type=Path, default=Path("runs/compare_variants.png"), help="picture")
    args = parser.parse_args(argv)
    names = ("steps", "seeds", "rank", "rows", "length", "layers", "pretrain")
    parsing.at_least_one(parser, args, *names)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit code."""
    began, args = time.perf_counter(), parse_args(argv)
    try:
        variants = variant_budget.names_among(args.variants)
        base, data = variant_tasks.load_base(args)
        tasks = [variant_tasks.replies(base, data, args)]
        tasks.append(variant_tasks.sentiment(base, args))
        lora = {"variant": "lora"}
        budgets = {
            task.name: variant_budget.enter(task, "lora", lora, None, args.rank).trained
            for task in tasks
        }
    except (ImportError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    results: dict[str, list[Result]] = {task.name: [] for task in tasks}
    total = len(tasks) * len(variants) * args.seeds * len(args.rates) * args.steps
    with progress.progress_bar(console, "loss {task.fields[loss]:.3f}") as bar:
        shown = bar.add_task("", total=total)

        def report(name: str, value: float) -> None:
            bar.update(shown, description=name, advance=1, loss=value)

        for task in tasks:
            for name, settings in variants.items():
                budget = budgets[task.name]
                try:
                    one = variant_budget.enter(task, name, settings, budget, args.rank)
                except ValueError as error:
                    told = str(error).partition("\n")[0]
                    console.print(f"{task.name}: no {name}: {told}", markup=False)
                    continue
                results[task.name].append(run(task, one, args, report))
    for task in tasks:
        console.print(table_of(task, budgets[task.name], results[task.name]))
    console.print(f"plot written to {plot(args.plot, results)}")
    console.print(f"wall time {time.perf_counter() - began:.0f} s")
    return 0


def run(
    task: Task,
    entrant: Entrant,
    args: argparse.Namespace,
    report: Callable[[str, float], None],
) -> Result:
    """Trains a variant at each rate with each seed, by one compiled step."""
    loss, tx = task.make_loss(entrant.lora.apply), optax.scale_by_adam()
    evaluate, params = jax.jit(loss), task.example[0]

    def step(adapter: Any, state: Any, rate: Any, params: Any, batch: Any) -> Any:
        grad = jax.value_and_grad(loss, has_aux=True)
        (value, _), grads = grad(adapter, params, batch)
        updates, state = tx.update(grads, state, adapter)
        moved = jax.tree.map(
            lambda v, u: v - rate.astype(v.dtype) * u, adapter, updates
        )
        return moved, state, value

    def first(seed: int) -> Any:
        return entrant.lora.init(jax.random.key(seed), *task.example)

    adapter, batch = first(0), next(task.batches(0))
    arguments = (adapter, tx.init(adapter), jnp.float32(0), params, batch)
    compiled = jax.jit(step).lower(*arguments).compile()
    moments, losses, after = [], {}, {}
    for rate in args.rates:
        losses[rate], after[rate] = [], []
        for seed in range(args.seeds):
            adapter = first(seed)
            state, batches, values = tx.init(adapter), task.batches(seed), []
            for _ in range(args.steps):
                batch, started = next(batches), time.perf_counter()
                adapter, state, value = compiled(
                    adapter, state, jnp.float32(rate), params, batch
                )
                values.append(float(value))  # waits for the step
                moments.append(time.perf_counter() - started)
                report(f"{task.name}, {entrant.name}", values[-1])
            losses[rate].append(np.mean(values[-5:]))
            after[rate].append(task.held_out_loss(evaluate, adapter))
    best = min(
        args.rates, key=lambda rate: np.nan_to_num(np.mean(losses[rate]), nan=1e9)
    )
    needs: Any = compiled.memory_analysis()
    return Result(
        entrant,
        best,
        np.array(losses[best]),
        np.array(after[best]),
        float(np.median(moments)),
        variant_tasks.whole_bytes(adapter),
        needs.temp_size_in_bytes + needs.output_size_in_bytes,
    )


def table_of(task: Task, budget: int, results: Sequence[Result]) -> Table:
    """Returns the results of a task, the lowest held-out loss first."""
    names = ("variant", "rank", "trained", "rate", "training", "held out")
    table = Table(*names, "ms", "kB", "MB", box=box.SIMPLE, title=task.name)
    table.caption = (
        f"budget {budget:,} trained values; ms and MB of a step, kB of the adapter"
    )
    spread = lambda v: f"{v.mean():.3f}±{v.std():.3f}"
    for one in sorted(results, key=lambda one: one.held_out.mean()):
        entrant = one.entrant
        table.add_row(
            entrant.name,
            str(entrant.rank),
            f"{entrant.trained:,}",
            f"{one.rate:g}",
            spread(one.training),
            spread(one.held_out),
            f"{one.seconds * 1e3:.1f}",
            f"{one.adapter_bytes / 1e3:.1f}",
            f"{one.step_bytes / 1e6:.1f}",
        )
    return table


def plot(path: Path, results: dict[str, list[Result]]) -> Path:
    """Draws the held-out losses of each task and returns the path of the picture."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(results), figsize=(5 * len(results), 4), layout="constrained"
    )
    for axes, (name, found) in zip(np.ravel(panels), results.items(), strict=True):
        for one in found:
            y = one.held_out.mean()
            axes.errorbar(one.seconds * 1e3, y, yerr=one.held_out.std(), fmt="o")
            axes.annotate(one.entrant.name, (one.seconds * 1e3, y))
        axes.set_xlabel("a step, ms")
        axes.set_ylabel("held-out loss")
        axes.set_title(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())

"""Compares LoRA with full fine-tuning and with biases alone on a classification task.

The start is the first layers of SmolLM2-135M as an encoder, with a new linear head on
the mean of their outputs; the texts are tweets, positive or negative, both from PyPI
(requirements-finetune.txt). Every method trains the head, and something besides, from
the same start for as many steps on the same batches. The script prints the plan of
LoRA, and for each method what the paper's table of GLUE has: how many values are
trained and the held-out accuracy. On a CPU it takes about two minutes.

    python examples/classify_text.py --steps 20 --layers 4 --methods lora bias
"""

import argparse
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jlora

try:
    import classification
    import parsing
    import sentiment_data
    import training
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")

RATES = {"head": 3e-3, "bias": 3e-3, "lora": 2e-3, "full": 1e-4}  # peak, of each method
console = Console(soft_wrap=True, highlight=False)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = parsing.new_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=40, help="training steps of each method")
    add("--layers", type=int, default=6, help="layers of the encoder")
    add("--rank", type=int, default=8, help="rank of the factors")
    add(
        "--target", default="(q|v)_proj/kernel", help="regex of the kernels LoRA adapts"
    )
    add("--methods", nargs="+", choices=RATES, default=list(RATES), help="which ones")
    add("--rows", type=int, default=16, help="tweets of a training batch")
    add("--length", type=int, default=32, help="tokens of a tweet")
    add("--held-out", type=int, default=400, help="tweets to measure the accuracy on")
    add("--seed", type=int, default=0, help="seed of split, order, head and factors")
    add("--model", help="GGUF file, safetensors folder or hub id; SmolLM2 by default")
    args = parser.parse_args(argv)
    parsing.at_least_one(
        parser, args, "steps", "layers", "rank", "rows", "length", "held_out"
    )
    return args


def configs_of(method: str, args: argparse.Namespace) -> list[jlora.LoraConfig]:
    """Returns what a method trains: the head, which is new, and what else."""
    whole = lambda target, **but: jlora.LoraConfig(target, full=True, **but)
    head = whole("head/(kernel|bias)")
    lora = jlora.LoraConfig(args.target, rank=args.rank, alpha=2.0 * args.rank)
    of = {
        "head": [head],
        "bias": [head, whole("bias")],
        "lora": [head, lora],
        "full": [whole(["params/.*", "head/.*"])],
    }
    return of[method]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit code."""
    began = time.perf_counter()
    args = parse_args(argv)
    try:
        task = classification.make_task(args)
        example = task.as_batch(task.train[: args.rows]).texts
        loras = {
            method: jlora.lora(task.predict, configs_of(method, args))
            for method in args.methods
        }
        plans = {m: lora.plan(task.variables, example) for m, lora in loras.items()}
    except (ImportError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(str(plans.get("lora", "")), markup=False)
    console.print(
        f"{len(task.train)} tweets to train on, {len(task.held_out)} held out"
    )
    table = Table("method", "trained", "share", "held-out accuracy", "s/step")
    for method, lora in loras.items():
        console.print(f"training {method}", markup=False)
        accuracy, seconds = train(task, lora, RATES[method], args)
        trained, total = plans[method].trainable, plans[method].total
        cells = f"{trained:,}", f"{trained / total:.3%}", f"{accuracy:.3f}"
        table.add_row(method, *cells, f"{seconds:.2f}")
    console.print(table)
    console.print(f"wall time {time.perf_counter() - began:.0f} s")
    return 0


def train(
    task: classification.Task, lora: jlora.Lora, rate: float, args: argparse.Namespace
) -> tuple[float, float]:
    """Returns the held-out accuracy of a method, and its seconds per step."""
    tweets = sentiment_data.batches(task.train, args.seed, args.rows)
    moments: list[float] = []
    batches = classification.timed(map(task.as_batch, tweets), moments)
    example = next(batches).texts
    adapter = lora.init(jax.random.key(args.seed), task.variables, example)
    adapter = jax.tree.map(jnp.copy, adapter)  # each step donates what it was given
    adapter = training.fit(
        classification.make_loss(lora.apply),
        adapter,
        task.variables,
        batches,
        args.steps,
        rate,
        console,
        count_tokens=lambda batch: batch.texts.real.sum(),
    )
    moments.append(time.perf_counter())
    accuracy = classification.held_out_accuracy(lora.apply, task, adapter)
    # The first step compiles.
    return accuracy, float(np.median(np.diff(moments[2:] or moments)))


if __name__ == "__main__":
    sys.exit(main())

"""Trains eight adapters at once on one frozen base: seeds × learning rates × ranks.

The base is SmolLM2-135M-Instruct and the data the prompts and replies of
finetune_chat.py, both from PyPI (requirements-finetune.txt); on a CPU it takes less
than two minutes. Each base kernel enters one product for all adapters, so that it is
read once for all of them: at the end the script measures a step of all against as many
steps of one, turn by turn. It prints the losses of each adapter, best first.

    python examples/sweep.py --adapters 4 --steps 20 --ranks 2 16 --rates 1e-3 4e-3
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import several
from rich.console import Console
from rich.table import Table

console = Console(soft_wrap=True, highlight=False)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = several.make_parser(str(__doc__), steps=16)
    add = parser.add_argument
    add("--adapters", type=int, default=8, help="how many; seeds go up to make so many")
    add("--ranks", type=int, nargs="+", default=[2, 8], help="ranks to try")
    add("--rates", type=float, nargs="+", default=[1e-3, 5e-3], help="learning rates")
    add("--rounds", type=int, default=2, help="of the comparison with separate runs")
    args = parser.parse_args(argv)
    if min(args.steps, args.adapters, args.length, args.rounds, *args.ranks) < 1:
        parser.error("steps, adapters, length, rounds and ranks must be at least 1")
    return args


def runs_of(args: argparse.Namespace) -> list[several.Run]:
    """Returns the first runs of the grid; seeds change last."""
    pairs = [(rank, rate) for rate in args.rates for rank in args.ranks]
    seed = lambda i: args.seed + i // len(pairs)
    return [several.Run(*pairs[i % len(pairs)], seed(i)) for i in range(args.adapters)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the sweep and returns the exit code."""
    began = time.perf_counter()
    args = parse_args(argv)
    try:
        study = several.Study(args, runs_of(args))
    except (ImportError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    held_out = study.held_out_losses()
    before = float(held_out(study.adapters)[0])  # of all: b is zero
    console.print(f"{len(study.runs)} adapters, held-out loss of the base {before:.3f}")
    adapters, losses = study.fit(args.steps, console)
    after = held_out(adapters)
    console.print(table_of(study, losses, after))
    best = int(np.argmin(after))
    console.print(f"the best is adapter {best}: {study.runs[best]}", markup=False)

    together, apart = speeds(study, args.rounds)
    console.print(f"at once {together:.0f} tokens/s, one by one {apart:.0f} tokens/s:")
    console.print(f"{together / apart:.1f} times as fast")
    console.print(f"wall time {time.perf_counter() - began:.0f} s")
    return 0 if after.min() < before else 1


def table_of(study: several.Study, losses: np.ndarray, after: np.ndarray) -> Table:
    """Returns the losses of each adapter, the best first."""
    names = (
        "adapter",
        "rank",
        "rate",
        "seed",
        "weights",
        "first loss",
        "last",
        "held out",
    )
    table = Table(*names)
    for i in np.argsort(after):
        run = study.runs[i]
        cells = [i, run.rank, f"{run.rate:g}", run.seed, f"{study.sizes[i]:,}"]
        cells += [f"{v:.3f}" for v in (losses[i, 0], losses[i, -5:].mean(), after[i])]
        table.add_row(*map(str, cells))
    return table


def speeds(study: several.Study, rounds: int) -> tuple[float, float]:
    """Returns tokens per second at once and one by one, measured turn by turn.

    The separate runs have the padded ranks too, which spares compiling for each.
    """
    batch = next(study.batches())
    state_of_all = (*study.start(), batch)
    apart = [
        jax.tree.map(lambda v, i=i: v[i], state_of_all) for i in range(len(study.runs))
    ]
    one_step = study.compiled(study.step, *apart[0])

    def take(program: Callable[..., Any], states: list[Any]) -> Any:
        weights = study.base.variables
        return [program(*state[:-1], weights, state[-1]) for state in states]

    contenders = [(study.step_of_all, [state_of_all]), (one_step, apart)]
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for i, contender in enumerate(contenders):
            began = time.perf_counter()
            jax.block_until_ready(take(*contender))
            if turn:  # the first one warms up
                seconds[i].append(time.perf_counter() - began)
    tokens = int((batch.segments > 0).sum())
    together, one_by_one = (tokens / float(np.median(s)) for s in seconds)
    return together, one_by_one


if __name__ == "__main__":
    sys.exit(main())

"""Trains adapters of several ranks at once and plots their loss against the rank.

`jlora.stack` pads the ranks with zeros, which stay zero, so that one vmapped step
trains them all, on the same batches from the same seed. The base is
SmolLM2-135M-Instruct and the data the prompts and replies of finetune_chat.py, both
from PyPI (requirements-finetune.txt). On a CPU it takes a minute or two.

    python examples/rank_study.py --ranks 1 4 16 64 --rate 1e-3 --plot ranks.png
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import several
from rich.console import Console
from rich.table import Table

import jlora

console = Console(soft_wrap=True, highlight=False)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = several.make_parser(str(__doc__), steps=15)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="ranks")
    add("--rate", type=float, default=2e-3, help="peak learning rate of all")
    add("--plot", type=Path, default=Path("runs/rank_study.png"), help="the picture")
    args = parser.parse_args(argv)
    if min(args.steps, args.length, *args.ranks) < 1:
        parser.error("steps, length and ranks must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the study and returns the exit code."""
    began = time.perf_counter()
    args = parse_args(argv)
    ranks = sorted(set(args.ranks))
    runs = [several.Run(rank, args.rate, args.seed) for rank in ranks]
    try:
        study = several.Study(args, runs)
    except (ImportError, OSError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    held_out = study.held_out_losses()
    before = float(held_out(study.adapters)[0])  # of all: b is zero
    adapters, losses = study.fit(args.steps, console)
    trained, after = losses[:, -5:].mean(axis=1), held_out(adapters)
    table = Table("rank", "weights", "training loss", "held-out loss")
    table.add_row("none", "0", f"{losses[0, 0]:.3f}", f"{before:.3f}")
    for i, rank in enumerate(ranks):
        numbers = f"{trained[i]:.3f}", f"{after[i]:.3f}"
        table.add_row(str(rank), f"{study.sizes[i]:,}", *numbers)
    console.print(table)
    trimmed = jlora.unstack(adapters, trim=True)  # as large as they began
    kept = [max(entry.rank for entry in one.values()) for one in trimmed]
    console.print(f"the padding stayed zero: {'yes' if kept == ranks else 'NO'}")
    console.print(f"plot written to {plot(args.plot, ranks, trained, after, before)}")
    console.print(f"wall time {time.perf_counter() - began:.0f} s")
    return 0 if kept == ranks and after.min() < before else 1


def plot(
    path: Path, ranks: list[int], trained: np.ndarray, after: np.ndarray, before: float
) -> Path:
    """Draws the losses against the rank and returns the path of the picture."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(ranks, trained, "o-", label="training, last five steps")
    axes.plot(ranks, after, "s-", label="held out")
    axes.axhline(before, color="gray", linestyle=":", label="held out, base alone")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set_xlabel("rank")
    axes.set_ylabel("loss per reply token")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


if __name__ == "__main__":
    sys.exit(main())

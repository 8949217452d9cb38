"""What the training scripts show while they run, and what they say of it at the end."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

LOSS_AND_SPEED = "loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s"


def progress_bar(console: Console, fields: str = LOSS_AND_SPEED) -> Progress:
    """Returns a progress bar with the loss and the speed, or with other fields."""
    return Progress(
        TextColumn("{task.description} {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn(fields),
        TimeElapsedColumn(),
        console=console,
    )


@contextlib.contextmanager
def reporting(
    name: str, steps: int, unit: str, console: Console
) -> Iterator[Callable[[float, int], None]]:
    """Shows the bar of one run; the value is called after each step.

    It takes the loss and how many of the unit the step was about.
    """
    with progress_bar(console, LOSS_AND_SPEED.replace("tokens", unit)) as bar:
        task = bar.add_task(name, total=steps, loss=float("nan"), speed=0.0)
        began = time.perf_counter()

        def report(loss: float, count: int) -> None:
            nonlocal began
            now = time.perf_counter()
            bar.update(task, advance=1, loss=loss, speed=count / (now - began))
            began = now

        yield report


def usage_since(began: float) -> str:
    """Returns the time since `began`, by `time.perf_counter`, and the peak memory."""
    import resource  # which Windows has not

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_gb = peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, KiB here
    wall = time.perf_counter() - began
    return f"wall time {wall:.0f} s, peak memory {peak_gb:.1f} GB"

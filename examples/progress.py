"""What the training scripts show while they run, and what they say of it at the end."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

LOSS_AND_SPEED = "loss {task.fields[loss]:.3f}  {task.fields[speed]:.0f} tokens/s"
LINES = 10  # of a run where there is no terminal


class Steps(Progress):
    """A progress bar of steps; where there is no terminal, a line now and then."""

    def __init__(self, console: Console, fields: str):
        self.of_fields = Fields(fields)
        counts = TextColumn("{task.description} {task.completed}/{task.total}")
        columns = [counts, BarColumn(), self.of_fields, TimeElapsedColumn()]
        self.is_shown = console.is_terminal or console.is_jupyter
        super().__init__(*columns, console=console, disable=not self.is_shown)

    def update(self, task_id: Any, **given: Any) -> None:
        """Takes a step, and its fields."""
        super().update(task_id, **given)
        (task,) = [one for one in self.tasks if one.id == task_id]
        total, done = int(task.total or 0), int(task.completed)
        # The first step, the last, and those where a tenth of the way is done.
        is_tenth = done * LINES // max(total, 1) > (done - 1) * LINES // max(total, 1)
        if not self.is_shown and (done == 1 or is_tenth):
            told = f"{task.description} {done}/{total}  {self.of_fields.render(task)}"
            self.console.print(told, markup=False, highlight=False)


class Fields(ProgressColumn):
    """The loss and the like of the last step; nothing before the first."""

    def __init__(self, fields: str):
        super().__init__()
        self.fields = fields

    def render(self, task: Task) -> Text:
        """Returns the fields of a task as text."""
        return Text(self.fields.format(task=task) if task.fields else "")


def progress_bar(console: Console, fields: str = LOSS_AND_SPEED) -> Steps:
    """Returns a progress bar with the loss and the speed, or with other fields."""
    return Steps(console, fields)


@contextlib.contextmanager
def reporting(
    name: str, steps: int, unit: str, console: Console
) -> Iterator[Callable[[float, int], None]]:
    """Shows the bar of one run; the value is called after each step.

    It takes the loss and how many of the unit the step was about.
    """
    with progress_bar(console, LOSS_AND_SPEED.replace("tokens", unit)) as bar:
        task = bar.add_task(name, total=steps)
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

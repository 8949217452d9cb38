"""The progress bar of the training scripts."""

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

"""The progress of a run: no numbers before there are any, lines without a terminal."""

import io
import sys
from typing import Any

import pytest
from paths import ROOT

pytest.importorskip("rich")
sys.path.insert(0, str(ROOT / "examples"))
import progress
from rich.console import Console


def shown(steps: int, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with progress.reporting("training", steps, "tokens", console) as report:
        for i in range(steps):
            report(1.0 / (i + 1), 100)
    return out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 200])
def test_no_nan_before_the_first_step(steps: int, terminal: bool) -> None:
    text = shown(steps, terminal)
    assert "nan" not in text
    assert f"training {steps}/{steps}" in text.replace("\x1b[", "")
    assert "loss 1.000" in text or steps > 1


@pytest.mark.parametrize(("steps", "lines"), [(1, 1), (3, 3), (10, 10), (200, 11)])
def test_lines_where_there_is_no_terminal(steps: int, lines: int) -> None:
    told = shown(steps, terminal=False).splitlines()
    assert len(told) == lines
    assert told[0].startswith(f"training 1/{steps}  loss 1.000  ")
    assert told[-1].startswith(f"training {steps}/{steps}  loss ")


def test_other_fields_are_shown_after_the_first_step() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=100)
    with progress.progress_bar(console, "reward {task.fields[reward]:.2f}") as bar:
        task: Any = bar.add_task("training", total=2, completed=1)
        bar.update(task, advance=1, reward=0.5)
    assert out.getvalue() == "training 2/2  reward 0.50\n"

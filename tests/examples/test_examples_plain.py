"""examples/plain_jax.py, as a user runs it: on real digits, for fewer steps."""

import re
import subprocess
import sys
from typing import Any

import pytest
from example_runs import EXAMPLES, run_example

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.examples
def test_an_mlp_learns_mirrored_digits(monkeypatch: Any) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for quick compiling
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "raise")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    printed = run_example("plain_jax.py", "--steps", "60")
    assert "trainable 4,688 of 26,122" in printed
    assert printed.count("60/60") == 2  # bars
    before, adapted, merged = map(float, re.findall(r"([\d.]+)% right", printed))
    assert before < 60
    assert adapted > 85
    assert abs(merged - adapted) < 0.5  # one image of 450 may be on the fence


def test_it_refuses_to_do_nothing() -> None:
    command = [sys.executable, str(EXAMPLES / "plain_jax.py"), "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--steps must be at least 1, got 0" in done.stderr

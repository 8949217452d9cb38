"""examples/nnx_model.py, as a user runs it: on real text, for fewer steps."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from example_runs import EXAMPLES, run_example

import jlora.checkpoint

sys.path.insert(0, str(EXAMPLES))

import nnx_model

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.examples
def test_a_reader_of_prose_learns_code(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for quick compiling
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "raise")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    options = ["--steps", "40", "--rank", "4", "--target", "(up|down|head)/kernel"]
    printed = run_example("nnx_model.py", *options, "--out", "found", cwd=tmp_path)
    assert printed.count("40/40") == 2  # the bars
    found = dict(re.findall(r"held-out loss, (\w+): ([\d.]+)", printed))
    before, adapted, merged = (float(v) for v in found.values())
    assert list(found) == ["before", "adapted", "merged"]
    assert before < 4  # guessing costs log(128) = 4.85
    assert adapted < before - 0.15
    assert abs(merged - adapted) < 2e-3
    record = jlora.checkpoint.describe(tmp_path / "found")
    assert [entry.rank for entry in record.entries] == [4] * 5


@pytest.mark.examples
def test_it_explains_what_it_cannot_do(capsys: Any) -> None:
    for pattern in ("kernell", "kernel("):
        assert nnx_model.main(["--target", pattern]) == 2
        assert "error: " in (printed := capsys.readouterr().out)
        assert pattern in printed
    for options, code in ((["--steps", "0"], "2"), (["--help"], "0")):
        with pytest.raises(SystemExit, match=code):
            nnx_model.main(options)
    assert "--steps" in capsys.readouterr().out

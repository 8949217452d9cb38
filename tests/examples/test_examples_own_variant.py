"""examples/own_variant.py, as a user runs it: on digits and eight devices."""

import re
import sys
from pathlib import Path

import pytest
from example_runs import EXAMPLES, run_example

sys.path.insert(0, str(EXAMPLES))

import own_variant

pytestmark = pytest.mark.examples


def test_a_variant_of_ones_own_is_trained_sharded_and_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    options = ("--steps", "80", "--rank", "12", "--devices", "8")
    printed = run_example("own_variant.py", *options, cwd=tmp_path)
    assert "8 devices" in printed
    assert re.search(r"params/hidden/kernel +512×64 .* 12 cosine +144", printed)
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    shares = {row[0].strip(): float(row[2].strip(" %")) for row in rows}
    assert shares["before"] < 40
    assert shares["cosine"] > 50
    assert "restored: the same logits, True" in printed
    assert re.search(r"logits off by .*, (99|100)\.\d% of predictions", printed)
    assert (tmp_path / "runs" / "own_variant").is_dir()


def test_it_explains_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert own_variant.main(["--target", "kernell"]) == 2
    printed = capsys.readouterr().out
    assert "error: " in printed
    assert "kernell" in printed

"""examples/sweep.py and examples/rank_study.py, on a Llama of a few thousand weights.

The last tests run them on SmolLM2 for a few steps.
"""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_runs import needs_data, run_example
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import chat_data
import rank_study
import several
import sweep
from tiny_llama import TALKS, random_weights, write_gguf

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", random_weights())


@pytest.fixture
def options(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options for the tiny model; its tokens are bytes, so that rows are longer."""
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    return ["--model", str(tiny_path), "--length", "128"]


def test_a_sweep_of_a_tiny_model(options: list[str], capsys: Any) -> None:
    more = ["--steps", "6", "--adapters", "5", "--ranks", "2", "3", "--rounds", "1"]
    assert sweep.main([*options, *more, "--rates", "1e-3", "2e-2"]) == 0
    printed = capsys.readouterr().out
    before = float(re.findall(r"of the base ([\d.]+)", printed)[0])
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    found = {tuple(cell.strip() for cell in row[:4]) for row in rows}
    assert found == {
        ("0", "2", "0.001", "0"),
        ("1", "3", "0.001", "0"),
        ("2", "2", "0.02", "0"),
        ("3", "3", "0.02", "0"),
        ("4", "2", "0.001", "1"),
    }
    held_out = [float(row[-1]) for row in rows]
    assert held_out == sorted(held_out)
    assert held_out[0] < before
    weights = {row[1].strip(): int(row[4].replace(",", "")) for row in rows}
    assert weights["3"] * 2 == weights["2"] * 3
    assert re.search(r"at once \d+ tokens/s, one by one \d+ tokens/s", printed)


def test_a_rank_study_of_a_tiny_model(
    options: list[str], tmp_path: Path, capsys: Any
) -> None:
    picture = tmp_path / "new" / "ranks.png"
    more = ["--steps", "6", "--ranks", "5", "1", "2", "--rate", "1e-2"]
    assert rank_study.main([*options, *more, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "the padding stayed zero: yes" in printed
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    assert [row[0].strip() for row in rows] == ["none", "1", "2", "5"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_an_adapter_of_a_sweep_is_trained_as_it_is_alone(options: list[str]) -> None:
    """With its seed, rate and rank; on the rows of its seed."""
    args = several.make_parser("", steps=3).parse_args(options)
    runs = [several.Run(4, 3e-3, 0), several.Run(2, 1e-2, 1)]
    adapters, losses = several.Study(args, runs).fit(3, sweep.console)
    one, alone = several.Study(args, runs[1:]).fit(3, sweep.console)
    np.testing.assert_allclose(losses[1], alone[0], rtol=1e-4)
    for path, entry in one.items():
        b, own = adapters[path].b[1], entry.b[0]
        rank_axis = 1 if "blocks" in path else 0  # after the layers
        kept, padding = np.split(np.asarray(b), [2], axis=rank_axis)
        assert np.abs(kept - own).max() < 2e-3 * np.abs(own).max()
        assert padding.shape[rank_axis] == 2
        assert not padding.any()


@pytest.mark.parametrize("script", [sweep, rank_study])
@pytest.mark.parametrize(
    ("given", "words"),
    [(["--length", "9"], "too short"), (["--target", "querry"], "querry")],
)
def test_the_scripts_explain_what_they_cannot_do(
    script: Any, given: list[str], words: str, options: list[str], capsys: Any
) -> None:
    assert script.main([*options, *given]) == 2
    printed = capsys.readouterr().out
    assert "error: " in printed
    assert words in printed


@pytest.mark.parametrize("script", [sweep, rank_study])
@pytest.mark.parametrize("option", ["--steps", "--ranks", "--length"])
def test_the_scripts_refuse_to_do_nothing(script: Any, option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main([option, "0"])


def test_help_names_the_steps(capsys: Any) -> None:
    for script in (sweep, rank_study):
        with pytest.raises(SystemExit, match="0"):
            script.main(["--help"])
        assert "--steps" in capsys.readouterr().out


@pytest.mark.examples
@needs_data("SWEEPS OF SMOLLM2 ARE")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "command",
    [
        ["sweep.py", "--steps", "5", "--adapters", "3", "--rounds", "1"],
        ["rank_study.py", "--steps", "5", "--ranks", "1", "6", "--plot", "ranks.png"],
    ],
    ids=lambda command: command[0],
)
def test_the_scripts_lower_the_held_out_loss(
    command: list[str], tmp_path: Path
) -> None:
    """Which their exit codes say."""
    run_example(*command, "--length", "32", cwd=tmp_path)

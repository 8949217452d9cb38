"""The scripts of examples/: the Llama, its checkpoints, its data, and a whole run.

All but the last tests need no download: they use a Llama of a few thousand weights and
a tokenizer of bytes, written as a GGUF file and as a safetensors folder.
"""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from example_runs import needs_data, run_example
from gguf.quants import dequantize, quantize
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import chat_data
import data_packages
import finetune_chat
import pretrained
from tiny_llama import (
    CONFIG,
    SPECIAL,
    TALKS,
    random_weights,
    write_folder,
    write_gguf,
)

import jlora
import jlora.checkpoint

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """The weights of a tiny Llama under their Hugging Face names."""
    return random_weights()


@pytest.fixture(scope="module")
def tiny_path(
    tmp_path_factory: pytest.TempPathFactory, weights: dict[str, np.ndarray]
) -> Path:
    """A tiny Llama in a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", weights)


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> pretrained.Pretrained:
    """The tiny Llama, loaded."""
    return pretrained.load(str(tiny_path))


def some_tokens(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), shape, 0, CONFIG.vocab)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(found, expected, atol=tolerance * scale, rtol=0)


# Checkpoints.


def test_a_gguf_file_loads_as_it_was_written(
    tiny: pretrained.Pretrained, weights: dict[str, np.ndarray]
) -> None:
    blocks = tiny.variables["params"]["blocks"]
    q = weights["model.layers.1.self_attn.q_proj.weight"]
    o = weights["model.layers.2.self_attn.o_proj.weight"]
    assert tiny.model.config == CONFIG
    np.testing.assert_array_equal(
        blocks["attention"]["q_proj"]["kernel"][1].reshape(q.T.shape), q.T
    )
    np.testing.assert_array_equal(
        blocks["attention"]["o_proj"]["kernel"][2].reshape(o.T.shape), o.T
    )


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_quantized_gguf_file_is_dequantized(
    kind: str, tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    base = pretrained.load(str(write_gguf(tmp_path / "q.gguf", weights, stored)))
    down = weights["model.layers.0.mlp.down_proj.weight"]
    expected = dequantize(quantize(down, stored), stored)
    found = base.variables["params"]["blocks"]["mlp"]["down_proj"]["kernel"][0]
    np.testing.assert_array_equal(found, expected.T)
    assert_close(found, down.T, 0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_both_formats_give_the_same_model(
    tied: bool, tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    if not tied:
        embedding = weights["model.embed_tokens.weight"]
        weights = weights | {"lm_head.weight": np.ascontiguousarray(embedding[::-1])}
    one = pretrained.load(str(write_gguf(tmp_path / "one.gguf", weights)))
    two = pretrained.load(str(write_folder(tmp_path / "two", weights)))
    assert one.model.config == two.model.config
    assert one.model.config.tied == tied
    assert jax.tree.structure(one.variables) == jax.tree.structure(two.variables)
    jax.tree.map(np.testing.assert_array_equal, one.variables, two.variables)
    text = "<|im_start|>user\nhello 12<|im_end|>"
    assert one.tokenizer.encode(text).ids == two.tokenizer.encode(text).ids


def test_the_tokenizer_round_trips_and_splits_digits(
    tiny: pretrained.Pretrained,
) -> None:
    text = "hello, it's 2024: naïve 日本\n\n  done"
    encoded = tiny.tokenizer.encode(text)
    assert tiny.tokenizer.decode(encoded.ids) == text
    assert encoded.tokens[0] == "hello"
    assert [t for t in encoded.tokens if t.isdigit()] == ["2", "0", "2", "4"]
    chat = tiny.tokenizer.encode(chat_data.chat_prompt("hello")).tokens
    assert [t for t in chat if t in SPECIAL] == [SPECIAL[1], SPECIAL[2], SPECIAL[1]]


# Errors.


def test_a_missing_data_package_names_its_install_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (pretrained.load, chat_data.load_conversations):
        with pytest.raises(ModuleNotFoundError, match="requirements-finetune"):
            load()


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"weights isn't .* sha256 .* expected 12ab"):
        data_packages.check_sha256([file], "12ab")


@pytest.mark.parametrize("source", ["nowhere.gguf", "/no/such", "no", "a/b/c"])
def test_a_missing_path_is_named(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(source)):
        pretrained.load(source)


def test_a_hub_id_that_cannot_be_fetched_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"'some/model' here.*no network"):
        pretrained.load("some/model")


def test_a_folder_without_its_files_says_which(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json, no \*"):
        pretrained.load(str(tmp_path))


def test_weights_without_a_place_and_missing_ones_are_named(
    tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    other = dict(weights)
    bias = other.pop("model.layers.1.mlp.up_proj.weight")
    other["model.layers.1.mlp.up_proj.bias"] = bias
    with pytest.raises(ValueError, match=r"1 weights are missing.*1\.mlp\.up_proj\)"):
        pretrained.load(str(write_folder(tmp_path / "other", other)))


def test_another_architecture_is_refused(
    tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    with pytest.raises(ValueError, match=r"architecture 'qwen2'"):
        pretrained.load(
            str(write_gguf(tmp_path / "q.gguf", weights, architecture="qwen2"))
        )


def test_a_model_with_another_chat_template_is_refused() -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    with pytest.raises(ValueError, match=r"knows no <\|im_end\|>"):
        chat_data.load_examples(tokenizer, seed=0)


# The script.


def test_the_script_runs_whole_on_a_tiny_model(
    tiny_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    options = ["--model", str(tiny_path), "--steps", "3", "--out", str(tmp_path)]
    assert finetune_chat.main(options) == 0
    printed = capsys.readouterr().out
    for words in ("trainable", "held-out loss after", "reloaded", "merged", "peak"):
        assert words in printed
    assert {one.rank for one in jlora.checkpoint.describe(tmp_path).entries} == {8}


def test_the_script_knows_before_training_that_it_cannot_save(
    tiny_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    (tmp_path / "notes").write_text("mine")
    options = ["--model", str(tiny_path), "--out", str(tmp_path)]
    assert finetune_chat.main(options) == 2
    printed = capsys.readouterr().out
    assert "error: " in printed and str(tmp_path) in printed.replace("\n", "")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--target", "querry", "querry"),
        ("--model", "no.gguf", "no.gguf"),
    ],
)
def test_the_script_explains_what_it_cannot_do(
    option: str,
    value: str,
    words: str,
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    options = {"--model": str(tiny_path)} | {option: value}
    code = finetune_chat.main([word for pair in options.items() for word in pair])
    printed = capsys.readouterr().out
    assert code == 2
    assert "error: " in printed
    assert words in printed


@pytest.mark.parametrize("option", ["--steps", "--rank"])
def test_the_script_refuses_to_do_nothing(option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        finetune_chat.main([option, "0"])


@pytest.mark.parametrize("broken", [None, "restore", "merge"])
def test_the_check_notices_another_adapter(
    broken: str | None,
    tiny: pretrained.Pretrained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = jlora.LoraConfig("q_proj", rank=3)
    lora = jlora.lora(tiny.model.apply, config)
    adapter = lora.init(jax.random.key(0), tiny.variables, some_tokens(1, 4))
    adapter = jax.tree.map(lambda v: v + 0.1, adapter)
    add = lambda tree: jax.tree.map(lambda v: v + 1e-2, tree)
    nudged = lambda f: lambda *args, **given: add(f(*args, **given))
    if broken == "restore":
        restore = nudged(jlora.checkpoint.restore)
        monkeypatch.setattr(jlora.checkpoint, broken, restore)
    if broken == "merge":
        monkeypatch.setattr(jlora, broken, nudged(jlora.merge))
    examples = chat_data.encode(tiny.tokenizer, [chat_data.Pair("hello", "bye")])
    passed = finetune_chat.check(lora, tiny, adapter, examples, tmp_path)
    assert passed == (broken is None)


@pytest.mark.examples
@needs_data("THE MAIN EXAMPLE IS")
def test_smollm2_knows_the_capital_of_france() -> None:
    base = pretrained.load()
    tokens = base.tokenizer.encode("The capital of France is").ids
    logits = base.model.apply(base.variables, jnp.array([tokens]))
    assert base.tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


@pytest.mark.examples
@needs_data("THE MAIN EXAMPLE IS")
def test_the_corpus_has_the_pairs_we_say() -> None:
    talks = chat_data.load_conversations()
    assert sum(len(talk) - 1 for talk in talks) == 1072


@pytest.mark.examples
@needs_data("THE MAIN EXAMPLE IS")
@pytest.mark.timeout(900)
def test_finetune_chat_lowers_the_held_out_loss(tmp_path: Path) -> None:
    printed = run_example("finetune_chat.py", "--steps", "8", "--out", str(tmp_path))
    before, after = (
        float(value) for value in re.findall(r"held-out loss \w+: +([\d.]+)", printed)
    )
    assert 4.1 < before < 4.3
    assert after < before - 0.4
    assert "FAILED" not in printed

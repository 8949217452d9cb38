"""Text of one's own for finetune_chat.py: what is read, and what is wrong by line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import EXAMPLES

pytest.importorskip("tokenizers")
sys.path.insert(0, str(EXAMPLES))

import chat_data
import finetune_chat
import own_text
import pretrained
from tiny_llama import random_weights, write_gguf

pytestmark = pytest.mark.usefixtures("fast_compile")

PAIRS = [{"prompt": f"hi {i}", "reply": f"ho {i}"} for i in range(12)]
TALKS = [
    {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": f"hi {i}"},
            {"role": "assistant", "content": "ho"},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "so"},
        ]
    }
    for i in range(6)
]
TEXTS = [{"text": f"some text of number {i}"} for i in range(12)]
FORMS = {"pairs": PAIRS, "messages": TALKS, "text": TEXTS}


def written(path: Path, rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_forms_are_read(tmp_path: Path) -> None:
    read = lambda rows: own_text.read(written(tmp_path / "my.jsonl", rows))
    assert read(PAIRS).pairs == [(f"hi {i}", f"ho {i}") for i in range(12)]
    assert read(TALKS).pairs[:2] == [("hi 0", "ho"), ("and?", "so")]
    assert read(TEXTS).texts[0] == "some text of number 0"
    assert read([PAIRS[0], "", "  ", PAIRS[1]]).pairs == [
        ("hi 0", "ho 0"),
        ("hi 1", "ho 1"),
    ]


WRONG = {
    "no JSON": ([PAIRS[0], "{'prompt': 'a'}"], "line 2: no JSON"),
    "a list": ([PAIRS[0], "[1, 2]"], "line 2: no object, but list"),
    "other keys": ([{"question": "a", "answer": "b"}], "line 1: has ['answer', 'q"),
    "another form": ([PAIRS[0], "", TEXTS[0]], "line 3: lacks 'prompt'"),
    "no reply": ([PAIRS[0], {"prompt": "a", "reply": None}], "line 2: 'reply' is no"),
    "empty": ([PAIRS[0], {"prompt": " ", "reply": "b"}], "line 2: 'prompt' is no text"),
    "no turns": ([{"messages": [{"role": "user", "content": "a"}]}], "line 1: 'mess"),
    "many": (["x"] * 9, "and 4 more"),
    "one line": ([PAIRS[0]], "has 1 lines; at least two"),
    "nothing": ([], "has 0 lines"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_by_line(name: str, tmp_path: Path) -> None:
    rows, words = WRONG[name]
    with pytest.raises(own_text.DataError) as error:
        own_text.read(written(tmp_path / "my.jsonl", rows))
    assert words in str(error.value)
    assert "my.jsonl" in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(own_text.DataError, match="UTF-8"):
        own_text.read(tmp_path / "my.jsonl")


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", random_weights())


@pytest.mark.parametrize("form", FORMS)
def test_all_tokens_that_are_learnt_are_in_the_file(
    form: str, tiny_path: Path, tmp_path: Path
) -> None:
    tokenizer = pretrained.load(str(tiny_path)).tokenizer
    path = written(tmp_path / "my.jsonl", FORMS[form])
    train, held_out = own_text.load_examples(path, tokenizer, seed=0)
    assert len(held_out) >= 1 and len(train) > len(held_out)
    assert len(train) + len(held_out) == 12
    for example in (*train, *held_out):
        text = tokenizer.decode(example.tokens[example.start :])
        assert any(word in text for word in ("ho", "so", "ome text"))
        assert 0 < example.start < len(example.tokens) <= chat_data.LENGTH


@pytest.mark.parametrize("form", ["pairs", "text"])
def test_the_script_learns_it(
    form: str, tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "my.jsonl", FORMS[form])
    out = ["--out", str(tmp_path / "out"), "--data", str(path)]
    assert finetune_chat.main(["--model", str(tiny_path), "--steps", "3", *out]) == 0
    assert "11 examples to train on, 1 held out" in capsys.readouterr().out


def test_the_script_tells_what_is_wrong(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "my.jsonl", [PAIRS[0], "{"])
    assert finetune_chat.main(["--model", str(tiny_path), "--data", str(path)]) == 2
    assert "line 2" in capsys.readouterr().out
    missing = ["--model", str(tiny_path), "--data", str(tmp_path / "no.jsonl")]
    assert finetune_chat.main(missing) == 2
    assert "no.jsonl" in capsys.readouterr().out

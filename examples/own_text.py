"""Text of your own to train on: JSON lines of prompts and replies, or of plain text.

A line is an object in one of three forms, all lines of a file in the same:

    {"prompt": "Hello!", "reply": "Ahoy!"}
    {"messages": [{"role": "user", "content": "Hello!"},
                  {"role": "assistant", "content": "Ahoy!"}]}
    {"text": "Any text, of which every token is learnt."}
"""

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chat_data import LENGTH, Example, Pair, encode
from tokenizers import Tokenizer

FORMS = (("prompt", "reply"), ("messages",), ("text",))


class DataError(ValueError):
    """A file of data is not in the form that it should have; the line is named."""


class Data(NamedTuple):
    """What a file holds: pairs, or texts; and the lines that they come from."""

    pairs: list[Pair]
    texts: list[str]


def read(path: Path) -> Data:
    """Returns the data in a file of JSON lines.

    Raises:
        DataError: with the first lines that are wrong, or if there are too few.
        OSError: if the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error}") from error
    rows = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    data, problems, form = Data([], []), [], None
    for number, line in rows:
        try:
            value = _parsed(line)
            form = form or _form(value)
            _add(data, value, form)
        except DataError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(f"{path}:\n  " + "\n  ".join(problems[:5]) + more)
    if len(data.pairs) + len(data.texts) < 2:
        raise DataError(
            f"{path} has {len(rows)} lines; at least two are needed, one of which is "
            "held out"
        )
    return data


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"no JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise DataError(f"no object, but {type(value).__name__}: {line[:40]}")
    return value


def _form(value: dict[str, Any]) -> tuple[str, ...]:
    found = next((form for form in FORMS if set(form) <= set(value)), None)
    if found is None:
        raise DataError(
            f'has {sorted(value)}; needs "prompt" and "reply", or "messages", or "text"'
        )
    return found


def _add(data: Data, value: dict[str, Any], form: tuple[str, ...]) -> None:
    missing = [key for key in form if key not in value]
    if missing:
        raise DataError(f"lacks {missing[0]!r}, which the lines before it have")
    if form == ("messages",):
        data.pairs.extend(_turns(value["messages"]))
        return
    texts = [_text(key, value[key]) for key in form]
    if form == ("text",):
        data.texts.extend(texts)
    else:
        data.pairs.append(Pair(*texts))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{name!r} is no text, but {json.dumps(value)[:40]}")
    return value


def _turns(messages: Any) -> list[Pair]:
    """Returns each reply of an assistant with what the user said before it."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError("'messages' is no list of objects")
    turns = [(m.get("role"), _text("content", m.get("content"))) for m in messages]
    pairs = [
        Pair(said, reply)
        for (one, said), (other, reply) in itertools.pairwise(turns)
        if (one, other) == ("user", "assistant")
    ]
    if not pairs:
        raise DataError("'messages' has no user's turn before an assistant's")
    return pairs


def load_examples(
    path: Path, tokenizer: Tokenizer, seed: int, length: int = LENGTH
) -> tuple[list[Example], list[Example]]:
    """Returns the examples of a file to train on, and those held out.

    Raises:
        DataError: if the file is wrong, or all examples are too long for a row.
        OSError: if it cannot be read.
    """
    data = read(path)
    of_pairs: Callable[[Sequence[Any]], list[Example]]
    of_pairs = lambda some: encode(tokenizer, some, length)
    of_texts = lambda some: _encode_texts(tokenizer, some, length)
    items, encoded = (data.pairs, of_pairs) if data.pairs else (data.texts, of_texts)
    order = random.Random(seed).sample(range(len(items)), len(items))
    count = max(1, round(0.1 * len(items)))
    held_out, train = order[:count], order[count:]
    sides = [encoded([items[i] for i in side]) for side in (train, held_out)]
    if not all(sides):
        use = "hold out" if sides[0] else "train on"
        raise DataError(
            f"{path}: no example to {use} fits a row of {length} tokens, half of them "
            "the reply's; shorten them"
        )
    return sides[0], sides[1]


def _encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], length: int
) -> list[Example]:
    """Returns texts in pieces, of each of which all tokens but the first are learnt."""
    size = length // 2
    pieces = []
    for text in texts:
        tokens = tokenizer.encode(text).ids
        pieces += [tokens[i : i + size] for i in range(0, len(tokens), size)]
    return [Example(piece, 1) for piece in pieces if len(piece) > 1]

"""Prompts and replies: the corpus, its split, and packed batches of tokens."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import data_packages
import numpy as np
import yaml
from tokenizers import Tokenizer

CORPUS_SHA256 = "25bff2ce4bf3515b7021586f70785c495cd4986cce7cc9413fa7d1192fbd02a8"
LEFT_OUT = ("coding", "tech_support")  # long answers, not chat
ROWS, LENGTH = 4, 128  # of a batch; half of a row are targets at most
IGNORED = -1  # a target that no reply contains


class Pair(NamedTuple):
    """What one says and what the other replies."""

    prompt: str
    reply: str


class Example(NamedTuple):
    """A pair as tokens; the reply begins at index `start`."""

    tokens: list[int]
    start: int


class Batch(NamedTuple):
    """Rows of tokens, several pairs to a row, which leaves next to no padding.

    `segments` numbers the pairs of a row from 1; 0 is padding. The logits wanted are
    those at the positions `at`, and `targets` are the tokens that follow there.
    """

    tokens: np.ndarray
    segments: np.ndarray
    at: np.ndarray
    targets: np.ndarray


def load_conversations() -> list[list[str]]:
    """Returns the English conversations of the `chatterbot-corpus` package.

    One entry of trivia.yml is a bare string instead of a list: it is left out.
    """
    folder = data_packages.locate("chatterbot_corpus") / "data" / "english"
    files = [f for f in sorted(folder.glob("*.yml")) if f.stem not in LEFT_OUT]
    data_packages.check_sha256(files, CORPUS_SHA256)
    found = [yaml.safe_load(f.read_text("utf-8"))["conversations"] for f in files]
    return [talk for talks in found for talk in talks if isinstance(talk, list)]


def load_examples(
    tokenizer: Tokenizer, seed: int, length: int = LENGTH
) -> tuple[list[Example], list[Example]]:
    """Returns the examples to train on and the examples held out."""
    stop_token(tokenizer)
    train, held_out = split(load_conversations(), seed)
    return encode(tokenizer, train, length), encode(tokenizer, held_out, length)


def split(
    conversations: Sequence[list[str]], seed: int, held_out: float = 0.1
) -> tuple[list[Pair], list[Pair]]:
    """Returns the pairs to train on and the pairs held out.

    Conversations that open with the same words (the corpus answers some questions in
    ten ways) stay on the same side, or the held-out loss would measure memory.
    """
    openings = sorted({talk[0].casefold() for talk in conversations})
    random.Random(seed).shuffle(openings)
    kept_back = set(openings[: round(held_out * len(openings))])
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for talk in conversations:
        pairs = (Pair(*two) for two in itertools.pairwise(talk))
        sides[talk[0].casefold() in kept_back].extend(pairs)
    return sides


def chat_prompt(text: str) -> str:
    """Returns `text` as the user's turn, up to where the reply begins.

    This is the template of SmolLM2 without its default system turn, which would be
    more than half of the tokens of every example.
    """
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def stop_token(tokenizer: Tokenizer) -> int:
    """Returns the token that ends a turn.

    Raises:
        ValueError: If the tokenizer is that of a model with another chat template.
    """
    token = tokenizer.token_to_id("<|im_end|>")
    if token is None:
        raise ValueError(
            "the tokenizer of `--model` knows no <|im_end|>: this example speaks the "
            "chat template of SmolLM2 (ChatML)"
        )
    return token


def encode(
    tokenizer: Tokenizer, pairs: Sequence[Pair], length: int = LENGTH
) -> list[Example]:
    """Returns the pairs as tokens, without those too long for a row."""
    examples = []
    for pair in pairs:
        prompt = tokenizer.encode(chat_prompt(pair.prompt)).ids
        reply = tokenizer.encode(f"{pair.reply}<|im_end|>").ids
        if len(prompt + reply) <= length and len(reply) <= length // 2:
            examples.append(Example(prompt + reply, len(prompt)))
    return examples


def training_batches(
    examples: Sequence[Example], seed: int, rows: int = ROWS, length: int = LENGTH
) -> Iterator[Batch]:
    """Yields batches for ever, each epoch in another order."""
    order = random.Random(seed)
    while True:
        packed = _pack(order.sample(examples, len(examples)), length)
        order.shuffle(packed)  # first fit leaves the emptiest rows last
        for i in range(0, max(len(packed) - rows, 0) + 1, rows):
            yield _as_batch(packed[i : i + rows], rows, length)


def all_batches(
    examples: Sequence[Example], rows: int = ROWS, length: int = LENGTH
) -> list[Batch]:
    """Returns every example once; the last batch may end in empty rows."""
    packed = _pack(examples, length)
    starts = range(0, len(packed), rows)
    return [_as_batch(packed[i : i + rows], rows, length) for i in starts]


def _pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Returns rows of examples, each example in the first row with room for it."""
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # tokens and targets left in each row
    for example in examples:
        needs = len(example.tokens), len(example.tokens) - example.start
        fits = (i for i, r in enumerate(room) if r[0] >= needs[0] and r[1] >= needs[1])
        i = next(fits, len(rows))
        if i == len(rows):
            rows.append([])
            room.append((length, length // 2))
        rows[i].append(example)
        room[i] = (room[i][0] - needs[0], room[i][1] - needs[1])
    return rows


def _as_batch(packed: Sequence[Sequence[Example]], rows: int, length: int) -> Batch:
    """Returns the arrays of up to `rows` rows, filled up with empty ones."""
    batch = Batch(
        tokens=np.zeros((rows, length), np.int32),
        segments=np.zeros((rows, length), np.int32),
        at=np.zeros((rows, length // 2), np.int32),
        targets=np.full((rows, length // 2), IGNORED, np.int32),
    )
    for row, examples in enumerate(packed):
        begin, done = 0, 0
        for number, (tokens, start) in enumerate(examples, 1):
            end, count = begin + len(tokens), len(tokens) - start
            batch.tokens[row, begin:end] = tokens
            batch.segments[row, begin:end] = number
            batch.at[row, done : done + count] = np.arange(begin + start, end) - 1
            batch.targets[row, done : done + count] = tokens[start:]
            begin, done = end, done + count
    return batch

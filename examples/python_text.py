"""The data of nnx_model.py: texts that come with Python, as rows of characters."""

import argparse
import inspect
import shlex
import tarfile
import typing
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np

CHARACTERS = 128


class Texts(NamedTuple):
    """Rows (n, length + 1): the documentation, modules, and a module held out."""

    prose: np.ndarray
    code: np.ndarray
    held_out: np.ndarray


def load(length: int) -> Texts:
    """Returns the texts in rows of `length` characters and the one after them."""
    code = "".join(inspect.getsource(m) for m in (argparse, tarfile, typing))
    texts = "".join(topics.values()), code, inspect.getsource(shlex)
    return Texts(*(_rows(text, length + 1) for text in texts))


def _rows(text: str, size: int) -> np.ndarray:
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int32)
    return codes[: len(codes) // size * size].reshape(-1, size)


def batches(rows: np.ndarray, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """Yields batches of rows drawn at random."""
    random = np.random.default_rng(seed)
    for _ in range(steps):
        yield rows[random.integers(len(rows), size=size)]

"""Numbered paths as one, for tables: `layers/[0-31]/q_proj`."""

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

# A number by itself, or behind an underscore: not that of `w1` or `conv2d`.
_NUMBER = re.compile(r"(?<![^\W_])(?:0|[1-9]\d*)(?![^\W_])")
_WIDTH = 24  # of the numbers in brackets, in letters


class Group(NamedTuple):
    """Paths that differ in numbers alone, and have the same of what is told of them.

    Attributes:
        name: the paths as one.
        members: the places of the paths among those that were given.
    """

    name: str
    members: tuple[int, ...]


def grouped(items: Iterable[tuple[str, Hashable]]) -> list[Group]:
    """Returns the groups of paths, in the order of their first members.

    Args:
        items: each path, with what must be the same in a group.

    Example:
        >>> layers = [(f"layers_{i}/{name}", "8") for i in range(12) for name in "qv"]
        >>> [group.name for group in grouped([*layers, ("head", "8")])]
        ['layers_[0-11]/q × 12', 'layers_[0-11]/v × 12', 'head']
    """
    found: dict[Hashable, list[tuple[int, str]]] = {}
    for place, (path, same) in enumerate(items):
        key = (_NUMBER.sub("#", path), same)
        found.setdefault(key, []).append((place, path))
    return [
        Group(_name([path for _, path in own]), tuple(place for place, _ in own))
        for own in found.values()
    ]


def _name(paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return paths[0]
    rows = [_NUMBER.findall(path) for path in paths]
    columns = iter(zip(*rows, strict=True))
    told = _NUMBER.sub(lambda _: _numbers(map(int, next(columns))), paths[0])
    return f"{told} × {len(paths)}"


def _numbers(column: Iterable[int]) -> str:
    """Returns the numbers at one place of the paths, as runs.

    >>> _numbers([3, 0, 1, 2, 7]), _numbers([5, 5])
    ('[0-3,7]', '5')
    """
    numbers = sorted(set(column))
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    told = ",".join("-".join(map(str, run)) for run in runs)
    if len(told) > _WIDTH:
        told = f"{told[: _WIDTH // 2].rpartition(',')[0]},…,{numbers[-1]}"
    return f"[{told}]"

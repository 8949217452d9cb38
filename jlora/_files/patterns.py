"""Regular expressions from files, matched in bounded time.

Python's own matcher backtracks: a pattern that a stranger chose can keep it busy for
years. Here a pattern becomes a tree, and matching maps the set of positions where a
node may begin to the set of positions where it may end, so that no position of the text
is tried twice for the same node; and the steps are counted.

References:
    Thompson, Regular Expression Search Algorithm, Communications of the ACM, 1968.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

Positions = set[int]
_LENGTH = 1 << 15  # the names of some hundreds of modules
_DEPTH = 20
_NESTED = 2  # repetitions within repetitions: each multiplies the time by the text
_FORMS = 4096  # of names among patterns: their lengths, and where they have dots
_STEPS = 50_000  # a usual pattern takes some hundreds

_ATOM = re.compile(
    r"\\[dDwWsS]|\\[^a-zA-Z0-9]|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\\[\](){}*+?|^$]"
)
_ANCHOR = re.compile(r"\^|\$|\\[bAZ]")
# What Python warns of in a class: some day these may be operations on sets.
_DOUBTFUL = re.compile(r"\[|--|&&|~~|\|\|")
_TIMES = re.compile(r"([*+?]|\{\d{1,2}\}|\{\d{0,2},\d{0,2}\})\??")
# A name, in which an unescaped dot is any character.
_PLAIN = re.compile(r"(\^?)((?:[\w.-]|\\[^a-zA-Z0-9\n])+)")
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>)?(?!\?)")


def file_pattern(pattern: str) -> Callable[[str], bool]:
    """Returns whether a whole text matches a regex from a file, as a function.

    Characters, classes, groups, alternatives, anchors and repetitions are known; what
    else Python has (references, lookaround, flags) is refused.

    Raises:
        ValueError: if the pattern is too long or too deep, or is not of that kind; the
            function does if it takes too many steps.

    Example:
        >>> chosen = file_pattern(r".*\\.(q|v)_proj")
        >>> chosen("layers.0.q_proj"), chosen("layers.0.o_proj")
        (True, False)
        >>> file_pattern("(a+)+b")("a" * 200)
        False
    """
    if len(pattern) > _LENGTH:
        raise ValueError(f"the pattern {pattern[:60]!r}… is longer than {_LENGTH}")
    return (_few if len(pattern) > 500 else _many)(pattern)


def _matcher(pattern: str) -> Callable[[str], bool]:
    node, end, _ = _alternatives(pattern, 0, 0)
    if end < len(pattern):
        raise _unknown(pattern, end)

    def matches(text: str) -> bool:
        counted = text if isinstance(text, _Counted) else _Counted(text)
        return len(text) in node(counted, {0})

    return matches


def ends_of(name: str) -> Iterator[str]:
    """Yields the name, and what is behind each of its dots.

    >>> list(ends_of("layers.0.q"))
    ['layers.0.q', '0.q', 'q']
    """
    yield name
    yield from (name[i + 1 :] for i, letter in enumerate(name) if letter == ".")


def heads_of(name: str) -> Iterator[str]:
    """Yields the modules that a module is in, from the outermost to itself.

    >>> list(heads_of("layers.0.q"))
    ['layers', 'layers.0', 'layers.0.q']
    """
    yield from (name[:i] for i, letter in enumerate(name) if letter == ".")
    yield name


def layer_of(name: str, order: Mapping[str, int]) -> int | None:
    """Returns the number of the layer that a module is in, or None.

    Args:
        name: of the module. Its first part that is a number counts, unless it is the
            last part, or the second.
        order: what may stand before the number, of which the first counts; if there
            are none, anything.

    Example:
        >>> layer_of("model.layers.3.experts.1.up", {})
        3
        >>> layer_of("model.layers.3.experts.1.up", {"experts": 0, "layers": 1})
        1
    """
    found: dict[int, int] = {}
    for number in re.finditer(r"(?<=\.)\d+(?=\.)", name):
        _, *before = ends_of(name[: number.start() - 1])
        known = [order[end] for end in before if end in order]
        for place in known if order else [0] * bool(before):
            found.setdefault(place, int(number[0]))
    return found[min(found)] if found else None


class Endings:
    """Which of many patterns match a name, or what follows a dot in it.

    Patterns that are names themselves, with `^` or without, are looked up: a file may
    have one for each module, and to try all on all would take too long.

    Args:
        patterns: the patterns.

    Raises:
        ValueError: if one is not known to `file_pattern`, or there are too many.

    Example:
        >>> Endings(["q_proj", "^layers.0.q_proj", "0.q", "k.*"]).of("layers.0.q_proj")
        ['q_proj', '^layers.0.q_proj']
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._plain: dict[tuple[str, int, tuple[int, ...]], dict[str, list[str]]] = {}
        others = []
        for pattern in patterns:
            if found := _PLAIN.fullmatch(pattern):
                marks = re.findall(r"\\?.", found[2])
                anyhow = tuple(i for i, mark in enumerate(marks) if mark == ".")
                kind = self._plain.setdefault((found[1], len(marks), anyhow), {})
                kind.setdefault("".join(mark[-1] for mark in marks), []).append(pattern)
            else:
                others.append(pattern)
        if sum(map(len, others)) > _LENGTH or len(self._plain) > _FORMS:
            raise ValueError("the patterns are too many to match")
        self._others = [(p, file_pattern(rf"(.*\.)?({p})$")) for p in others]

    def of(self, name: str) -> list[str]:
        """Returns those that match.

        Raises:
            ValueError: if that takes too many steps.
        """
        found = []
        for (anchor, length, anyhow), patterns in self._plain.items():
            before, end = name[:-length], list(name[-length:])
            if len(end) < length or (before and (anchor or before[-1] != ".")):
                continue
            for i in anyhow:
                end[i] = "."
            found += patterns.get("".join(end), [])
        counted = _Counted(name)
        return found + [pattern for pattern, fits in self._others if fits(counted)]


# Bounded by what they hold: a node takes some hundred bytes.
_few = functools.lru_cache(maxsize=8)(_matcher)
_many = functools.lru_cache(maxsize=4096)(_matcher)


class _Counted(str):
    """A text that counts the steps of its matching."""

    left = _STEPS

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise ValueError(f"a pattern takes too long to match {str(self)[:200]!r}")


# From the text and the positions where a node begins to those where it ends.
Node = Callable[[_Counted, Positions], Positions]


class _Parsed(NamedTuple):
    """A node, where its text ends, and how deep repetitions are nested in it."""

    node: Node
    end: int
    nested: int


def _unknown(pattern: str, at: int) -> ValueError:
    return ValueError(
        f"the pattern {pattern[:200]!r} has {pattern[at : at + 20]!r} at {at}, which "
        "jlora does not match for files: only characters, classes, groups, "
        "alternatives, anchors and repetitions"
    )


def _alternatives(pattern: str, at: int, depth: int) -> _Parsed:
    if depth > _DEPTH:
        raise ValueError(f"the pattern {pattern[:60]!r}… has too many nested groups")
    branches = [_sequence(pattern, at, depth)]
    while (at := branches[-1].end) < len(pattern) and pattern[at] == "|":
        branches.append(_sequence(pattern, at + 1, depth))
    nodes = [branch.node for branch in branches]
    either = lambda text, begins: set().union(*(n(text, begins) for n in nodes))
    return _Parsed(either, at, max(branch.nested for branch in branches))


def _sequence(pattern: str, at: int, depth: int) -> _Parsed:
    items: list[_Parsed] = []
    while at < len(pattern) and pattern[at] not in "|)":
        items.append(_repeated(pattern, _item(pattern, at, depth)))
        at = items[-1].end
    nodes = [item.node for item in items]

    def whole(text: _Counted, begins: Positions) -> Positions:
        for node in nodes:
            if not begins:
                break
            begins = node(text, begins)
        return begins

    return _Parsed(whole, at, max((item.nested for item in items), default=0))


def _item(pattern: str, at: int, depth: int) -> _Parsed:
    if found := _GROUP.match(pattern, at):
        inside = _alternatives(pattern, found.end(), depth + 1)
        if pattern[inside.end : inside.end + 1] != ")":
            raise _unknown(pattern, at)
        return inside._replace(end=inside.end + 1)
    if found := _ANCHOR.match(pattern, at):
        return _Parsed(_anchor(found[0]), found.end(), 0)
    if found := _ATOM.match(pattern, at):
        return _Parsed(_character(pattern, found[0]), found.end(), 0)
    raise _unknown(pattern, at)


def _character(pattern: str, atom: str) -> Node:
    inside = re.sub(r"\\.", "?", atom[1:])
    if atom[0] == "[" and _DOUBTFUL.search(inside):
        raise ValueError(f"the pattern {pattern[:200]!r} has the class {atom[:50]!r}")
    try:
        matches = re.compile(atom).fullmatch
    except re.error as error:
        raise ValueError(f"the pattern {pattern[:200]!r}: {error}") from error

    def character(text: _Counted, begins: Positions) -> Positions:
        text.spend(len(begins) + 1)
        return {i + 1 for i in begins if i < len(text) and matches(text[i])}

    return character


def _anchor(anchor: str) -> Node:
    matches = re.compile(anchor).match  # looks around, and takes no character

    def between(text: _Counted, begins: Positions) -> Positions:
        text.spend(len(begins) + 1)
        return {i for i in begins if matches(text, i)}

    return between


def _repeated(pattern: str, item: _Parsed) -> _Parsed:
    found = _TIMES.match(pattern, item.end)
    if found is None:
        return item
    least, most = _times(found[1])
    if most is not None and most < least:
        raise ValueError(f"the pattern {pattern[:200]!r} has {found[1]!r}")
    nested = item.nested + (most is None or most > 1)
    if nested > _NESTED:
        raise ValueError(f"the pattern {pattern[:200]!r} repeats repeated repetitions")
    return _Parsed(_repetition(item.node, least, most), found.end(), nested)


def _times(text: str) -> tuple[int, int | None]:
    """Returns the least and the greatest number of repetitions.

    >>> _times("+"), _times("{2}"), _times("{,3}")
    ((1, None), (2, 2), (0, 3))
    """
    if text in "*+?":
        return int(text == "+"), 1 if text == "?" else None
    least, comma, most = text[1:-1].partition(",")
    if not comma:
        return int(least), int(least)
    return int(least or 0), int(most) if most else None


def _repetition(node: Node, least: int, most: int | None) -> Node:
    def repeat(text: _Counted, begins: Positions) -> Positions:
        for _ in range(least):
            before, begins = begins, node(text, begins)
            if begins == before:
                break  # it stays so
        reached, new, times = set(begins), begins, least
        while new and (most is None or times < most):
            new = node(text, new) - reached
            reached |= new
            times += 1
        return reached

    return repeat

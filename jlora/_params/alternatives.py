"""The alternatives of a pattern, each of which must find something.

`(in|out)_proj` is the wish for two things, as a list of two patterns is. An alternative
is tried in its place, with all the rest of the pattern as it stands, so that
`(query|value)/(kernel|embedding)` asks for both modules and for both names, and not for
each of the four.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

from .paths import flags_of

_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]"  # a letter behind a backslash, a class
    r"|\(\?#[^)]*\)|(?P<open>\((?:\?(?:[:=!>]|<[=!]|P<\w+>|P=|\(|[a-zA-Z-]+:))?)"
    r"|(?P<close>\))|(?P<bar>\|)|.",
    re.DOTALL,
)
_PLAIN_GROUP = re.compile(r"\((?:\?(?::|P<\w+>|[aimsuL-]+:))?$")
# References to groups, which may be in an alternative that is taken out, and the flag
# for spaces and comments.
_UNTOLD = re.compile(r"\\[1-9]|\(\?P=|\(\?\(|\(\?[aiLmsu]*x")


@dataclasses.dataclass(frozen=True)
class Alternative:
    """One of several that a pattern offers at one place.

    Attributes:
        text: the alternative.
        alone: the pattern without the others of its place.
        within: the places of the alternatives that this one is a part of.
        place: where it begins in the pattern.
    """

    text: str
    alone: str
    within: frozenset[int]
    place: int


@dataclasses.dataclass
class _Group:
    """A group while it is read: its branches, and whether they are alternatives."""

    start: int
    is_plain: bool
    above: "_Group | None" = None
    branch: int = 0  # of the group above it
    ends: list[int] = dataclasses.field(default_factory=list)

    def branches(self) -> list[tuple[int, int]]:
        starts = [self.start, *(end + 1 for end in self.ends[:-1])]
        return list(zip(starts, self.ends, strict=True))

    def chain(self) -> "Iterator[tuple[_Group, int]]":
        """Yields the groups around this one, each with the branch it is in."""
        group = self
        while group.above is not None:
            yield group.above, group.branch
            group = group.above


def alternatives(pattern: str) -> list[Alternative]:
    """Returns the alternatives of a pattern, those that hold others before these.

    Alternatives that repeat or that may be absent, in lookarounds, in a pattern with
    references or with the flag for spaces and comments, are not told apart.

    Example:
        >>> [(one.text, one.alone) for one in alternatives("(in|out)_proj/w")]
        [('in', '(in)_proj/w'), ('out', '(out)_proj/w')]
        >>> [one.alone for one in alternatives("(?i)a|b(c|d)?|[|]e")]
        ['(?i)a', '(?i)b(c|d)?', '(?i)[|]e']
    """
    if _UNTOLD.search(pattern):
        return []
    found = []
    for group in _groups(pattern):
        chain = list(group.chain())
        branches = group.branches()
        told = all(outer.is_plain for outer, _ in [(group, 0), *chain])
        if not told or len(branches) == 1 or any(i == j for i, j in branches):
            continue
        within = frozenset(outer.branches()[i][0] for outer, i in chain)
        for i, (start, end) in enumerate(branches):
            alone = _without(pattern, [(group, i), *chain])
            found.append(Alternative(pattern[start:end], alone, within, start))
    return sorted(found, key=lambda one: (len(one.within), one.place))


def failing(pattern: str, finds: Callable[[str], bool]) -> list[Alternative]:
    """Returns the alternatives that find nothing, but not the parts of such."""
    failed: dict[int, Alternative] = {}
    for one in alternatives(pattern):
        if not one.within & set(failed) and not finds(one.alone):
            failed[one.place] = one
    return list(failed.values())


def _groups(pattern: str) -> list[_Group]:
    """Returns the groups of a pattern, itself among them, as they end."""
    place = len(flags_of(pattern))
    group, done = _Group(place, is_plain=True), []
    for token in _TOKEN.finditer(pattern, place):
        if token["open"]:
            is_plain = _PLAIN_GROUP.match(token["open"]) is not None
            group = _Group(token.end(), is_plain, group, len(group.ends))
        elif token["bar"]:
            group.ends.append(token.start())
        elif token["close"] and group.above is not None:
            group.ends.append(token.start())
            # One that repeats, or may be absent, is no place for one alternative.
            group.is_plain &= pattern[token.end() : token.end() + 1] not in tuple(
                "*+?{"
            )
            done.append(group)
            group = group.above
    group.ends.append(len(pattern))
    return [*done, group]


def _without(pattern: str, kept: list[tuple[_Group, int]]) -> str:
    """Returns a pattern in which groups have one of their branches each."""
    cuts = []
    for group, i in kept:
        (first, _), (start, end), (_, last) = (
            group.branches()[0],
            group.branches()[i],
            group.branches()[-1],
        )
        cuts += [(first, start), (end, last)]
    for start, end in sorted(cuts, reverse=True):
        pattern = pattern[:start] + pattern[end:]
    return pattern

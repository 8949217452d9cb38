"""Counts what became of programs, and why the refused ones were."""

import collections
import dataclasses
import re
from typing import Any

from programs.check import Outcome


@dataclasses.dataclass
class Tally:
    """Numbers of programs by outcome, and of refusals by primitive."""

    kinds: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    refused: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )

    def add(self, outcome: Outcome) -> None:
        """Counts a program."""
        self.kinds[outcome.kind] += 1
        if outcome.kind == "refused":
            self.refused[reason(outcome.told)] += 1

    def plain(self) -> dict[str, dict[str, int]]:
        """The numbers as plain dicts."""
        return {"kinds": dict(self.kinds), "refused": dict(self.refused)}

    def update(self, plain: dict[str, dict[str, int]]) -> None:
        """Adds the numbers of another tally."""
        self.kinds.update(plain["kinds"])
        self.refused.update(plain["refused"])

    def __str__(self) -> str:
        programs = max(sum(self.kinds.values()), 1)
        share = lambda n: f"{n} ({n / programs:.1%})"
        kinds = ", ".join(f"{kind} {share(n)}" for kind, n in self.kinds.most_common())
        lines = [f"  {n:4} {why}" for why, n in self.refused.most_common()]
        return "\n".join([f"{programs} programs: {kinds}", "refused at:", *lines])


def reason(told: str) -> str:
    """The primitive that a refusal names, or else how it begins."""
    found = re.search(r"reach(?:es|ed)? `?(\w[\w-]*)`?", told)
    kind, _, rest = told.partition(": ")
    rest = re.sub(r"'w\d+'|\(.*?\)|\d+", "", rest)
    return f"{kind}: {found[1] if found else ' '.join(rest.split()[:9])}"


def alike(told: Any) -> str:
    """What failures of one kind have in common."""
    return re.sub(r"\[.*?\]|float\d+|bfloat16|off by \S*|[wx]\d+|:.*", "", told[:60])

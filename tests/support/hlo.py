"""What a compiled program moves between devices, read from its HLO text."""

import math
import re
from collections import Counter
from typing import Any

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_CALL = re.compile(
    rf"= (?P<shapes>.*?) (?P<op>{'|'.join(COLLECTIVES)})(-start)?\((?P<operands>.*?)\)"
)
_SHAPE = re.compile(r"\b(?:bf|[fsuc]|pred)\w*\[([\d,]*)\]")


def collectives(compiled: Any) -> Counter[tuple[str, int]]:
    """Returns the collectives of a compiled program: (name, values of a result).

    One that moves several arrays at once counts once for each of them; one in the body
    of a loop counts once.
    """
    found: Counter[tuple[str, int]] = Counter()
    for line in compiled.as_text().splitlines():
        call = _CALL.search(line)
        if call is None:
            continue
        for dims in _SHAPE.findall(call["shapes"]):
            found[call["op"], math.prod(map(int, filter(None, dims.split(","))))] += 1
    return found


def cost(moves: Counter[tuple[str, int]]) -> int:
    """Returns how many values travel; those of a sum over devices go to and fro."""
    times = {"all-reduce": 2}
    return sum(n * size * times.get(kind, 1) for (kind, size), n in moves.items())

"""What a program optimised by the TPU's compiler says of itself, read from its text.

Cycles are the compiler's own estimates for its fusions, no times: kernels (Pallas,
ragged products), collectives and copies ahead of use are not among them.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
)
_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**63 - 1  # what stands there where the compiler has none
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_MOVE = re.compile(rf"= (?P<shapes>.*?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SHAPE = re.compile(r"\b(?P<dtype>pred|bf16|[fsuc]\d+\w*)\[(?P<dims>[\d,]*)\]")
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_BOUND = re.compile(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")


@dataclasses.dataclass(frozen=True)
class Moves:
    """The collectives of a kind: how many, and the bytes of their results."""

    count: int = 0
    bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Program:
    """What is read from a program.

    Attributes:
        cycles: the estimates of all fusions, those of a loop times its steps.
        unestimated: fusions of which the compiler has no estimate, counted likewise.
        moves: the collectives by kind, those of a loop times its steps.
        kernels: calls of kernels, of which the compiler estimates nothing.
        unknown: loops of which it is not seen how many steps they take; they are
            counted once.
    """

    cycles: int
    unestimated: int
    moves: Mapping[str, Moves]
    kernels: int
    unknown: int


def read(text: str) -> Program:
    """Returns what the optimised HLO text of a program says."""
    parts, entry = _computations(text)
    cycles = unestimated = kernels = unknown = 0
    moved: dict[str, tuple[str, int, int]] = {}
    for name, times, is_known in _walk(parts, entry, 1):
        unknown += not is_known
        for line in parts[name]:
            found = list(map(int, _CYCLES.findall(line)))
            cycles += times * sum(each for each in found if each != _NO_ESTIMATE)
            unestimated += times * found.count(_NO_ESTIMATE)
            kernels += times * ("tpu_custom_call" in line)
            move = _MOVE.search(line)
            if move is None:
                continue
            # A collective that is spread over several fusions is written in each.
            channel = _CHANNEL.search(line)
            key = channel[1] if channel else line
            size = max(map(_bytes, _SHAPE.finditer(move["shapes"])), default=0)
            if "-start(" not in line:
                size = sum(map(_bytes, _SHAPE.finditer(move["shapes"])))
            before = moved.get(key, ("", 0, 0))
            moved[key] = move["kind"], max(size, before[1]), max(times, before[2])
    moves = {}
    for kind in KINDS:
        own = [(size, times) for k, size, times in moved.values() if k == kind]
        total = sum(size * times for size, times in own)
        moves[kind] = Moves(sum(times for _, times in own), total)
    return Program(cycles, unestimated, moves, kernels, unknown)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the first to run."""
    parts: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is not None:
            lines = parts.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return parts, entry


def _walk(
    parts: Mapping[str, list[str]], name: str, times: int, is_known: bool = True
) -> Iterator[tuple[str, int, bool]]:
    """Yields each computation that runs, how often, and whether that is known."""
    if name not in parts:
        return
    yield name, times, is_known
    for line in parts[name]:
        loop = _WHILE.search(line)
        if loop is not None:
            steps = _steps(parts.get(loop[1], ()))
            yield from _walk(parts, loop[2], times * (steps or 1), steps is not None)
            continue
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [one.strip().lstrip("%") for one in branches.split(",")]
        for one in called:
            yield from _walk(parts, one, times)


def _steps(condition: Sequence[str]) -> int | None:
    """Returns the steps of a loop that counts from 0 to a constant, as scans do."""
    text = "\n".join(condition)
    bound, constants = _BOUND.search(text), dict(_CONSTANT.findall(text))
    if bound is None or bound[1] not in constants:
        return None
    return int(constants[bound[1]])


def _bytes(shape: re.Match[str]) -> int:
    """Returns the bytes of an array as the text names its type."""
    digits = re.search(r"\d+", shape["dtype"])
    bits = int(digits[0]) if digits else 8
    values = math.prod(map(int, filter(None, shape["dims"].split(","))))
    return -(-values * bits // 8)

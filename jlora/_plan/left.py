"""What is told below a plan's table in few lines: what is formed, what is left."""

import re
from collections.abc import Sequence

from .groups import grouped
from .target import Target, Unusable

_LINES, _EXAMPLES = 10, 3


def lines_of_formed(targets: Sequence[Target], *, fold: bool) -> list[str]:
    """Returns the lines about targets whose `W + s·a·b` is formed, if any."""
    formed = [
        (target.path, f"{use.kind} ({use.source})")
        for target in targets
        for use in dict.fromkeys(target.uses)
        if not use.factored
    ]
    if not formed:
        return []
    told = [f"  {path}: {where}" for path, where in formed]
    if fold:
        told = [f"  {g.name}: {formed[g.members[0]][1]}" for g in grouped(formed)]
    return ["materialized, W + s·a·b is formed there:", *told]


def lines_of_left(
    targets: Sequence[Target], unusable: Sequence[Unusable], *, fold: bool
) -> list[str]:
    """Returns the lines about leaves that are matched and are no targets.

    Args:
        targets: the targets.
        unusable: these leaves.
        fold: whether those that differ in numbers alone are one line, and biases beside
            adapted kernels another.
    """
    if not unusable:
        return []
    head = f"matched and left out: {len(unusable)}"
    if not fold:
        return [head, *(f"  {_told(one.path, one)}" for one in unusable)]
    modules = {target.path.rpartition("/")[0] for target in targets}
    biases = [one for one in unusable if _is_bias(one, modules)]
    others = [one for one in unusable if not _is_bias(one, modules)]
    same = lambda one: (one.shape, re.sub(r":\d+", "", one.reason))
    groups = grouped((one.path, same(one)) for one in others)
    lines = [f"  {_told(g.name, others[g.members[0]])}" for g in groups[:_LINES]]
    if len(groups) > _LINES:
        rest = sum(len(group.members) for group in groups[_LINES:])
        lines.append(f"  and {rest:,} more; `plan.table(fold=False)` has all of them")
    return [head, *(["  " + _of_biases(biases)] if biases else []), *lines]


def _told(name: str, one: Unusable) -> str:
    return f"{name} {one.shape}: {one.reason}"


def _is_bias(one: Unusable, modules: set[str]) -> bool:
    module, _, name = one.path.rpartition("/")
    return name == "bias" and module in modules and not one.is_doubtful


def _of_biases(biases: Sequence[Unusable]) -> str:
    trains = "`LoraConfig(bias='adapted')` trains"
    if len(biases) == 1:
        return f"{_told(biases[0].path, biases[0])}; {trains} it"
    return f"{len(biases):,} biases beside adapted kernels; {trains} them"


def lines_of_frozen(paths: Sequence[str], *, fold: bool) -> list[str]:
    """Returns the lines about kernels that could be adapted and are frozen, if any.

    >>> layers = [f"layers/{i}/up" for i in range(3)]
    >>> print(*lines_of_frozen([*layers, "head"], fold=True), sep="\\n")
    left frozen, though they could be adapted: 4 kernels
      layers/[0-2]/up × 3
      head
    """
    if not paths:
        return []
    head = f"left frozen, though they could be adapted: {len(paths):,} kernels"
    if len(paths) == 1:
        head = "left frozen, though it could be adapted: 1 kernel"
    if not fold:
        return [head, *(f"  {path}" for path in paths)]
    groups = grouped((path, None) for path in paths)
    lines = [f"  {group.name}" for group in groups[:_EXAMPLES]]
    rest = sum(len(group.members) for group in groups[_EXAMPLES:])
    return [head, *lines, *([f"  and {rest:,} more"] if rest else [])]

"""Where a kernel cannot be evaluated for the roles of its axes, and with others could.

The roles in an adapter, or those that `LoraConfig(batch=...)` names, need not be those
that the program tells. Most of such uses are evaluated all the same; of the others the
error says that it is the roles that differ, for the operation does have a rule.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ._analyze import Use, View
from ._axes import KernelAxes
from ._choice import Contraction
from ._decide import decide
from ._discover import discover, settle


def told_roles(axes: KernelAxes) -> str:
    """Returns roles as an error has them.

    >>> told_roles(KernelAxes((0,), (1,), (2, 3)))
    'batch 0, in 1, out 2 and 3'
    """
    named = (("batch", axes.batch), ("in", axes.in_), ("out", axes.out))
    return ", ".join(f"{n} {' and '.join(map(str, own))}" for n, own in named if own)


def conflicts(
    jaxpr: Any,
    views: Sequence[View | None],
    axes: Mapping[str, KernelAxes],
    obstacles: Sequence[Use],
    contraction: Contraction,
    dora: Collection[str] = (),
) -> list[str]:
    """Returns a line for each kernel that the roles of the program would evaluate.

    Args:
        jaxpr: the program.
        views: the kernels among its inputs.
        axes: the roles that it was to be evaluated with.
        obstacles: what had to be materialized for it.
        contraction: as `jlora.lora` takes it.
        dora: the paths of the kernels that have DoRA's scale.
    """
    first = {use.path: use for use in reversed(obstacles)}
    own = [view if view and view.path in first else None for view in views]
    votes, _ = discover(jaxpr, own)
    lines = []
    for view in own:
        if view is None:
            continue
        path, given = view.path, axes[view.path]
        told = settle(votes.get(path, []), view.shape)
        if told is None or told == given:
            continue
        alone = [v if v is view else None for v in views]
        _, log = decide(jaxpr, alone, {path: told}, contraction, dora)
        if not log.obstacles:
            lines.append(_line(view, given, told, first[path]))
    return lines


def _line(view: View, given: KernelAxes, told: KernelAxes, use: Use) -> str:
    return (
        f"{view.path!r} {view.shape}: factors with the roles {told_roles(given)}, "
        f"where the program has {told_roles(told)}, cannot be evaluated in {use.kind} "
        f"at {use.source}"
    )

"""Where a kernel cannot be evaluated for the roles of its axes, and with others could.

The roles in an adapter, or those that `LoraConfig(batch=...)` names, need not be those
that the program tells. Most of such uses are evaluated all the same; of the others the
error says that it is the roles that differ, for the operation does have a rule.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .._errors import AdapterError, TargetError
from .._params.axes import KernelAxes
from .._product.choice import Contraction
from .._program.decide import SideScale, decide
from .._program.discover import discover, settle
from .._rules.view import Use, Value, View


def told_roles(axes: KernelAxes) -> str:
    """Returns roles as an error has them.

    >>> told_roles(KernelAxes((0,), (1,), (2, 3)))
    'batch 0, in 1, out 2 and 3'
    """
    named = (("batch", axes.batch), ("in", axes.in_), ("out", axes.out))
    return ", ".join(f"{n} {' and '.join(map(str, own))}" for n, own in named if own)


def conflicts(
    jaxpr: Any,
    inputs: Sequence[Value],
    axes: Mapping[str, KernelAxes],
    obstacles: Sequence[Use],
    contraction: Contraction,
    scales: Mapping[str, SideScale] | None = None,
) -> list[str]:
    """Returns a line for each kernel that the roles of the program would evaluate.

    Args:
        jaxpr: the program.
        inputs: what is known of its inputs.
        axes: the roles that it was to be evaluated with.
        obstacles: what had to be materialized for it.
        contraction: as `jlora.lora` takes it.
        scales: the scales that kernels have, by path.
    """
    first = {use.path: use for use in reversed(obstacles)}
    votes = discover(jaxpr, _only(first, inputs)).votes
    lines = []
    for value in _only(first, inputs):
        for view in value.views:
            path, given = view.path, axes[view.path]
            told = settle(votes.get(path, []), view.shape)
            if told is None or told == given:
                continue
            alone = _only([path], inputs)
            _, log = decide(jaxpr, alone, {path: told}, contraction, scales)
            if not log.obstacles:
                lines.append(_line(view, given, told, first[path]))
    return lines


def _only(paths: Collection[str], inputs: Sequence[Value]) -> list[Value]:
    """Returns the inputs with the views of some kernels alone."""
    keep = lambda value: tuple(view for view in value.views if view.path in paths)
    return [dataclasses.replace(value, views=keep(value)) for value in inputs]


def _line(view: View, given: KernelAxes, told: KernelAxes, use: Use) -> str:
    return (
        f"{view.path!r} {view.shape}: factors with the roles {told_roles(given)}, "
        f"where the program has {told_roles(told)}, cannot be evaluated in {use.kind} "
        f"at {use.source}"
    )


def other_roles(told: list[str]) -> AdapterError:
    """Returns the error for an adapter with other roles than the program."""
    return AdapterError(
        "the roles in the adapter differ from those of the program:\n"
        + "\n".join(told)
        + "\nMake the adapter with `init` of this program, or pass "
        '`materialize="allow"` to `jlora.lora` to form W + s·a·b there and only there'
    )


def other_batch(told: list[str]) -> TargetError:
    """Returns the error for a config with other batch axes than the program."""
    return TargetError(
        "`LoraConfig.batch` names axes that this program does not let have factors of "
        "their own:\n" + "\n".join(told) + "\nLeave `batch` out for these kernels, or "
        'pass `materialize="allow"` to `jlora.lora` to form W + s·a·b there'
    )


def no_batch(axes: KernelAxes, batch: Sequence[int]) -> str:
    """Says why axes that a config names are no batch axes of a kernel."""
    outside = [i for i in batch if not -axes.ndim <= i < axes.ndim]
    if outside:
        return f"has {axes.ndim} axes, and `batch` names {outside}"
    asked = {i % axes.ndim for i in batch}
    contracted = set(axes.in_) <= asked
    own, does = (axes.out, "which the program keeps")
    if contracted:
        own, does = (axes.in_, "along which the program contracts or looks up")
    told = f"axis {own[0]}" if len(own) == 1 else f"the axes {own}"
    side = "input" if contracted else "output"
    return f"has no {side} axis but {told}, {does}: `batch` names it"

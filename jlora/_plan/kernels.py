"""Which leaves are kernels: from the operations that use them, or from their names."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .._params.axes import KernelAxes
from .._params.paths import is_array, is_empty, is_floating
from .._program.discover import discover, settle
from .._program.trace import Traced
from .._rules import CARRY, CONSUME
from .._rules.elementwise import is_elementwise
from .._rules.view import Log, Vote
from .problems import DOUBT, EMPTY
from .program import inputs_known


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is known of a leaf: its axes if it is a kernel, else why it is none.

    Attributes:
        axes: the roles of its axes, or None.
        reason: why it is no kernel.
        looked_up: whether it is a table of rows.
        is_opaque: whether it may be a kernel all the same.
    """

    axes: KernelAxes | None
    reason: str = ""
    looked_up: bool = False
    is_opaque: bool = False


def discovered(
    traced: Traced, leaves: Mapping[str, Any], wanted: set[str]
) -> dict[str, Kernel]:
    """Learns the roles of the axes from the operations of the program."""
    shapes = {
        path: tuple(leaves[path].shape)
        for path in wanted & set(traced.positions)
        if is_floating(leaves[path])
        and leaves[path].shape
        and not is_empty(leaves[path])
    }
    found = discover(traced.jaxpr, inputs_known(traced, shapes))
    votes, log = found.votes, found.log
    return {p: _learnt(p, leaves[p], votes.get(p, []), log) for p in wanted}


def _learnt(path: str, leaf: Any, votes: Sequence[Vote], log: Log) -> Kernel:
    if not is_floating(leaf):
        kind = leaf.dtype if is_array(leaf) else type(leaf).__name__
        return Kernel(None, f"is {kind}, not floating")
    if is_empty(leaf):
        return Kernel(None, EMPTY)
    axes = settle(votes, leaf.shape)
    if axes is not None:
        return Kernel(axes, looked_up=any(v.kind == "lookup" for v in votes))
    if votes:
        return Kernel(None, _disagreement(votes), is_opaque=True)
    reached = [use for use in log.obstacles if use.path == path]
    if not reached:
        return Kernel(None, "is not used as a kernel by the function")
    opaque = [use for use in reached if use.is_matrix and not _is_known(use.primitive)]
    first = [*opaque, *reached][0]
    where = f"reaches {first.kind} at {first.source}"
    # A norm scale beside the input of a product has no output axis there.
    why = "gives it no roles of a kernel" if first.primitive in CONSUME else _NO_RULE
    return Kernel(None, f"{where}, which {why}", is_opaque=bool(opaque))


_NO_RULE = "has no low-rank rule"


def _disagreement(votes: Sequence[Vote]) -> str:
    """Returns why uses of a kernel leave it without input or output axes."""

    def told(vote: Vote) -> str:
        by_role = {
            role: ",".join(
                str(axis) for axis, own in sorted(vote.roles.items()) if own == role
            )
            for role in ("batch", "in", "out")
        }
        roles = " ".join(f"{role} {axes}" for role, axes in by_role.items() if axes)
        return f"{vote.kind} ({roles})"

    uses = list(dict.fromkeys(map(told, votes)))
    if len(uses) == 1:
        return f"has a use that leaves it no input or no output axes: {uses[0]}"
    return f"has uses that disagree on the roles of its axes: {' and '.join(uses)}"


def _is_known(primitive: str) -> bool:
    """Whether it is known of an operation that it is no product by another name.

    A bias or a position table is added, and a norm scale multiplied. A product with a
    rule is not the one of a kernel where it gives no roles.
    """
    known = primitive in CARRY or primitive in CONSUME or is_elementwise(primitive)
    return known or primitive == "output" or primitive.startswith(("reduce_", "arg"))


def named(leaves: Mapping[str, Any], wanted: set[str]) -> dict[str, Kernel]:
    """Learns the axes from Flax's names and shapes, where they are beyond doubt."""
    return {path: _named(path, leaves[path]) for path in wanted}


def _named(path: str, leaf: Any) -> Kernel:
    if not is_floating(leaf):
        return Kernel(None, "is not a floating array")
    if is_empty(leaf):
        return Kernel(None, EMPTY)
    *module, name = path.split("/")
    ndim = len(leaf.shape)
    if name == "kernel" and ndim == 2:
        return Kernel(KernelAxes((), (0,), (1,)))
    if name == "embedding" and ndim == 2:
        return Kernel(KernelAxes((), (0,), (1,)), looked_up=True)
    if name == "kernel" and 3 <= ndim <= 5 and _is_conv(module):
        return Kernel(KernelAxes((), tuple(range(ndim - 1)), (ndim - 1,)))
    if ndim < 2:
        return Kernel(None, f"has {ndim} axes; a kernel has at least two")
    return Kernel(None, DOUBT)


def named_axes(path: str, leaf: Any) -> tuple[KernelAxes, bool]:
    """Returns the axes of a leaf of two or more, and whether it is a table of rows.

    Where its name says nothing the last two are the input and the output axis.
    """
    known, ndim = _named(path, leaf), len(leaf.shape)
    if known.axes is not None:
        return known.axes, known.looked_up
    return KernelAxes(tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,)), False


def _is_conv(module: Sequence[str]) -> bool:
    return bool(module) and re.match(r"conv(_?\d+)?$", module[-1].lower()) is not None

"""Where a kernel cannot leave the program inside of a loop, a branch or a shard_map."""

from collections.abc import Sequence
from typing import Any

from .._params.lazy import dense
from .adapted import base_of
from .rule import Analysis, Run
from .view import Body


def note_outputs(
    analysis: Analysis, eqn: Any, body: Body, wanted: Sequence[bool]
) -> None:
    """Notes that outputs which carry a kernel, and are used, are formed inside."""
    pairs = zip(body.outputs, wanted, strict=True)
    analysis.materialized(eqn, [v for v, used in pairs if used], " output")


def formed(values: Sequence[Any], wanted: Sequence[bool], run: Run) -> list[Any]:
    """Forms the outputs that are used; nobody looks at the others."""
    pairs = zip(values, wanted, strict=True)
    return [run.whole(v) if used else dense(base_of(v)) for v, used in pairs]

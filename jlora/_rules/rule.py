"""What a rule says of one primitive, and what the passes offer to it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from .view import Body, Program, Step, Value, View

# Runs a program on values: `(program, values) -> outputs`.
Run = Callable[[Program, Sequence[Any]], list[Any]]


class Analysis(Protocol):
    """A pass over the program, as the rules of control flow see it."""

    def program(self, jaxpr: Any, inputs: Sequence[Value]) -> Body:
        """Analyzes a jaxpr, given what is known of its inputs."""
        ...

    def loop(self, length: int = 1) -> contextlib.AbstractContextManager[None]:
        """Surrounds the analysis of a body that runs `length` times, if it is known."""
        ...

    def materialized(
        self, eqn: Any, values: Iterable[Value], where: str = "", *, used: bool = False
    ) -> None:
        """Notes that the operands with views must be formed at an equation."""
        ...

    def is_one_sided(self, view: View, axes: Iterable[int]) -> bool:
        """Whether axes of a view are batch axes, or on one side of its kernel."""
        ...


@dataclasses.dataclass(frozen=True)
class ControlFlowRule:
    """How one higher-order primitive is analyzed and emitted again."""

    analyze: Callable[
        [Analysis, Any, list[Value], tuple[bool, ...]], tuple[Step, list[Value]]
    ]
    run: Callable[[Any, Step, list[Any], Run], Sequence[Any]]

"""What a rule says of one primitive, and what the passes offer to it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax

from .view import Body, Program, Step, Value, View

# What is gathered of one value: arrays, of which a plain evaluation has none.
Gathered = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """How an evaluation runs the programs inside of an operation, and what it gathers.

    Beside its outputs, an evaluation may gather something of each value that goes into
    a program. A rule brings it out of its operation: added up over the steps of a loop,
    and for what a scan cuts, slice by slice. A plain evaluation gathers nothing: of no
    value `()`, so that all of this leaves no trace in a program.

    Attributes:
        program: runs a program on values; returns its outputs, and what it has gathered
            of each value.
        whole: returns what stands for a value where it is needed as one array.
        places: returns, of values, arrays with the shapes and types of what is gathered
            of them; of their specs, its specs.
    """

    program: Callable[[Program, Sequence[Any]], tuple[list[Any], Sequence[Gathered]]]
    whole: Callable[[Any], Any]
    places: Callable[[Sequence[Any]], Sequence[Gathered]]

    def zeros(self, values: Sequence[Any]) -> Sequence[Gathered]:
        """Returns what was gathered of values before the first step of a loop."""
        # Not `zeros_like`: a zero of this kind varies in a shard_map as its place does.
        return jax.tree.map(lambda place: 0 * place, self.places(values))


def _always(eqn: Any) -> str | None:
    return None


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
    """How one higher-order primitive is analyzed and emitted again.

    It is emitted through the public functions of `jax` and `jax.lax`. Adapted values
    are pytrees, so that factors pass as ordinary operands. `jax.vmap` and `jax.grad`
    make equations that the public function of a primitive does not: a loop whose
    condition is a bool for each example, a checkpoint that is part of a backward pass.
    The file of each rule says what becomes of each parameter.

    Attributes:
        analyze: returns the step, with the programs inside, and what is known of the
            outputs, given which of these are used.
        run: emits the operation around its programs; returns its outputs, and what was
            gathered of each of its operands.
        is_call: whether it stands for its body, which can be evaluated in its place.
        uncounted: says what cannot be told of the inputs of kernels inside, if they
            cannot be counted.
    """

    analyze: Callable[
        [Analysis, Any, list[Value], tuple[bool, ...]], tuple[Step, list[Value]]
    ]
    run: Callable[[Any, Step, list[Any], Run], tuple[Sequence[Any], Sequence[Gathered]]]
    is_call: bool = False
    uncounted: Callable[[Any], str | None] = _always

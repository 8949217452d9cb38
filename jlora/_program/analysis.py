"""The abstract pass: everything that can be decided before a number flows.

The pass follows views (see `View`) from the params through every equation, control
flow included, and gives each equation one action. It runs twice:

* `discover.py` learns the roles of a kernel's axes from the operations that consume
  it;
* `decide.py`, with the roles settled (by the discovery, or by the factors of an
  adapter), decides how each equation is evaluated. `interpret.py` follows that
  decision and `_plan/plan.py` prints it: there is one source of truth.

What an operation means can depend on what comes after it (see `Passed`). So a pass is
run anew, with the places at which kernels come to an end, until nothing changes; most
programs need one run. Jaxprs that are called again with views of the same kind are
looked up in a memory, so that the work is linear in the size of the program as JAX
keeps it.
"""

import abc
import contextlib
import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from .._jax.frames import Unsure
from .._jax.versions import is_literal, is_var, open_jaxpr, operation_name, source_line
from .._rules import CARRY, CONSUME, CONTROL_FLOW
from .._rules.broadcast import varies_along
from .._rules.view import (
    Body,
    Log,
    Place,
    Program,
    Step,
    Use,
    Value,
    View,
    any_active,
    plain,
)
from .passed import use_before
from .recall import Call, Kinds, Recall


class Analysis(abc.ABC):
    """One run of the pass over a program; the two passes say what an equation does.

    Args:
        recall: what was found out of jaxprs, in this run and those before it.
        ends: the places where kernels come to an end, of operations that could have
            passed them on.
    """

    def __init__(self, recall: Recall, ends: frozenset[Place]) -> None:
        self.recall, self.ends = recall, ends
        self.log = Log()
        self.loop_depth = 0
        self.trips = 1
        # Where the pass stands, and how many bodies it has seen of an equation there.
        self.place: Place = ()
        self._bodies = 0

    @abc.abstractmethod
    def first_order(self, eqn: Any, values: list[Value]) -> tuple[Step, list[Value]]:
        """Returns the action for an equation without sub-jaxprs, and its outputs."""

    def kind_of(self, path: str) -> Hashable:
        """Returns what, besides its views, decides what is done with a kernel."""
        return None

    def is_one_sided(self, view: View, axes: Iterable[int]) -> bool:
        """Whether axes of a view are batch axes, or on one side of its kernel.

        As far as the pass knows: the first takes it that they are.
        """
        return True

    def whole(self, jaxpr: Any, inputs: Sequence[Value]) -> Program:
        """Analyzes the function itself, given what is known of its inputs."""
        body = self.program(jaxpr, inputs)
        for view in itertools.chain(*(value.views for value in body.outputs)):
            self._lose(view)
            use = Use(view.path, "output", "the function's result", False, "output")
            self.log.obstacles.append(use)
        return body.program

    def program(self, jaxpr: Any, inputs: Sequence[Value]) -> Body:
        """Analyzes a jaxpr, given what is known of its inputs."""
        around, self.place = self.place, (*self.place, self._bodies)
        self._bodies += 1
        kinds = Kinds(self.kind_of, self.loop_depth > 0)
        call = Call.of(jaxpr, inputs, self.place, self.ends, kinds)
        found = self.recall.get(call)
        if found is None:
            found = self._apart(jaxpr, inputs)
            self.recall.put(call, jaxpr, *found)
        self.place = around
        body, log = found
        self._add(log)
        return body

    def _apart(self, jaxpr: Any, inputs: Sequence[Value]) -> tuple[Body, Log]:
        """Analyzes a jaxpr with a log of its own, as if it ran once."""
        log, trips = self.log, self.trips
        self.log, self.trips = Log(), 1
        body = self._program(jaxpr, inputs)
        found = body, self.log
        self.log, self.trips = log, trips
        return found

    def _add(self, log: Log) -> None:
        """Adds what was seen in a sub-program, for each time that it runs."""
        self.log.uses += [
            dataclasses.replace(use, factor_flops=self.trips * use.factor_flops)
            for use in log.uses
        ]
        self.log.obstacles += log.obstacles
        self.log.votes += log.votes
        self.log.met |= log.met
        self.log.needed |= log.needed
        self.log.lost.update(log.lost)

    def _program(self, jaxpr: Any, inputs: Sequence[Value]) -> Body:
        jaxpr, consts = open_jaxpr(jaxpr)
        env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        read = lambda v: Value() if is_literal(v) else env.get(v, Value())
        steps, around = [], self.place
        live, needed = _liveness(jaxpr)
        for i, (eqn, alive) in enumerate(zip(jaxpr.eqns, live, strict=True)):
            values = [read(v) for v in eqn.invars]
            step = Step("plain" if alive else "dead")
            outputs = plain(len(eqn.outvars), any_active(values))
            if (along := varies_along(eqn, values)) is not None:
                outputs = [dataclasses.replace(outputs[0], along=along)]
            lazy = any(value.lazy for value in values)
            adapted = any(value.views for value in values)
            if alive and (adapted or (lazy and eqn.primitive.name in CONTROL_FLOW)):
                self.place = (*around, i)
                wanted = tuple(v in needed for v in eqn.outvars)
                step, outputs = self._equation(eqn, values, wanted)
            if lazy and eqn.primitive.name in CARRY:
                outputs = [dataclasses.replace(value, lazy=True) for value in outputs]
            steps.append(dataclasses.replace(step, eqns=(eqn,)))
            env.update(zip(eqn.outvars, outputs, strict=True))
        self.place = around
        outs = tuple(read(v) for v in jaxpr.outvars)
        return Body(Program(jaxpr, tuple(consts), tuple(self.arranged(steps))), outs)

    def arranged(self, steps: list[Step]) -> list[Step]:
        """Returns the steps in the order of evaluation."""
        return steps

    def _equation(
        self, eqn: Any, values: list[Value], wanted: tuple[bool, ...]
    ) -> tuple[Step, list[Value]]:
        rule = CONTROL_FLOW.get(eqn.primitive.name)
        if rule is None:
            return self.first_order(eqn, values)
        first, hurdles = len(self.log.uses), len(self.log.obstacles)
        bodies, self._bodies = self._bodies, 0
        result = rule.analyze(self, eqn, values, wanted)
        self._bodies = bodies
        # A library's own jit has the line of its caller.
        line = self.line_of(eqn)
        _fill_lines(self.log.uses, first, line)
        _fill_lines(self.log.obstacles, hurdles, line)
        return result

    @contextlib.contextmanager
    def loop(self, length: int = 1) -> Iterator[None]:
        """Surrounds the analysis of a body that runs `length` times, if it is known."""
        before, self.trips = self.trips, self.trips * length
        self.loop_depth += 1
        yield
        self.loop_depth -= 1
        self.trips = before

    def line_of(self, eqn: Any) -> str:
        """Returns the model's line of an equation, or the best that is known."""
        return source_line(eqn)

    def materialized(
        self, eqn: Any, values: Iterable[Value], where: str = "", *, used: bool = False
    ) -> None:
        """Notes that the operands with views must be formed at an equation.

        Args:
            eqn: the equation.
            values: its operands.
            where: what the name of the operation gets.
            used: whether it is a use of the kernels, if one that cannot be factored.
        """
        name, kind = eqn.primitive.name, f"{operation_name(eqn)}{where}"
        for view in itertools.chain(*(value.views for value in values)):
            if not used:
                self._lose(view)
            use = Use(view.path, kind, self.line_of(eqn), False, name)
            use = dataclasses.replace(use, is_matrix=view.is_matrix)
            self.log.obstacles.append(use)

    def _lose(self, view: View) -> None:
        """Notes that a view has come to no use.

        The last of what it has passed may have been its use; what comes before that
        is seen when that is.
        """
        if view.passed:
            last = view.passed[-1]
            self.log.lost[last.place] = last.kind

    def reaches(self, eqn: Any, operand: int, view: View, active: bool) -> bool:
        """Notes that a view has come to a product, and says whether that is its use.

        Args:
            eqn: the product.
            operand: the operand that the view is of.
            view: the view.
            active: whether another operand depends on activations.
        """
        before = use_before(eqn, operand, view, active)
        if before is not None:
            self.log.lost[before.place] = before.kind
            return False
        rule = CONSUME[eqn.primitive.name]
        features = active or rule.features(eqn, operand)
        self.meets(view, features=features, active=active)
        return True

    def meets(self, view: View, *, features: bool = True, active: bool = True) -> None:
        """Notes that a view has come to its use.

        Args:
            view: the view.
            features: whether what it is multiplied by are features, active or frozen.
            active: whether they depend on activations.
        """
        if active:
            self.log.needed.update(passed.place for passed in view.passed)
        for passed in view.passed:
            if passed.kind != "order" or features:
                self.log.met.add(passed.place)
            else:
                self.log.lost[passed.place] = passed.kind


def _fill_lines(uses: list[Use], start: int, line: str) -> None:
    for i, use in enumerate(uses[start:], start):
        if isinstance(use.source, Unsure) and not isinstance(line, Unsure):
            uses[i] = dataclasses.replace(use, source=line)


def ends_of(log: Log) -> frozenset[Place]:
    """Returns the places where kernels come to an end, as one run has shown.

    Rows that are wanted for themselves and for a product too are looked up. What else
    was passed is passed on if one use takes it; the others are obstacles.
    """
    ended = lambda place, kind: kind == "order" or place not in log.met
    lost = log.lost.items()
    return frozenset(at for at, kind in lost if kind != "index" and ended(at, kind))


def _liveness(jaxpr: Any) -> tuple[list[bool], set[Any]]:
    """Returns which equations, and which variables, the outputs or effects need."""
    needed = {v for v in jaxpr.outvars if is_var(v)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        alive = bool(eqn.effects) or any(v in needed for v in eqn.outvars)
        if alive:
            needed.update(v for v in eqn.invars if is_var(v))
        live.append(alive)
    return live[::-1], needed

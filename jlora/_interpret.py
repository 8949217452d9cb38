"""The evaluation pass: the loop over equations, following the analysis."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from ._adapted import materialize
from ._analyze import Program, Step
from ._carry import CARRY
from ._compat import equation_scope, is_literal, rebind
from ._consume import CONSUME, add_rows
from ._control_flow import CONTROL_FLOW


def run(program: Program, values: Sequence[Any], *, backward: str) -> list[Any]:
    """Evaluates a program on plain and adapted values.

    Args:
        program: the jaxpr with the step of each equation.
        values: one array, or `Adapted`, per input of the jaxpr.
        backward: "custom" or "autodiff", see `_linear.low_rank_product`.

    Returns:
        The outputs, of which those with views are `Adapted`.
    """
    env = dict(zip(program.jaxpr.invars, values, strict=True))
    env.update(zip(program.jaxpr.constvars, program.consts, strict=True))
    read = lambda v: v.val if is_literal(v) else env[v]
    for eqn, step in zip(program.jaxpr.eqns, program.steps, strict=True):
        if step.action == "dead":
            continue
        with equation_scope(eqn):
            outputs = _evaluate(eqn, step, [read(v) for v in eqn.invars], backward)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in program.jaxpr.outvars]


def _evaluate(eqn: Any, step: Step, values: list[Any], backward: str) -> Sequence[Any]:
    name = eqn.primitive.name
    if step.action == "plain":
        return rebind(eqn, values)
    if step.action == "enter":
        deeper = functools.partial(run, backward=backward)
        return CONTROL_FLOW[name].run(eqn, step, values, deeper)
    with jax.named_scope("jlora"):
        if step.action == "consume":
            return CONSUME[name].run(eqn, values, backward)
        if step.action == "carry":
            return CARRY[name].run(eqn, values)
        if step.action == "lookup":
            return list(map(add_rows, CARRY[name].run(eqn, values)))
        return rebind(eqn, [materialize(value) for value in values])

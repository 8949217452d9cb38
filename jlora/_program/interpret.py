"""The evaluation pass: the loop over equations, following the analysis."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._jax.versions import equation_scope, in_shard_map, is_literal, rebind, staged
from .._params.lazy import called, dense, is_lazy
from .._rules.adapted import base_of, materialize
from .._rules.broadcast import cut
from .._rules.carry import CARRY, scale_beside, take_rows
from .._rules.consume import EVALUATE, add_rows
from .._rules.control_flow import CONTROL_FLOW
from .._rules.dot_general import run_products
from .._rules.gather import found_rows
from .._rules.lazy_moves import carried, stays_small
from .._rules.view import Program, Step

# Returns the value of a variable of a jaxpr.
Read = Callable[[Any], Any]


def run(program: Program, values: Sequence[Any], *, derive: str) -> list[Any]:
    """Evaluates a program on plain and adapted values.

    Args:
        program: the jaxpr with the step of each equation.
        values: one array, `Adapted` or `Lazy`, per input of the jaxpr.
        derive: "custom" or "autodiff", see `_linear.low_rank_product`.

    Returns:
        The outputs, of which those with views are `Adapted`, and others may be `Lazy`.
    """

    def evaluate(step: Step, read: Read) -> Sequence[Any]:
        if step.action == "product":
            return _products(step, read, derive)
        return _evaluate(step, read, derive)

    return walk(program, values, evaluate)


def outputs_of(program: Program, inputs: Sequence[Any], *, derive: str) -> Any:
    """Returns the outputs of the function itself, as `run` does, all of them plain."""

    def evaluate(*inputs: Any) -> list[jax.Array]:
        return list(map(materialize, run(program, inputs, derive=derive)))

    return (staged(evaluate) if in_shard_map() else evaluate)(*inputs)


def walk(
    program: Program,
    values: Sequence[Any],
    evaluate: Callable[[Step, Read], Sequence[Any]],
) -> list[Any]:
    """Goes through the steps of a program.

    Args:
        program: the jaxpr with the step of each equation.
        values: one value per input of the jaxpr.
        evaluate: returns the outputs of all equations of a step, given a function that
            reads the value of a variable.

    Returns:
        The outputs of the program.
    """
    env = dict(zip(program.jaxpr.invars, values, strict=True))
    env.update(zip(program.jaxpr.constvars, program.consts, strict=True))
    read = lambda v: v.val if is_literal(v) else env[v]
    for step in program.steps:
        if step.action == "dead":
            continue
        with equation_scope(step.eqns[0]):
            outputs = evaluate(step, read)
        outvars = itertools.chain.from_iterable(eqn.outvars for eqn in step.eqns)
        env.update(zip(outvars, outputs, strict=True))
    return [read(v) for v in program.jaxpr.outvars]


def _products(step: Step, read: Read, derive: str) -> list[Any]:
    """Siblings are evaluated where the first stands, with its other operand."""
    x = dense(read(step.eqns[0].invars[1 - step.kernels[0]]))
    pairs = zip(step.eqns, step.kernels, strict=True)
    kernels = [read(eqn.invars[i]) for eqn, i in pairs]
    with jax.named_scope("jlora"):
        return run_products(step.eqns, step.kernels, x, kernels, step.form, derive)


def _evaluate(step: Step, read: Read, derive: str) -> Sequence[Any]:
    (eqn,) = step.eqns
    values = [read(v) for v in eqn.invars]
    name = eqn.primitive.name
    if step.along is not None:
        values = cut(values, step.along)
    if step.action == "plain":
        return _plain(eqn, values, derive)
    if step.action == "enter":
        return CONTROL_FLOW[name].run(eqn, step, values, _deeper(derive))
    with jax.named_scope("jlora"):
        if step.action == "consume":
            return EVALUATE[name](eqn, list(map(dense, values)), derive)
        if not (name in CARRY and CARRY[name].together):
            # What stands beside the adapted operand.
            values = list(map(dense, values))
        if step.beside:
            return scale_beside(eqn, values)
        if step.action == "carry":
            return CARRY[name].run(eqn, values)
        if step.action == "lookup":
            return _lookup(eqn, values)
        return rebind(eqn, [materialize(value) for value in values])


def _lookup(eqn: Any, values: list[Any]) -> list[jax.Array]:
    if eqn.primitive.name != "gather":
        return list(map(add_rows, CARRY[eqn.primitive.name].run(eqn, values)))
    found = found_rows(eqn, base_of(values[0]).shape, *values[1:])
    return [add_rows(take_rows(eqn, values), found)]


@functools.cache
def _deeper(derive: str) -> Callable[..., list[Any]]:
    """Returns what runs the programs inside of a program: always the same function."""
    return functools.partial(run, derive=derive)


def _plain(eqn: Any, values: list[Any], derive: str) -> Sequence[Any]:
    """Evaluates an equation without adapted operands, of which some may be lazy."""
    if not is_lazy(values):
        return rebind(eqn, values)
    if eqn.primitive.name in CARRY and stays_small(eqn, values):
        return carried(eqn, values)
    return called(eqn, values, derive)

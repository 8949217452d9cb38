"""The evaluation pass: the loop over equations, following the analysis."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._jax.versions import equation_scope, in_shard_map, is_literal, rebind, staged
from .._params.lazy import called, dense, is_lazy
from .._rules import CARRY, CONSUME
from .._rules.adapted import materialize
from .._rules.broadcast import cut
from .._rules.control_flow import CONTROL_FLOW
from .._rules.lazy_moves import stays_small
from .._rules.lookup import look_up
from .._rules.products import run_products
from .._rules.view import Program, Step, Value
from .analysis import Analysis
from .recall import Recall

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
            return _consume(eqn, list(map(dense, values)), derive)
        if step.action in ("carry", "lookup"):
            return _carry(eqn, step, values)
        return rebind(eqn, [materialize(value) for value in values])


def _consume(eqn: Any, values: list[Any], derive: str) -> list[Any]:
    run = CONSUME[eqn.primitive.name].run
    if run is None:  # they are evaluated in groups, see `_products`
        raise AssertionError(f"{eqn.primitive.name} is a product")
    return run(eqn, values, derive)


def _carry(eqn: Any, step: Step, values: list[Any]) -> list[Any]:
    rule = CARRY[eqn.primitive.name]
    if not rule.together:  # what stands beside the adapted operand
        values = list(map(dense, values))
    if step.beside and rule.beside is not None:
        return rule.beside(eqn, values)
    return look_up(eqn, values) if step.action == "lookup" else rule.run(eqn, values)


@functools.cache
def _deeper(derive: str) -> Callable[..., list[Any]]:
    """Returns what runs the programs inside of a program: always the same function."""
    return functools.partial(run, derive=derive)


# --- kernels that are quantised and not adapted ---


class _Nothing(Analysis):
    """The analysis of an equation whose operands carry no adapted kernel."""

    def __init__(self) -> None:
        super().__init__(CONTROL_FLOW, Recall(), frozenset())

    def first_order(self, eqn: Any, values: list[Value]) -> tuple[Step, list[Value]]:
        """Is not asked: without views every step is plain."""
        raise AssertionError(f"{eqn.primitive.name} has views")


def _plain(eqn: Any, values: list[Any], derive: str) -> Sequence[Any]:
    """Evaluates an equation without adapted operands, of which some may be lazy."""
    if not is_lazy(values):
        return rebind(eqn, values)
    name = eqn.primitive.name
    if name in CONTROL_FLOW:
        wanted, rule = (True,) * len(eqn.outvars), CONTROL_FLOW[name]
        step, _ = rule.analyze(_Nothing(), eqn, [Value()] * len(values), wanted)
        return rule.run(eqn, step, values, _deeper(derive))
    carry = CARRY.get(name)
    if carry is not None and (carry.beside is None or stays_small(eqn, values)):
        return carry.on_bases(eqn, values)
    return called(eqn, values, derive)

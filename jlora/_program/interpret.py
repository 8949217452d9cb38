"""The evaluation pass: the loop over equations, following the analysis."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from .._jax.versions import equation_scope, in_shard_map, is_literal, rebind, staged
from .._params.lazy import called, dense, is_lazy
from .._rules import CARRY, CONSUME, CONTROL_FLOW
from .._rules.adapted import laid_out, materialize
from .._rules.broadcast import cut
from .._rules.lazy_moves import stays_small
from .._rules.lookup import look_up
from .._rules.products import run_products, taken
from .._rules.rule import Gathered, Run
from .._rules.view import Program, Step


class Evaluation(Protocol):
    """What is done with values at each action, see `Step`; each returns the outputs."""

    def plain(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Evaluates an equation without adapted operands."""
        ...

    def carry(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Moves kernels: the outputs are kernels again."""
        ...

    def lookup(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Takes rows of a kernel as plain values."""
        ...

    def consume(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Uses a kernel up."""
        ...

    def materialize(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Evaluates an operation without a rule."""
        ...

    def enter(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Evaluates an operation with programs inside."""
        ...

    def product(self, step: Step, x: Any, kernels: list[Any]) -> Sequence[Any]:
        """Multiplies one value by the kernels of all products of a step."""
        ...


def walk(program: Program, values: Sequence[Any], evaluation: Evaluation) -> list[Any]:
    """Goes through the steps of a program.

    Args:
        program: the jaxpr with the step of each equation.
        values: one value per input of the jaxpr.
        evaluation: what is done at each.

    Returns:
        The outputs of the program.
    """
    env = dict(zip(program.jaxpr.invars, values, strict=True))
    env.update(zip(program.jaxpr.constvars, program.consts, strict=True))
    held = lambda v: v.val if is_literal(v) else env[v]
    for step in program.steps:
        if step.action == "dead":
            continue
        # Before its scope is entered, which may be one of other mesh axes.
        operands = _operands(step, held)
        with equation_scope(step.eqns[0]):
            outputs = _outputs(step, operands, evaluation)
        outvars = itertools.chain.from_iterable(eqn.outvars for eqn in step.eqns)
        env.update(zip(outvars, outputs, strict=True))
    return [laid_out(held(v)) for v in program.jaxpr.outvars]


def _operands(step: Step, held: Callable[[Any], Any]) -> list[Any]:
    """Returns what a step takes: of a product the other operand, and all kernels."""
    if step.action != "product":
        (eqn,) = step.eqns
        return [laid_out(held(v)) for v in eqn.invars]
    # Siblings are evaluated where the first stands, with its other operand.
    x = laid_out(held(step.eqns[0].invars[1 - step.kernels[0]]))
    pairs = zip(step.eqns, step.kernels, strict=True)
    return [x, *(taken(eqn, i, held(eqn.invars[i])) for eqn, i in pairs)]


def _outputs(step: Step, values: list[Any], evaluation: Evaluation) -> Sequence[Any]:
    """Returns the outputs of all equations of a step."""
    if step.action == "product":
        x, *kernels = values
        return evaluation.product(step, x, kernels)
    if step.along is not None:
        values = cut(values, step.along)
    return getattr(evaluation, step.action)(step.eqns[0], step, values)


# --- a program with adapted kernels ---


def outputs_of(program: Program, inputs: Sequence[Any], *, derive: str) -> Any:
    """Returns the outputs of the function itself, all of them plain.

    Args:
        program: the jaxpr with the step of each equation.
        inputs: one array, `Adapted`, `Held` or `Lazy`, per input of the jaxpr.
        derive: "custom" or "autodiff", see `low_rank_product`.
    """

    def evaluate(*inputs: Any) -> list[jax.Array]:
        return list(map(materialize, walk(program, inputs, _factored(derive))))

    return (staged(evaluate) if in_shard_map() else evaluate)(*inputs)


@functools.cache
def _factored(derive: str) -> "Factored":
    return Factored(derive)


class Factored:
    """An evaluation on plain and adapted values, some of which may be lazy.

    Outputs with views are `Adapted`, and others may be `Lazy`.

    Args:
        derive: as in `outputs_of`.
    """

    def __init__(self, derive: str) -> None:
        self.derive = derive
        # One for all programs, as functions are kept by what runs them.
        self.run = Run(self._inside, materialize, lambda values: ())

    def _inside(
        self, program: Program, values: Sequence[Any]
    ) -> tuple[list[Any], Sequence[Gathered]]:
        return walk(program, values, self), ()

    def plain(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Evaluates an equation without adapted operands, of which some may be lazy."""
        if not is_lazy(values):
            return rebind(eqn, values)
        rule = CARRY.get(eqn.primitive.name)
        if rule is not None and (rule.beside is None or stays_small(eqn, values)):
            return rule.on_bases(eqn, values)
        return called(eqn, values, self.derive)

    def enter(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Emits control flow around the same evaluation of what is inside."""
        rule = CONTROL_FLOW[eqn.primitive.name]
        outputs, _ = rule.run(eqn, step, values, self.run)
        return outputs

    def product(self, step: Step, x: Any, kernels: list[Any]) -> Sequence[Any]:
        """Multiplies by all kernels at once."""
        x, eqns = dense(x), step.eqns
        with jax.named_scope("jlora"):
            return run_products(eqns, step.kernels, x, kernels, step.form, self.derive)

    def consume(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Adds what the factors give to what the base gives."""
        run = CONSUME[eqn.primitive.name].run
        if run is None:  # it has a step of its own, which evaluates it in a group
            raise AssertionError(f"{eqn.primitive.name} is a product")
        with jax.named_scope("jlora"):
            return run(eqn, list(map(dense, values)), self.derive)

    def carry(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Moves the factors with the base."""
        with jax.named_scope("jlora"):
            values, rule = _beside_dense(eqn, values), CARRY[eqn.primitive.name]
            if step.beside and rule.beside is not None:
                return rule.beside(eqn, values)
            return rule.run(eqn, values)

    def lookup(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Takes rows of the base and of the factors, and adds them."""
        with jax.named_scope("jlora"):
            return look_up(eqn, _beside_dense(eqn, values))

    def materialize(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Forms the kernels."""
        with jax.named_scope("jlora"):
            return rebind(eqn, list(map(materialize, values)))


def _beside_dense(eqn: Any, values: list[Any]) -> list[Any]:
    """Makes what stands beside an adapted operand, unless all are carried together."""
    together = CARRY[eqn.primitive.name].together
    return values if together else list(map(dense, values))

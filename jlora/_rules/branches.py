"""Loops with a condition, and branches.

`while`: the `..._nconsts` say what the operands are; a condition with a bool for each
example is reduced, see `_masked_loop`.

`cond`: `branches_platforms` is kept.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.sharding import explicit_sharding
from .._jax.versions import open_jaxpr, source_line
from .outputs import formed, note_outputs
from .rule import Analysis, ControlFlowRule, Gathered, Inside, Run
from .view import Program, Step, Value, any_active, plain


def _analyze_while(
    analysis: Analysis, eqn: Any, values: list[Value], wanted: tuple[bool, ...]
) -> tuple[Step, list[Value]]:
    params, active = eqn.params, any_active(values)
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    carry = values[n_cond + n_body :]
    analysis.materialized(eqn, carry, " carry")
    none = plain(len(carry), active)
    with analysis.loop():
        cond = analysis.program(params["cond_jaxpr"], [*cond_consts, *none])
        body = analysis.program(params["body_jaxpr"], [*body_consts, *none])
    # Every output of the body is looked at by its next round.
    note_outputs(analysis, eqn, body, [True] * len(body.outputs))
    return Step("enter", (cond.program, body.program)), none


def _run_while(
    eqn: Any, step: Step, values: list[Any], run: Run
) -> tuple[Sequence[Any], Sequence[Gathered]]:
    params, (cond, body) = eqn.params, step.programs
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    consts = values[n_cond : n_cond + n_body]

    def goes_on(state: Any) -> jax.Array:
        outputs, _ = run.program(cond, [*values[:n_cond], *state[0]])
        return outputs[0]

    def once(state: Any) -> Any:
        carry, totals = state
        outputs, gathered = run.program(body, [*consts, *carry])
        totals = jax.tree.map(jnp.add, totals, gathered[:n_body])
        return [run.whole(v) for v in outputs], totals

    start = [run.whole(v) for v in values[n_cond + n_body :]]
    loop = _masked_loop if _is_mapped(eqn) else lax.while_loop
    carry, totals = loop(goes_on, once, (start, run.zeros(consts)))
    # What the condition gathers has no way out of the loop.
    return carry, [*[()] * n_cond, *totals, *[()] * len(carry)]


def _is_mapped(eqn: Any) -> bool:
    """Whether the condition of a `while` gives a bool for each example."""
    condition, _ = open_jaxpr(eqn.params["cond_jaxpr"])
    return bool(condition.outvars[0].aval.shape)


def _masked_loop(
    condition: Callable[[Any], jax.Array], body: Callable[[Any], Any], state: Any
) -> Any:
    """Loops with a condition that is a bool for each example.

    As JAX lowers it, the loop goes on while any is true, and examples that are done
    keep their values.
    """

    def masked(state: Any) -> Any:
        goes_on = condition(state)
        return jax.tree.map(functools.partial(_chosen, goes_on), body(state), state)

    return lax.while_loop(lambda state: jnp.any(condition(state)), masked, state)


def _chosen(mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Chooses entries along the leading axes, which the mask has."""
    leading = tuple(range(mask.ndim))
    place = explicit_sharding(old)
    full = lax.broadcast_in_dim(mask, old.shape, leading, out_sharding=place)
    return lax.select(full, new, old)


def _unknown_steps(eqn: Any) -> str | None:
    if not _is_mapped(eqn):
        return None
    return (
        f"tell which examples still run in the while loop at {source_line(eqn)}, whose "
        "condition `jax.vmap` made one for each example of. Map over `lora.inputs` in "
        "place of the loop, and add up what it gives"
    )


# --- cond ---


def _analyze_cond(
    analysis: Analysis, eqn: Any, values: list[Value], wanted: tuple[bool, ...]
) -> tuple[Step, list[Value]]:
    programs = []
    for branch in eqn.params["branches"]:
        body = analysis.program(branch, values[1:])
        note_outputs(analysis, eqn, body, wanted)
        programs.append(body.program)
    outputs = plain(len(eqn.outvars), any_active(values))
    return Step("enter", tuple(programs), wanted), outputs


def _run_cond(
    eqn: Any, step: Step, values: list[Any], run: Run
) -> tuple[Sequence[Any], Sequence[Gathered]]:
    index, *operands = values

    def one(program: Program, *args: Any) -> tuple[list[Any], Sequence[Gathered]]:
        outputs, gathered = run.program(program, args)
        return formed(outputs, step.wanted, run), gathered

    branches = [functools.partial(one, program) for program in step.programs]
    outputs, gathered = _switch(eqn, index, branches, operands)
    return outputs, [(), *gathered]


def _switch(
    eqn: Any,
    index: jax.Array,
    branches: Sequence[Callable[..., Any]],
    operands: Sequence[Any],
) -> Any:
    """Emits a `cond` around other branches, each for the platforms that it was for."""
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return lax.switch(index, branches, *operands)
    named: dict[str, Any] = {}
    for names, branch in zip(platforms, branches, strict=True):
        # None stands for the default.
        named |= dict.fromkeys(["default"] if names is None else names, branch)
    return lax.platform_dependent(*operands, **named)


def _inside_while(eqn: Any, frozen: Sequence[bool]) -> list[Inside]:
    """The body, once: how often it runs is not known, and what is carried changes."""
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carried = [False] * (len(frozen) - n_cond - n_body)
    consts = frozen[n_cond : n_cond + n_body]
    return [Inside(eqn.params["body_jaxpr"], [*consts, *carried])]


def _inside_cond(eqn: Any, frozen: Sequence[bool]) -> list[Inside]:
    """All branches; the first operand chooses."""
    return [Inside(branch, frozen[1:]) for branch in eqn.params["branches"]]


CONTROL_FLOW = {
    "while": ControlFlowRule(
        _analyze_while, _run_while, uncounted=_unknown_steps, inside=_inside_while
    ),
    "cond": ControlFlowRule(_analyze_cond, _run_cond, inside=_inside_cond, one_of=True),
}

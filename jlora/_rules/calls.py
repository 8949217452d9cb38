"""Calls: the body once, in the place of the call; what it returns may stay factored.

`jit`: `name`, `inline`, `keep_unused` are kept; `donated_invars` too, on operands
without factors; `in_shardings`, `out_shardings`, `in_layouts` and `out_layouts` are
constraints on frozen values; `ctx_mesh` is that of the equation's context.
`compiler_options_kvs` is empty: JAX refuses options on an inner jit.

`remat2`, `checkpoint`: `prevent_cse`, `differentiated` are kept; `policy` is too, and
saves small `x·a` besides.

`closed_call`, `core_call`, `composite`: the body is evaluated in their place. So the
`name`, `attributes` and `version` of a composite that a kernel enters are gone.

`by_platform`, ours, of a function that is adapted already: its portable body likewise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from .._jax.platforms import by_platform_p
from .._jax.versions import (
    JIT,
    REMAT,
    equation_scope,
    is_literal,
    open_jaxpr,
    rebind,
    with_layout,
)
from .._params.lazy import Lazy
from .._product.low_rank import keeping
from .adapted import Adapted
from .rule import Analysis, ControlFlowRule, Gathered, Run
from .view import Program, Step, Value


def _analyze_call(
    analysis: Analysis, eqn: Any, values: list[Value], wanted: tuple[bool, ...]
) -> tuple[Step, list[Value]]:
    params = eqn.params
    body = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    inner = analysis.program(body, values)
    return Step("enter", (inner.program,), wanted), list(inner.outputs)


def _run_jit(
    eqn: Any, step: Step, values: list[Any], run: Run
) -> tuple[Sequence[Any], Sequence[Gathered]]:
    (program,) = step.programs
    # A kernel and its factors belong to the caller: they are never donated.
    own = tuple(not isinstance(value, Adapted | Lazy) for value in values)
    body = lambda *args: run.program(program, args)[0]
    make = lambda: _jitted(eqn, body, own)
    jitted = _kept(program, ("jit", run, own, *_settings(eqn)), make)
    return jitted(*values), ()


def _run_remat(
    eqn: Any, step: Step, values: list[Any], run: Run
) -> tuple[Sequence[Any], Sequence[Gathered]]:
    (program,) = step.programs
    body = lambda *args: run.program(program, args)[0]
    make = lambda: _checkpointed(eqn, body)
    again = _kept(program, ("remat", run, *_settings(eqn)), make)
    return again(*values), ()


def _settings(eqn: Any) -> tuple[Any, ...]:
    """Returns the parameters of an equation but for its body."""
    return tuple(value for name, value in eqn.params.items() if name != "jaxpr")


def _kept(
    program: Program, key: Any, make: Callable[[], Callable[..., Any]]
) -> Callable[..., Any]:
    """Returns a function that is made once for all calls of a program.

    JAX knows a function by its identity: it then traces it once, and compiles it once.
    """
    if key not in program.kept:
        program.kept[key] = make()
    return program.kept[key]


def _run_inline(
    eqn: Any, step: Step, values: list[Any], run: Run
) -> tuple[Sequence[Any], Sequence[Gathered]]:
    return run.program(step.programs[0], values)


# --- jit ---


def _jitted(
    eqn: Any, body: Callable[..., Any], own: Sequence[bool]
) -> Callable[..., Any]:
    """Returns another body as the function of a `jit` equation.

    Args:
        eqn: the equation.
        body: the body.
        own: the operands that may be donated.
    """
    params = eqn.params

    def constrained(*args: Any) -> list[Any]:
        outputs = body(*_laid_out(args, params["in_shardings"], params["in_layouts"]))
        return _laid_out(outputs, params["out_shardings"], params["out_layouts"])

    constrained.__name__ = constrained.__qualname__ = params["name"]
    donated = zip(params["donated_invars"], own, strict=True)
    return jax.jit(
        constrained,
        inline=params["inline"],
        keep_unused=params["keep_unused"],
        donate_argnums=[i for i, both in enumerate(donated) if all(both)],
    )


def _laid_out(
    values: Sequence[Any], shardings: Sequence[Any], layouts: Sequence[Any]
) -> list[Any]:
    return list(map(_constrain, values, shardings, layouts))


def _constrain(value: Any, sharding: Any, layout: Any) -> Any:
    """Keeps what an inner jit was told of the layout, on frozen values."""
    if isinstance(value, Adapted):
        return value.with_base(_constrain(value.base, sharding, layout))
    if isinstance(value, Lazy):
        return value  # XLA lays it out as its quantised arrays are
    if isinstance(sharding, jax.sharding.Sharding):
        value = lax.with_sharding_constraint(value, sharding)
    return with_layout(value, layout)


# --- checkpoint ---


def _checkpointed(eqn: Any, body: Callable[..., Any]) -> Callable[..., Any]:
    """Returns another body as the function of a checkpoint."""
    params = eqn.params
    again = jax.checkpoint(
        body, prevent_cse=params["prevent_cse"], policy=keeping(params["policy"])
    )
    if not params["differentiated"]:
        return again
    # Part of a backward pass: from here on XLA must not find what is computed twice.
    return lambda *values: _rebound(again, values, eqn.primitive, differentiated=True)


def _rebound(
    fn: Callable[..., Any], values: Sequence[Any], primitive: Any, **changes: Any
) -> Sequence[Any]:
    """Returns `fn(*values)` with other parameters of the equations of a primitive."""
    leaves, treedef = jax.tree.flatten(tuple(values))
    flat = lambda *leaves: fn(*treedef.unflatten(leaves))
    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    jaxpr, consts = open_jaxpr(closed)
    env = dict(zip(jaxpr.invars, leaves, strict=True))
    env.update(zip(jaxpr.constvars, consts, strict=True))
    read = lambda atom: atom.val if is_literal(atom) else env[atom]
    for eqn in jaxpr.eqns:
        if eqn.primitive is primitive:
            eqn = eqn.replace(params={**eqn.params, **changes})
        with equation_scope(eqn):
            outputs = rebind(eqn, list(map(read, eqn.invars)))
        env.update(zip(eqn.outvars, outputs, strict=True))
    return jax.tree.unflatten(jax.tree.structure(shapes), map(read, jaxpr.outvars))


_INLINED = ("closed_call", "core_call", "composite", by_platform_p.name)

CONTROL_FLOW = {
    **dict.fromkeys(JIT, ControlFlowRule(_analyze_call, _run_jit, is_call=True)),
    **dict.fromkeys(REMAT, ControlFlowRule(_analyze_call, _run_remat, is_call=True)),
    **dict.fromkeys(
        _INLINED, ControlFlowRule(_analyze_call, _run_inline, is_call=True)
    ),
}

"""Programs for each device: factors are cut as their kernel is.

`mesh`, `in_specs`, `out_specs`, `check_vma` and the axes made manual are kept.
"""

from collections.abc import Sequence
from typing import Any

import jax

from .._jax.sharding import factor_spec
from .._jax.versions import explicit_mesh, shard_map_axes, source_line, staged
from .._params.lazy import Lazy, dense
from .adapted import Adapted
from .lazy_moves import lazy_specs
from .outputs import formed, note_outputs
from .rule import Analysis, ControlFlowRule, Gathered, Run
from .view import Step, Value, any_active, plain


def _analyze_shard_map(
    analysis: Analysis, eqn: Any, values: list[Value], wanted: tuple[bool, ...]
) -> tuple[Step, list[Value]]:
    body = analysis.program(eqn.params["jaxpr"], values)
    note_outputs(analysis, eqn, body, wanted)
    outputs = plain(len(eqn.outvars), any_active(values))
    return Step("enter", (body.program,), wanted), outputs


def _run_shard_map(
    eqn: Any, step: Step, values: list[Any], run: Run
) -> tuple[Sequence[Any], Sequence[Gathered]]:
    params, (program,) = eqn.params, step.programs
    specs = []
    for i, spec in enumerate(params["in_specs"]):
        values[i], like = _specs_like(values[i], spec, params["mesh"])
        values[i] = _laid_out(values[i], like)
        specs.append(like)

    def body(*args: Any) -> tuple[tuple[Any, ...], Sequence[Gathered]]:
        outputs, gathered = run.program(program, args)
        return tuple(formed(outputs, step.wanted, run)), gathered

    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=(tuple(params["out_specs"]), run.places(specs)),
        check_vma=params["check_vma"],
        axis_names=shard_map_axes(params),
    )
    return staged(mapped)(*values)


def _laid_out(value: Any, specs: Any) -> Any:
    """Lays out what JAX has no layout of its own for as it enters a shard_map.

    Explicit meshes ask for it: of factors, and of the pieces of a lazy value. An array
    is laid out as the function says.
    """
    if isinstance(value, Lazy):
        on_mesh = explicit_mesh(*jax.tree.leaves(value)) is not None
        return jax.tree.map(jax.sharding.reshard, value, specs) if on_mesh else value
    if not isinstance(value, Adapted):
        return value
    base = _laid_out(value.base, specs.base)
    if explicit_mesh(*jax.tree.leaves(base)) is None:
        return value
    rest = value.with_base(None), specs.with_base(None)
    return jax.tree.map(jax.sharding.reshard, *rest).with_base(base)


def _specs_like(value: Any, spec: Any, mesh: Any) -> tuple[Any, Any]:
    """Returns the value and its specs: for factors, the entries of their axes.

    A lazy value whose pieces cannot be made from pieces is made here.
    """
    if isinstance(value, Lazy):
        specs = lazy_specs(value, spec, mesh)
        return (dense(value), spec) if specs is None else (value, specs)
    if not isinstance(value, Adapted):
        return value, spec
    shape = value.base.shape
    follow: Any = lambda factor: factor_spec(spec, factor.shape, shape)
    base, like = _specs_like(value.base, spec, mesh)
    return value.with_base(base), value.moved(like, follow)


def _unknown_copies(eqn: Any) -> str | None:
    if eqn.params["check_vma"]:
        return None
    return (
        f"tell what is replicated inside of the shard_map at {source_line(eqn)}, which "
        "uses a target and has `check_vma=False`"
    )


CONTROL_FLOW = {
    "shard_map": ControlFlowRule(
        _analyze_shard_map, _run_shard_map, uncounted=_unknown_copies
    )
}

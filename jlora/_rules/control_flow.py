"""Control flow, re-emitted through the public functions of `jax` and `jax.lax`.

Each rule has two halves: `analyze` gives the sub-jaxprs their programs, `run` emits the
operation again around the interpreter. Adapted values are pytrees, so that factors pass
as ordinary extra operands; the slices of a scan take those of the factors with them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from .._jax.sharding import factor_spec
from .._jax.symbolic import scan_length
from .._jax.versions import JIT, REMAT, explicit_mesh, scan_counts, staged
from .._params.lazy import Lazy, dense
from . import emit as _emit
from .adapted import Adapted, base_of, materialize
from .lazy_moves import Slices, lazy_specs
from .rule import Analysis, ControlFlowRule, Run
from .select import select
from .view import Body, Program, Step, Value, any_active, plain


def _note_outputs(
    analysis: Analysis, eqn: Any, body: Body, wanted: Sequence[bool]
) -> None:
    """Outputs that carry a kernel and are used are materialized in the sub-program."""
    pairs = zip(body.outputs, wanted, strict=True)
    analysis.materialized(eqn, [v for v, used in pairs if used], " output")


def _formed(values: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """Materializes the outputs that are used; nobody looks at the others."""
    pairs = zip(values, wanted, strict=True)
    return [materialize(v) if used else dense(base_of(v)) for v, used in pairs]


# --- jit, remat, closed calls: the body once, outputs may stay factored ---


def _analyze_call(
    analysis: Analysis, eqn: Any, values: list[Value], wanted: tuple[bool, ...]
) -> tuple[Step, list[Value]]:
    params = eqn.params
    body = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
    inner = analysis.program(body, values)
    return Step("enter", (inner.program,), wanted), list(inner.outputs)


def _run_jit(eqn: Any, step: Step, values: list[Any], run: Run) -> Sequence[Any]:
    (program,) = step.programs
    # A kernel and its factors belong to the caller: they are never donated.
    own = tuple(not isinstance(value, Adapted | Lazy) for value in values)
    body = lambda *args: run(program, args)
    make = lambda: _emit.jit(eqn, body, own)
    return _kept(program, ("jit", run, own, *_settings(eqn)), make)(*values)


def _run_remat(eqn: Any, step: Step, values: list[Any], run: Run) -> Sequence[Any]:
    (program,) = step.programs
    body = lambda *args: run(program, args)
    make = lambda: _emit.checkpoint(eqn, body)
    return _kept(program, ("remat", run, *_settings(eqn)), make)(*values)


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


def _run_inline(eqn: Any, step: Step, values: list[Any], run: Run) -> Sequence[Any]:
    return run(step.programs[0], values)


# --- scan ---


def _analyze_scan(
    analysis: Analysis, eqn: Any, values: list[Value], wanted: tuple[bool, ...]
) -> tuple[Step, list[Value]]:
    n_consts, n_carry = scan_counts(eqn.params)
    consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
    xs, active = values[n_consts + n_carry :], any_active(values)
    analysis.materialized(eqn, carry, " carry")
    rows = [
        Value(tuple(view.without_leading() for view in whole.views), whole.active)
        for whole in xs
    ]
    with analysis.loop(eqn.params["length"]):
        inputs = [*consts, *plain(n_carry, active), *rows]
        body = analysis.program(eqn.params["jaxpr"], inputs)
    # The carry is looked at by the next step, whether its last value is used or not.
    wanted = (*[True] * n_carry, *wanted[n_carry:])
    _note_outputs(analysis, eqn, body, wanted)
    return Step("enter", (body.program,), wanted), plain(len(eqn.outvars), active)


def _run_scan(eqn: Any, step: Step, values: list[Any], run: Run) -> Sequence[Any]:
    params, (program,) = eqn.params, step.programs
    n_consts, n_carry = scan_counts(params)
    consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
    xs = [rows_of(v, params["length"]) for v in values[n_consts + n_carry :]]

    def body(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        slices = [x.restore(row) for x, row in zip(xs, rows, strict=True)]
        out = _formed(run(program, [*consts, *carry, *slices]), step.wanted)
        return out[:n_carry], out[n_carry:]

    carry, ys = lax.scan(
        body,
        [materialize(v) for v in carry],
        [x.scanned for x in xs],
        length=scan_length(params["length"]),
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def rows_of(value: Any, length: int) -> Any:
    """Takes a scanned value apart, given the number of steps."""
    if isinstance(value, Lazy):
        return _LazyRows.of(value)
    if isinstance(value, Adapted) and isinstance(value.base, Lazy):
        return _LazyRows.of(value.base, Rows.of(value.with_base(None), length))
    return Rows.of(value, length)


@dataclasses.dataclass(frozen=True)
class _LazyRows:
    """The same of a lazy value, alone or with the rest of an adapted one."""

    slices: Slices
    rest: "Rows | None"

    @classmethod
    def of(cls, base: Lazy, rest: "Rows | None" = None) -> "_LazyRows":
        """Takes a lazy value apart."""
        return cls(Slices.of(base), rest)

    @property
    def scanned(self) -> list[list[jax.Array]]:
        """The arrays to slice."""
        own = self.slices.scanned()
        return [own] if self.rest is None else [own, self.rest.scanned]

    def restore(self, row: list[list[jax.Array]]) -> Any:
        """Returns the value at one step."""
        base = self.slices.entry(row[0])
        return base if self.rest is None else self.rest.restore(row[1]).with_base(base)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A scanned value: the arrays to slice, and those that are the same at each step.

    A factor without the leading axis of its kernel is the same at each step.
    """

    scanned: list[jax.Array]
    fixed: list[jax.Array | None]
    treedef: Any

    @classmethod
    def of(cls, value: Any, length: int) -> "Rows":
        """Takes a value apart, given the number of steps."""
        leaves, treedef = jax.tree.flatten(value)
        fixed = [None if v.shape[0] == length else v[0] for v in leaves]
        return cls([v for v in leaves if v.shape[0] == length], fixed, treedef)

    def restore(self, row: list[jax.Array]) -> Any:
        """Returns the value at one step."""
        rest = iter(row)
        leaves = [next(rest) if v is None else v for v in self.fixed]
        return self.treedef.unflatten(leaves)


# --- while, cond ---


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
    _note_outputs(analysis, eqn, body, [True] * len(body.outputs))
    return Step("enter", (cond.program, body.program)), none


def _run_while(eqn: Any, step: Step, values: list[Any], run: Run) -> Sequence[Any]:
    params, (cond, body) = eqn.params, step.programs
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    return _emit.while_loop(
        eqn,
        lambda carry: run(cond, [*cond_consts, *carry])[0],
        lambda carry: [materialize(v) for v in run(body, [*body_consts, *carry])],
        [materialize(v) for v in values[n_cond + n_body :]],
    )


def _analyze_cond(
    analysis: Analysis, eqn: Any, values: list[Value], wanted: tuple[bool, ...]
) -> tuple[Step, list[Value]]:
    programs = []
    for branch in eqn.params["branches"]:
        body = analysis.program(branch, values[1:])
        _note_outputs(analysis, eqn, body, wanted)
        programs.append(body.program)
    outputs = plain(len(eqn.outvars), any_active(values))
    return Step("enter", tuple(programs), wanted), outputs


def _run_cond(eqn: Any, step: Step, values: list[Any], run: Run) -> Sequence[Any]:
    index, *operands = values
    branches = [
        functools.partial(
            lambda program, *args: _formed(run(program, args), step.wanted), p
        )
        for p in step.programs
    ]
    return _emit.switch(eqn, index, branches, operands)


# --- choices, which branches become under vmap ---


def _analyze_select(
    analysis: Analysis, eqn: Any, values: list[Value], wanted: tuple[bool, ...]
) -> tuple[Step, list[Value]]:
    sizes = enumerate(eqn.invars[0].aval.shape)
    along = frozenset(i for i, n in sizes if n != 1)
    if values[0].along is not None:
        along &= values[0].along
    active = any_active(values)
    views = [view for value in values[1:] for view in value.views]
    # What was formed of a kernel is none any more where features are chosen beside it.
    views = [view for view in views if not (view.formed and active)]
    if not all(analysis.is_one_sided(view, along) for view in views):
        analysis.materialized(eqn, values)
        return Step("materialize"), plain(1, active)
    # A scale of one kernel ends where another is chosen.
    chosen = [view.spread_along(along).chosen_along(along) for view in views]
    output = Value(tuple(dict.fromkeys(chosen)), active)
    return Step("enter", predicate=tuple(sorted(along))), [output]


def _run_select(eqn: Any, step: Step, values: list[Any], run: Run) -> Sequence[Any]:
    with jax.named_scope("jlora"):
        return select(eqn, step.predicate, values)


# --- shard_map ---


def _analyze_shard_map(
    analysis: Analysis, eqn: Any, values: list[Value], wanted: tuple[bool, ...]
) -> tuple[Step, list[Value]]:
    body = analysis.program(eqn.params["jaxpr"], values)
    _note_outputs(analysis, eqn, body, wanted)
    outputs = plain(len(eqn.outvars), any_active(values))
    return Step("enter", (body.program,), wanted), outputs


def _run_shard_map(eqn: Any, step: Step, values: list[Any], run: Run) -> Sequence[Any]:
    params, (program,) = eqn.params, step.programs
    specs = []
    for i, spec in enumerate(params["in_specs"]):
        values[i], like = specs_like(values[i], spec, params["mesh"])
        values[i] = _laid_out(values[i], like)
        specs.append(like)
    body = lambda *args: tuple(_formed(run(program, args), step.wanted))
    mapped = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=params["newly_manual_axes"],
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


def specs_like(value: Any, spec: Any, mesh: Any) -> tuple[Any, Any]:
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
    base, like = specs_like(value.base, spec, mesh)
    return value.with_base(base), value.moved(like, follow)


CONTROL_FLOW: dict[str, ControlFlowRule] = {
    **{name: ControlFlowRule(_analyze_call, _run_jit) for name in JIT},
    **{name: ControlFlowRule(_analyze_call, _run_remat) for name in REMAT},
    "closed_call": ControlFlowRule(_analyze_call, _run_inline),
    "core_call": ControlFlowRule(_analyze_call, _run_inline),
    "composite": ControlFlowRule(_analyze_call, _run_inline),
    "scan": ControlFlowRule(_analyze_scan, _run_scan),
    "while": ControlFlowRule(_analyze_while, _run_while),
    "cond": ControlFlowRule(_analyze_cond, _run_cond),
    "select_n": ControlFlowRule(_analyze_select, _run_select),
    "shard_map": ControlFlowRule(_analyze_shard_map, _run_shard_map),
}

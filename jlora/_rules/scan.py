"""Scans: the slices of a kernel take those of its factors with them.

`length`, `reverse`, `unroll` are kept; `num_consts`, `num_carry`, `ft_in`, `ft_out` say
what the operands and the outputs are.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.symbolic import scan_length
from .._jax.versions import scan_counts
from .._params.lazy import Lazy
from .adapted import Adapted
from .lazy_moves import Slices
from .outputs import formed, note_outputs
from .rule import Analysis, ControlFlowRule, Gathered, Inside, Run
from .view import Step, Value, any_active, plain


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
    note_outputs(analysis, eqn, body, wanted)
    return Step("enter", (body.program,), wanted), plain(len(eqn.outvars), active)


def _run_scan(
    eqn: Any, step: Step, values: list[Any], run: Run
) -> tuple[Sequence[Any], Sequence[Gathered]]:
    params, (program,) = eqn.params, step.programs
    n_consts, n_carry = scan_counts(params)
    consts, carry = values[:n_consts], values[n_consts : n_consts + n_carry]
    xs = [_rows_of(v, params["length"]) for v in values[n_consts + n_carry :]]

    def body(state: Any, rows: list[Any]) -> tuple[Any, Any]:
        carry, totals = state
        slices = [x.restore(row) for x, row in zip(xs, rows, strict=True)]
        out, gathered = run.program(program, [*consts, *carry, *slices])
        out = formed(out, step.wanted, run)
        totals = jax.tree.map(jnp.add, totals, gathered[:n_consts])
        return (out[:n_carry], totals), (out[n_carry:], gathered[n_consts + n_carry :])

    (carry, totals), (ys, of_slices) = lax.scan(
        body,
        ([run.whole(v) for v in carry], run.zeros(consts)),
        [x.scanned for x in xs],
        length=scan_length(params["length"]),
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys], [*totals, *[()] * n_carry, *of_slices]


def _rows_of(value: Any, length: int) -> Any:
    """Takes a scanned value apart, given the number of steps."""
    if isinstance(value, Lazy):
        return _LazyRows.of(value)
    if isinstance(value, Adapted) and isinstance(value.base, Lazy):
        return _LazyRows.of(value.base, _Rows.of(value.with_base(None), length))
    return _Rows.of(value, length)


@dataclasses.dataclass(frozen=True)
class _LazyRows:
    """The same of a lazy value, alone or with the rest of an adapted one."""

    slices: Slices
    rest: "_Rows | None"

    @classmethod
    def of(cls, base: Lazy, rest: "_Rows | None" = None) -> "_LazyRows":
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
class _Rows:
    """A scanned value: the arrays to slice, and those that are the same at each step.

    A factor without the leading axis of its kernel is the same at each step.
    """

    scanned: list[jax.Array]
    fixed: list[jax.Array | None]
    treedef: Any

    @classmethod
    def of(cls, value: Any, length: int) -> "_Rows":
        """Takes a value apart, given the number of steps."""
        leaves, treedef = jax.tree.flatten(value)
        fixed = [None if v.shape[0] == length else v[0] for v in leaves]
        return cls([v for v in leaves if v.shape[0] == length], fixed, treedef)

    def restore(self, row: list[jax.Array]) -> Any:
        """Returns the value at one step."""
        rest = iter(row)
        leaves = [next(rest) if v is None else v for v in self.fixed]
        return self.treedef.unflatten(leaves)


def _inside(eqn: Any, frozen: Sequence[bool]) -> list[Inside]:
    """The body; a carry may start as a constant, and is a result from then on."""
    n_consts, n_carry = scan_counts(eqn.params)
    rows = frozen[n_consts + n_carry :]
    flags = [*frozen[:n_consts], *[False] * n_carry, *rows]
    return [Inside(eqn.params["jaxpr"], flags, eqn.params["length"])]


CONTROL_FLOW = {"scan": ControlFlowRule(_analyze_scan, _run_scan, inside=_inside)}

"""What goes into each kernel: the second moments of the inputs, by a forward pass.

Beside each kernel `W` travels a *probe* in the place of the factor `a`: the identity
over its input axes, or a few columns `Ω`. Wherever the program uses the kernel, what
the use does to `W` is done to the probe, `h = x·Ω`, and the gradient of `½‖h‖²` with
respect to the probe is `xᵀ·(x·Ω)`, the wanted statistic. Products, convolutions,
lookups and ragged products differ in nothing but that linear map. What moves a kernel
before its use (casts, transposes, slices, scales) moves the probe by the same rules,
and their transposes bring the statistic back to the kernel's own layout.

Only the probes are differentiated, never the model: each use is a term of a sum that is
linear in its probe, and the bodies of loops and branches give their statistics out
forward. So it does not matter what a model does to its outputs (`stop_gradient`,
integers, operations without a derivative), and no activation is kept.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._errors import UnsupportedFeatureError
from .._jax.sharding import on_set_mesh
from .._jax.versions import manual_axes, rebind, source_line, vary
from .._params.axes import KernelAxes
from .._params.input_stats import InputStats, projection
from .._rules import CARRY, CONTROL_FLOW
from .._rules.adapted import Adapted, base_of
from .._rules.linear_use import Term, is_input_side, lookup_terms, use_terms
from .._rules.rule import Gathered, Run
from .._rules.view import Program, Step
from .interpret import walk
from .trace import Traced


def input_stats(
    traced: Traced,
    program: Program,
    axes: Mapping[str, KernelAxes],
    sketch: int | None,
) -> dict[str, InputStats]:
    """Returns the statistics of all kernels, given their axes and the program.

    Args:
        traced: the call.
        program: its program, with these kernels adapted.
        axes: the roles of the kernels' axes, by path.
        sketch: the columns of a sketch, or None for whole moments.
    """
    values = list(traced.inputs)
    for path, roles in axes.items():
        place = traced.positions[path]
        leaf = jnp.asarray(values[place])
        omega = projection(path, roles.fans(leaf.shape)[0], sketch)
        values[place] = Adapted.of(leaf, roles, *_probe(roles, leaf.shape, omega))
    _, gathered = _collect(program, values)
    return {
        path: _stats(roles, *gathered[traced.positions[path]])
        for path, roles in axes.items()
    }


def _probe(
    axes: KernelAxes, shape: Sequence[int], omega: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns a probe as two factors: `Ω` and a column of ones that counts the rows."""
    columns = jnp.concatenate([omega, jnp.ones((len(omega), 1))], axis=1)
    of_a, of_b = axes.factor_shapes(shape, columns.shape[1])
    n = len(axes.batch)
    a = jnp.broadcast_to(columns.reshape((1,) * n + of_a[n:]), of_a)
    # The rules move both factors; the other one is not looked at and has rank one.
    b = jnp.zeros((*of_b[:n], 1, *of_b[n + 1 :]))
    return a, b


def _stats(axes: KernelAxes, gathered: jax.Array) -> InputStats:
    """Returns what an aligned probe has gathered as a matrix and a number of rows."""
    order = axes.batch + axes.in_
    kept = sorted(order)
    found = lax.squeeze(gathered, axes.out)
    found = jnp.transpose(found, [*map(kept.index, order), len(kept)])
    batch = found.shape[: len(axes.batch)]
    found = found.reshape(*batch, -1, found.shape[-1])
    return InputStats(found[..., :-1], found[..., -1].sum(-1).round())


# --- a program, and what its probes gather ---


def _collect(
    program: Program, values: Sequence[Any]
) -> tuple[list[jax.Array], list[Gathered]]:
    """Returns the frozen outputs of a program and what the probes of `values` gather.

    Each use adds `⟨probe, statistic⟩` to a sum whose gradient is thus the statistic,
    moved back through all that has moved the probe.
    """

    def level(probes: Sequence[Gathered]) -> tuple[jax.Array, list[jax.Array]]:
        uses = _Uses()
        outputs = walk(program, list(map(_with_probes, values, probes)), uses)
        terms = map(on_set_mesh, uses.terms)
        return sum(terms, jnp.float32(0)), list(map(base_of, outputs))

    total, pull, outputs = jax.vjp(level, _probes(values), has_aux=True)
    (gathered,) = pull(vary(jnp.ones((), total.dtype), manual_axes(total)))
    return outputs, gathered


def _probes_of(value: Any) -> Gathered:
    parts = value.parts if isinstance(value, Adapted) else ()
    return tuple(part.a for part in parts)


def _probes(values: Sequence[Any]) -> list[Gathered]:
    return list(map(_probes_of, values))


def _with_probes(value: Any, probes: Gathered) -> Any:
    if not isinstance(value, Adapted):
        return value
    pairs = zip(value.parts, probes, strict=True)
    parts = [dataclasses.replace(part, a=probe) for part, probe in pairs]
    return Adapted(value.base, tuple(parts))


def _quiet(values: Sequence[Any]) -> list[Any]:
    """Returns values whose probes are not differentiated from outside."""
    still = jax.tree.map(lax.stop_gradient, _probes(values))
    return list(map(_with_probes, values, still))


# How loops, branches and shard_maps run what is inside: it gathers its own.
_RUN = Run(_collect, base_of, _probes)


class _Uses:
    """An evaluation of the frozen program, with a term for each use of a probe."""

    def __init__(self) -> None:
        self.terms: list[jax.Array] = []

    def _add(self, terms: Iterable[Term]) -> None:
        for probe, statistic in terms:
            # A probe that is the same along an axis gathers the sum along it.
            self.terms.append((probe * lax.stop_gradient(statistic)).sum())

    def plain(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Evaluates an equation on frozen values."""
        return rebind(eqn, list(map(base_of, values)))

    materialize = plain

    def enter(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Adds what each probe has gathered inside of an operation."""
        rule = CONTROL_FLOW[eqn.primitive.name]
        if rule.is_call:
            # It may give out kernels that it has moved: it is part of this level.
            return walk(step.programs[0], values, self)
        if (what := rule.uncounted(eqn)) is not None:
            raise UnsupportedFeatureError(f"`lora.inputs` cannot {what}")
        outputs, gathered = rule.run(eqn, step, _quiet(values), _RUN)
        for value, statistics in zip(values, gathered, strict=True):
            self._add(zip(_probes_of(value), statistics, strict=False))
        return outputs

    def product(self, step: Step, x: Any, kernels: list[Any]) -> Sequence[Any]:
        """Evaluates siblings one by one."""
        outputs = []
        for eqn, i, kernel in zip(step.eqns, step.kernels, kernels, strict=True):
            outputs += self.consume(eqn, step, [kernel, x] if i == 0 else [x, kernel])
        return outputs

    def consume(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Adds terms for the probes that stand on the input side of a use."""
        operand = next(i for i, v in enumerate(values) if isinstance(v, Adapted))
        for part in values[operand].parts:
            if is_input_side(eqn, operand, part, values[operand].base.shape):
                self._add(use_terms(eqn, operand, part, values))
        return self.plain(eqn, step, values)

    def carry(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Moves the probes with the base."""
        name = eqn.primitive.name
        if CARRY[name].mixes:
            raise UnsupportedFeatureError(
                f"`lora.inputs` cannot count the inputs of a target that {name} at "
                f"{source_line(eqn)} mixes with a frozen value; leave the target out "
                "of the config that it is made with"
            )
        # A probe is not to be zero, row by row, where all rows share it.
        return CARRY[name].run_rows(eqn, values)

    def lookup(self, eqn: Any, step: Step, values: list[Any]) -> Sequence[Any]:
        """Takes rows, and adds a term for the probes of each."""
        rows = self.carry(eqn, step, values)
        self._add(lookup_terms(eqn, values[0], rows))
        return list(map(base_of, rows))

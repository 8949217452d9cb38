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
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._errors import UnsupportedFeatureError
from .._jax.sharding import factor_spec, on_set_mesh
from .._jax.symbolic import scan_length
from .._jax.versions import (
    JIT,
    REMAT,
    manual_axes,
    rebind,
    scan_counts,
    source_line,
    vary,
)
from .._params.axes import KernelAxes
from .._params.input_stats import InputStats, projection
from .._rules import CARRY
from .._rules.adapted import Adapted, base_of
from .._rules.broadcast import cut
from .._rules.control_flow import Rows, specs_like
from .._rules.emit import is_mapped, switch
from .._rules.linear_use import is_input_side, lookup_terms, use_terms
from .._rules.view import Program, Step
from .interpret import Read, walk
from .trace import Traced

# What is gathered for the probes of one value, in their shapes; () for a plain value.
Gathered = tuple[jax.Array, ...]
Tally = Callable[[jax.Array, jax.Array], None]


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
    probes = [_probes_of(value) for value in values]

    def level(probes: list[Gathered]) -> tuple[jax.Array, list[jax.Array]]:
        terms: list[jax.Array] = []

        def tally(probe: jax.Array, statistic: jax.Array) -> None:
            terms.append((probe * lax.stop_gradient(statistic)).sum())

        inputs = list(map(_with_probes, values, probes))
        outputs = list(map(base_of, _walk(program, inputs, tally)))
        return sum(map(on_set_mesh, terms), jnp.float32(0)), outputs

    total, pull, outputs = jax.vjp(level, probes, has_aux=True)
    (gathered,) = pull(vary(jnp.float32(1), manual_axes(total)))
    return outputs, gathered


def _probes_of(value: Any) -> Gathered:
    parts = value.parts if isinstance(value, Adapted) else ()
    return tuple(part.a for part in parts)


def _with_probes(value: Any, probes: Gathered) -> Any:
    if not isinstance(value, Adapted):
        return value
    pairs = zip(value.parts, probes, strict=True)
    parts = [dataclasses.replace(part, a=probe) for part, probe in pairs]
    return Adapted(value.base, tuple(parts))


def _quiet(values: Sequence[Any]) -> list[Any]:
    """Returns values whose probes are not differentiated from outside."""
    still = lambda value: tuple(map(lax.stop_gradient, _probes_of(value)))
    return [_with_probes(value, still(value)) for value in values]


def _walk(program: Program, values: Sequence[Any], tally: Tally) -> list[Any]:
    """Evaluates a program as `_interpret.run` does, and tallies the uses on the way."""
    return walk(program, values, functools.partial(_step, tally=tally))


def _step(step: Step, read: Read, *, tally: Tally) -> Sequence[Any]:
    if step.action == "product":
        # Siblings stand where the first does, and read its other operand.
        x = read(step.eqns[0].invars[1 - step.kernels[0]])
        uses = []
        for eqn, i in zip(step.eqns, step.kernels, strict=True):
            kernel = read(eqn.invars[i])
            uses += _use(eqn, [kernel, x] if i == 0 else [x, kernel], tally)
        return uses
    (eqn,) = step.eqns
    values, name = [read(v) for v in eqn.invars], eqn.primitive.name
    if step.along is not None:
        values = cut(values, step.along)
    if step.action == "enter":
        if name not in _ENTER:
            raise UnsupportedFeatureError(
                f"`lora.inputs` cannot look into {name} at {source_line(eqn)}, which "
                "uses a target; leave the target out of the config that it is made with"
            )
        return _ENTER[name](eqn, step, values, tally)
    if step.action == "consume":
        return _use(eqn, values, tally)
    if step.action in ("carry", "lookup"):
        if CARRY[name].mixes:
            raise UnsupportedFeatureError(
                f"`lora.inputs` cannot count the inputs of a target that {name} at "
                f"{source_line(eqn)} mixes with a frozen value; leave the target out "
                "of the config that it is made with"
            )
        # A probe is not to be zero, row by row, where all rows share it.
        outputs = CARRY[name].run_rows(eqn, values)
        if step.action == "carry":
            return outputs
        for term in lookup_terms(eqn, values[0], outputs):
            tally(*term)
        return list(map(base_of, outputs))
    return rebind(eqn, list(map(base_of, values)))


def _use(eqn: Any, values: list[Any], tally: Tally) -> list[Any]:
    """The base operation, and a term for each probe that stands on the input side."""
    outputs = rebind(eqn, list(map(base_of, values)))
    operand = next(i for i, v in enumerate(values) if isinstance(v, Adapted))
    for part in values[operand].parts:
        if is_input_side(eqn, operand, part, values[operand].base.shape):
            for term in use_terms(eqn, operand, part, values):
                tally(*term)
    return outputs


# --- control flow: what is inside gathers its own and gives it out ---


def _tally_all(tally: Tally, values: Sequence[Any], gathered: Sequence[Any]) -> None:
    for value, found in zip(values, gathered, strict=True):
        for probe, statistic in zip(_probes_of(value), found, strict=True):
            tally(probe, statistic)


def _inline(eqn: Any, step: Any, values: list[Any], tally: Tally) -> list[Any]:
    """A jit or remat may give out kernels that it has moved: part of the level."""
    return _walk(step.programs[0], values, tally)


def _nothing(values: Sequence[Any]) -> list[Gathered]:
    """Returns zeros for all probes (with the types that they have in a shard_map)."""
    return [tuple(0 * probe for probe in _probes_of(value)) for value in values]


def _scan(eqn: Any, step: Any, values: list[Any], tally: Tally) -> list[Any]:
    params, (program,) = eqn.params, step.programs
    n_consts, n_carry = scan_counts(params)
    quiet = _quiet(values)
    consts, carry = quiet[:n_consts], quiet[n_consts : n_consts + n_carry]
    xs = [Rows.of(v, params["length"]) for v in quiet[n_consts + n_carry :]]

    def body(state: Any, rows: Any) -> tuple[Any, Any]:
        carry, total = state
        slices = [x.restore(row) for x, row in zip(xs, rows, strict=True)]
        outputs, found = _collect(program, [*consts, *carry, *slices])
        total = jax.tree.map(jnp.add, total, found[:n_consts])
        return (outputs[:n_carry], total), (outputs[n_carry:], found[n_consts:])

    (carry, total), (ys, found) = lax.scan(
        body,
        (list(map(base_of, carry)), _nothing(consts)),
        [x.scanned for x in xs],
        length=scan_length(params["length"]),
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    sliced = values[n_consts + n_carry :]
    _tally_all(tally, values[:n_consts], total)
    _tally_all(tally, sliced, list(map(_along_rows, sliced, found[n_carry:])))
    return [*carry, *ys]


def _along_rows(value: Any, found: Gathered) -> Gathered:
    """Sums over the steps for a probe that is the same at each of them."""
    pairs = zip(_probes_of(value), found, strict=True)
    return tuple(
        f if p.shape[0] == f.shape[0] else f.sum(0, keepdims=True) for p, f in pairs
    )


def _while(eqn: Any, step: Any, values: list[Any], tally: Tally) -> list[Any]:
    """What the condition uses is not counted: it has no way out."""
    params, (cond, body) = eqn.params, step.programs
    if is_mapped(eqn):
        raise UnsupportedFeatureError(
            f"`lora.inputs` cannot tell which examples still run in the while loop at "
            f"{source_line(eqn)}, whose condition `jax.vmap` made one for each example "
            "of. Map over `lora.inputs` in place of the loop, and add up what it gives"
        )
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    quiet = _quiet(values)
    cond_consts, consts = quiet[:n_cond], quiet[n_cond : n_cond + n_body]

    def one(state: Any) -> Any:
        carry, total = state
        outputs, found = _collect(body, [*consts, *carry])
        return outputs, jax.tree.map(jnp.add, total, found[:n_body])

    start = list(map(base_of, quiet[n_cond + n_body :]))
    carry, total = lax.while_loop(
        lambda state: _collect(cond, [*cond_consts, *state[0]])[0][0],
        one,
        (start, _nothing(consts)),
    )
    _tally_all(tally, values[n_cond : n_cond + n_body], total)
    return carry


def _cond(eqn: Any, step: Any, values: list[Any], tally: Tally) -> list[Any]:
    index, *operands = values
    branches = [lambda *args, p=p: _collect(p, args) for p in step.programs]
    outputs, found = switch(eqn, index, branches, _quiet(operands))
    _tally_all(tally, operands, found)
    return outputs


def _shard_map(eqn: Any, step: Any, values: list[Any], tally: Tally) -> list[Any]:
    params, (program,) = eqn.params, step.programs
    if not params["check_vma"]:
        raise UnsupportedFeatureError(
            f"`lora.inputs` cannot tell what is replicated inside of the shard_map at "
            f"{source_line(eqn)}, which uses a target and has `check_vma=False`"
        )
    gathered_specs = [
        tuple(factor_spec(spec, p.shape, base_of(v).shape) for p in _probes_of(v))
        for v, spec in zip(values, params["in_specs"], strict=True)
    ]
    specs = [
        specs_like(value, spec, params["mesh"])[1]
        for value, spec in zip(values, params["in_specs"], strict=True)
    ]
    outputs, found = jax.shard_map(
        lambda *args: _collect(program, args),
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=(list(params["out_specs"]), gathered_specs),
        axis_names=params["newly_manual_axes"],
    )(*_quiet(values))
    _tally_all(tally, values, found)
    return outputs


_ENTER: dict[str, Callable[[Any, Any, list[Any], Tally], list[Any]]] = {
    **dict.fromkeys((*JIT, *REMAT, "closed_call", "core_call", "composite"), _inline),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}

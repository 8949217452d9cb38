"""Rules for the operations that carry an adapted value: it stays factored.

A rule has two halves. `axes(eqn, operand)` says, for each output and each of its axes,
which axes of the operand it comes from; the analysis follows kernels through the
program with that alone. `move(eqn, factor, ...)` does to an aligned factor (see
`_axes.align`) what the equation does to the value; an axis that the factor lacks
is of size 1 and stays so.

To add a rule, write the two functions and enter them in `CARRY` under the primitive's
name.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.dtypes import summed_in
from .._jax.sharding import factor_spec
from .._jax.versions import rebind
from .._params.axes import Roles, Shape
from .._params.lazy import dense
from . import moves
from .adapted import Adapted, Part, base_of
from .collectives import all_gather, all_gather_axes, permute
from .gather import found_rows, gather_axes, gather_rows, lacks_rows, select
from .lazy_moves import carried
from .mix import mix, mix_axes, mix_supports
from .moves import AxisMap, identity, present, same_axes
from .sum import sum_, sum_axes


@dataclasses.dataclass(frozen=True)
class CarryRule:
    """One operation that keeps an adapted operand factored.

    Attributes:
        axes: `(eqn, operand) -> [AxisMap of each output]`, with None for an output that
            does not come from the operand; None where the form of the equation is not
            supported.
        run: `(eqn, operands) -> outputs` on plain and adapted values.
        operands: the operands that may be adapted; None means any one of them.
        together: whether several operands may be adapted at once.
        frozen: whether the other operands must not depend on activations: what is
            added to an activation, or multiplied by one, is used up.
        supports: `(eqn, operand, roles of the value) -> bool`: whether the value stays
            factored once the roles of the kernel are settled.
    """

    axes: Callable[[Any, int], Sequence[AxisMap | None] | None]
    run: Callable[[Any, list[Any]], list[Any]]
    operands: tuple[int, ...] | None = (0,)
    together: bool = False
    frozen: bool = False
    supports: Callable[[Any, int, Roles], bool] = lambda eqn, operand, roles: True

    def takes(self, operands: Collection[int], active: bool) -> bool:
        """Returns whether just these operands may be adapted.

        Args:
            operands: the operands.
            active: whether another operand depends on activations.
        """
        known = self.operands is None or set(operands) <= set(self.operands)
        alone = self.together or len(operands) == 1
        return known and alone and not (self.frozen and active)


def _mover(move: Callable[[Any, jax.Array, Shape, list[Any]], jax.Array]) -> Callable:
    """Makes `run` from a function that moves one factor of the first operand."""

    def run(eqn: Any, operands: list[Any]) -> list[Any]:
        value, others = operands[0], operands[1:]
        (base,) = carried(eqn, [base_of(value), *others])
        shape = value.base.shape
        one = lambda factor: move(eqn, factor, shape, others)
        return [value.moved(base, one)]

    return run


def _unchanged(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    del eqn, shape, others
    return factor


# --- arithmetic that is linear in the value ---


def _axes_scaled(eqn: Any, operand: int) -> list[AxisMap] | None:
    """The other operand is a scalar, or a vector along some axes, new ones too."""
    own, out = eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape
    if any(m not in (n, 1) for m, n in zip(own, out, strict=True)):
        return None
    return same_axes(eqn, operand)


def scale_axes(eqn: Any, operand: int) -> frozenset[int]:
    """Returns the axes along which the other factor of a `mul` or `div` varies."""
    shape = eqn.invars[1 - operand].aval.shape
    return frozenset(i for i, n in enumerate(shape) if n != 1)


def _scale_supports(eqn: Any, operand: int, roles: Roles) -> bool:
    """Whether the scale varies along axes that one factor has alone, or none has."""
    shape = eqn.invars[operand].aval.shape
    varies = [i for i in scale_axes(eqn, operand) if shape[i] != 1]
    along = {roles[i] for i in varies} - {"batch"}
    return len(along) <= 1 and None not in along


def _scale(eqn: Any, operands: list[Any]) -> list[Any]:
    index = 0 if isinstance(operands[0], Adapted) else 1
    value, other = operands[index], operands[1 - index]
    (base,) = carried(eqn, [base_of(v) for v in operands])
    sizes = enumerate(zip(jnp.shape(other), value.base.shape, strict=False))
    varies = [i for i, (n, own) in sizes if n != 1 != own]
    amount = other.astype(summed_in(other.dtype))
    amount = amount[..., None] if amount.ndim else amount
    divides = eqn.primitive.name == "div"

    def times(factor: jax.Array) -> jax.Array:
        return factor / amount if divides else factor * amount

    def scaled(part: Part) -> Part:
        has = lambda array: all(present(array, i, value.base.shape) for i in varies)
        if has(part.a):
            return dataclasses.replace(part, a=times(part.a))
        placed = [i for i, place in enumerate(part.places) if has(place)]
        if has(part.b) or not placed:
            return dataclasses.replace(part, b=times(part.b))
        places = list(part.places)
        places[placed[0]] = times(places[placed[0]])
        return dataclasses.replace(part, places=tuple(places))

    return [Adapted(base, tuple(map(scaled, value.parts)), value.scale)]


def scale_beside(eqn: Any, operands: list[Any]) -> list[Any]:
    """Keeps a scale apart from the kernel: `(base + Δ)·scale`, as DoRA's is kept."""
    index = 0 if isinstance(operands[0], Adapted) else 1
    value, other = operands[index], operands[1 - index]
    amount = other.astype(summed_in(other.dtype))
    amount = amount.reshape(*(amount.shape or (1,) * value.base.ndim), 1)
    amount = 1 / amount if eqn.primitive.name == "div" else amount
    scale = amount if value.scale is None else value.scale * amount
    base, shape = value.base, tuple(eqn.outvars[0].aval.shape)
    if base.shape != shape:  # the scale has axes along which the kernel has size one
        base = jnp.broadcast_to(dense(base), shape)
    return [dataclasses.replace(value, base=base, scale=scale)]


def _negate(eqn: Any, operands: list[Any]) -> list[Any]:
    (value,) = operands
    (base,) = carried(eqn, [value.base])
    flipped = [dataclasses.replace(part, a=-part.a) for part in value.parts]
    return [Adapted(base, tuple(flipped), value.scale)]


# --- operations that touch the value as a whole ---


def _convert_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    """Casts to floats, and to complex: the real part of a complex sum is no sum."""
    new, old = eqn.params["new_dtype"], eqn.invars[0].aval.dtype
    is_complex = lambda dtype: jnp.issubdtype(dtype, jnp.complexfloating)
    if not jnp.issubdtype(new, jnp.inexact) or (
        is_complex(old) and not is_complex(new)
    ):
        return None
    return same_axes(eqn, operand)


def _barrier_axes(eqn: Any, operand: int) -> list[AxisMap | None]:
    """Only the output of the same position comes from the operand."""
    maps: list[AxisMap | None] = [None] * len(eqn.outvars)
    maps[operand] = identity(eqn.outvars[operand].aval.ndim)
    return maps


def _barrier(eqn: Any, operands: list[Any]) -> list[Any]:
    bases = carried(eqn, [base_of(v) for v in operands])
    return [
        value.with_base(base) if isinstance(value, Adapted) else base
        for base, value in zip(bases, operands, strict=True)
    ]


def _rebound(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """The operation itself, on the factor: it does not look at axes."""
    return rebind(eqn, [factor])[0]


def _reshard(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Sends the factor along, to another mesh or into a region of Auto axes too."""
    wanted = eqn.params["dst_sharding"]
    spec = factor_spec(wanted.spec, factor.shape, shape)
    params = {**eqn.params, "dst_sharding": wanted.update(spec=spec)}
    return rebind(eqn.replace(params=params), [factor])[0]


def take_rows(eqn: Any, operands: list[Any]) -> Adapted:
    """Takes rows by a gather; those that are filled in have no scale."""
    value, others = operands[0], operands[1:]
    (rows,) = _mover(gather_rows)(eqn, operands)
    if rows.scale is None:
        return rows
    found = found_rows(eqn, value.base.shape, *others)
    return dataclasses.replace(rows, scale=select(found, rows.scale, 1))


def _gather(eqn: Any, operands: list[Any]) -> list[Any]:
    """Takes rows; a factor that all rows share is zero for those that are filled in.

    So its gradient leaves them out, as that of a factor with rows of its own does.
    """
    value, others = operands[0], operands[1:]
    rows, found = take_rows(eqn, operands), found_rows(eqn, value.base.shape, *others)
    parts = []
    for old, part in zip(value.parts, rows.parts, strict=True):
        shared = [name for name in "ab" if lacks_rows(eqn, getattr(old, name))]
        new = {name: select(found, getattr(part, name), 0) for name in shared}
        parts.append(dataclasses.replace(part, **new))
    return [dataclasses.replace(rows, parts=tuple(parts))]


def _power_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    return same_axes(eqn, operand) if eqn.params["y"] == 1 else None


_plain = CarryRule(same_axes, _mover(_unchanged))

CARRY: dict[str, CarryRule] = {
    "transpose": CarryRule(moves.transpose_axes, _mover(moves.transpose)),
    "squeeze": CarryRule(moves.squeeze_axes, _mover(moves.squeeze)),
    "broadcast_in_dim": CarryRule(moves.broadcast_axes, _mover(moves.broadcast)),
    "reshape": CarryRule(moves.reshape_axes, _mover(moves.reshape)),
    "slice": CarryRule(same_axes, _mover(moves.slice_)),
    "dynamic_slice": CarryRule(same_axes, _mover(moves.dynamic_slice)),
    "gather": CarryRule(gather_axes, _gather),
    "split": CarryRule(same_axes, moves.split),
    "unstack": CarryRule(moves.unstack_axes, moves.unstack),
    "stack": CarryRule(moves.stack_axes, moves.stack, operands=None, together=True),
    "rev": CarryRule(same_axes, _mover(_rebound)),
    "pad": CarryRule(same_axes, moves.pad),
    "concatenate": CarryRule(
        same_axes, moves.concatenate, operands=None, together=True
    ),
    "mul": CarryRule(_axes_scaled, _scale, operands=(0, 1), supports=_scale_supports),
    "div": CarryRule(_axes_scaled, _scale, supports=_scale_supports),
    "dot_general": CarryRule(
        mix_axes, mix, operands=(0, 1), frozen=True, supports=mix_supports
    ),
    "reduce_sum": CarryRule(mix_axes, mix, supports=mix_supports),
    "add": CarryRule(sum_axes, sum_, operands=None, together=True, frozen=True),
    "sub": CarryRule(sum_axes, sum_, operands=None, together=True, frozen=True),
    "integer_pow": CarryRule(_power_axes, _mover(_unchanged)),
    "tile": CarryRule(same_axes, _mover(moves.tile)),
    "neg": CarryRule(same_axes, _negate),
    "convert_element_type": CarryRule(_convert_axes, _mover(_unchanged)),
    "reduce_precision": _plain,
    "copy": _plain,
    "copy_p": _plain,
    "device_put": _plain,
    "name": _plain,
    "sharding_constraint": _plain,
    "reshard": CarryRule(same_axes, _mover(_reshard)),
    "layout_constraint": _plain,
    "optimization_barrier": CarryRule(
        _barrier_axes, _barrier, operands=None, together=True
    ),
    "stop_gradient": CarryRule(same_axes, _mover(_rebound)),
    "pvary": CarryRule(same_axes, _mover(_rebound)),
    "pcast": CarryRule(same_axes, _mover(_rebound)),
    "all_gather": CarryRule(all_gather_axes, all_gather),
    "all_gather_invariant": CarryRule(all_gather_axes, all_gather),
    "ppermute": CarryRule(same_axes, permute),
}

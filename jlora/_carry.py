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
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._adapted import Adapted, Part, base_of, complete
from ._compat import rebind
from ._gather import gather_axes, gather_rows
from ._sharding import factor_spec

# For each axis of a value, the axes of another value that it comes from.
AxisMap = list[frozenset[int]]
Shape = tuple[int, ...]


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
    """

    axes: Callable[[Any, int], Sequence[AxisMap | None] | None]
    run: Callable[[Any, list[Any]], list[Any]]
    operands: tuple[int, ...] | None = (0,)
    together: bool = False


def _present(factor: jax.Array, axis: int, shape: Shape) -> bool:
    return factor.shape[axis] == shape[axis]


def _identity(ndim: int) -> AxisMap:
    return [frozenset([i]) for i in range(ndim)]


def _same_axes(eqn: Any, operand: int) -> list[AxisMap]:
    return [_identity(eqn.invars[operand].aval.ndim)]


def _mover(move: Callable[[Any, jax.Array, Shape, list[Any]], jax.Array]) -> Callable:
    """Makes `run` from a function that moves one factor of the first operand."""

    def run(eqn: Any, operands: list[Any]) -> list[Any]:
        value, others = operands[0], operands[1:]
        (base,) = rebind(eqn, [base_of(value), *others])
        shape = value.base.shape
        one = lambda factor: move(eqn, factor, shape, others)
        return [Adapted(base, tuple(part.each(one) for part in value.parts))]

    return run


def _unchanged(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    del eqn, shape, others
    return factor


# --- transpose, reshape, and axes of size one ---


def _transpose_axes(eqn: Any, operand: int) -> list[AxisMap]:
    return [[frozenset([i]) for i in eqn.params["permutation"]]]


def _transpose(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    return jnp.transpose(factor, (*eqn.params["permutation"], len(shape)))


def _squeeze_axes(eqn: Any, operand: int) -> list[AxisMap]:
    ndim = eqn.invars[0].aval.ndim
    dropped = {d % ndim for d in eqn.params["dimensions"]}
    return [[frozenset([i]) for i in range(ndim) if i not in dropped]]


def _squeeze(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    return jnp.squeeze(factor, [d % len(shape) for d in eqn.params["dimensions"]])


def _broadcast_axes(eqn: Any, operand: int) -> list[AxisMap]:
    dims = eqn.params["broadcast_dimensions"]
    ndim = len(eqn.params["shape"])
    return [[frozenset([dims.index(i)] if i in dims else []) for i in range(ndim)]]


def _broadcast(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    dims = eqn.params["broadcast_dimensions"]
    new = [1] * len(eqn.params["shape"])
    for axis, target in enumerate(dims):
        new[target] = factor.shape[axis]
    return factor.reshape(*new, factor.shape[-1])


def reshape_groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Matches the axes of a reshape in the smallest groups of equal size.

    Axes of size one form groups of their own.

    >>> reshape_groups((4, 6), (4, 2, 3))
    [([0], [0]), ([1], [1, 2])]
    """
    groups = [([i], []) for i, n in enumerate(old) if n == 1]
    groups += [([], [j]) for j, n in enumerate(new) if n == 1]
    left = [i for i, n in enumerate(old) if n != 1]
    right = [j for j, n in enumerate(new) if n != 1]
    while left:
        took, gave = [left.pop(0)], [right.pop(0)]
        while (m := math.prod(old[i] for i in took)) != (
            n := math.prod(new[j] for j in gave)
        ):
            (took if m < n else gave).append((left if m < n else right).pop(0))
        groups.append((took, gave))
    return groups


def _reshape_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    old, new = eqn.invars[0].aval.shape, eqn.params["new_sizes"]
    if eqn.params.get("dimensions") is not None or 0 in old:
        return None
    origins: AxisMap = [frozenset()] * len(new)
    for took, gave in reshape_groups(old, new):
        for j in gave:
            origins[j] = frozenset(took)
    return [origins]


def _reshape(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    new = eqn.params["new_sizes"]
    sizes = [1] * len(new)
    for took, gave in reshape_groups(shape, new):
        if all(factor.shape[i] == 1 for i in took):
            continue
        factor = complete(factor, took, shape)
        for j in gave:
            sizes[j] = new[j]
    return factor.reshape(*sizes, factor.shape[-1])


# --- pieces of a value ---


def _slice(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    params = eqn.params
    strides = params["strides"] or (1,) * len(shape)
    starts, limits, steps = [], [], []
    for axis, n in enumerate(factor.shape[:-1]):
        here = _present(factor, axis, shape)
        starts.append(params["start_indices"][axis] if here else 0)
        limits.append(params["limit_indices"][axis] if here else n)
        steps.append(strides[axis] if here else 1)
    rank = factor.shape[-1]
    return lax.slice(factor, (*starts, 0), (*limits, rank), (*steps, 1))


def _dynamic_slice(
    eqn: Any, factor: jax.Array, shape: Shape, starts: list
) -> jax.Array:
    sizes, where = [], []
    for axis, size in enumerate(eqn.params["slice_sizes"]):
        here = _present(factor, axis, shape)
        sizes.append(size if here else 1)
        where.append(starts[axis] if here else jnp.zeros_like(starts[axis]))
    zero = jnp.zeros_like(starts[0])
    return lax.dynamic_slice(factor, [*where, zero], [*sizes, factor.shape[-1]])


def _rev(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    return lax.rev(factor, eqn.params["dimensions"])


def _split_axes(eqn: Any, operand: int) -> list[AxisMap]:
    return [_identity(eqn.invars[0].aval.ndim) for _ in eqn.outvars]


def _split(eqn: Any, operands: list[Any]) -> list[Any]:
    (value,) = operands
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    bases = rebind(eqn, [value.base])

    def pieces(factor: jax.Array) -> Sequence[jax.Array]:
        if not _present(factor, axis, value.base.shape):
            return [factor] * len(bases)
        return lax.split(factor, sizes, axis=axis)

    halves = [(pieces(p.a), pieces(p.b), p.scaling) for p in value.parts]
    return [
        Adapted(base, tuple(Part(a[i], b[i], s) for a, b, s in halves))
        for i, base in enumerate(bases)
    ]


def _unstack_axes(eqn: Any, operand: int) -> list[AxisMap]:
    ndim, axis = eqn.invars[0].aval.ndim, eqn.params["axis"]
    kept = [frozenset([i]) for i in range(ndim) if i != axis]
    return [kept for _ in eqn.outvars]


def _unstack(eqn: Any, operands: list[Any]) -> list[Any]:
    (value,) = operands
    axis, bases = eqn.params["axis"], rebind(eqn, [value.base])

    def entry(factor: jax.Array, i: int) -> jax.Array:
        here = _present(factor, axis, value.base.shape)
        return lax.index_in_dim(factor, i if here else 0, axis, keepdims=False)

    return [
        Adapted(base, tuple(p.each(lambda f, i=i: entry(f, i)) for p in value.parts))
        for i, base in enumerate(bases)
    ]


# --- pads and concatenations ---


def _hold(part: Part, axis: int, shape: Shape) -> Part:
    """Returns the part with `axis` present in at least one factor."""
    if any(_present(f, axis, shape) for f in (part.a, part.b)):
        return part
    return dataclasses.replace(part, a=complete(part.a, [axis], shape))


def _pad_part(part: Part, config: Sequence[tuple], shape: Shape) -> Part:
    """Pads both factors with zeros where they have the padded axis."""
    for axis, amounts in enumerate(config):
        if any(amounts):
            part = _hold(part, axis, shape)

    def pad(factor: jax.Array) -> jax.Array:
        here = [_present(factor, axis, shape) for axis in range(len(shape))]
        amounts = [c if h else (0, 0, 0) for c, h in zip(config, here, strict=True)]
        zero = jnp.zeros((), factor.dtype)
        return lax.pad(factor, zero, [*amounts, (0, 0, 0)])

    return part.each(pad)


def _pad(eqn: Any, operands: list[Any]) -> list[Any]:
    value, fill = operands
    (base,) = rebind(eqn, [value.base, fill])
    config, shape = eqn.params["padding_config"], value.base.shape
    return [Adapted(base, tuple(_pad_part(p, config, shape) for p in value.parts))]


def _concatenate(eqn: Any, operands: list[Any]) -> list[Any]:
    (base,) = rebind(eqn, [base_of(v) for v in operands])
    return [_joined(base, operands, eqn.params["dimension"])]


def _joined(base: jax.Array, operands: Sequence[Any], axis: int) -> Adapted:
    """Pads the parts of each operand with zeros to their place in the whole."""
    parts, offset, total = [], 0, base.shape[axis]
    for value in operands:
        shape = base_of(value).shape
        if isinstance(value, Adapted):
            config = [(0, 0, 0)] * base.ndim
            config[axis] = (offset, total - offset - shape[axis], 0)
            parts += [_pad_part(part, config, shape) for part in value.parts]
        offset += shape[axis]
    return Adapted(base, tuple(parts))


def _stack_axes(eqn: Any, operand: int) -> list[AxisMap]:
    axes = _identity(eqn.invars[operand].aval.ndim)
    return [[*axes[: eqn.params["axis"]], frozenset(), *axes[eqn.params["axis"] :]]]


def _stack(eqn: Any, operands: list[Any]) -> list[Any]:
    axis = eqn.params["axis"]
    (base,) = rebind(eqn, [base_of(v) for v in operands])
    add_axis = lambda array: jnp.expand_dims(array, axis)
    return [_joined(base, [jax.tree.map(add_axis, v) for v in operands], axis)]


# --- arithmetic that is linear in the value ---


def _scale_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    """The other operand must be a scalar, or a vector along some axes."""
    out_ndim = eqn.outvars[0].aval.ndim
    if eqn.invars[operand].aval.shape != eqn.outvars[0].aval.shape:
        return None
    return [_identity(out_ndim)]


def scale_varies_along(eqn: Any, operand: int) -> frozenset[int]:
    """Returns the axes along which the other factor of a `mul` or `div` varies."""
    shape = eqn.invars[1 - operand].aval.shape
    return frozenset(i for i, n in enumerate(shape) if n != 1)


def _scale(eqn: Any, operands: list[Any]) -> list[Any]:
    index = 0 if isinstance(operands[0], Adapted) else 1
    value, other = operands[index], operands[1 - index]
    (base,) = rebind(eqn, [base_of(v) for v in operands])
    varies = scale_varies_along(eqn, index)
    amount = other.astype(jnp.promote_types(other.dtype, jnp.float32))
    amount = amount[..., None] if amount.ndim else amount
    divides = eqn.primitive.name == "div"

    def scaled(part: Part) -> Part:
        side = "a" if all(_present(part.a, i, base.shape) for i in varies) else "b"
        factor = getattr(part, side)
        factor = factor / amount if divides else factor * amount
        return dataclasses.replace(part, **{side: factor})

    return [Adapted(base, tuple(map(scaled, value.parts)))]


def _negate(eqn: Any, operands: list[Any]) -> list[Any]:
    (value,) = operands
    (base,) = rebind(eqn, [value.base])
    flipped = [dataclasses.replace(part, a=-part.a) for part in value.parts]
    return [Adapted(base, tuple(flipped))]


# --- operations that touch the value as a whole ---


def _convert_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        return None
    return _same_axes(eqn, operand)


def _barrier_axes(eqn: Any, operand: int) -> list[AxisMap | None]:
    """Only the output of the same position comes from the operand."""
    maps: list[AxisMap | None] = [None] * len(eqn.outvars)
    maps[operand] = _identity(eqn.outvars[operand].aval.ndim)
    return maps


def _barrier(eqn: Any, operands: list[Any]) -> list[Any]:
    bases = rebind(eqn, [base_of(v) for v in operands])
    return [
        Adapted(base, value.parts) if isinstance(value, Adapted) else base
        for base, value in zip(bases, operands, strict=True)
    ]


def _stop_gradient(
    eqn: Any, factor: jax.Array, shape: Shape, others: list
) -> jax.Array:
    return lax.stop_gradient(factor)


def _rebound(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """The operation itself, on the factor: it does not look at axes."""
    return rebind(eqn, [factor])[0]


def _reshard(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Sends the factor along, to another mesh or into a region of Auto axes too."""
    wanted = eqn.params["dst_sharding"]
    spec = factor_spec(wanted.spec, factor.shape, shape)
    params = {**eqn.params, "dst_sharding": wanted.update(spec=spec)}
    return rebind(eqn.replace(params=params), [factor])[0]


def _all_gather_axes(eqn: Any, operand: int) -> list[AxisMap] | None:
    if not eqn.params.get("tiled"):
        return None
    return [_identity(eqn.invars[0].aval.ndim) for _ in eqn.outvars]


def _all_gather(eqn: Any, factor: jax.Array, shape: Shape, others: list) -> jax.Array:
    """Gathers the factor that has the axis; the other is the same on every device."""
    if not _present(factor, eqn.params["all_gather_dimension"], shape):
        return factor
    return rebind(eqn, [factor])[0]


_plain = CarryRule(_same_axes, _mover(_unchanged))

CARRY: dict[str, CarryRule] = {
    "transpose": CarryRule(_transpose_axes, _mover(_transpose)),
    "squeeze": CarryRule(_squeeze_axes, _mover(_squeeze)),
    "broadcast_in_dim": CarryRule(_broadcast_axes, _mover(_broadcast)),
    "reshape": CarryRule(_reshape_axes, _mover(_reshape)),
    "slice": CarryRule(_same_axes, _mover(_slice)),
    "dynamic_slice": CarryRule(_same_axes, _mover(_dynamic_slice)),
    "gather": CarryRule(gather_axes, _mover(gather_rows)),
    "split": CarryRule(_split_axes, _split),
    "unstack": CarryRule(_unstack_axes, _unstack),
    "stack": CarryRule(_stack_axes, _stack, operands=None, together=True),
    "rev": CarryRule(_same_axes, _mover(_rev)),
    "pad": CarryRule(_same_axes, _pad),
    "concatenate": CarryRule(_same_axes, _concatenate, operands=None, together=True),
    "mul": CarryRule(_scale_axes, _scale, operands=(0, 1)),
    "div": CarryRule(_scale_axes, _scale),
    "neg": CarryRule(_same_axes, _negate),
    "convert_element_type": CarryRule(_convert_axes, _mover(_unchanged)),
    "reduce_precision": _plain,
    "copy": _plain,
    "copy_p": _plain,
    "device_put": _plain,
    "name": _plain,
    "sharding_constraint": _plain,
    "reshard": CarryRule(_same_axes, _mover(_reshard)),
    "layout_constraint": _plain,
    "optimization_barrier": CarryRule(
        _barrier_axes, _barrier, operands=None, together=True
    ),
    "stop_gradient": CarryRule(_same_axes, _mover(_stop_gradient)),
    "pvary": CarryRule(_same_axes, _mover(_rebound)),
    "pcast": CarryRule(_same_axes, _mover(_rebound)),
    "all_gather": CarryRule(_all_gather_axes, _mover(_all_gather)),
    "all_gather_invariant": CarryRule(_all_gather_axes, _mover(_all_gather)),
}

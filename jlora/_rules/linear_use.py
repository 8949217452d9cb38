"""What one use of a kernel does, done to a probe of its inputs; see `inputs.py`.

Every use is linear in the kernel, so that a probe `Ω` in the place of the kernel gives
`h = x·Ω`, and the transpose of that map takes `h` to `xᵀ·(x·Ω)`.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.dots import dot
from .._jax.dtypes import summed_in
from .._jax.sharding import without_axes
from .._jax.versions import manual_axes
from .._params.axes import Shape, free_axes
from .adapted import Adapted, Part, complete, times_place
from .dot_general import dot_dims
from .lookup import indexed_axes
from .parts import factor_matrix
from .ragged_rows import Rows, rows_product
from .window import Window, convolve

# A probe, and what it gathers.
Term = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class LinearUse:
    """How one primitive uses a kernel up, as a map that is linear in it.

    Attributes:
        summed: `(eqn, operand) -> axes` of the kernel that it sums over.
        shared: `(eqn, operand) -> axes` that the kernel shares with what it meets.
        apply: `(eqn, operand, others, probe, shape, own) -> x·Ω`, given the other
            operands, the kernel's shape and the summed axes that are batch axes here.
        rows: `(eqn, operand, values) -> number of inputs`, for each group if there are.
        sums_batches: whether it may sum over batch axes.
    """

    summed: Callable[[Any, int], Sequence[int]]
    shared: Callable[[Any, int], Sequence[int]]
    apply: Callable[
        [Any, int, Sequence[Any], jax.Array, Shape, Collection[int]], jax.Array
    ]
    rows: Callable[[Any, int, Sequence[Any]], Any]
    sums_batches: bool = False


def is_input_side(eqn: Any, operand: int, part: Part, shape: Shape) -> bool:
    """Whether a use sums over input axes of the kernel.

    A transposed use (a tied head, the backward pass of an inner gradient) sums over the
    output axes: what it multiplies is no input of the kernel.
    """
    use = USES[eqn.primitive.name]
    own = _own_axes(use, eqn, operand, part)
    summed = [i for i in use.summed(eqn, operand) if i not in own]
    if own and all(part.a.shape[i] == 1 for i in summed):
        return False  # it sums over batch axes alone
    return all(shape[i] == 1 or part.b.shape[i] == 1 for i in summed)


def _own_axes(use: LinearUse, eqn: Any, operand: int, part: Part) -> set[int]:
    """Returns the batch axes of a kernel that a product sums over.

    Each index along them has inputs of its own: a config names such axes.
    """
    if not use.sums_batches:
        return set()
    summed = use.summed(eqn, operand)
    return {i for i in summed if part.a.shape[i] != 1 and part.b.shape[i] != 1}


def use_terms(
    eqn: Any, operand: int, part: Part, values: Sequence[Any]
) -> Iterator[Term]:
    """Returns what the columns of a probe gather in a product or convolution."""
    use = USES[eqn.primitive.name]
    shape, x = values[operand].base.shape, values[1 - operand]
    others = [x.astype(summed_in(x.dtype)), *values[2:]]
    a = _placed(use, eqn, operand, part)
    probe, ones = a[..., :-1], a[..., -1:]
    own = _own_axes(use, eqn, operand, part)
    apply = lambda probe: use.apply(eqn, operand, others, probe, shape, own)
    h, pull = jax.vjp(apply, lax.stop_gradient(probe))
    # The norm of a complex x·Ω: its gradient is the real part of xᴴ·x·Ω.
    h = lax.conj(h) if jnp.issubdtype(h.dtype, jnp.complexfloating) else h
    yield probe, pull(h)[0] / _copies(part)
    summed = [i for i in use.summed(eqn, operand) if i not in own]
    ones = complete(ones, [*use.shared(eqn, operand), *summed], shape)
    yield ones, _counted(ones, use.rows(eqn, operand, values), summed)


def _placed(use: LinearUse, eqn: Any, operand: int, part: Part) -> jax.Array:
    """Returns a probe that is zero where its part does not stand, but among outputs."""
    taken = {*use.summed(eqn, operand), *use.shared(eqn, operand)}
    a = part.a
    for place in part.places:
        along = {i for i, n in enumerate(place.shape) if n != 1}
        a = times_place(a, place) if along & taken or not along else a
    return a


def lookup_terms(eqn: Any, value: Adapted, rows: Sequence[Adapted]) -> Iterator[Term]:
    """Returns what probes gather in a lookup: its inputs are the rows of an identity.

    Rows that are out of bounds may be NaN; they are no rows.
    """
    indexed, shape = indexed_axes(eqn), value.base.shape
    for part, row in zip(value.parts, rows[0].parts, strict=True):
        if all(shape[i] == 1 or part.b.shape[i] == 1 for i in indexed):
            a = row.a
            for place in row.places:
                sides = zip(place.shape, row.a.shape, strict=True)
                outputs = any(n != 1 == m for n, m in sides)
                a = a if outputs else times_place(a, place)
            probe, ones = a[..., :-1], a[..., -1:]
            yield probe, jnp.where(jnp.isnan(probe), 0, probe) / _copies(part)
            yield ones, _counted(ones, 1, ()) / _copies(part)


def _copies(part: Part) -> int:
    """Returns how often each input occurs on the devices of a shard_map.

    Where the outputs of a kernel are sharded, and not its inputs, each shard gets the
    same inputs, marked as varying because the kernel does.
    """
    axes = manual_axes(part.b) - manual_axes(part.a)
    return math.prod(map(lax.axis_size, axes))


def _counted(ones: jax.Array, rows: Any, summed: Sequence[int]) -> jax.Array:
    """Returns what makes a probe of ones gather `rows`, once over the summed axes.

    A probe that was scaled by `c` on its way has its gradient scaled by `c` on its way
    back; where it was padded it is zero.
    """
    here = (ones != 0) & ~jnp.isnan(ones)
    found = here.sum(tuple(summed), keepdims=True, dtype=ones.dtype)
    times = jnp.maximum(found, 1)
    scale = jnp.where(here, lax.stop_gradient(ones), 1)
    return jnp.where(here, rows / (times * scale), 0)


# --- dot_general ---


def _dot(
    eqn: Any,
    operand: int,
    others: Sequence[Any],
    probe: jax.Array,
    shape: Shape,
    own: Collection[int],
) -> jax.Array:
    """The product; the columns of the probe are one more free axis.

    It sums over no axis of `own`: these are batch axes here.
    """
    x = others[0]
    contract, batch, x_contract, x_batch = dot_dims(eqn, operand)
    pairs = list(zip(contract, x_contract, strict=True))
    shared = [*zip(batch, x_batch, strict=True), *(p for p in pairs if p[0] in own)]
    pairs = [pair for pair in pairs if pair[0] not in own]
    probe = complete(probe, [*contract, *batch], shape)
    sides = lambda pairs: ([j for _, j in pairs], [i for i, _ in pairs])
    return dot(x, probe, sides(pairs), sides(shared), x.dtype, lax.Precision.HIGHEST)


def _dot_rows(eqn: Any, operand: int, values: Sequence[Any]) -> int:
    _, _, contract, batch = dot_dims(eqn, operand)
    shape = values[1 - operand].shape
    return math.prod(shape[i] for i in free_axes(len(shape), contract, batch))


# --- conv_general_dilated ---


def _conv_summed(eqn: Any, operand: int) -> Sequence[int]:
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    return free_axes(eqn.invars[1].aval.ndim, [out_axis])


def _conv(
    eqn: Any,
    operand: int,
    others: Sequence[Any],
    probe: jax.Array,
    shape: Shape,
    own: Collection[int],
) -> jax.Array:
    """The convolution, to as many channels as the probe has columns, in each group."""
    x = others[0]
    dims, sharding = eqn.params["dimension_numbers"], eqn.params["out_sharding"]
    _, in_, *space = dims.rhs_spec
    channels = dims.out_spec[1]
    if sharding is not None:
        spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
        sharding = without_axes(sharding, spec, [channels])
    window = Window.of(
        eqn, shared=True, computed=x.dtype, result=x.dtype, sharding=sharding
    )
    highest = lax.Precision.HIGHEST
    window = window._replace(precision=(highest, highest))
    return convolve(window, x, factor_matrix(probe, [*space, in_], shape), "custom")


def _conv_rows(eqn: Any, operand: int, values: Sequence[Any]) -> int:
    params, out = eqn.params, eqn.outvars[0].aval
    channels = params["dimension_numbers"].out_spec[1]
    positions = [n for i, n in enumerate(out.shape) if i != channels]
    return math.prod(positions) * params["feature_group_count"]


# --- ragged_dot_general ---


def _ragged(
    eqn: Any,
    operand: int,
    others: Sequence[Any],
    probe: jax.Array,
    shape: Shape,
    own: Collection[int],
) -> jax.Array:
    """The ragged product; rows of each group with the probe of that group."""
    x, sizes, *_ = others
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, contract), (x_batch, _) = dims.dot_dimension_numbers
    (ragged,) = dims.lhs_ragged_dimensions
    factor = factor_matrix(probe, [*_ragged_shared(eqn, operand), *contract], shape)
    highest, dtype = lax.Precision.HIGHEST, x.dtype
    rows = Rows(x_contract, x_batch, ragged, highest, dtype, dtype)
    return rows_product(rows, x, factor, sizes, "custom")


def _ragged_summed(eqn: Any, operand: int) -> Sequence[int]:
    return eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][1]


def _ragged_shared(eqn: Any, operand: int) -> Sequence[int]:
    dims = eqn.params["ragged_dot_dimension_numbers"]
    return [*dims.rhs_group_dimensions, *dims.dot_dimension_numbers[1][1]]


def _ragged_rows(eqn: Any, operand: int, values: Sequence[Any]) -> jax.Array:
    """Returns the number of inputs of each group."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (group,) = dims.rhs_group_dimensions
    ndim = values[1].base.ndim + 1
    sizes = values[2].astype(jnp.float32)
    return sizes.reshape([-1 if i == group else 1 for i in range(ndim)])


USES: dict[str, LinearUse] = {
    "dot_general": LinearUse(
        summed=lambda eqn, operand: dot_dims(eqn, operand)[0],
        shared=lambda eqn, operand: dot_dims(eqn, operand)[1],
        apply=_dot,
        rows=_dot_rows,
        sums_batches=True,
    ),
    "conv_general_dilated": LinearUse(
        summed=_conv_summed,
        shared=lambda eqn, operand: (),
        apply=_conv,
        rows=_conv_rows,
    ),
    "ragged_dot_general": LinearUse(
        summed=_ragged_summed,
        shared=_ragged_shared,
        apply=_ragged,
        rows=_ragged_rows,
    ),
}

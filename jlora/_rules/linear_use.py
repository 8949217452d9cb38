"""What one use of a kernel does, done to a probe of its inputs; see `_inputs.py`.

Every use is linear in the kernel, so that a probe `Ω` in the place of the kernel gives
`h = x·Ω`, and the transpose of that map takes `h` to `xᵀ·(x·Ω)`.
"""

import math
from collections.abc import Collection, Iterator, Sequence
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


def is_input_side(eqn: Any, operand: int, part: Part, shape: Shape) -> bool:
    """Whether a use sums over input axes of the kernel.

    A transposed use (a tied head, the backward pass of an inner gradient) sums over the
    output axes: what it multiplies is no input of the kernel.
    """
    own = _own_axes(eqn, operand, part)
    summed = [i for i in _summed_axes(eqn, operand) if i not in own]
    if own and all(part.a.shape[i] == 1 for i in summed):
        return False  # it sums over batch axes alone
    return all(shape[i] == 1 or part.b.shape[i] == 1 for i in summed)


def _own_axes(eqn: Any, operand: int, part: Part) -> set[int]:
    """Returns the batch axes of a kernel that a product sums over.

    Each index along them has inputs of its own: a config names such axes.
    """
    if eqn.primitive.name != "dot_general":
        return set()
    summed = _summed_axes(eqn, operand)
    return {i for i in summed if part.a.shape[i] != 1 and part.b.shape[i] != 1}


def _summed_axes(eqn: Any, operand: int) -> Sequence[int]:
    if eqn.primitive.name == "dot_general":
        return dot_dims(eqn, operand)[0]
    if eqn.primitive.name == "conv_general_dilated":
        out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
        return free_axes(eqn.invars[1].aval.ndim, [out_axis])
    dims = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return dims[0][1]


def use_terms(
    eqn: Any, operand: int, part: Part, values: Sequence[Any]
) -> Iterator[Term]:
    """Returns what the columns of a probe gather in a product or convolution."""
    shape, x = values[operand].base.shape, values[1 - operand]
    x = x.astype(summed_in(x.dtype))
    a = _placed(eqn, operand, part)
    probe, ones = a[..., :-1], a[..., -1:]
    own = _own_axes(eqn, operand, part)
    if eqn.primitive.name == "dot_general":
        apply = lambda probe: _dot(eqn, operand, x, probe, shape, own)
        ones = complete(ones, dot_dims(eqn, operand)[1], shape)
    elif eqn.primitive.name == "conv_general_dilated":
        apply = lambda probe: _conv(eqn, x, probe, shape)
    else:
        apply = lambda probe: _ragged(eqn, x, values[2:], probe, shape)
        ones = complete(ones, _ragged_shared(eqn), shape)
    h, pull = jax.vjp(apply, lax.stop_gradient(probe))
    # The norm of a complex x·Ω: its gradient is the real part of xᴴ·x·Ω.
    h = lax.conj(h) if jnp.issubdtype(h.dtype, jnp.complexfloating) else h
    yield probe, pull(h)[0] / _copies(part)
    summed = [i for i in _summed_axes(eqn, operand) if i not in own]
    ones = complete(ones, summed, shape)
    yield ones, _counted(ones, _rows(eqn, operand, values), summed)


def _placed(eqn: Any, operand: int, part: Part) -> jax.Array:
    """Returns a probe that is zero where its part does not stand, but among outputs."""
    shared = ()
    if eqn.primitive.name == "dot_general":
        shared = dot_dims(eqn, operand)[1]
    elif eqn.primitive.name != "conv_general_dilated":
        shared = _ragged_shared(eqn)
    taken = {*_summed_axes(eqn, operand), *shared}
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


def _rows(eqn: Any, operand: int, values: Sequence[Any]) -> Any:
    """Returns the number of inputs of one use: for each group if it is ragged."""
    params, out = eqn.params, eqn.outvars[0].aval
    if eqn.primitive.name == "dot_general":
        _, _, contract, batch = dot_dims(eqn, operand)
        shape = values[1 - operand].shape
        return math.prod(shape[i] for i in free_axes(len(shape), contract, batch))
    if eqn.primitive.name == "conv_general_dilated":
        channels = params["dimension_numbers"].out_spec[1]
        positions = [n for i, n in enumerate(out.shape) if i != channels]
        return math.prod(positions) * params["feature_group_count"]
    (group,) = params["ragged_dot_dimension_numbers"].rhs_group_dimensions
    ndim = values[1].base.ndim + 1
    sizes = values[2].astype(jnp.float32)
    return sizes.reshape([-1 if i == group else 1 for i in range(ndim)])


# --- the uses, with a probe in the place of the kernel ---


def _dot(
    eqn: Any,
    operand: int,
    x: jax.Array,
    probe: jax.Array,
    shape: Shape,
    own: Collection[int],
) -> Any:
    """The product; the columns of the probe are one more free axis.

    It sums over no axis of `own`: these are batch axes here.
    """
    contract, batch, x_contract, x_batch = dot_dims(eqn, operand)
    pairs = list(zip(contract, x_contract, strict=True))
    shared = [*zip(batch, x_batch, strict=True), *(p for p in pairs if p[0] in own)]
    pairs = [pair for pair in pairs if pair[0] not in own]
    probe = complete(probe, [*contract, *batch], shape)
    sides = lambda pairs: ([j for _, j in pairs], [i for i, _ in pairs])
    return dot(x, probe, sides(pairs), sides(shared), x.dtype, lax.Precision.HIGHEST)


def _conv(eqn: Any, x: jax.Array, probe: jax.Array, shape: Shape) -> jax.Array:
    """The convolution, to as many channels as the probe has columns, in each group."""
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


def _ragged(
    eqn: Any, x: jax.Array, rest: Sequence[Any], probe: jax.Array, shape: Shape
) -> jax.Array:
    """The ragged product; rows of each group with the probe of that group."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (x_contract, contract), (x_batch, _) = dims.dot_dimension_numbers
    (ragged,) = dims.lhs_ragged_dimensions
    factor = factor_matrix(probe, [*_ragged_shared(eqn), *contract], shape)
    highest, dtype = lax.Precision.HIGHEST, x.dtype
    rows = Rows(x_contract, x_batch, ragged, highest, dtype, dtype)
    return rows_product(rows, x, factor, rest[0], "custom")


def _ragged_shared(eqn: Any) -> list[int]:
    dims = eqn.params["ragged_dot_dimension_numbers"]
    return [*dims.rhs_group_dimensions, *dims.dot_dimension_numbers[1][1]]

"""What one use of a kernel does, done to a probe of its inputs.

Every use is linear in the kernel, so that a probe `Ω` in the place of the kernel gives
`h = x·Ω`, and the transpose of that map takes `h` to `xᵀ·(x·Ω)`. What it is for is told
in `_program/inputs.py`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.dtypes import summed_in
from .._jax.versions import manual_axes
from .._params.axes import Shape
from . import CONSUME
from .adapted import Adapted, Part, complete, times_place
from .lookup import indexed_axes
from .rule import LinearUse

# A probe, and what it gathers.
Term = tuple[jax.Array, jax.Array]


def is_input_side(eqn: Any, operand: int, part: Part, shape: Shape) -> bool:
    """Whether a use sums over input axes of the kernel.

    A transposed use (a tied head, the backward pass of an inner gradient) sums over the
    output axes: what it multiplies is no input of the kernel.
    """
    use = CONSUME[eqn.primitive.name].linear
    own = use.own(eqn, operand, part)
    summed = [i for i in use.summed(eqn, operand) if i not in own]
    if own and all(part.a.shape[i] == 1 for i in summed):
        return False  # it sums over batch axes alone
    return all(shape[i] == 1 or part.b.shape[i] == 1 for i in summed)


def use_terms(
    eqn: Any, operand: int, part: Part, values: Sequence[Any]
) -> Iterator[Term]:
    """Returns what the columns of a probe gather in a product or convolution."""
    use = CONSUME[eqn.primitive.name].linear
    shape, x = values[operand].base.shape, values[1 - operand]
    others = [x.astype(summed_in(x.dtype)), *values[2:]]
    a = _placed(use, eqn, operand, part)
    probe, ones = a[..., :-1], a[..., -1:]
    own = use.own(eqn, operand, part)
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

"""Products of a kernel with frozen operands, and sums over its axes: it stays factored.

`w·m` with a frozen `m` is linear in `w`: `m` multiplies the factor that has the axis
which is summed over. `w` is still a kernel after that; a later product with activations
uses it up. Which of the two products is the use is for the analysis to say, see
`view.Passed`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.dots import dot
from .._jax.dtypes import common, summed_in
from .._params.axes import Roles, Shape
from .adapted import Adapted, Part, complete, whole, without_gate
from .rule import CarryRule
from .view import Passed, Place, View


@dataclasses.dataclass(frozen=True)
class Mix:
    """How a kernel enters a frozen product.

    The result is laid out `(batch, free of left, free of right)`.

    Attributes:
        contract: its axes that are summed over.
        batch: its axes that go along with axes of the other operand.
        free: its other axes.
        other_contract: the axes of the other operand, paired with `contract`.
        other_batch: likewise, paired with `batch`.
        new: the number of axes that come from the other operand.
        own_first: whether the kernel is the left operand.
    """

    contract: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    other_contract: tuple[int, ...]
    other_batch: tuple[int, ...]
    new: int
    own_first: bool

    def axes(self) -> list[list[frozenset[int]]] | None:
        """The axes that are kept; new axes come from those that are summed over."""
        if not self.contract and (self.new or not self.batch):
            return None
        new = [frozenset(self.contract)] * self.new
        own = [frozenset([i]) for i in self.free]
        batch = [frozenset([i]) for i in self.batch]
        return [[*batch, *(own + new if self.own_first else new + own)]]

    def supports(self, roles: Roles) -> bool:
        """Whether all that is summed over, or scaled, is on one side of the kernel."""
        changed = {roles[i] for i in self.contract or self.batch}
        return not {"in", "out"} <= changed

    def passed(self, view: View, place: Place, *, features: bool) -> Passed:
        """Returns what a view passes, given whether the other operand is features."""
        axes, tied = view.origin_of(self.contract), view.origin_of(self.batch)
        return Passed(place, axes, "mix", features, tied)

    def laid_out(
        self, batch: list[int], free: list[int], new: list[int]
    ) -> tuple[int, ...]:
        """Returns axes, or sizes, in the order of the result."""
        return (*batch, *(free + new if self.own_first else new + free))

    def follow(self, array: jax.Array, into_rank: Sequence[int]) -> jax.Array:
        """Lays an aligned array that is not summed over out as the result.

        Args:
            array: a factor, a scale or keys.
            into_rank: the axes that become part of the last one.
        """
        for axis in self.contract:
            if axis not in into_rank:
                array = lax.slice_in_dim(array, 0, 1, axis=axis)
        dropped = [i for i in self.contract if i not in into_rank]
        kept = [i for i in range(array.ndim) if i not in dropped]
        last = array.ndim - 1
        order = (*self.batch, *self.free, *into_rank, last)
        sizes = self.laid_out(
            [array.shape[i] for i in self.batch],
            [array.shape[i] for i in self.free],
            [1] * self.new,
        )
        rank = math.prod(array.shape[i] for i in (*into_rank, last))
        array = lax.squeeze(array, dropped)
        array = lax.transpose(array, [kept.index(i) for i in order])
        return array.reshape(*sizes, rank)

    def sum(
        self, factor: jax.Array, other: jax.Array | None, into_rank: Sequence[int]
    ) -> jax.Array:
        """Sums a factor, times the other operand, over the contracted axes."""
        pairs = dict(zip(self.contract, self.other_contract, strict=False))
        summed = [i for i in self.contract if i not in into_rank]
        if other is None:
            total = factor.sum(summed, keepdims=True)
            return self.follow(total, into_rank)
        dtype = common(factor.dtype, summed_in(factor.dtype))
        if jnp.issubdtype(other.dtype, jnp.inexact):
            dtype = common(dtype, summed_in(other.dtype))
        shared = [*self.batch, *into_rank]
        others = [*self.other_batch, *(pairs[i] for i in into_rank)]
        contract = summed, [pairs[i] for i in summed]
        highest = lax.Precision.HIGHEST
        total = dot(
            factor.astype(dtype),
            other.astype(dtype),
            contract,
            (shared, others),
            dtype,
            highest,
        )
        # Now (batch, into the rank, free, rank, new).
        n, m, f = len(self.batch), len(into_rank), len(self.free)
        batch, merged = list(range(n)), range(n, n + m)
        free, rank = list(range(n + m, n + m + f)), n + m + f
        new = list(range(rank + 1, rank + 1 + self.new))
        order = (*self.laid_out(batch, free, new), *merged, rank)
        sizes = [total.shape[i] for i in self.laid_out(batch, free, new)]
        total = lax.transpose(total, order)
        return total.reshape(*sizes, math.prod(total.shape[len(sizes) :]))


def mixing(
    of: Callable[[Any, int], Mix],
    features: Callable[[Any, int], bool] = lambda eqn, operand: False,
    **settings: Any,
) -> CarryRule:
    """Returns the carry rule of an operation that sums over axes of a kernel.

    Args:
        of: `(eqn, operand) -> Mix`.
        features: `(eqn, operand) -> bool`, as `ConsumeRule.features`.
        settings: other fields of the rule.
    """

    def move(eqn: Any, operands: list[Any], bases: list[Any]) -> list[Any]:
        index = next(i for i, v in enumerate(operands) if isinstance(v, Adapted))
        other = operands[1 - index] if len(operands) > 1 else None
        return [_mixed_value(of(eqn, index), operands[index], other, bases[0])]

    def passed(eqn: Any, operand: int, view: View, place: Place) -> Passed:
        how = of(eqn, operand)
        return how.passed(view, place, features=features(eqn, operand))

    return CarryRule(
        lambda eqn, operand: of(eqn, operand).axes(),
        move,
        supports=lambda eqn, operand, roles: of(eqn, operand).supports(roles),
        mixes=True,
        passed=passed,
        keeps_scale=lambda eqn, operand, varies: (
            not varies & set(of(eqn, operand).contract)
        ),
        **settings,
    )


def _mixed_value(how: Mix, value: Adapted, other: Any, base: Any) -> Adapted:
    parts = tuple(_mixed(how, part, other, value.base.shape) for part in value.parts)
    scale = None if value.scale is None else how.follow(value.scale, ())
    return Adapted(base, parts, scale)


def _mixed(how: Mix, part: Part, other: jax.Array | None, shape: Shape) -> Part:
    """Sums one factor; an axis that both factors have becomes part of the rank.

    `Σ_e m_e (a_e·b_e)` is `[m_1 a_1, m_2 a_2, …]·[b_1; b_2; …]`: batch axes that are
    summed over make the rank larger.
    """
    changed = [*how.contract, *how.batch]
    if any(place.shape[i] != 1 for place in part.places for i in changed):
        part = whole(part)
    both = [
        i for i in how.contract if part.a.shape[i] == part.b.shape[i] == shape[i] != 1
    ]
    if both:  # the rank is another one afterwards
        part = without_gate(part)
    alone = [i for i in how.contract or how.batch if i not in both]
    of_b = any(part.b.shape[i] != 1 == part.a.shape[i] for i in alone)
    side, rest = ("b", "a") if of_b else ("a", "b")
    factor = complete(getattr(part, side), [*how.contract, *how.batch], shape)
    mixed = {
        side: how.sum(factor, other, both),
        rest: how.follow(getattr(part, rest), both),
    }
    key = None if part.key is None else how.follow(part.key, ())
    gate = None if part.gate is None else how.follow(part.gate, ())
    places = tuple(how.follow(place, ()) for place in part.places)
    return dataclasses.replace(part, key=key, places=places, gate=gate, **mixed)

"""Products of a kernel with frozen operands, and sums over its axes: it stays factored.

`w·m` with a frozen `m` is linear in `w`: `m` multiplies the factor that has the axis
which is summed over. `w` is still a kernel after that; a later product with activations
uses it up. Which of the two products is the use is for the analysis to say, see
`_view.Passed`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.dots import dot
from .._jax.dtypes import common, summed_in
from .._params.axes import Roles, Shape, free_axes
from .adapted import Adapted, Part, base_of, complete, whole
from .dot_general import dot_dims
from .lazy_moves import carried
from .view import Passed, Place, Value, View, any_active

MIXES = ("dot_general", "reduce_sum")


# --- what the analysis asks ---


def is_frozen_product(eqn: Any, others: Sequence[Value]) -> bool:
    """Returns whether an equation sums a kernel with nothing but frozen operands."""
    return eqn.primitive.name in MIXES and not any_active(others)


def holds_features(eqn: Any, operand: int) -> bool:
    """Returns whether the other operand is contracted along its last axes.

    As features are (`x @ w`), frozen ones too: learned queries, encoded positions. A
    matrix that a kernel is multiplied by (`w @ m`) is contracted along its first axes.
    """
    if eqn.primitive.name != "dot_general":
        return False
    _, _, contract, _ = dot_dims(eqn, operand)
    ndim = eqn.invars[1 - operand].aval.ndim
    last = set(range(ndim - len(contract), ndim))
    return bool(contract) and set(contract) == last


def passed_by(eqn: Any, operand: int, view: View, place: Place) -> Passed | None:
    """Returns what a view passes in a frozen product or sum; None elsewhere."""
    name = eqn.primitive.name
    if name in MIXES:
        how, features = _Mix.of(eqn, operand), holds_features(eqn, operand)
        axes, tied = view.origin_of(how.contract), view.origin_of(how.batch)
        return Passed(place, axes, "mix", features, tied)
    if name in ("add", "sub"):
        return Passed(place, frozenset(), "sum")
    return None


def use_before(eqn: Any, operand: int, view: View, active: bool) -> Passed | None:
    """Returns what a view has passed that was its use, if this product is not.

    A frozen product is where frozen features went into the kernel, and this product
    contracts their outputs head by head: the keys `k` of attention whose queries are
    learned. So it is where an operation without a rule follows, as an activation
    function does. A sum of frozen values is one of features where it goes into a frozen
    product.
    """
    kinds = [passed.kind for passed in view.passed]
    if "sum" in kinds:
        first = kinds.index("sum")
        if not active or "mix" in kinds[first:]:
            return view.passed[first]
    mixes = [p for p in view.passed if p.kind == "mix" and p.features]
    if mixes and view.formed:
        return mixes[-1]
    if not mixes or eqn.primitive.name != "dot_general":
        return None
    contract, batch, _, _ = dot_dims(eqn, operand)
    free = free_axes(len(view.origins), contract, batch)
    own = lambda axes: any(view.origins[i] - view.mixed for i in axes)
    of_features = any(view.origins[i] & view.mixed for i in free)
    by_heads = own(batch) and own(contract) and not own(free)
    return mixes[-1] if by_heads and of_features else None


def mix_axes(eqn: Any, operand: int) -> list[list[frozenset[int]]] | None:
    """The axes that are kept; new axes come from those that are summed over."""
    how = _Mix.of(eqn, operand)
    if not how.contract and (how.new or not how.batch):
        return None
    new = [frozenset(how.contract)] * how.new
    own = [frozenset([i]) for i in how.free]
    batch = [frozenset([i]) for i in how.batch]
    return [[*batch, *(own + new if how.own_first else new + own)]]


def mix_supports(eqn: Any, operand: int, roles: Roles) -> bool:
    """Whether all that is summed over, or scaled, is on one side of the kernel."""
    how = _Mix.of(eqn, operand)
    changed = {roles[i] for i in how.contract or how.batch}
    return not {"in", "out"} <= changed


# --- evaluation ---


@dataclasses.dataclass(frozen=True)
class _Mix:
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

    @classmethod
    def of(cls, eqn: Any, operand: int) -> "_Mix":
        ndim = eqn.invars[operand].aval.ndim
        if eqn.primitive.name == "reduce_sum":
            axes = tuple(eqn.params["axes"])
            return cls(axes, (), free_axes(ndim, axes), (), (), 0, True)
        contract, batch, other_contract, other_batch = dot_dims(eqn, operand)
        free = free_axes(ndim, contract, batch)
        other = eqn.invars[1 - operand].aval.ndim
        new = other - len(other_contract) - len(other_batch)
        first = operand == 0
        return cls(
            tuple(contract),
            tuple(batch),
            free,
            tuple(other_contract),
            tuple(other_batch),
            new,
            first,
        )

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


def mix(eqn: Any, operands: list[Any]) -> list[Any]:
    """Evaluates a frozen product with an adapted operand."""
    index = next(i for i, v in enumerate(operands) if isinstance(v, Adapted))
    value, how = operands[index], _Mix.of(eqn, index)
    (base,) = carried(eqn, [base_of(v) for v in operands])
    other = operands[1 - index] if len(operands) > 1 else None
    parts = tuple(_mixed(how, part, other, value.base.shape) for part in value.parts)
    scale = None if value.scale is None else how.follow(value.scale, ())
    return [Adapted(base, parts, scale)]


def _mixed(how: _Mix, part: Part, other: jax.Array | None, shape: Shape) -> Part:
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
    alone = [i for i in how.contract or how.batch if i not in both]
    of_b = any(part.b.shape[i] != 1 == part.a.shape[i] for i in alone)
    side, rest = ("b", "a") if of_b else ("a", "b")
    factor = complete(getattr(part, side), [*how.contract, *how.batch], shape)
    mixed = {
        side: how.sum(factor, other, both),
        rest: how.follow(getattr(part, rest), both),
    }
    key = None if part.key is None else how.follow(part.key, ())
    places = tuple(how.follow(place, ()) for place in part.places)
    return dataclasses.replace(part, key=key, places=places, **mixed)

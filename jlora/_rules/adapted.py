"""An adapted value of the traced program: the frozen value beside its factors."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._jax.dtypes import summed_in
from .._params.axes import KernelAxes, align, contract_rank, ordered
from .._params.lazy import Lazy, dense
from .._product.dropout import Dropout
from .._product.gate import through


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Part:
    """The factors of one kernel inside a value, aligned with the value's axes.

    Both arrays have the axes of the value and the rank as last axis; an axis that a
    factor does not have is of size 1. The part stands for
    `scaling * sum(a * b, axis=-1)`, broadcast to the shape of the value.
    """

    a: jax.Array
    b: jax.Array
    scaling: float = dataclasses.field(metadata={"static": True})
    # The state of a dropout key for each index of the batch axes, laid out likewise.
    key: jax.Array | None = None
    dropout: Dropout | None = dataclasses.field(default=None, metadata={"static": True})
    # Where it stands among others along axes that neither factor has: ones there and
    # zeros elsewhere, of rank one. Which factor they multiply is for the use to say.
    places: tuple[jax.Array, ...] = ()
    # What `x·a` goes through on its way to `b`, see `_product.gate`; it has the rank
    # alone, and size 1 along all axes of the value.
    gate: jax.Array | None = None

    def each(self, move: Callable[[jax.Array], jax.Array]) -> "Part":
        """Returns the part with all arrays moved in the same way."""
        return jax.tree.map(move, self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A frozen value and the parts that are to be added to it: `(base + Δ)·scale`.

    Attributes:
        base: the frozen value.
        parts: what is added.
        scale: with DoRA or IA3 what the sum is multiplied by, laid out like a factor of
            rank one; it varies along the batch axes of the kernel and one side of it,
            which is that of the outputs with DoRA.
    """

    base: jax.Array | Lazy
    parts: tuple[Part, ...]
    scale: jax.Array | None = None

    @classmethod
    def of(
        cls,
        kernel: jax.Array | Lazy,
        axes: KernelAxes,
        a: jax.Array,
        b: jax.Array,
        scaling: float = 1.0,
    ) -> "Adapted":
        """Returns a kernel with factors in the layout that its axes give them."""
        return cls(kernel, (Part(*align(a, b, axes), scaling),))

    @property
    def is_shared(self) -> bool:
        """Whether it is frozen: one kernel for all examples of a mixed batch."""
        return not self.parts and self.scale is None

    def moved(self, base: Any, move: Callable[[jax.Array], jax.Array]) -> "Adapted":
        """Returns `base` with everything else of this value moved in the same way."""
        return jax.tree.map(move, dataclasses.replace(self, base=None)).with_base(base)

    def with_base(self, base: Any) -> "Adapted":
        """Returns the same change of another base."""
        return dataclasses.replace(self, base=base)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """A kernel that nothing has moved, and its factors as the adapter holds them.

    Most kernels are multiplied as they are, and then their factors are the matrices of
    the product. Laid out along the axes of the kernel and back, with the derivatives of
    that, they would be eight more equations a kernel.

    Attributes:
        base: the frozen kernel.
        axes: the roles of its axes.
        a: of shape (*batch, *in, r).
        b: of shape (*batch, r, *out).
        scaling: the scaling of the delta.
    """

    base: jax.Array | Lazy
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    a: jax.Array
    b: jax.Array
    scaling: float = dataclasses.field(metadata={"static": True})
    scale: ClassVar[None] = None  # as `Adapted` has one

    @functools.cached_property
    def laid_out(self) -> Adapted:
        """The same in the layout that all other rules take."""
        return Adapted.of(self.base, self.axes, self.a, self.b, self.scaling)

    def is_split(self, batch: Sequence[int], contract: Sequence[int]) -> bool:
        """Whether a product contracts one side of the kernel and maps to the other."""
        axes = self.axes
        sides = {*axes.in_}, {*axes.out}
        return {*batch} == {*axes.batch} and {*contract} in sides

    def matrices(
        self, batch: Sequence[int], contract: Sequence[int], free: Sequence[int]
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the `(*batch, *contract, r)` and `(*batch, *free, r)` of that."""
        axes = self.axes
        b = jnp.moveaxis(self.b, len(axes.batch), -1)
        (own, first), (other, second) = (axes.in_, self.a), (axes.out, b)
        if {*contract} != {*own}:
            (own, first), (other, second) = (other, second), (own, first)
        first = ordered(first, axes.batch + own, [*batch, *contract])
        return first, ordered(second, axes.batch + other, [*batch, *free])


def laid_out(value: Any) -> Any:
    """Returns a value of which each factor has all axes."""
    return value.laid_out if isinstance(value, Held) else value


def times_place(factor: jax.Array, place: jax.Array) -> jax.Array:
    """Returns a factor that is zero where its part does not stand."""
    if factor.dtype != place.dtype:
        dtype = summed_in(factor.dtype, place.dtype)
        factor, place = factor.astype(dtype), place.astype(dtype)
    return factor * place


def whole(part: Part) -> Part:
    """Returns the part with its places, and its gate, multiplied into `a`."""
    part = without_gate(part)
    a = functools.reduce(times_place, part.places, part.a)
    return dataclasses.replace(part, a=a, places=())


def without_gate(part: Part) -> Part:
    """Returns the part with its gate multiplied into `a`, where there is no `x·a`."""
    return dataclasses.replace(part, a=through(part.a, part.gate), gate=None)


def part_delta(part: Part, shape: tuple[int, ...]) -> jax.Array:
    """Returns the delta of one part in float32, broadcast to `shape`."""
    part = whole(part)
    wide = summed_in(part.a.dtype, part.a.dtype, part.b.dtype)
    a, b = part.a.astype(wide), part.b.astype(wide)
    product = contract_rank(a, b, dtype=wide, precision=jax.lax.Precision.HIGHEST)
    return jnp.broadcast_to(part.scaling * product, shape)


def materialize(value: Any) -> jax.Array:
    """Returns the value with its deltas added in float32 and rounded once."""
    if not isinstance(value, Adapted):
        return dense(value)
    base = dense(value.base)
    total = base.astype(summed_in(base.dtype))
    for part in value.parts:
        total = total + part_delta(part, base.shape).astype(total.dtype)
    if value.scale is not None:
        total = total * value.scale[..., 0]
    return total.astype(base.dtype)


def base_of(value: Any) -> Any:
    """Returns the frozen value."""
    return value.base if isinstance(value, Adapted) else value


def complete(
    factor: jax.Array, axes: Sequence[int], shape: tuple[int, ...]
) -> jax.Array:
    """Broadcasts `factor` to the full size of the value along `axes`."""
    sizes = list(factor.shape)
    for axis in axes:
        sizes[axis] = shape[axis]
    return factor if factor.shape == tuple(sizes) else jnp.broadcast_to(factor, sizes)

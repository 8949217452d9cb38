"""Factors of some slices of a fused kernel, as of q and v in a kernel of q, k, v."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..._jax.dtypes import widest
from ..._jax.sharding import whole_along
from ..._params.axes import KernelAxes, Shape
from ..config import LoraConfig
from ..dora import kernel_norm
from ..factors import LoraFactors
from ..initializers import INITIALIZERS
from .variant import New, Variant, capped_rank

Slices = tuple[tuple[int, int], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlicedFactors:
    """Factors of some slices of a fused kernel, as of q and v in a kernel of q, k, v.

    Each slice is a run of outputs with an `a` and a `b` of its own; the other outputs
    are not adapted. Slices count the outputs of all output axes together, the last
    axis fastest.

    Attributes:
        a: of all slices side by side, of shape `(*batch, *in, slices·rank)`.
        b: of all slices side by side, of shape `(*batch, rank, outputs of slices)`.
        axes: the roles of the kernel's axes.
        scaling: alpha/rank (or alpha/√rank), a Python float.
        slices: the first output of each slice, and the one behind its last.
        out: the sizes of the output axes.
        magnitude: with DoRA the norm that each output of the slices has, of shape
            `(*batch, outputs of slices)`; else None. Other outputs are not scaled.

    References:
        `MergedLinear` of loralib, <https://github.com/microsoft/LoRA>.
    """

    a: jax.Array
    b: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})
    slices: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})
    out: Shape = dataclasses.field(metadata={"static": True})
    magnitude: jax.Array | None = None

    @property
    def rank(self) -> int:
        """The rank of each slice."""
        return self.a.shape[-1] // len(self.slices)

    @property
    def kernel_shape(self) -> Shape:
        """The shape of the kernel that the factors belong to."""
        return self.axes.kernel_shape(self.a.shape[:-1] + self.out)

    def lowered(self, kernel: Any = None) -> LoraFactors:
        """Returns the same change as factors: `b` is block-diagonal.

        Args:
            kernel: the frozen kernel, whose norms are those of outputs that no slice
                has. They are asked for with a magnitude alone.

        Raises:
            ValueError: if there is a magnitude and no kernel.
        """
        batch, width = self.b.shape[: len(self.axes.batch)], math.prod(self.out)
        rows, start = [], 0
        for first, stop in self.slices:
            block = self.b[..., start : start + stop - first]
            start += stop - first
            sides = [(0, 0)] * (block.ndim - 1) + [(first, width - stop)]
            rows.append(jnp.pad(block, sides))
        b = jnp.concatenate(rows, axis=-2)
        b = b.reshape(*batch, b.shape[-2], *self.out)
        whole = self._whole_magnitude(kernel)
        return LoraFactors(self.a, b, self.axes, self.scaling, whole)

    def _whole_magnitude(self, kernel: Any) -> jax.Array | None:
        if self.magnitude is None:
            return None
        if kernel is None:
            raise ValueError(
                "`SlicedFactors` with DoRA's magnitude are lowered beside their kernel:"
                " `factors.lowered(kernel)`"
            )
        norm = jax.lax.stop_gradient(kernel_norm(kernel, self.axes))
        shape, n = norm.shape, len(self.axes.batch)
        norm = whole_along(norm, range(n, norm.ndim)).reshape(*shape[:n], -1)
        own, pieces, start, done = self.magnitude.astype(norm.dtype), [], 0, 0
        for first, stop in self.slices:
            pieces += [norm[..., done:first], own[..., start : start + stop - first]]
            start, done = start + stop - first, stop
        pieces.append(norm[..., done:])
        return jnp.concatenate(pieces, axis=-1).reshape(shape)


def _shapes(
    axes: KernelAxes, shape: Shape, rank: int, slices: Slices
) -> dict[str, Shape]:
    a, b = axes.factor_shapes(shape, rank)
    width = sum(stop - first for first, stop in slices)
    batch = b[: len(axes.batch)]
    return {
        "a": (*a[:-1], len(slices) * rank),
        "b": (*batch, rank, width),
        "magnitude": (*batch, width),
    }


def _rank(config: LoraConfig, axes: KernelAxes, shape: Shape) -> int:
    """Returns the rank of each slice: at most the outputs of the smallest."""
    slices: Any = config.slices
    least = min(stop - first for first, stop in slices)
    return min(capped_rank(config, axes, shape), least)


def _new(new: New, leaf: Any) -> dict[str, Any]:
    """Makes the factors of each slice as those of a kernel of its own."""
    axes, slices, key = new.axes, new.config.slices, new.key
    lead = tuple(new.shape[i] for i in axes.batch + axes.in_)
    n, end = len(axes.batch), len(lead)
    plain = KernelAxes(tuple(range(n)), tuple(range(n, end)), (end,))
    make, whole = INITIALIZERS[new.config.init], new.wanted()
    of_slice = lambda width: dataclasses.replace(
        whole, axes=plain, shape=(*lead, width)
    )
    made = [
        make(jax.random.fold_in(key, i), of_slice(stop - first))
        for i, (first, stop) in enumerate(slices or ())
    ]
    a, b = zip(*made, strict=True)
    a, b = jnp.concatenate(a, axis=-1), jnp.concatenate(b, axis=-1)
    if not new.config.dora:
        return {"a": a, "b": b}
    norm = kernel_norm(leaf, axes)
    norm = whole_along(norm, range(n, norm.ndim)).reshape(*norm.shape[:n], -1)
    own = [norm[..., first:stop] for first, stop in slices or ()]
    magnitude = jnp.concatenate(own, axis=-1).astype(widest(a))
    return {"a": a, "b": b, "magnitude": magnitude}


def _parts(entry: SlicedFactors) -> list[LoraFactors]:
    """Returns the factors of each slice, as of a kernel with one output axis."""
    n, rank, found, start = len(entry.axes.batch), entry.rank, [], 0
    end = entry.a.ndim - 1
    axes = KernelAxes(tuple(range(n)), tuple(range(n, end)), (end,))
    for i, (first, stop) in enumerate(entry.slices):
        a = entry.a[..., i * rank : (i + 1) * rank]
        b = entry.b[..., start : start + stop - first]
        found.append(LoraFactors(a, b, axes, entry.scaling))
        start += stop - first
    return found


def _rejoined(entry: SlicedFactors, parts: Sequence[LoraFactors]) -> SlicedFactors:
    """Returns an entry with these factors; smaller ranks are padded with zeros."""
    rank, xp = max(part.rank for part in parts), entry.a.__array_namespace__()
    padded = lambda v, axis: xp.pad(
        v, [(0, rank - v.shape[axis] if i == axis else 0) for i in range(v.ndim)]
    )
    a = xp.concatenate([padded(part.a, part.a.ndim - 1) for part in parts], axis=-1)
    b = xp.concatenate([padded(part.b, part.b.ndim - 2) for part in parts], axis=-1)
    return dataclasses.replace(entry, a=a, b=b, scaling=parts[0].scaling)


def _misfit(axes: KernelAxes, shape: Shape, slices: Slices) -> str | None:
    _, outputs = axes.fans(shape)
    if slices[-1][1] > outputs:
        return f"has {outputs} outputs, and `slices` end at {slices[-1][1]}"
    return None


SLICED = Variant(
    "slices",
    SlicedFactors,
    _shapes,
    _new,
    lambda entry, kernel: entry.lowered(kernel),
    statics=lambda axes, shape: {"out": tuple(shape[i] for i in axes.out)},
    settings=("slices",),
    chosen=lambda config: config.slices is not None,
    rank=_rank,
    misfit=_misfit,
    from_leaf=lambda config: "has DoRA's magnitude, which" if config.dora else None,
    optional={"magnitude": lambda config: config.dora},
    wide=("magnitude",),
    reads_for="magnitude",
    parts=_parts,
    rejoined=_rejoined,
    # Slices cut across the output axes, which have no layout of theirs to follow.
    along=lambda axes: {
        "a": (*axes.batch, *axes.in_, None),
        "b": (*axes.batch, None, None),
        "magnitude": (*axes.batch, None),
    },
    note=lambda entry: (
        f" × {len(entry.slices)} slices{'' if entry.magnitude is None else ', dora'}"
    ),
    plural="slices",
)

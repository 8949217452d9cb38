"""Factors of some layers of a stack, as of the last ones of a scan; the others rest."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._jax.dtypes import widest
from ..._jax.sharding import whole_along
from ..._params.axes import KernelAxes, Shape
from ..dora import kernel_norm
from ..factors import LoraFactors
from ..initializers import INITIALIZERS
from .variant import New, Variant

Layers = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerFactors:
    """Factors of some layers of a stack, as of the last ones of a scan.

    The layers are the first batch axis of the kernel. Those that are not named have no
    factors, and so no moments and no bytes in a file.

    Attributes:
        a: the input side, of shape `(layers, *other batch axes, *in, rank)`.
        b: the output side, of shape `(layers, *other batch axes, rank, *out)`.
        axes: the roles of the kernel's axes.
        scaling: alpha/rank (or alpha/√rank), a Python float.
        layers: the index of each layer, in ascending order.
        count: how many layers the stack has.
        magnitude: with DoRA the norm that each output of the layers has, of shape
            `(layers, *other batch axes, *out)`; else None. Other layers are not scaled.
    """

    a: jax.Array
    b: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})
    layers: Layers = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    magnitude: jax.Array | None = None

    @property
    def rank(self) -> int:
        """The size of the axis that `a` and `b` share."""
        return self.a.shape[-1]

    @property
    def kernel_shape(self) -> Shape:
        """The shape of the kernel that the factors belong to."""
        n_batch, n_in = len(self.axes.batch), len(self.axes.in_)
        sizes = (
            self.count,
            *self.a.shape[1 : n_batch + n_in],
            *self.b.shape[n_batch + 1 :],
        )
        return self.axes.kernel_shape(sizes)

    def lowered(self, kernel: Any = None) -> LoraFactors:
        """Returns the same change as factors of all layers, most of them zero.

        Args:
            kernel: the frozen stack, whose norms are those of the other layers. They
                are asked for with a magnitude alone.

        Raises:
            ValueError: if there is a magnitude and no kernel.
        """
        a, b = self._spread(self.a), self._spread(self.b)
        whole = self._whole_magnitude(kernel)
        return LoraFactors(a, b, self.axes, self.scaling, whole)

    def _whole_magnitude(self, kernel: Any) -> jax.Array | None:
        if self.magnitude is None:
            return None
        if kernel is None:
            raise ValueError(
                "`LayerFactors` with DoRA's magnitude are lowered beside their kernel: "
                "`factors.lowered(kernel)`"
            )
        norm = jax.lax.stop_gradient(kernel_norm(kernel, self.axes))
        norm = whole_along(norm, (0,))
        own = self._spread(self.magnitude.astype(norm.dtype))
        has = np.isin(np.arange(self.count), self.layers)
        return jnp.where(has.reshape(-1, *[1] * (norm.ndim - 1)), own, norm)

    def _spread(self, factor: jax.Array) -> jax.Array:
        placed = []
        for start, stop in _runs(self.layers):
            block = factor[start:stop]
            first = self.layers[start]
            behind = self.count - first - (stop - start)
            sides = [(first, behind), *[(0, 0)] * (block.ndim - 1)]
            placed.append(jnp.pad(block, sides))
        return sum(placed[1:], placed[0])


def of_layers(factors: LoraFactors, layers: Sequence[int]) -> Any:
    """Returns factors of some layers alone, on the host; as they are, if others count.

    Args:
        factors: those of a stack, whose first batch axis is that of the layers.
        layers: the layers that are not zero, or more.
    """
    axes = factors.axes
    if not axes.batch or factors.magnitude is not None:
        return factors
    count = factors.a.shape[0]
    own = sorted({i for i in layers if i < count})
    others = [i for i in range(count) if i not in own]
    if not own or not others or any(np.any(v[others]) for v in (factors.a, factors.b)):
        return factors
    a: Any = np.asarray(factors.a)[own]
    b: Any = np.asarray(factors.b)[own]
    return LayerFactors(a, b, axes, factors.scaling, tuple(own), count)


def _runs(layers: Layers) -> Iterator[tuple[int, int]]:
    """Yields the beginning and the end of each run of layers that follow each other.

    >>> list(_runs((0, 1, 5)))
    [(0, 2), (2, 3)]
    """
    start = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[i - 1] + 1:
            yield start, i
            start = i


def _picked(axes: KernelAxes, shape: Shape, count: int) -> Shape:
    """Returns the shape of a kernel with as many layers."""
    return tuple(count if i == axes.batch[0] else n for i, n in enumerate(shape))


def _shapes(
    axes: KernelAxes, shape: Shape, rank: int, layers: Layers
) -> dict[str, Shape]:
    picked = _picked(axes, shape, len(layers))
    a, b = axes.factor_shapes(picked, rank)
    return {"a": a, "b": b, "magnitude": axes.magnitude_shape(picked)}


def _new(new: New, leaf: Any) -> dict[str, Any]:
    layers = new.config.layers or ()
    shape = _picked(new.axes, new.shape, len(layers))
    wanted = dataclasses.replace(new.wanted(), shape=shape)
    a, b = INITIALIZERS[new.config.init](new.key, wanted)
    if not new.config.dora:
        return {"a": a, "b": b}
    norm = whole_along(kernel_norm(leaf, new.axes), (0,))
    magnitude = jnp.concatenate([norm[i : i + 1] for i in layers])
    return {"a": a, "b": b, "magnitude": magnitude.astype(widest(a))}


def _parts(entry: LayerFactors) -> list[LoraFactors]:
    """Returns the factors of the stack of the layers alone."""
    return [LoraFactors(entry.a, entry.b, entry.axes, entry.scaling)]


def _rejoined(entry: LayerFactors, parts: Sequence[LoraFactors]) -> LayerFactors:
    (part,) = parts
    return dataclasses.replace(entry, a=part.a, b=part.b, scaling=part.scaling)


def _misfit(axes: KernelAxes, shape: Shape, layers: Layers) -> str | None:
    if not axes.batch:
        return (
            "is no stack of layers, of which `layers` names some; layers that are "
            "leaves of their own are named by a pattern, such as `layers_[0-3]`"
        )
    count = shape[axes.batch[0]]
    unknown = [i for i in layers if i >= count]
    if unknown:
        return f"is a stack of {count} layers, from 0, and `layers` names {unknown}"
    return None


LAYERS = Variant(
    "layers",
    LayerFactors,
    _shapes,
    _new,
    lambda entry, kernel: entry.lowered(kernel),
    statics=lambda axes, shape: {"count": shape[axes.batch[0]]},
    settings=("layers",),
    chosen=lambda config: config.layers is not None,
    misfit=_misfit,
    from_leaf=lambda config: "has DoRA's magnitude, which" if config.dora else None,
    optional={"magnitude": lambda config: config.dora},
    wide=("magnitude",),
    reads_for="magnitude",
    parts=_parts,
    rejoined=_rejoined,
    # The layers that are picked need not divide among devices as all of them do.
    along=lambda axes: {
        "a": (None, *axes.batch[1:], *axes.in_, None),
        "b": (None, *axes.batch[1:], None, *axes.out),
        "magnitude": (None, *axes.batch[1:], *axes.out),
    },
    note=lambda entry: (
        f" in {len(entry.layers)}/{entry.count} layers"
        f"{'' if entry.magnitude is None else ', dora'}"
    ),
    plural="layers",
)

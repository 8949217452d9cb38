"""A leaf that will be trained, and a leaf that a config matched in vain."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax

from .._adapter.config import LoraConfig
from .._adapter.entries import sliced_shapes
from .._adapter.rank import capped_rank
from .._jax.dtypes import widest
from .._params.axes import KernelAxes, Shape
from .._params.paths import FlatParams
from .._rules.view import Use


@dataclasses.dataclass(frozen=True)
class Target:
    """A leaf that will be trained.

    Attributes:
        path: its canonical path.
        shape: its shape.
        dtype: its dtype.
        axes: the roles of its axes; None if it is trained whole.
        config: the config that chose it.
        uses: where the function uses it.
        qtype: how it is quantised, if it is; `dtype` is that of the dense kernel.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: KernelAxes | None
    config: LoraConfig
    uses: tuple[Use, ...] = ()
    qtype: str | None = None

    @property
    def is_low_rank(self) -> bool:
        """Whether it has factors of its own: it is no leaf or rows trained whole."""
        return self.axes is not None and self.config.rows is None

    @property
    def rank(self) -> int | None:
        """The rank, or None if the leaf or rows of it are trained whole.

        That of the config, or less where the kernel maps fewer features.
        """
        if self.axes is None or not self.is_low_rank:
            return None
        return capped_rank(self.config, self.axes, self.shape)

    @property
    def scaling(self) -> float | None:
        """The scaling, or None if the leaf or rows of it are trained whole."""
        return self.config.scaling if self.is_low_rank else None

    @property
    def trainable(self) -> int:
        """The number of trained values."""
        return sum(map(math.prod, self.array_shapes.values()))

    @property
    def array_shapes(self) -> dict[str, Shape]:
        """The shapes of its arrays in an adapter, by name."""
        config, axes, shape = self.config, self.axes, self.shape
        if axes is None:
            return {"value": shape}
        if config.rows is not None:
            out = tuple(shape[i] for i in axes.out)
            return {"values": (len(tuple(config.rows)), *out)}
        rank = capped_rank(config, axes, shape)
        if config.slices is not None:
            return sliced_shapes(axes, shape, tuple(config.slices), rank)
        a, b = axes.factor_shapes(shape, rank)
        if not config.dora:
            return {"a": a, "b": b}
        return {"a": a, "b": b, "magnitude": axes.magnitude_shape(shape)}

    @property
    def abstract_arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of its arrays in a new adapter, by name."""
        shapes, dtype = self.array_shapes, self.config.dtype
        found = {n: jax.ShapeDtypeStruct(s, dtype) for n, s in shapes.items()}
        if "magnitude" in found:
            wide = widest(found["a"])
            found["magnitude"] = jax.ShapeDtypeStruct(shapes["magnitude"], wide)
        return found


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A leaf that a config matched and that is no target, with the reason.

    Attributes:
        path: its canonical path.
        shape: its shape.
        reason: why it is no target.
        is_doubtful: whether it may be wanted all the same, and is warned of: two of its
            axes at least go into an operation of which jlora knows nothing, or uses
            disagree, or it is in a collection that none of Flax's layers keeps.
    """

    path: str
    shape: tuple[int, ...]
    reason: str
    is_doubtful: bool = False


def counted(params: FlatParams, targets: Iterable[Target]) -> list[bool]:
    """Returns which leaves count as params: not the statistics and caches of Linen.

    A collection beside "params" counts where a target is in it.
    """
    own = {params.collection(target.path) for target in targets} | {None}
    return [params.collection(path) in own for path in params.paths]

"""A leaf that will be trained, and a leaf that a config matched in vain."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from .._adapter.config import LoraConfig
from .._adapter.variants import variant_of_config
from .._adapter.variants.variant import Variant
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
        """Whether it has factors: it is no scale, leaf or rows trained whole."""
        return variant_of(self).rank is not None

    @property
    def rank(self) -> int | None:
        """The rank, or None if the leaf or rows of it are trained whole.

        That of the config, or less where the kernel maps fewer features.
        """
        rank = variant_of(self).rank
        if rank is None or self.axes is None:
            return None
        return rank(self.config, self.axes, self.shape)

    @property
    def scaling(self) -> float | None:
        """The scaling, or None if the leaf or rows of it are trained whole."""
        return self.config.scaling if self.is_low_rank else None

    @property
    def trainable(self) -> int:
        """The number of trained values."""
        frozen, shapes = variant_of(self).frozen, self.array_shapes
        return sum(math.prod(s) for name, s in shapes.items() if name not in frozen)

    @property
    def array_shapes(self) -> dict[str, Shape]:
        """The shapes of its arrays in an adapter, by name."""
        variant, config = variant_of(self), self.config
        settings = variant.settings_of(config)
        shapes = variant.shapes(self.axes, self.shape, self.rank, **settings)
        left = {name for name, asked in variant.optional.items() if not asked(config)}
        return {name: shape for name, shape in shapes.items() if name not in left}

    @property
    def abstract_arrays(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of its arrays in a new adapter, by name."""
        shapes, dtype = self.array_shapes, self.config.dtype
        found = {n: jax.ShapeDtypeStruct(s, dtype) for n, s in shapes.items()}
        for name in found.keys() & {*variant_of(self).wide}:
            wide = widest(found[name])
            found[name] = jax.ShapeDtypeStruct(shapes[name], wide)
        return found


def variant_of(target: Target) -> Variant:
    """Returns what is trained of a target, and how."""
    return variant_of_config(target.config, has_roles=target.axes is not None)


def entry_of(target: Target, arrays: Mapping[str, Any]) -> Any:
    """Returns the entry of a target in an adapter, from its arrays by name."""
    variant, config = variant_of(target), target.config
    settings = variant.settings_of(config)
    return variant.built(arrays, target.axes, target.shape, config.scaling, settings)


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

"""LoRA-FA: the input side of two factors is frozen as it was drawn."""

import dataclasses
from typing import Any

import jax
from jax import lax

from ..._params.axes import KernelAxes, Shape
from ..factors import LoraFactors
from ..initializers import INITIALIZERS
from .variant import New, Variant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedFactors:
    """Two factors of one kernel, of which `b` alone is trained.

    `ΔW = scaling · frozen_a · b`. The gradient of `frozen_a` is zero, so `x` is kept
    for no gradient of it: of what goes into the kernel `x·a` alone is needed.

    Attributes:
        frozen_a: the input side, of shape `(*batch, *in, rank)`, as `init` drew it.
        b: the output side, of shape `(*batch, rank, *out)`.
        axes: the roles of the kernel's axes.
        scaling: alpha/rank (or alpha/√rank), a Python float.

    References:
        Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language
        Models Fine-tuning, <https://arxiv.org/abs/2308.03303>, 2023, section 3.
    """

    frozen_a: jax.Array
    b: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The size of the axis that both factors share."""
        return self.frozen_a.shape[-1]

    @property
    def kernel_shape(self) -> Shape:
        """The shape of the kernel that the factors belong to."""
        return LoraFactors(self.frozen_a, self.b, self.axes, self.scaling).kernel_shape

    def lowered(self) -> LoraFactors:
        """Returns the same change as factors, of which `a` has no gradient."""
        a = lax.stop_gradient(self.frozen_a)
        return LoraFactors(a, self.b, self.axes, self.scaling)


def _shapes(axes: KernelAxes, shape: Shape, rank: int) -> dict[str, Shape]:
    a, b = axes.factor_shapes(shape, rank)
    return {"frozen_a": a, "b": b}


def _new(new: New, leaf: Any) -> dict[str, Any]:
    if new.config.init == "zero_a":
        raise ValueError(
            f'{new.path!r}: `LoraConfig(variant="lora_fa")` freezes `a`, which '
            '`init="zero_a"` makes zero: nothing would be trained. Choose another'
        )
    a, b = INITIALIZERS[new.config.init](new.key, new.wanted())
    return {"frozen_a": a, "b": b}


FIXED = Variant(
    "lora_fa",
    FixedFactors,
    _shapes,
    _new,
    lambda entry, kernel: entry.lowered(),
    along=lambda axes: dict(zip(("frozen_a", "b"), axes.along_factors(), strict=True)),
    frozen=("frozen_a",),
    note=lambda entry: " lora_fa",
)

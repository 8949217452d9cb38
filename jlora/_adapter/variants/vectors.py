"""VeRA: vectors that scale what two random matrices do, the same for all kernels."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..._jax.hashed import hashed_uniform
from ..._params.axes import KernelAxes, Shape
from ..factors import LoraFactors
from .variant import New, Variant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VectorFactors:
    """Two vectors of one kernel, `ΔW = scaling · A·diag(d)·B·diag(b)`.

    `A` and `B` are random and held nowhere: they follow from a seed, whenever they are
    needed. All kernels have the same two, of which each has as many rows and columns as
    it maps from and to, its inputs and outputs counted through; layers and experts
    share them. They are uniform, `A` within √(6/inputs) and `B` within √(6/rank).

    Attributes:
        d: a weight for each column of `A`, `(*batch, rank)`; it starts at 0.1.
        b: a weight for each output, `(*batch, *out)`; it starts at zero.
        axes: the roles of the kernel's axes.
        scaling: alpha/rank (or alpha/√rank), a Python float. The paper has none: that
            is `alpha=rank`.
        projection_seed: what `A` and `B` follow from.
        kernel_shape: the shape of the kernel.

    References:
        Kopiczko, Blankevoort and Asano, VeRA: Vector-based Random Matrix Adaptation,
        <https://arxiv.org/abs/2310.11454>, 2023, equation 2. PEFT's `VeraConfig`.
    """

    d: jax.Array
    b: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})
    projection_seed: int = dataclasses.field(metadata={"static": True})
    kernel_shape: Shape = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number of columns of `A` and of rows of `B`."""
        return self.d.shape[-1]

    def projections(self) -> tuple[jax.Array, jax.Array]:
        """Returns `A: (inputs, rank)` and `B: (rank, outputs)`, in float32."""
        inputs, outputs = self.axes.fans(self.kernel_shape)
        a, b = random_sides(self.projection_seed, inputs, outputs, self.rank)
        return a * math.sqrt(6 / inputs), b * math.sqrt(6 / self.rank)

    def lowered(self) -> LoraFactors:
        """Returns the same change as factors, `A·diag(d)` and `B·diag(b)`."""
        a_shape, b_shape = self.axes.factor_shapes(self.kernel_shape, self.rank)
        n, (left, right) = len(self.axes.batch), self.projections()
        left = left.reshape(*(1,) * n, *a_shape[n:])
        right = right.reshape(*(1,) * n, *b_shape[n:])
        d = self.d.reshape(*a_shape[:n], *(1,) * len(self.axes.in_), self.rank)
        a, b = left * d, right * jnp.expand_dims(self.b, n)
        return LoraFactors(
            a.astype(self.d.dtype), b.astype(self.b.dtype), self.axes, self.scaling
        )


def random_sides(
    seed: int, inputs: int, outputs: int, rank: int
) -> tuple[jax.Array, jax.Array]:
    """Returns `(inputs, rank)` and `(rank, outputs)` values of U(-1, 1)."""
    a = hashed_uniform(seed, inputs, rank)
    # Another matrix of the same seed; 2³² divided by the golden ratio is far from it.
    other = (seed + 0x9E3779B9) % 2**32
    return a, hashed_uniform(other, outputs, rank).T


def _shapes(
    axes: KernelAxes, shape: Shape, rank: int, projection_seed: int
) -> dict[str, Shape]:
    out = axes.magnitude_shape(shape)
    return {"d": (*out[: len(axes.batch)], rank), "b": out}


def _new(new: New, leaf: Any) -> dict[str, Any]:
    dtype = new.config.dtype
    shapes = _shapes(new.axes, new.shape, new.rank, new.config.projection_seed)
    return {"d": jnp.full(shapes["d"], 0.1, dtype), "b": jnp.zeros(shapes["b"], dtype)}


VECTORS = Variant(
    "vera",
    VectorFactors,
    _shapes,
    _new,
    lambda entry, kernel: entry.lowered(),
    statics=lambda axes, shape: {"kernel_shape": shape},
    settings=("projection_seed",),
    # More columns than the kernel has features are more weights, and no waste.
    rank=lambda config, axes, shape: config.rank,
    along=lambda axes: {
        "d": (*axes.batch, None),
        "b": (*axes.batch, *axes.out),
    },
    labels={"d": "a"},
    note=lambda entry: " vera",
    peft="VERA",
)

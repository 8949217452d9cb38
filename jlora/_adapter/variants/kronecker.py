"""LoKr: a change that is the Kronecker product of a small matrix and a low-rank one."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..._params.axes import KernelAxes, Shape
from ..config import LoraConfig
from ..factors import LoraFactors
from ..initializers import kaiming_uniform
from .variant import New, Variant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerFactors:
    """A matrix and two factors of one kernel, `ΔW = scaling · c ⊗ (a·b)`.

    The inputs of the kernel are counted through and cut into blocks, and so are its
    outputs; what goes from a block to another is `a·b`, by a weight in `c`. The program
    is evaluated with the same change as two factors, whose rank is that of `a·b` times
    the blocks, of inputs or of outputs, of which there are fewer: that is what each
    product costs, and a plan says it.

    Attributes:
        c: `(*batch, blocks of inputs, blocks of outputs)`; it starts at zero.
        a: `(*batch, inputs of a block, rank)`.
        b: `(*batch, rank, outputs of a block)`.
        axes: the roles of the kernel's axes.
        scaling: alpha/rank (or alpha/√rank), a Python float.
        decompose_factor: into how many blocks both sides are cut, by `blocks`.
        kernel_shape: the shape of the kernel.

    References:
        Yeh et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to
        Model Evaluation, <https://arxiv.org/abs/2309.14859>, 2023, section 3 (LoKr).
        Edalati et al., KronA, <https://arxiv.org/abs/2212.10650>, 2022.
        PEFT's `LoKrConfig`.
    """

    c: jax.Array
    a: jax.Array
    b: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})
    decompose_factor: int = dataclasses.field(metadata={"static": True})
    kernel_shape: Shape = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The rank of `a·b`."""
        return self.a.shape[-1]

    @property
    def lowered_rank(self) -> int:
        """The rank of the two factors that the program is evaluated with."""
        return self.rank * min(self.c.shape[-2:])

    def lowered(self) -> LoraFactors:
        """Returns the same change as two factors.

        `c ⊗ (a·b) = (1 ⊗ a)·(c ⊗ b) = (c ⊗ a)·(1 ⊗ b)`, of which the one with the
        smaller unit matrix is taken.
        """
        blocks_in, blocks_out = self.c.shape[-2:]
        one = jnp.eye(min(blocks_in, blocks_out), dtype=self.c.dtype)
        is_in = blocks_in <= blocks_out
        left, right = (one, self.c) if is_in else (self.c, one)
        a_shape, b_shape = self.axes.factor_shapes(self.kernel_shape, self.lowered_rank)
        a = _kronecker(left, self.a).astype(self.a.dtype).reshape(a_shape)
        b = _kronecker(right, self.b).astype(self.b.dtype).reshape(b_shape)
        return LoraFactors(a, b, self.axes, self.scaling)


def _kronecker(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns `x ⊗ y` of matrices, or batches of them, as `(*batch, ...)`."""
    n = max(x.ndim, y.ndim)
    x, y = (v.reshape(*(1,) * (n - v.ndim), *v.shape) for v in (x, y))
    both = x[..., :, None, :, None] * y[..., None, :, None, :]
    *batch, i, j, k, l = both.shape
    return both.reshape(*batch, i * j, k * l)


def blocks(size: int, factor: int) -> tuple[int, int]:
    """Returns how many blocks of what size, as PEFT and LyCORIS cut.

    As many as the factor says, if it divides the size; else the largest divisor that is
    no larger than the factor and than the square root, of which -1 looks at the second.

    >>> [blocks(size, -1) for size in (64, 360, 768, 7)]
    [(8, 8), (18, 20), (24, 32), (1, 7)]
    >>> [blocks(360, factor) for factor in (4, 7, 90, 1000)]
    [(4, 90), (6, 60), (90, 4), (18, 20)]
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    count = next(n for n in range(most, 0, -1) if size % n == 0)
    return count, size // count


def _cut(
    axes: KernelAxes, shape: Shape, factor: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns blocks of inputs and of outputs, each how many of what size."""
    inputs, outputs = axes.fans(shape)
    return blocks(inputs, factor), blocks(outputs, factor)


def _shapes(
    axes: KernelAxes, shape: Shape, rank: int, decompose_factor: int
) -> dict[str, Shape]:
    batch = tuple(shape[i] for i in axes.batch)
    (blocks_in, in_), (blocks_out, out) = _cut(axes, shape, decompose_factor)
    return {
        "c": (*batch, blocks_in, blocks_out),
        "a": (*batch, in_, rank),
        "b": (*batch, rank, out),
    }


def _rank(config: LoraConfig, axes: KernelAxes, shape: Shape) -> int:
    """Returns the rank of `a·b`: at most what a block maps from and to."""
    (_, in_), (_, out) = _cut(axes, shape, config.decompose_factor)
    return min(config.rank, in_, out)


def _new(new: New, leaf: Any) -> dict[str, Any]:
    config = new.config
    shapes = _shapes(new.axes, new.shape, new.rank, config.decompose_factor)
    keys, dtype = jax.random.split(new.key), config.dtype
    a = kaiming_uniform(keys[0], shapes["a"], shapes["a"][-2], dtype)
    b = kaiming_uniform(keys[1], shapes["b"], new.rank, dtype)
    return {"c": jnp.zeros(shapes["c"], dtype), "a": a, "b": b}


def _note(entry: KroneckerFactors) -> str:
    rank, fans = entry.lowered_rank, entry.axes.fans(entry.kernel_shape)
    dear = ", more than the kernel's work" if rank * sum(fans) > math.prod(fans) else ""
    return f" lokr, {rank} as two factors{dear}"


KRONECKER = Variant(
    "lokr",
    KroneckerFactors,
    _shapes,
    _new,
    lambda entry, kernel: entry.lowered(),
    statics=lambda axes, shape: {"kernel_shape": shape},
    settings=("decompose_factor",),
    rank=_rank,
    # Blocks cut across the axes of the kernel, which have no layout of theirs.
    along=lambda axes: dict.fromkeys(("c", "a", "b"), (*axes.batch, None, None)),
    labels={"c": "b"},
    note=_note,
    peft="LOKR",
)

"""LoHa: a change that is the Hadamard product of two low-rank ones."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..._params.axes import KernelAxes, Shape
from ..factors import LoraFactors
from ..initializers import INITIALIZERS
from .variant import New, Variant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HadamardFactors:
    """Two pairs of factors of one kernel, `ΔW = scaling · (a·b) ∘ (a2·b2)`.

    It reaches rank² with the values of two times the rank. `∘` is the product of each
    entry with its own. The program is evaluated with the same change as two factors of
    rank², whose columns and rows are the products of those of both pairs: that is what
    each product costs.

    Attributes:
        a: `(*batch, *in, rank)`, and `a2` likewise.
        b: `(*batch, rank, *out)`, and `b2` likewise; `b2` starts at zero.
        axes: the roles of the kernel's axes.
        scaling: alpha/rank (or alpha/√rank), a Python float.

    References:
        Hyeon-Woo, Ye-Bin and Oh, FedPara: Low-Rank Hadamard Product for
        Communication-Efficient Federated Learning, <https://arxiv.org/abs/2108.06098>,
        2022, equation 3. PEFT's `LoHaConfig`.
    """

    a: jax.Array
    b: jax.Array
    a2: jax.Array
    b2: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The rank of each pair."""
        return self.a.shape[-1]

    @property
    def kernel_shape(self) -> Shape:
        """The shape of the kernel that the factors belong to."""
        return LoraFactors(self.a, self.b, self.axes, self.scaling).kernel_shape

    def lowered(self) -> LoraFactors:
        """Returns the same change as two factors of rank².

        `(Σᵢ aᵢ·bᵢ) ∘ (Σⱼ cⱼ·dⱼ) = Σᵢⱼ (aᵢ ∘ cⱼ)·(bᵢ ∘ dⱼ)`.
        """
        n = len(self.axes.batch)
        columns = self.a[..., :, None] * self.a2[..., None, :]
        rows = jnp.expand_dims(self.b, n + 1) * jnp.expand_dims(self.b2, n)
        a = columns.reshape(*self.a.shape[:-1], -1)
        b = rows.reshape(*self.b.shape[:n], -1, *self.b.shape[n + 1 :])
        return LoraFactors(a, b, self.axes, self.scaling)


def _shapes(axes: KernelAxes, shape: Shape, rank: int) -> dict[str, Shape]:
    a, b = axes.factor_shapes(shape, rank)
    return {"a": a, "b": b, "a2": a, "b2": b}


def _new(new: New, leaf: Any) -> dict[str, Any]:
    """Draws all but `b2` by the bound of its fan-in, as PEFT does."""
    make, wanted = INITIALIZERS["kaiming_uniform"], new.wanted()
    keys = jax.random.split(new.key, 3)
    a, _ = make(keys[0], wanted)
    a2, zero = make(keys[1], wanted)
    bound = 1 / math.sqrt(wanted.rank)
    b = jax.random.uniform(keys[2], zero.shape, zero.dtype, -bound, bound)
    return {"a": a, "b": b, "a2": a2, "b2": zero}


def _along(axes: KernelAxes) -> dict[str, tuple[int | None, ...]]:
    a, b = axes.along_factors()
    return {"a": a, "b": b, "a2": a, "b2": b}


HADAMARD = Variant(
    "loha",
    HadamardFactors,
    _shapes,
    _new,
    lambda entry, kernel: entry.lowered(),
    along=_along,
    labels={"a2": "a", "b2": "b"},
    note=lambda entry: f" loha, {entry.rank**2} as two factors",
    peft="LOHA",
)

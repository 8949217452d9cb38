"""LoRA-XS: a small matrix between the singular vectors of the kernel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..._jax.dots import dot
from ..._jax.dtypes import summed_in
from ..._jax.linalg import svd
from ..._jax.sharding import whole_along
from ..._params.axes import KernelAxes, Shape
from ..factors import LoraFactors
from .variant import New, Variant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CoreFactors:
    """A trained rank×rank matrix between two frozen sides, `ΔW = scaling · a·core·b`.

    With the singular value decomposition `W = U·S·Vᵀ` of the kernel, `frozen_a` is
    `U_r·S_r` and `frozen_b` is `V_rᵀ`, of its `rank` largest singular values. Both are
    held, as a decomposition takes long and rounds otherwise elsewhere.

    Attributes:
        frozen_a: the input side, of shape `(*batch, *in, rank)`.
        core: what is trained, of shape `(*batch, rank, rank)`; it starts at zero.
        frozen_b: the output side, of shape `(*batch, rank, *out)`.
        axes: the roles of the kernel's axes.
        scaling: alpha/rank (or alpha/√rank), a Python float.

    References:
        Bałazy et al., LoRA-XS: Low-Rank Adaptation with Extremely Small Number of
        Parameters, <https://arxiv.org/abs/2405.17604>, 2024, section 3. There the core
        starts at values of the size of 1e-5.
    """

    frozen_a: jax.Array
    core: jax.Array
    frozen_b: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number of rows, and of columns, of the core."""
        return self.frozen_a.shape[-1]

    @property
    def kernel_shape(self) -> Shape:
        """The shape of the kernel that the factors belong to."""
        return LoraFactors(
            self.frozen_a, self.frozen_b, self.axes, self.scaling
        ).kernel_shape

    def lowered(self) -> LoraFactors:
        """Returns the same change as factors, `a·core` and `b`, of the same rank."""
        a, b = lax.stop_gradient((self.frozen_a, self.frozen_b))
        n, last = len(self.axes.batch), a.ndim - 1
        batch, dtype = tuple(range(n)), a.dtype
        wide = summed_in(dtype)
        a = dot(a, self.core, ((last,), (n,)), (batch, batch), wide, _HIGHEST)
        return LoraFactors(a.astype(dtype), b, self.axes, self.scaling)


_HIGHEST = lax.Precision.HIGHEST


def _shapes(axes: KernelAxes, shape: Shape, rank: int) -> dict[str, Shape]:
    a, b = axes.factor_shapes(shape, rank)
    core = (*a[: len(axes.batch)], rank, rank)
    return {"frozen_a": a, "core": core, "frozen_b": b}


def _new(new: New, leaf: Any) -> dict[str, Any]:
    shapes, dtype = _shapes(new.axes, new.shape, new.rank), new.config.dtype
    whole = whole_along(leaf, range(leaf.ndim))  # a decomposition is not sharded
    matrix = new.axes.to_matrix(whole.astype(summed_in(leaf.dtype)))
    u, s, vt = svd(matrix).cut(slice(0, new.rank))
    a = (u * s[..., None, :]).reshape(shapes["frozen_a"])
    b = vt.reshape(shapes["frozen_b"])
    core = jnp.zeros(shapes["core"], dtype)
    return {"frozen_a": a.astype(dtype), "core": core, "frozen_b": b.astype(dtype)}


CORE = Variant(
    "lora_xs",
    CoreFactors,
    _shapes,
    _new,
    lambda entry, kernel: entry.lowered(),
    from_leaf=lambda config: (
        "has the singular vectors of its kernel, with which LoRA-XS"
    ),
    along=lambda axes: {
        "frozen_a": axes.along_factors()[0],
        "core": (*axes.batch, None, None),
        "frozen_b": axes.along_factors()[1],
    },
    frozen=("frozen_a", "frozen_b"),
    labels={"core": "b"},
    note=lambda entry: " lora_xs",
)

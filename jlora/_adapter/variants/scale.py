"""IA3: a trained scale of the inputs or of the outputs of a kernel."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..._jax.dtypes import summed_in
from ..._jax.sharding import beside
from ..._params.axes import KernelAxes, Shape, expand
from .variant import New, Variant


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KernelScale:
    """A scale of one side of a kernel: `W·diag(scale)`, or `diag(scale)·W`.

    It is no sum of the kernel and two factors. The program is evaluated with the frozen
    kernel, and the scale is applied to what goes into it or comes out of it. Where it
    fits neither, as where a convolution has scaled inputs, a plan says so.

    Attributes:
        scale: of the outputs `(*batch, *out)`, or of the inputs `(*batch, *in)`; it
            starts at one, and is kept in float32 at least.
        axes: the roles of the kernel's axes.
        scale_side: "out" or "in".
        kernel_shape: the shape of the kernel.

    References:
        Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
        In-Context Learning, <https://arxiv.org/abs/2205.05638>, 2022, section 3.3: the
        outputs of keys and values, and the inputs of the last layer of each block.
        PEFT's `IA3Config`.
    """

    scale: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scale_side: str = dataclasses.field(metadata={"static": True})
    kernel_shape: Shape = dataclasses.field(metadata={"static": True})

    def scaled(self, kernel: jax.Array) -> jax.Array:
        """Returns the scaled kernel, the product in float32 and rounded once."""
        along = self.axes.batch + _side(self.axes, self.scale_side)
        scale = expand(self.scale[..., None], along, self.axes.ndim)[..., 0]
        wide = kernel.astype(summed_in(kernel.dtype))
        return (wide * beside(scale.astype(wide.dtype), wide)).astype(kernel.dtype)


def _side(axes: KernelAxes, side: str) -> tuple[int, ...]:
    return axes.in_ if side == "in" else axes.out


def _shapes(
    axes: KernelAxes, shape: Shape, rank: None, scale_side: str
) -> dict[str, Shape]:
    return {"scale": tuple(shape[i] for i in axes.batch + _side(axes, scale_side))}


def _new(new: New, leaf: Any) -> dict[str, Any]:
    shape = _shapes(new.axes, new.shape, None, new.config.scale_side)["scale"]
    return {"scale": jnp.ones(shape, summed_in(new.config.dtype))}


def _origin(entry: KernelScale, kernel: Any) -> Any:
    return entry.scale.__array_namespace__().ones_like(entry.scale)


SCALE = Variant(
    "ia3",
    KernelScale,
    _shapes,
    _new,
    lambda entry, kernel: entry.scaled(jnp.asarray(kernel)),
    statics=lambda axes, shape: {"kernel_shape": shape},
    settings=("scale_side",),
    rank=None,
    wide=("scale",),
    labels={"scale": "magnitude"},
    reads_kernel=True,
    leaf="kernel",
    merged=lambda kernel, entry: entry.scaled(kernel),
    origin=_origin,
    scaled_side=lambda owner: owner.scale_side,
    note=lambda entry: f"ia3 {entry.scale_side}",
    peft="IA3",
    plural="scales of kernels",
)

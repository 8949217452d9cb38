"""LoRA: two factors of a kernel, and with DoRA the norm of each of its outputs."""

from typing import Any

from ..._jax.dtypes import widest
from ..._jax.sharding import set_sharding
from ..._params.axes import KernelAxes, Shape
from ..._params.layout import factor_shardings
from ..._params.quantized import arrays_of
from ..dora import kernel_norm
from ..factors import LoraFactors
from ..initializers import INITIALIZERS
from .variant import New, Variant


def _shapes(axes: KernelAxes, shape: Shape, rank: int) -> dict[str, Shape]:
    a, b = axes.factor_shapes(shape, rank)
    return {"a": a, "b": b, "magnitude": axes.magnitude_shape(shape)}


def _new(new: New, leaf: Any) -> dict[str, Any]:
    axes, shape, config = new.axes, new.shape, new.config
    # On an Explicit mesh layouts are part of the types, and the kernel's is known here.
    kernel = set_sharding(arrays_of(leaf)[0])
    places: Any = (None, None)
    if kernel:
        places = factor_shardings(kernel, axes, *axes.factor_shapes(shape, new.rank))
    a, b = INITIALIZERS[config.init](new.key, new.wanted(places))
    if not config.dora:
        return {"a": a, "b": b}
    # A rounded norm would stretch each output before the first step.
    return {"a": a, "b": b, "magnitude": kernel_norm(leaf, axes).astype(widest(a))}


def _along(axes: KernelAxes) -> dict[str, tuple[int | None, ...]]:
    a, b = axes.along_factors()
    return {"a": a, "b": b, "magnitude": (*axes.batch, *axes.out)}


def _problem(factors: LoraFactors, shape: Shape) -> str | None:
    if factors.axes.ndim != len(shape):
        return f"has {len(shape)} axes, its factors {factors.axes}"
    wanted = factors.axes.factor_shapes(shape, factors.rank)
    given = tuple(factors.a.shape), tuple(factors.b.shape)
    if wanted != given:
        transposed = factors.kernel_shape == shape[::-1]
        hint = "; they look transposed" if transposed else ""
        return (
            f"needs a {wanted[0]} and b {wanted[1]} "
            f"(roles {factors.axes}), got a {given[0]} and b {given[1]}{hint}"
        )
    if factors.magnitude is None:
        return None
    wanted, own = factors.axes.magnitude_shape(shape), tuple(factors.magnitude.shape)
    return None if wanted == own else f"needs a magnitude {wanted} of DoRA, got {own}"


FACTORS = Variant(
    "lora",
    LoraFactors,
    _shapes,
    _new,
    lambda entry, kernel: entry,
    chosen=lambda config: config.variant == "lora" and not config.full,
    from_leaf=lambda config: "has DoRA's magnitude, which" if config.dora else None,
    optional={"magnitude": lambda config: config.dora},
    wide=("magnitude",),
    along=_along,
    problem=_problem,
    note=lambda entry: "" if entry.magnitude is None else " dora",
)

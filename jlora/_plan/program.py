"""The program that a call is evaluated by, and where it uses each kernel."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .._adapter.variants.variant import Variant
from .._errors import MaterializationError
from .._jax.versions import OWN_DERIVATIVE
from .._params.axes import KernelAxes, Shape
from .._params.quantized import Quantized
from .._product.choice import Contraction
from .._program.decide import DORA, OF_DORA, OF_SCALE, OF_SUM, SideScale, decide
from .._program.trace import Traced
from .._rules import CONSUME
from .._rules.view import Flow, Log, Use, Value, View
from .conflicts import conflicts, other_batch, other_roles, told_roles
from .target import Target, variant_of


def with_uses(
    targets: Sequence[Target],
    traced: Traced,
    materialize: str,
    contraction: Contraction,
) -> list[Target]:
    """Adds to each target where the program uses it."""
    axes = {t.path: t.axes for t in targets if t.axes is not None}
    scales = {
        t.path: scale
        for t in targets
        if (scale := scale_of(variant_of(t), t.config, "magnitude" in t.array_shapes))
    }
    whole = {t.path for t in targets if t.axes is None}
    _, log = program_of(
        traced, axes, materialize, contraction, scales, whole, misfit=other_batch
    )
    seen = [*log.uses, *log.obstacles]
    return [
        dataclasses.replace(t, uses=tuple(use for use in seen if use.path == t.path))
        for t in targets
    ]


def scale_of(variant: Variant, owner: Any, has_magnitude: bool) -> SideScale | None:
    """Returns the scale beside a kernel, of DoRA or of a variant that is one.

    Args:
        variant: what the adapter has of the kernel.
        owner: a config, or an entry, with the settings of the variant.
        has_magnitude: whether it has DoRA's magnitude.
    """
    if has_magnitude:
        return DORA
    side = variant.scaled_side(owner)
    return SideScale(("batch", side), OF_SCALE) if side else None


def program_of(
    traced: Traced,
    axes: Mapping[str, KernelAxes],
    materialize: str,
    contraction: Contraction,
    scales: Mapping[str, SideScale] | None = None,
    whole: Collection[str] = (),
    *,
    frozen: Collection[str] = (),
    misfit: Callable[[list[str]], Exception] | None = None,
) -> tuple[Any, Log]:
    """Returns the program to evaluate, and the uses of the kernels in it.

    Args:
        traced: the traced call.
        axes: the roles of the axes of the kernels, by path.
        materialize: as `jlora.lora` takes it.
        contraction: likewise.
        scales: the scales that kernels have, by path.
        whole: the paths of the leaves that are trained whole.
        frozen: the paths of the kernels that have no factors: where these reach an
            operation without a rule nothing is amiss.
        misfit: makes the error for kernels that could be evaluated with other roles; it
            is about the adapter by default.

    Raises:
        AdapterError: if the roles in the adapter are not those of the program, and keep
            it from being evaluated.
        MaterializationError: if a kernel reaches an operation without a low-rank rule,
            or one of `scales` a use that has none for it, and `materialize` is "error".
    """
    shapes = {p: tuple(traced.inputs[traced.positions[p]].shape) for p in axes}
    inputs = inputs_known(traced, shapes, whole)
    program, log = decide(traced.jaxpr, inputs, axes, contraction, scales)
    obstacles = [use for use in log.obstacles if use.path not in frozen]
    if obstacles and materialize == "error":
        told = conflicts(traced.jaxpr, inputs, axes, obstacles, contraction, scales)
        if told:
            raise (misfit or other_roles)(told)
        raise MaterializationError(_obstacles(obstacles, shapes, axes))
    return program, log


def inputs_known(
    traced: Traced, kernels: Mapping[str, Shape], whole: Collection[str] = ()
) -> list[Value]:
    """Returns what is known of the inputs of a program, given the shapes of kernels."""
    inputs = [Value(active=Flow(active=True))] * len(traced.inputs)
    for path, place in traced.positions.items():
        view = (View.whole(path, kernels[path]),) if path in kernels else ()
        lazy = isinstance(traced.inputs[place], Quantized)
        inputs[place] = Value(view, Flow(adapter=path in whole), lazy=lazy)
    return inputs


def _obstacles(
    uses: Sequence[Use],
    shapes: Mapping[str, tuple[int, ...]],
    axes: Mapping[str, KernelAxes],
) -> str:
    lines = [
        f"adapted kernel {use.path!r} {shapes[use.path]} reaches {use.kind} at "
        f"{use.source}, which has no low-rank rule{_for_axes(use, axes[use.path])}"
        for use in dict.fromkeys(uses)
    ]
    of_own = any(use.primitive in OWN_DERIVATIVE for use in uses)
    has = lambda text: any(use.kind.endswith(text) for use in uses)
    apart = ", leave DoRA off for them with a config of their own"
    apart = apart if has(OF_DORA) else ""
    moved = has(OF_SCALE) or has(OF_SUM)
    apart += ", do not train what is beside them there" if moved else ""
    return (
        "\n".join(lines)
        + f"\nLeave these paths out of `LoraConfig.target`{apart}, or pass "
        '`materialize="allow"` to `jlora.lora` to form W + s·a·b there and only there'
        + (_OF_OWN if of_own else "")
    )


def _for_axes(use: Use, axes: KernelAxes) -> str:
    """Says the roles where a product, which has a rule, has none for them."""
    has_rule = use.primitive in CONSUME and use.kind == use.primitive
    return f" for its axes ({told_roles(axes)})" if has_rule else ""


_OF_OWN = (
    ", with exact gradients. A function with a derivative of its own takes whole "
    "kernels, as its rule does; in a variant without one they stay factored (for "
    "Diffrax: `adjoint=diffrax.DirectAdjoint()`)"
)

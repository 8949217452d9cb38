"""Convolutions with an adapted kernel: its roles, and how they are evaluated."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._errors import MaterializationError
from .._jax.dtypes import product_dtype
from .._jax.sharding import explicit_sharding, spec_of, without_axes
from .._jax.versions import source_line
from .._params.axes import Roles, Shape, free_axes
from .._params.lazy import called
from .adapted import Adapted, Part, complete, part_delta, without_gate
from .channels import Mixing, mix_channels
from .parts import (
    branch_dtype,
    contracted_first,
    dropped_input,
    factor_matrix,
    part_words,
    split_join,
    times,
)
from .rule import Axes, ConsumeRule, LinearUse
from .view import View
from .window import Window, convolve


def _is_depthwise(eqn: Any) -> bool:
    """Returns whether a convolution has one input channel per group."""
    in_feature = eqn.params["dimension_numbers"].rhs_spec[1]
    single = eqn.invars[1].aval.shape[in_feature] == 1
    return single and eqn.params["feature_group_count"] > 1


def _roles(eqn: Any, operand: int) -> list[str] | None:
    if eqn.params["batch_group_count"] != 1:
        return None
    out, in_, *_ = eqn.params["dimension_numbers"].rhs_spec
    ndim = eqn.invars[1].aval.ndim
    return [{out: "out", in_: "in"}.get(i, "either") for i in range(ndim)]


def _details(eqn: Any, view: View) -> str:
    """Names what not every library's convolution has."""
    groups = eqn.params["feature_group_count"]
    strides = max(eqn.params["lhs_dilation"], default=1)
    told = {
        f", {groups} groups": groups > 1,
        ", dilated": max(eqn.params["rhs_dilation"], default=1) > 1,
        ", fractionally strided": strides > 1,
    }
    return "".join(text for text, holds in told.items() if holds) + _order(eqn, view)


def _order(eqn: Any, view: View) -> str:
    """Names the order of the kernel's axes if it is not usual, numbers for the window.

    Usual are `(out, in, *window)`, and `(*window, in)` with the outputs anywhere behind
    the first. The window has the order of the other operand's axes.
    """
    dims = eqn.params["dimension_numbers"]
    out, in_, *space = dims.rhs_spec
    space = [axis for _, axis in sorted(zip(dims.lhs_spec[2:], space, strict=True))]
    names = {out: "out", in_: "in", **{axis: str(i) for i, axis in enumerate(space)}}
    places = {axis: min(view.origins[axis], default=-1) for axis in names}
    order = sorted((i for i in names if places[i] >= 0), key=places.__getitem__)
    usual = [in_, *space] if order[:1] == [out] else [*space, in_]
    if [i for i in order if i != out] == [i for i in usual if i in order]:
        return ""
    return f", axes ({', '.join(names[i] for i in order)})"


def _supports(eqn: Any, operand: int, roles: Roles) -> bool:
    """Whether inputs and outputs of a convolution are on different factors.

    An axis of the window may be on either, see `_low_rank`; in groups all are on that
    of the inputs.
    """
    if eqn.params["batch_group_count"] != 1:
        return False
    out, in_, *space = eqn.params["dimension_numbers"].rhs_spec
    if _is_depthwise(eqn):
        return True
    taken = [i for i in (in_, *space) if roles[i] is not None]
    if eqn.params["feature_group_count"] == 1 and roles[in_] is not None:
        taken = [in_]
    sides = {roles[i] for i in taken}
    apart = len(sides) <= 1 and roles[out] not in sides
    return apart and "batch" not in roles


def _run(eqn: Any, operands: list[Any], derive: str) -> list[Any]:
    x, value = operands
    (y,) = called(eqn, [x, value.base], derive)
    for part in map(without_gate, value.parts):
        convolve = _depthwise if _is_depthwise(eqn) else _low_rank
        dropped = dropped_input(part, x, part_words(part, ()), ())
        delta = convolve(eqn, dropped, value.base, part, y, derive)
        y = y + delta.astype(y.dtype)
    return [_scaled(eqn, y, value)]


def _scaled(eqn: Any, y: jax.Array, value: Adapted) -> jax.Array:
    """Applies DoRA's scale along the output channels."""
    if value.scale is None:
        return y
    dims, ndim = eqn.params["dimension_numbers"], value.base.ndim
    out_axis, sizes = dims.rhs_spec[0], [1] * y.ndim
    if any(value.scale.shape[i] != 1 for i in free_axes(ndim, [out_axis])):
        raise MaterializationError(
            f"a DoRA kernel of shape {value.base.shape} has output axes that a "
            f"convolution at {source_line(eqn)} sums over; adapt it without `dora=True`"
        )
    sizes[dims.out_spec[1]] = y.shape[dims.out_spec[1]]
    return times(y, complete(value.scale, [out_axis], value.base.shape).reshape(sizes))


def _depthwise(
    eqn: Any, x: jax.Array, w: Any, part: Part, y: jax.Array, derive: str
) -> jax.Array:
    """One depthwise convolution with the delta, which is a few values per channel."""
    out, in_, *space = eqn.params["dimension_numbers"].rhs_spec
    kernel = jnp.transpose(part_delta(part, w.shape), [*space, in_, out])
    computed = product_dtype(x.dtype, w.dtype, y.dtype)
    window = Window.of(
        eqn,
        shared=False,
        computed=computed,
        result=branch_dtype(y.dtype, computed),
        sharding=explicit_sharding(y),
    )
    return convolve(window, x, kernel, derive)


def _low_rank(
    eqn: Any, x: jax.Array, w: Any, part: Part, y: jax.Array, derive: str
) -> jax.Array:
    """A convolution to rank channels, then a product over the channels.

    Where the outputs' factor has axes of the window, that is a convolution over them.
    """
    dims, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    out, in_, *space = dims.rhs_spec
    late = _late(eqn, part)
    early = [i for i in space if i not in late]
    pair = contracted_first(part, [*early, in_], [*late, out])
    if pair is None:
        raise MaterializationError(split_join(eqn, w, "is convolved"))
    first = factor_matrix(pair[0], [*early, in_], w.shape)
    second = factor_matrix(pair[1], [*late, out], w.shape)
    computed = product_dtype(x.dtype, w.dtype, y.dtype)
    sharding, channels = explicit_sharding(y), dims.out_spec[1]
    places = [dims.out_spec[2 + space.index(i)] for i in late]
    window = Window.of(
        eqn,
        shared=True,
        computed=computed,
        result=computed,
        sharding=without_axes(sharding, spec_of(y), [channels, *places]),
    )
    h = _convolved(window, space, early, x, first, derive)
    # The scaling is folded into the rank-sized value.
    h, result = part.scaling * h, branch_dtype(y.dtype, computed)
    if not late:
        mixing = Mixing(channels, groups, window.precision, result, sharding)
        return mix_channels(mixing, h, second, derive)
    window = window._replace(lhs=window.out, result=result, sharding=sharding)
    return _convolved(window, space, late, h, jnp.swapaxes(second, -1, -2), derive)


def _convolved(
    window: Window,
    space: Sequence[int],
    axes: Sequence[int],
    x: jax.Array,
    kernel: jax.Array,
    derive: str,
) -> jax.Array:
    """Returns the convolution with a kernel that has some axes of the window alone."""
    absent = [n for n, i in enumerate(space) if i not in axes]
    window = window.along([space.index(i) for i in axes])
    return convolve(window, x, jnp.expand_dims(kernel, absent), derive)


def _late(eqn: Any, part: Part) -> list[int]:
    """Returns the axes of the window that the factor of the outputs has."""
    if eqn.params["feature_group_count"] > 1:
        return []
    out, in_, *space = eqn.params["dimension_numbers"].rhs_spec
    turned = part.a.shape[out] != 1 or part.b.shape[in_] != 1
    factor = part.a if turned else part.b
    return [i for i in space if factor.shape[i] != 1]


def _flops(eqn: Any) -> int:
    out, kernel = eqn.outvars[0].aval, eqn.invars[1].aval
    features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * out.size * (kernel.size // features)


def _scale_fits(eqn: Any, operand: int, varies: Axes) -> bool:
    return varies <= {eqn.params["dimension_numbers"].rhs_spec[0]}


# --- with a probe in the place of the kernel, see `linear_use.py` ---


def _summed(eqn: Any, operand: int) -> Sequence[int]:
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    return free_axes(eqn.invars[1].aval.ndim, [out_axis])


def _on_probe(
    eqn: Any,
    operand: int,
    others: Sequence[Any],
    probe: jax.Array,
    shape: Shape,
    own: Collection[int],
) -> jax.Array:
    """The convolution, to as many channels as the probe has columns, in each group.

    Its own axes are those of the window that outputs have: each entry counts once.
    """
    x = others[0]
    dims, sharding = eqn.params["dimension_numbers"], eqn.params["out_sharding"]
    _, in_, *space = dims.rhs_spec
    early = [i for i in space if i not in own]
    channels = dims.out_spec[1]
    if sharding is not None:
        spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
        sharding = without_axes(sharding, spec, [channels])
    window = Window.of(
        eqn, shared=True, computed=x.dtype, result=x.dtype, sharding=sharding
    )
    highest = lax.Precision.HIGHEST
    window = window._replace(precision=(highest, highest))
    kernel = factor_matrix(probe, [*early, in_], shape)
    return _convolved(window, space, early, x, kernel, "custom")


def _inputs(eqn: Any, operand: int, values: Sequence[Any]) -> int:
    params, out = eqn.params, eqn.outvars[0].aval
    dims, x = params["dimension_numbers"], values[0]
    places = zip(dims.out_spec[2:], dims.lhs_spec[2:], dims.rhs_spec[2:], strict=True)
    late = _own(eqn, operand, values[operand].parts[0])
    counts = [x.shape[j] if k in late else out.shape[i] for i, j, k in places]
    batch = out.shape[dims.out_spec[0]]
    return batch * math.prod(counts) * params["feature_group_count"]


def _own(eqn: Any, operand: int, part: Part) -> set[int]:
    """The axes of the window that the outputs of the kernel have."""
    return {i for i in _late(eqn, part) if part.a.shape[i] == 1}


CONSUME = {
    "conv_general_dilated": ConsumeRule(
        "conv",
        (1,),
        _roles,
        _flops,
        run=_run,
        linear=LinearUse(_summed, lambda eqn, operand: (), _on_probe, _inputs, _own),
        supports=_supports,
        details=_details,
        scale_fits=_scale_fits,
    )
}

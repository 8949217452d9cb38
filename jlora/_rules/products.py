"""The products of a program with adapted kernels, evaluated in groups.

A kernel's parts are brought to two matrices, `a` over what is contracted and `b` over
what is free, and all products that share an operand go to `low_rank_product` as one
group. Where the factors are no such matrices, each part is a branch of its own, see
`dot_einsum.py`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._errors import MaterializationError
from .._jax.dtypes import common, product_dtype, workable
from .._jax.versions import source_line
from .._params.axes import free_axes
from .._params.lazy import called
from .._product.branch import Arrays, Static, add_branch
from .._product.choice import ByPlatform
from .._product.group import Form, GroupDims, Operands, concatenate
from .._product.low_rank import low_rank_product
from .adapted import Adapted, Held, Part
from .dot_einsum import add_labelled
from .dot_general import dot_dims, group_dims
from .parts import contracted_first, dropped_input, factor_matrix, part_words, times


class _Member(NamedTuple):
    dims: GroupDims
    operands: Operands


def run_products(
    eqns: Sequence[Any],
    operands: Sequence[int],
    x: jax.Array,
    kernels: Sequence[Adapted | Held],
    form: Form | ByPlatform,
    derive: str,
) -> list[jax.Array]:
    """Evaluates products that share their other operand.

    Args:
        eqns: the `dot_general` equations.
        operands: which operand of each is the kernel.
        x: the other operand.
        kernels: the kernels, as `taken` returns them.
        form: how the group is computed.
        derive: who derives the backward pass.

    Returns:
        The output of each equation.
    """
    rows = zip(eqns, operands, kernels, strict=True)
    scaled = [Scaled.of(eqn, operand, x, kernel) for eqn, operand, kernel in rows]
    rows = zip(eqns, operands, scaled, strict=True)
    members = [_member(eqn, i, one.x, one.kernel) for eqn, i, one in rows]
    groups: dict[Any, list[int]] = {}
    for i, member in enumerate(members):
        key: Any = ("alone", i)
        if member is not None and scaled[i].x is x:
            key = _type_of(member.operands.a[0])
        groups.setdefault(key, []).append(i)
    outputs: dict[int, jax.Array] = {}
    for which in groups.values():
        found = [m for i in which if (m := members[i]) is not None]
        if not found:
            (i,) = which
            one = scaled[i]
            outputs[i] = _apart(eqns[i], operands[i], one.x, one.kernel, derive)
            continue
        dims, arrays = _join(found)
        products = low_rank_product(dims, arrays, form=form, derive=derive)
        outputs.update(zip(which, products, strict=True))
    return [scaled[i].finish(outputs[i]) for i in range(len(eqns))]


class Scaled(NamedTuple):
    """A product with DoRA's scale moved from the kernel to `x` or to the result.

    Attributes:
        x: the other operand; scaled where the output axes of the kernel are contracted.
        kernel: the kernel without its scale.
        after: what the result is multiplied by, if anything.
    """

    x: jax.Array
    kernel: Adapted | Held
    after: jax.Array | None = None

    @classmethod
    def of(cls, eqn: Any, operand: int, x: jax.Array, kernel: Any) -> "Scaled":
        """Moves the scale of a kernel, if it has one."""
        scale = kernel.scale
        if scale is None:
            return cls(x, kernel)
        kernel = dataclasses.replace(kernel, scale=None)
        contract, batch, x_contract, x_batch = dot_dims(eqn, operand)
        free = free_axes(kernel.base.ndim, contract, batch)
        if all(scale.shape[i] == 1 for i in contract):
            return cls(x, kernel, _after(eqn, operand, scale, batch, free))
        if all(scale.shape[i] == 1 for i in free):
            axes, places = [*batch, *contract], [*x_batch, *x_contract]
            own = factor_matrix(scale, axes, kernel.base.shape)[..., 0]
            return cls(times(x, _placed(own, places, x.ndim)), kernel)
        raise MaterializationError(
            f"a DoRA kernel of shape {kernel.base.shape} is contracted over a part of "
            f"its output axes at {source_line(eqn)}, where its norm fits neither side; "
            "adapt it without `dora=True`"
        )

    def finish(self, y: jax.Array) -> jax.Array:
        """Returns the result with the scale applied."""
        return y if self.after is None else times(y, self.after)


def _after(
    eqn: Any,
    operand: int,
    scale: jax.Array,
    batch: Sequence[int],
    free: Sequence[int],
) -> jax.Array:
    """Lays a scale out as the result: `(batch, free of left, free of right)`."""
    shape, n = eqn.invars[operand].aval.shape, len(batch)
    own = factor_matrix(scale, [*batch, *free], shape)[..., 0]
    ndim = eqn.outvars[0].aval.ndim
    start = n if operand == 0 else ndim - len(free)
    return _placed(own, [*range(n), *range(start, start + len(free))], ndim)


def _placed(value: jax.Array, places: Sequence[int], ndim: int) -> jax.Array:
    """Lays a value out with its axes at these places among `ndim`, for broadcasting."""
    value = jnp.transpose(value, sorted(range(len(places)), key=places.__getitem__))
    return jnp.expand_dims(value, free_axes(ndim, places))


def taken(eqn: Any, operand: int, kernel: Any) -> Any:
    """Returns a kernel as its product takes it: held where that splits it by roles."""
    if not isinstance(kernel, Held):
        return kernel
    contract, batch, _, _ = dot_dims(eqn, operand)
    return kernel if kernel.is_split(batch, contract) else kernel.laid_out


def _member_as_held(eqn: Any, operand: int, x: jax.Array, kernel: Held) -> _Member:
    contract, batch, _, _ = dot_dims(eqn, operand)
    free = free_axes(kernel.axes.ndim, contract, batch)
    a, b = kernel.matrices(batch, contract, free)
    dims = group_dims(eqn, operand, kernel.scaling)
    return _Member(dims, Operands(x, (kernel.base,), (a,), (b,), (None,), (None,)))


def _member(
    eqn: Any, operand: int, x: jax.Array, kernel: Adapted | Held
) -> _Member | None:
    """Returns a product as a group of one.

    None if its parts are no two matrices, or have dropout and so an `x` each, or if it
    has none.
    """
    if isinstance(kernel, Held):
        return _member_as_held(eqn, operand, x, kernel)
    first, *others = kernel.parts or (None,)
    if first is None or (others and any(part.dropout for part in kernel.parts)):
        return None
    contract, batch, _, _ = dot_dims(eqn, operand)
    matrices = _as_matrices(kernel, contract, batch)
    if matrices is None:
        return None
    a, b, scaling = matrices
    dims = group_dims(eqn, operand, scaling, first.dropout)
    gate = _gate_of(kernel.parts, x.ndim - len(contract))
    words = part_words(first, batch)
    return _Member(dims, Operands(x, (kernel.base,), (a,), (b,), (gate,), (words,)))


def _gate_of(parts: Sequence[Part], before: int) -> jax.Array | None:
    """Returns the gate of joined parts, with so many axes before that of the rank."""
    if all(part.gate is None for part in parts):
        return None
    gates = [
        jnp.ones(part.a.shape[-1]) if part.gate is None else part.gate.reshape(-1)
        for part in parts
    ]
    return concatenate(_alike(gates)).reshape(*[1] * before, -1)


def _type_of(a: jax.Array) -> Any:
    """What must agree, but for the rank, for factors to be concatenated."""
    aval = jax.typeof(a)
    return aval.dtype, aval.sharding.spec


def _join(members: Sequence[_Member]) -> tuple[GroupDims, Operands]:
    dims, operands = members[0]
    for member in members[1:]:
        dims = dims.with_kernels(member.dims.kernels)
        more = member.operands
        operands = Operands(
            operands.x,
            operands.kernels + more.kernels,
            operands.a + more.a,
            operands.b + more.b,
            operands.gates + more.gates,
            operands.words + more.words,
        )
    return dims, operands


def _as_matrices(
    value: Adapted, contract: Sequence[int], batch: Sequence[int]
) -> tuple[jax.Array, jax.Array, float] | None:
    """Returns `a: (*batch, *contract, r)`, `b: (*batch, *free, r)` and the scaling.

    A transposed use (a tied head) swaps the two factors. None if the parts do not fall
    into a contracted and a free factor. Several parts are one, with the ranks joined.
    """
    shape = value.base.shape
    free = free_axes(len(shape), contract, batch)
    pairs = []
    for part in value.parts:
        pair = contracted_first(part, contract, free)
        if pair is None:
            return None
        pairs.append(pair)
    scalings = {part.scaling for part in value.parts}
    common = scalings.pop() if len(scalings) == 1 else None
    a_list, b_list = [], []
    for part, (first, second) in zip(value.parts, pairs, strict=True):
        a_list.append(factor_matrix(first, [*batch, *contract], shape))
        b = factor_matrix(second, [*batch, *free], shape)
        b_list.append(b if common is not None else part.scaling * b)
    a, b = concatenate(_alike(a_list)), concatenate(_alike(b_list))
    return a, b, 1.0 if common is None else common


def _alike(factors: list[jax.Array]) -> list[jax.Array]:
    """Returns factors in one dtype: joined kernels may have configs of their own."""
    dtype = common(*(factor.dtype for factor in factors))
    return [factor.astype(dtype) for factor in factors]


def _apart(eqn: Any, operand: int, x: jax.Array, value: Any, derive: str) -> jax.Array:
    """The base product, and each part by itself."""
    base = [value.base, x] if operand == 0 else [x, value.base]
    (y,) = called(eqn, base, derive)
    contract, batch, _, x_batch = dot_dims(eqn, operand)
    kernel = jax.ShapeDtypeStruct(value.base.shape, value.base.dtype)
    for part in value.parts:
        words = part_words(part, batch)
        one = Adapted(value.base, (part,))
        matrices = _as_matrices(one, contract, batch)
        if matrices is None:
            computed = product_dtype(x.dtype, kernel.dtype, y.dtype)
            dropped = dropped_input(part, workable(x, computed), words, x_batch)
            y = add_labelled(eqn, operand, dropped, computed, part, y, derive=derive)
            continue
        a, b, scaling = matrices
        static = Static(group_dims(eqn, operand, scaling, part.dropout), kernel)
        gate = _gate_of((part,), x.ndim - len(contract))
        y = add_branch(static, Arrays(x, a, b, words, gate), y, derive=derive)
    return y

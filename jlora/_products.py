"""The products of a program with adapted kernels: what `dot_general` becomes.

A kernel's parts are brought to two matrices, `a` over what is contracted and `b` over
what is free, and all products that share an operand go to `_linear` as one group.
"""

import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._adapted import Adapted, Part, complete
from ._axes import free_axes
from ._group import Form, GroupDims, KernelDims, Operands, concatenate
from ._lazy import called
from ._linear import low_rank_product


def dot_dims(eqn: Any, operand: int) -> tuple[tuple, tuple, tuple, tuple]:
    """Returns the contracting and batch axes of the kernel and of the other operand."""
    contract, batch = eqn.params["dimension_numbers"]
    other = 1 - operand
    return contract[operand], batch[operand], contract[other], batch[other]


def dot_roles(eqn: Any, operand: int) -> list[str] | None:
    """Returns the role that a product gives each axis of an operand, if it does."""
    contract, batch, _, _ = dot_dims(eqn, operand)
    ndim = eqn.invars[operand].aval.ndim
    roles = ["out"] * ndim
    for axes, role in ((contract, "in"), (batch, "batch")):
        for axis in axes:
            roles[axis] = role
    return roles if "in" in roles and "out" in roles else None


def group_dims(eqn: Any, operand: int, scaling: float = 1.0) -> GroupDims:
    """Returns one product as a group, given which operand is the kernel."""
    contract, batch, x_contract, x_batch = dot_dims(eqn, operand)
    params = {k: v for k, v in eqn.params.items() if k != "dimension_numbers"}
    one = KernelDims(
        contract, batch, operand == 0, scaling, tuple(sorted(params.items()))
    )
    return GroupDims(x_contract, x_batch, (one,))


class _Member(NamedTuple):
    dims: GroupDims
    operands: Operands


def run_products(
    eqns: Sequence[Any],
    operands: Sequence[int],
    x: jax.Array,
    kernels: Sequence[Adapted],
    form: Form,
    derive: str,
) -> list[jax.Array]:
    """Evaluates products that share their other operand.

    Args:
        eqns: the `dot_general` equations.
        operands: which operand of each is the kernel.
        x: the other operand.
        kernels: the kernels.
        form: how the group is computed.
        derive: who derives the backward pass.

    Returns:
        The output of each equation.
    """
    rows = zip(eqns, operands, kernels, strict=True)
    members = [_member(eqn, operand, x, kernel) for eqn, operand, kernel in rows]
    groups: dict[Any, list[int]] = {}
    for i, member in enumerate(members):
        key = ("alone", i) if member is None else _type_of(member.operands.a[0])
        groups.setdefault(key, []).append(i)
    outputs: dict[int, jax.Array] = {}
    for which in groups.values():
        found = [m for i in which if (m := members[i]) is not None]
        if not found:
            (i,) = which
            outputs[i] = _dot_general_any(eqns[i], operands[i], x, kernels[i], derive)
            continue
        dims, arrays = _join(found)
        products = low_rank_product(dims, arrays, form=form, derive=derive)
        outputs.update(zip(which, products, strict=True))
    return [outputs[i] for i in range(len(eqns))]


def _member(eqn: Any, operand: int, x: jax.Array, kernel: Adapted) -> _Member | None:
    """Returns a product as a group of one; None if its parts are no two matrices."""
    contract, batch, _, _ = dot_dims(eqn, operand)
    matrices = _as_matrices(kernel, contract, batch)
    if matrices is None:
        return None
    a, b, scaling = matrices
    dims = group_dims(eqn, operand, scaling)
    return _Member(dims, Operands(x, (kernel.base,), (a,), (b,)))


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
    a, b = concatenate(a_list), concatenate(b_list)
    return a, b, 1.0 if common is None else common


def contracted_first(
    part: Part, contract: Sequence[int], free: Sequence[int]
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the factor without free axes and the one without contracted axes."""
    for first, second in ((part.a, part.b), (part.b, part.a)):
        lacks_free = all(first.shape[i] == 1 for i in free)
        if lacks_free and all(second.shape[i] == 1 for i in contract):
            return first, second
    return None


def factor_matrix(
    factor: jax.Array, axes: Sequence[int], shape: tuple[int, ...]
) -> jax.Array:
    """Returns a factor with just `axes`, in that order and whole, and the rank."""
    factor = complete(factor, axes, shape)
    if absent := free_axes(len(shape), axes):
        factor = lax.squeeze(factor, absent)
    kept = sorted(axes)
    return lax.transpose(factor, (*map(kept.index, axes), len(kept)))


def _dot_general_any(
    eqn: Any, index: int, x: jax.Array, value: Adapted, derive: str
) -> jax.Array:
    """A product that contracts part of each group: two einsums, left to autodiff."""
    base = [value.base, x] if index == 0 else [x, value.base]
    (y,) = called(eqn, base, derive)
    contract, batch, x_contract, x_batch = dot_dims(eqn, index)
    letters = iter(string.ascii_lowercase)
    w_labels = [next(letters) for _ in range(value.base.ndim)]
    x_labels = [next(letters) for _ in range(x.ndim)]
    for i, j in zip((*contract, *batch), (*x_contract, *x_batch), strict=True):
        x_labels[j] = w_labels[i]
    labels = (w_labels, x_labels) if index == 0 else (x_labels, w_labels)
    lhs_batch = [w_labels[i] for i in batch]
    summed = {w_labels[i] for i in contract}
    free = [
        c for side in labels for c in side if c not in summed and c not in lhs_batch
    ]
    out_labels = [*lhs_batch, *free]
    for part in value.parts:
        y = y + _einsum_part(part, x, w_labels, x_labels, out_labels, y)
    return y


def _einsum_part(
    part: Part,
    x: jax.Array,
    w_labels: list[str],
    x_labels: list[str],
    out_labels: list[str],
    y: jax.Array,
) -> jax.Array:
    """Returns `s·(x·a)·b` for any labels, each product over what it can sum."""

    def labelled(factor: jax.Array) -> tuple[jax.Array, list[str]]:
        absent = [i for i, n in enumerate(factor.shape[:-1]) if n == 1]
        kept = [c for i, c in enumerate(w_labels) if i not in absent]
        return jnp.squeeze(factor, absent).astype(y.dtype), [*kept, "R"]

    sides = [labelled(part.a), labelled(part.b)]
    # The factor that shares most labels with x goes first, so that h is small.
    sides.sort(key=lambda side: -len(set(side[1]) & set(x_labels)))
    (first, first_labels), (second, second_labels) = sides
    later = {*out_labels, *second_labels}
    h_labels = [c for c in dict.fromkeys([*x_labels, *first_labels]) if c in later]
    h = _einsum(x, x_labels, first, first_labels, h_labels)
    have = {*h_labels, *second_labels}
    short = [c for c in out_labels if c in have]
    result = _einsum(h, h_labels, second, second_labels, short)
    result = jnp.expand_dims(
        result, [i for i, c in enumerate(out_labels) if c not in have]
    )
    return jnp.broadcast_to((part.scaling * result).astype(y.dtype), y.shape)


def _einsum(
    x: jax.Array, xs: list[str], w: jax.Array, ws: list[str], out: list[str]
) -> jax.Array:
    expression = f"{''.join(xs)},{''.join(ws)}->{''.join(out)}"
    return jnp.einsum(expression, x, w)

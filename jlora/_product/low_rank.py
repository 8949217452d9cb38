"""The low-rank product `x·W + s·(x·a)·b`, with a hand-derived backward pass.

Plain autodiff of the same expression does the same arithmetic and runs slower: it asks
for transposed copies of large operands. Here every gradient is one `dot_general` whose
operands lie as they are, and the residuals are `x`, `W`, `a`, `b`, and `x·a` where it
is small beside `x`. A quantised kernel `W` is made dense in each pass, and its arrays
are the residuals.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from .._jax.dots import as_type_of
from .._jax.versions import manual_axes, vary
from .._params.lazy import (
    Lazy,
    dense,
    instantiate,
    is_lazy,
    kept_apart,
    made_again,
    primals,
    pulled,
)
from .alone import products_alone
from .choice import ByPlatform
from .forms import Backward, backward, forward
from .gate import factor_through
from .group import Form, GroupDims, Layout, Operands, per_kernel
from .lowered import Pass, run_lowered
from .skinny import gradients, shrink, shrink_cotangents

# `x·a` is kept for the backward pass where it has at most an eighth of the columns of
# `x`, and not computed again under `jax.checkpoint` where it has at most 1/32 of them.
_KEPT, _KEPT_UNDER_REMAT = 8, 32
_NAME = "jlora: x·a"


def low_rank_product(
    dims: GroupDims,
    operands: Operands,
    *,
    form: Form | ByPlatform,
    derive: str = "custom",
) -> list[jax.Array]:
    """Returns `x·W + s·(x·a)·b` for each kernel of a group.

    Args:
        dims: the static description of the products.
        operands: the arrays.
        form: how the products are computed, see `_product.forms`, or `ByPlatform`.
        derive: "custom" for the hand-derived backward pass, "autodiff" to leave the
            product to JAX, as forward-mode differentiation needs.

    Returns:
        One array per kernel, laid out as the base product lays it out.
    """
    varying = frozenset().union(*map(manual_axes, jax.tree.leaves(operands)))
    spread = lambda v: v if isinstance(v, Lazy) else vary(v, varying)
    operands = jax.tree.map(spread, operands, is_leaf=lambda v: isinstance(v, Lazy))
    if form == "merged" and operands.drops:
        form = "separate"  # a mask is one of inputs, and in no kernel
    if isinstance(form, ByPlatform) and is_lazy(operands.kernels):
        # What makes a kernel dense may be a part of its product, for few rows.
        form = form._replace(few=0)
    if derive == "custom":
        return _product((dims, form), operands)
    # Mapped over gates, a merged kernel would be one for each example.
    gated = any(gate is not None for gate in operands.gates)
    plain: Form = "merged" if form == "merged" and not gated else "separate"
    run = lambda operands: forward(
        plain, dims, _opened(operands), shrink(dims, operands)
    )
    if is_lazy(operands.kernels):
        return made_again(run, operands, derive)
    return run(operands)


def _opened(operands: Operands) -> Operands:
    """Returns the operands with quantised kernels made dense."""
    return operands._replace(kernels=tuple(_made(operands.x, operands.kernels)))


def _made(x: jax.Array, kernels: Sequence[Any]) -> list[jax.Array]:
    """Makes kernels dense, varying along the shard_map axes along which `x` does."""
    make = lambda w: vary(dense(w), manual_axes(x)) if isinstance(w, Lazy) else w
    return [make(w) for w in kernels]


def keeping(policy: Callable[..., Any] | None) -> Callable[..., Any]:
    """Returns a policy of `jax.checkpoint` that saves small `x·a` besides."""
    return _is_small if policy is None else _Keeping(policy)


def _is_small(primitive: Any, /, *_: Any, **params: Any) -> bool:
    return primitive.name == "name" and params.get("name") == _NAME


class _Keeping:
    """A policy and small `x·a`: equal for the same policy, which it alone holds on to.

    JAX caches by policies, with weak references. The parameters of a primitive may have
    any names, so that all of its own are positional.
    """

    def __init__(self, policy: Callable[..., Any]) -> None:
        self.policy = policy

    def __call__(self, primitive: Any, /, *args: Any, **params: Any) -> Any:
        small = _is_small(primitive, *args, **params)
        return small or self.policy(primitive, *args, **params)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keeping) and self.policy is other.policy

    def __hash__(self) -> int:
        return hash((_Keeping, id(self.policy)))


def _run(
    run: Callable[..., Any], form: Form, dims: GroupDims, operands: Operands, *rest: Any
) -> Any:
    """Runs a pass so that `jax.vmap` over adapters keeps one copy of each kernel.

    The merged form puts factors into a kernel; mapped over factors it would make one
    per adapter. The separate form then keeps the base product unbatched. (Forms that
    are chosen by platform see to it in `lowered`.)
    """
    if form == "separate":
        return run(form, dims, operands, *rest)
    mapped = custom_vmap(lambda operands, *rest: run(form, dims, operands, *rest))

    @mapped.def_vmap
    def rule(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        first = batched[0]
        factors = jax.tree.leaves((first.a, first.b, first.kernels, first.gates))
        inner: Form = "separate" if any(factors) else form
        axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, tuple(batched))

        def deeper(form: Form, dims: GroupDims, *args: Any) -> Any:
            each = functools.partial(run, form, dims)
            return jax.vmap(each, in_axes=axes, axis_size=size)(*args)

        out = _run(deeper, inner, dims, *args)
        return out, jax.tree.map(lambda _: True, out)

    separate = functools.partial(run, "separate", dims)
    return _derived_by(separate, mapped)(operands, *rest)


def _derived_by(
    other: Callable[..., Any], run: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns `run`, whose derivatives are those of `other`, which computes the same.

    They are asked for by second derivatives alone. A function with a batching rule of
    its own has none in reverse mode.
    """
    derived = jax.custom_jvp(run)

    def rule(primals: Any, tangents: Any) -> tuple[Any, Any]:
        values, treedef = jax.tree.flatten(primals)
        is_zero = lambda tangent: isinstance(tangent, SymbolicZero)
        changes = jax.tree.leaves(tangents, is_leaf=is_zero)
        moving = [i for i, change in enumerate(changes) if not is_zero(change)]

        def of_moving(*moved: jax.Array) -> Any:
            new = dict(zip(moving, moved, strict=True))
            every = [new.get(i, value) for i, value in enumerate(values)]
            return other(*treedef.unflatten(every))

        at = [values[i] for i in moving]
        _, change = jax.jvp(of_moving, at, [changes[i] for i in moving])
        return run(*primals), change

    derived.defjvp(rule, symbolic_zeros=True)
    return derived


Static = tuple[GroupDims, Form | ByPlatform]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(static: Static, operands: Operands) -> list[jax.Array]:
    return _in_its_form(_opened_alone, static, operands)


def _in_its_form(
    run: Callable[..., Any],
    static: Static,
    operands: Operands,
    *rest: Any,
    kind: Literal["product", "skinny", "sums"] = "product",
) -> Any:
    """Runs a pass in its form, or in the one that is chosen when it is lowered.

    See `Pass` for its kind.
    """
    dims, form = static
    if isinstance(form, ByPlatform):
        return run_lowered(Pass(run, dims, kind), form, operands, *rest)
    return _run(run, form, dims, operands, *rest)


def _without_kernels(static: Static) -> Static:
    """What the skinny products are of: there the merged form is as any other."""
    dims, form = static
    return dims, "separate" if form == "merged" else form


def _shrink(static: Static, operands: Operands) -> jax.Array:
    run = functools.partial(_in_its_form, _shrunk, _without_kernels(static))
    return run(operands, kind="skinny")[0]


def _shrunk(form: Form, dims: GroupDims, operands: Operands) -> list[jax.Array]:
    return [shrink(dims, operands, form)]


def _gradients(
    static: Static, operands: Operands, h: jax.Array, g: jax.Array, dys: list[jax.Array]
) -> list[jax.Array]:
    """Returns `da` of all kernels, concatenated, and each `db`."""
    rest = operands, h, g, dys
    return _in_its_form(gradients, _without_kernels(static), *rest, kind="sums")


def _forward_pass(static: Static, operands: Operands, h: jax.Array) -> list[jax.Array]:
    return _in_its_form(_opened_forward, static, operands, h)


def _opened_alone(form: Form, dims: GroupDims, operands: Operands) -> list[jax.Array]:
    return products_alone(form, dims, _opened(operands))


def _opened_forward(
    form: Form, dims: GroupDims, operands: Operands, h: jax.Array
) -> list[jax.Array]:
    return forward(form, dims, _opened(operands), h)


def _backward_pass(
    static: Static, operands: Operands, dys: list[jax.Array]
) -> Backward:
    """Returns `g` and the gradient of `x`."""
    return Backward(*_in_its_form(_opened_backward, static, operands, dys))


def _opened_backward(
    form: Form, dims: GroupDims, operands: Operands, dys: list[jax.Array]
) -> list[jax.Array]:
    return list(backward(form, dims, _opened(operands), dys))


class _Residuals(NamedTuple):
    operands: Operands
    h: jax.Array | None
    # None for what is not differentiated: a marker that is part of the tree structure,
    # so that no gradient of a frozen kernel is ever formed.
    wants_x: tuple[()] | None
    # One marker for each array that a kernel is made from.
    wants_kernel: tuple[tuple[tuple[()] | None, ...], ...]


def _forward(static: Static, operands: Operands) -> tuple[list[jax.Array], _Residuals]:
    """The forward pass; the residuals are the operands, and `x·a` where it is small."""
    dims, _ = static
    arrays, _ = primals(operands)
    (wants_x,) = primals(operands.x)[1]
    marks = tuple(primals(kernel)[1] for kernel in operands.kernels)
    h = _shrink(static, arrays)
    columns = math.prod(arrays.x.shape[i] for i in dims.contract)
    if h.shape[-1] * _KEPT_UNDER_REMAT <= columns:
        h = checkpoint_name(h, _NAME)
    kept = h if h.shape[-1] * _KEPT <= columns else None
    return _forward_pass(static, arrays, h), _Residuals(arrays, kept, wants_x, marks)


def _backward(
    static: Static, residuals: _Residuals, cotangents: Sequence[Any]
) -> tuple[Operands]:
    """The gradients of `x`, `a` and `b`, and of a kernel only where it is asked for.

    With `h = s·x·a` and `g = s·dy·bᵀ`:
    `dx = dy·Wᵀ + g·aᵀ`, `da = xᵀ·g`, `db = hᵀ·dy` (kept as `dyᵀ·h`, rank last).
    """
    dims, _ = static
    operands, kept, wants_x, wants_kernel = residuals
    x, ranks = operands.x, operands.ranks
    dys = [instantiate(dy) for dy in cotangents]
    if is_lazy(operands.kernels):
        operands, dys = kept_apart(operands, dys)
    h = _shrink(static, operands) if kept is None else kept

    if wants_x is None:
        g, dx = shrink_cotangents(dims, operands, dys), None
    else:
        g, dx = _backward_pass(static, operands, dys)
    da, *db = _gradients(static, operands, h, g, dys)
    dw = []
    for i, (one, dy) in enumerate(zip(dims.kernels, dys, strict=True)):
        layout = Layout.of(dims, one, x, operands.kernels[i])
        dw.append(_grad_kernel(layout, x, dy, operands.kernels[i], wants_kernel[i]))
    gates = operands.gates or (None,) * len(ranks)
    das = map(factor_through, per_kernel(da, ranks), gates)
    each = tuple(map(as_type_of, das, operands.a))
    dbs = tuple(map(factor_through, db, gates))
    # A gate is made of an index, and a key is one: neither has a gradient.
    none = [(None,) * len(one) for one in (operands.gates, operands.words)]
    return (Operands(dx, tuple(dw), each, dbs, *none),)


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _grad_kernel(
    layout: Layout, x: jax.Array, dy: jax.Array, w: Any, wanted: Sequence[Any]
) -> Any:
    """Returns the gradient of a kernel, or of what it is made from; None if unwanted.

    No one asks for that of a quantised array, but a kernel may have been scaled.
    """
    if all(mark is None for mark in wanted):
        return None
    make = lambda w: _made(x, [w])[0]
    dw = layout.grad_kernel(x, dy, make(w))
    return pulled(make, w, wanted, dw) if isinstance(w, Lazy) else dw

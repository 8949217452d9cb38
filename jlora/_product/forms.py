"""The ways to compute a group of adapted products; `_product.choice` chooses.

* separate: `x·W + s·(x·a)·b`, products apart. Works for any axes and any sharding.
* singly: separate on CPUs, where siblings share no product of their factors: that runs
  as fast, and what is joined and split takes a sixth more time to compile.
* extended: `[x, h]·[W; b]` with `h = s·x·a`: one product, whose float accumulator takes
  the delta in. It copies `x` and `W`, which pays on GPUs when tokens outnumber
  features, and it needs arrays that are whole: a sharded axis cannot be appended to.
* joined, copied: likewise on TPUs, where XLA joins the two in the product's own fusion,
  or from a copy of `[W; b]`; backward `[dy, g]·[W, a]ᵀ`. (See `_product.fused`.)
* tiled: the same sum on TPUs by a kernel, on request, see `_product.tpu_kernel`.
* fused: the same sum without copies, by a kernel for Hopper GPUs, see `_product.fused`.
* few: all of a group in one kernel for GPUs, where rows are few, as in decoding; see
  `_product.few_kernel`. Backward it is separate.
* grouped: fused for several adapters at once, each with rows of its own: those, the
  factors and all results have an axis of adapters first, kernels have none.
* partitioned, ruled: on a mesh, fused and separate, as operations with a partitioning
  rule (see `_product.partitioned`).
* ruled_few: ruled; where no backward pass follows, each device's part is by the kernel
  of few (see `_product.alone`).
* merged: `x·(W + s·a·b)`, on request. The factors' gradients are those of the other
  forms, so that the gradient of a kernel is not formed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.dots import as_laid_out, as_type_of, dot
from .._jax.dtypes import narrowed, summands_in, summed_in
from .._jax.sharding import explicit_sharding
from .few_kernel import (
    LARGEST_GATED,
    LARGEST_OWN,
    MOST_GATED_ROWS,
    Linear,
    adapted_products,
)
from .fused import (
    How,
    Terms,
    in_parts,
    sum_by_xla,
    sum_grouped,
    sum_joined,
    sum_tiled,
    sum_whole,
)
from .gate import factor_through
from .group import (
    Form,
    GroupDims,
    KernelDims,
    Layout,
    Operands,
    base_product,
    concatenate,
    per_kernel,
    through_gates,
)
from .partitioned import Sum, sum_partitioned
from .skinny import (
    each_kernel,
    grad_x_of_deltas,
    scaled,
    shrink_cotangents,
    total,
)


class Backward(NamedTuple):
    """What a form computes backward; `g = s·dy·bᵀ` of all kernels, the rank last."""

    g: jax.Array
    dx: jax.Array


def forward(
    form: Form, dims: GroupDims, operands: Operands, h: jax.Array
) -> list[jax.Array]:
    """Returns the adapted products, each laid out as its base product; `h = s·x·a`."""
    return _FORMS[form].forward(dims, operands, h)


def backward(
    form: Form,
    dims: GroupDims,
    operands: Operands,
    cotangents: Sequence[jax.Array],
) -> Backward:
    """Returns `g` and the gradient of `x`.

    With dropout that of the deltas is masked, and so it is no part of the same sum.
    """
    if operands.drops:
        g = shrink_cotangents(dims, operands, cotangents, form)
        dx = total(_through_kernels(dims, operands, cotangents, g.dtype))
    else:
        g, dx = _FORMS[form].backward(dims, operands, cotangents)
    if operands.drops or form in ("separate", "singly", "extended", "few"):
        dx = dx + grad_x_of_deltas(dims, operands, g, form)
    return Backward(g, as_type_of(dx, operands.x))


# --- separate ---


def _separate(dims: GroupDims, operands: Operands, h: jax.Array) -> list[jax.Array]:
    pieces = per_kernel(h, operands.ranks)
    rows = zip(dims.kernels, operands.kernels, operands.b, pieces, strict=True)
    return [
        expand(dims, one, h, b, base_product(dims, one, operands.x, w))
        for one, w, b, h in rows
    ]


def expand(
    dims: GroupDims, one: KernelDims, h: jax.Array, b: jax.Array, y: jax.Array
) -> jax.Array:
    """Returns `y + h·b`, in the dtype and layout of `y`."""
    batch = tuple(range(len(dims.batch)))
    b = b.astype(h.dtype)
    lhs, rhs = (b, h) if one.first else (h, b)
    contract = ((lhs.ndim - 1,), (rhs.ndim - 1,))
    wide = summands_in(y.dtype, h.dtype)
    delta = lax.dot_general(
        lhs,
        rhs,
        (contract, (batch, batch)),
        precision=one.precision,
        preferred_element_type=wide,
        out_sharding=explicit_sharding(y),
    )
    return narrowed(y.astype(wide) + delta, y.dtype)


def _separate_backward(
    dims: GroupDims,
    operands: Operands,
    cotangents: Sequence[jax.Array],
    form: Form = "separate",
) -> tuple[jax.Array, jax.Array]:
    g = shrink_cotangents(dims, operands, cotangents, form)
    return g, total(_through_kernels(dims, operands, cotangents, g.dtype))


def _through_kernels(
    dims: GroupDims, operands: Operands, cotangents: Sequence[jax.Array], dtype: Any
) -> list[jax.Array]:
    """Returns `dy·Wᵀ` of each kernel."""
    each = each_kernel(dims, operands, cotangents)
    return [layout.grad_x(dy, w, operands.x, dtype) for _, layout, w, _, dy in each]


# --- extended ---


def _extended(dims: GroupDims, operands: Operands, h: jax.Array) -> list[jax.Array]:
    x = operands.x
    features = math.prod(x.shape[i] for i in dims.contract)
    x = jnp.concatenate([x.reshape(*h.shape[:-1], features), h], axis=-1)
    outputs = []
    for i, (one, w) in enumerate(zip(dims.kernels, operands.kernels, strict=True)):
        kernel = _extended_kernel(operands, i, features)
        pairs = (((x.ndim - 1,), (0,)), ((), ()))
        y = lax.dot_general(x, kernel, pairs, **dict(one.params))
        free = w.shape[len(one.contract) :]
        outputs.append(y.reshape(*h.shape[:-1], *free))
    return outputs


def _extended_kernel(operands: Operands, index: int, features: int) -> jax.Array:
    """Returns `[W; b]: (in + ranks, out)`, with zeros below W for the siblings' b."""
    w, b = operands.kernels[index], operands.b[index]
    w = w.reshape(features, -1)
    b = b.reshape(w.shape[1], -1).T.astype(w.dtype)
    before, after = sum(operands.ranks[:index]), sum(operands.ranks[index + 1 :])
    zeros = lambda rows: jnp.zeros((rows, w.shape[1]), w.dtype)
    return jnp.concatenate([w, zeros(before), b, zeros(after)], axis=0)


def _extended_backward(
    dims: GroupDims, operands: Operands, cotangents: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """`Σ dy·[W; b]ᵀ = [Σ dy·Wᵀ, dy·bᵀ]`: one pass over each `dy` for both."""
    x = operands.x
    features = math.prod(x.shape[i] for i in dims.contract)
    lead = x.ndim - len(dims.contract)
    parts = []
    for i, (one, _, _, _, dy) in enumerate(each_kernel(dims, operands, cotangents)):
        kernel = _extended_kernel(operands, i, features)
        dy = dy.reshape(*dy.shape[:lead], -1)
        contract = ((lead,), (1,))
        parts.append(dot(dy, kernel, contract, ((), ()), x.dtype, one.precision))
    both = total(parts)
    dx, g = both[..., :features].reshape(x.shape), both[..., features:]
    g = scaled(dims, g, operands.ranks)
    return through_gates(operands, g), dx


# --- few ---


def _few(dims: GroupDims, operands: Operands, h: jax.Array) -> list[jax.Array]:
    """One kernel, which makes `x·a` itself where the rank is small and all of it goes.

    Nothing computes the given `h` then, unless a backward pass keeps it.
    """
    x = operands.x
    features = math.prod(x.shape[i] for i in dims.contract)
    gates = operands.gates or (None,) * len(operands.a)
    makes = not operands.drops and _makes_its_own(operands, x.size // features)
    pieces, linears = per_kernel(h, operands.ranks), []
    rows = zip(operands.kernels, operands.a, operands.b, pieces, gates, strict=True)
    for w, a, b, own, gate in rows:
        if not makes:
            linears.append(Linear.of(w, a, b, own.astype(x.dtype)))
            continue
        gate = None if gate is None else jnp.broadcast_to(gate, own.shape)
        linears.append(Linear.of(w, a, b, gate=gate))
    scalings = tuple(one.scaling for one in dims.kernels)
    ys = adapted_products(x.reshape(-1, features), linears, scalings)
    shapes = [(*h.shape[:-1], *b.shape[:-1]) for b in operands.b]
    return [y.reshape(shape) for y, shape in zip(ys, shapes, strict=True)]


def _makes_its_own(operands: Operands, rows: int) -> bool:
    """Whether it costs less to make `x·a` in each block than in a launch of its own."""
    gated = any(gate is not None for gate in operands.gates)
    narrow = all(one.dtype.itemsize == 2 for one in (*operands.a, *operands.b))
    large = gated and narrow and rows <= MOST_GATED_ROWS
    return max(operands.ranks) <= (LARGEST_GATED if large else LARGEST_OWN)


# --- fused, grouped, partitioned, ruled ---


def _summed(
    dims: GroupDims, operands: Operands, h: jax.Array, add: Sum
) -> list[jax.Array]:
    x, pieces = operands.x, per_kernel(h, operands.ranks)
    cast = lambda value: value.astype(x.dtype)
    how = How(False, dims.kernels[0].precision)
    rows = zip(operands.kernels, operands.b, pieces, strict=True)
    return [add(Terms((x,), (w,), cast(h), cast(b)), how) for w, b, h in rows]


def _summed_backward(
    dims: GroupDims,
    operands: Operands,
    cotangents: Sequence[jax.Array],
    add: Sum,
    form: Form,
) -> tuple[jax.Array, jax.Array]:
    """`Σ dy·Wᵀ + g·aᵀ`, each kernel as it lies, siblings in one sum."""
    if form == "grouped":
        g = _shrink_cotangents_of_each(dims, operands, cotangents)
    else:
        g = shrink_cotangents(dims, operands, cotangents, form)
    cast = lambda value: value.astype(operands.x.dtype)
    a = concatenate([cast(a) for a in operands.a])
    every = Terms(tuple(cotangents), operands.kernels, cast(g), a)
    how = How(True, dims.kernels[0].precision)
    return g, total([add(part, how) for part in in_parts(every, operands.ranks)])


def _shrink_cotangents_of_each(
    dims: GroupDims, operands: Operands, cotangents: Sequence[jax.Array]
) -> jax.Array:
    """`s·dy·bᵀ` of each adapter."""
    run = functools.partial(shrink_cotangents, dims)
    return jax.vmap(run, in_axes=(operands.adapter_axes, 0))(operands, list(cotangents))


# --- merged ---


def _merged(dims: GroupDims, operands: Operands, _: jax.Array) -> list[jax.Array]:
    kernels = _merged_kernels(dims, operands)
    pairs = zip(dims.kernels, kernels, strict=True)
    return [base_product(dims, one, operands.x, w) for one, w in pairs]


def _merged_kernels(dims: GroupDims, operands: Operands) -> list[jax.Array]:
    """Returns `W + s·a·b` of each kernel, summed in float32 and rounded once."""
    batch = tuple(range(len(dims.batch)))
    kernels = []
    gates = operands.gates or (None,) * len(operands.a)
    every = map(factor_through, operands.a, gates)
    rows = zip(dims.kernels, operands.kernels, every, operands.b, strict=True)
    for one, w, a, b in rows:
        wide = summed_in(w.dtype)
        a, b = one.scaling * a.astype(wide), b.astype(wide)
        contract = ((a.ndim - 1,), (b.ndim - 1,))
        highest = lax.Precision.HIGHEST
        delta = dot(a, b, contract, (batch, batch), wide, highest)
        layout = Layout.of(dims, one, operands.x, w)
        delta = as_laid_out(layout.like_kernel(delta, one.contract), w)
        kernels.append((w.astype(wide) + delta).astype(w.dtype))
    return kernels


def _merged_backward(
    dims: GroupDims, operands: Operands, cotangents: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    kernels = _merged_kernels(dims, operands)
    merged = operands._replace(kernels=tuple(kernels))
    return _separate_backward(dims, merged, cotangents)


class _Form(NamedTuple):
    forward: Callable[[GroupDims, Operands, jax.Array], list[jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array]]

    @classmethod
    def summing(cls, form: Form, add: Sum) -> "_Form":
        """Returns a form that is one sum forward, and one backward."""
        backward = functools.partial(_summed_backward, add=add, form=form)
        return cls(functools.partial(_summed, add=add), backward)


_on_mesh = functools.partial(functools.partial, sum_partitioned)
_sum_copied = functools.partial(sum_joined, copied=True)
_FORMS: dict[Form, _Form] = {
    "separate": _Form(_separate, _separate_backward),
    "singly": _Form(_separate, functools.partial(_separate_backward, form="singly")),
    "extended": _Form(_extended, _extended_backward),
    "joined": _Form.summing("joined", sum_joined),
    "copied": _Form.summing("copied", _sum_copied),
    "tiled": _Form.summing("tiled", sum_tiled),
    "fused": _Form.summing("fused", sum_whole),
    "few": _Form(_few, _separate_backward),
    "grouped": _Form.summing("grouped", sum_grouped),
    "partitioned": _Form.summing("partitioned", _on_mesh(whole=sum_whole)),
    "ruled": _Form.summing("ruled", _on_mesh(whole=sum_by_xla)),
    "ruled_few": _Form.summing("ruled_few", _on_mesh(whole=sum_by_xla)),
    "merged": _Form(_merged, _merged_backward),
}

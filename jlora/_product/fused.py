"""The fused form, `Σ x·w + h·b` by one kernel: on matrices, and on a mesh.

`hopper_kernel` takes matrices that are whole. On a mesh the sum is one operation with a
partitioning rule: rows stay where they are, the rank is never sharded, contracted axes
that are sharded give partial sums, and a kernel is gathered where it lies along axes of
the rows (FSDP), as for the plain product.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from .._jax.sharding import names_of_entry
from .hopper_kernel import fits, sum_of_products

# Terms that one kernel sums: each takes room among its arguments.
_SUMMED = 8


class Terms(NamedTuple):
    """The arrays of `Σ x·w + h·b: (*rows, *out)`.

    Attributes:
        xs: each `(*rows, *inner)`, with inner axes of its own.
        ws: each `(*inner, *out)`, or `(*out, *inner)` where the sum is turned.
        h: `(*rows, rank)`.
        b: `(*out, rank)`.
    """

    xs: tuple[jax.Array, ...]
    ws: tuple[jax.Array, ...]
    h: jax.Array
    b: jax.Array

    @property
    def rows(self) -> int:
        """How many axes of rows there are."""
        return self.h.ndim - 1


def in_parts(terms: Terms, ranks: Sequence[int]) -> list[Terms]:
    """Splits a sum of many terms, of which each has its part of the rank."""
    parts, at = [], 0
    for start in range(0, len(terms.xs), _SUMMED):
        of = slice(start, start + _SUMMED)
        end = at + sum(ranks[of])
        h, b = terms.h[..., at:end], terms.b[..., at:end]
        parts.append(Terms(terms.xs[of], terms.ws[of], h, b))
        at = end
    return parts


def sum_whole(terms: Terms, turned: bool) -> jax.Array:
    """Returns the sum of arrays that are whole, by the kernel where its tiles fit."""
    n = math.prod(terms.h.shape[:-1])
    xs = [x.reshape(n, -1) for x in terms.xs]
    # The inner axes of `w` are those of `x`.
    inner = [x.shape[1] for x in xs]
    pairs = zip(terms.ws, inner, strict=True)
    ws = [w.reshape(-1, k) if turned else w.reshape(k, -1) for w, k in pairs]
    h, b = terms.h.reshape(n, -1), terms.b.reshape(-1, terms.b.shape[-1]).T
    outputs = b.shape[1]
    if all(fits(n, k, outputs) for k in inner):
        # Where a scan keeps the result for its backward pass, XLA:GPU would write it
        # there by a second run of the kernel (jax 0.11.2): hence the barrier.
        y = lax.optimization_barrier(sum_of_products(xs, ws, h, b, turned=turned))
    else:
        y = _sum_of_dots(xs, ws, h, b, turned)
    return y.reshape(*terms.h.shape[:-1], *terms.b.shape[:-1])


def _sum_of_dots(
    xs: Sequence[jax.Array],
    ws: Sequence[jax.Array],
    h: jax.Array,
    b: jax.Array,
    turned: bool,
) -> jax.Array:
    """The kernel's sum by XLA: for shards that its tiles do not divide."""
    total = lax.dot(h, b, preferred_element_type=jnp.float32)
    for x, w in zip(xs, ws, strict=True):
        pairs = (((1,), (1 if turned else 0,)), ((), ()))
        total += lax.dot_general(x, w, pairs, preferred_element_type=jnp.float32)
    return total.astype(h.dtype)


def sum_partitioned(terms: Terms, turned: bool) -> jax.Array:
    """Returns the sum on a mesh, each device by `sum_whole` for its own part."""
    count, tree = len(terms.xs), jax.tree.structure(terms)
    run = custom_partitioning(lambda *leaves: sum_whole(tree.unflatten(leaves), turned))

    def partition(mesh: Any, operands: Any, _: Any) -> Any:
        specs = [_padded(operand) for operand in operands]
        where = _placed(specs[:count], specs[count : 2 * count], terms, turned)
        own = lambda *leaves: _of_a_shard(tree.unflatten(leaves), where, turned)
        place = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))
        return mesh, own, place(where.result), tuple(map(place, where.operands))

    rule, inner = _sharding_rule(terms, turned)
    run.def_partition(
        partition=partition,
        sharding_rule=rule,
        reduction_factors=inner,
        need_replication_factors=("r",),
    )
    return run(*jax.tree.leaves(terms))


def _sharding_rule(terms: Terms, turned: bool) -> tuple[str, tuple[str, ...]]:
    """Returns the rule that Shardy propagates by, and its summed factors.

    The summed axes of `x` are not those of `w`: a kernel that is sharded there, as by
    FSDP, says nothing of activations. What both are sharded along is summed apart.
    """
    rows = [f"n{i}" for i in range(terms.rows)]
    outs = [f"m{i}" for i in range(terms.b.ndim - 1)]
    xs, ws, summed = [], [], ([], [])
    for t, x in enumerate(terms.xs):
        inner = [f"k{t}x{i}" for i in range(x.ndim - terms.rows)]
        of_w = [f"w{name}" for name in inner]
        xs.append([*rows, *inner])
        ws.append([*outs, *of_w] if turned else [*of_w, *outs])
        summed[0].extend(inner)
        summed[1].extend(of_w)
    operands = [*xs, *ws, [*rows, "r"], [*outs, "r"]]
    text = ", ".join(" ".join(one) for one in operands)
    return f"{text} -> {' '.join([*rows, *outs])}", (*summed[0], *summed[1])


class _Placed(NamedTuple):
    operands: tuple[Any, ...]
    result: Any
    partial: tuple[str, ...]  # mesh axes over which the sum is partial


def _padded(operand: Any) -> tuple[Any, ...]:
    spec = tuple(operand.sharding.spec)
    return spec + (None,) * (len(operand.shape) - len(spec))


def _names(entries: Sequence[Any]) -> set[str]:
    return {name for entry in entries for name in names_of_entry(entry)}


def _without(entries: Sequence[Any], used: set[str]) -> tuple[Any, ...]:
    """Drops entries that name a mesh axis which is in use."""
    return tuple(None if used & set(names_of_entry(e)) else e for e in entries)


def _placed(
    xs: Sequence[Any], ws: Sequence[Any], terms: Terms, turned: bool
) -> _Placed:
    """Decides how each operand lies: first rows, then outputs, then what is summed.

    Args:
        xs: the specs by which the operands lie now.
        ws: those of the kernels.
        terms: the arrays, of which only ranks are read.
        turned: how the kernels lie.
    """
    rows, outputs = xs[0][: terms.rows], terms.b.ndim - 1
    divide = lambda spec, at: (spec[:at], spec[at:])
    wide = []
    for spec in ws:
        first, second = divide(spec, outputs if turned else len(spec) - outputs)
        wide.append((second, first) if turned else (first, second))
    outs = _without(wide[0][1], _names(rows))
    used = _names(rows) | _names(outs)
    inner = []
    for spec, (of_w, _) in zip(xs, wide, strict=True):
        of_x = spec[terms.rows :]
        inner.append(_without(of_x if _names(of_x) else of_w, used))
    partial = _names(inner[0])
    if any(_names(one) != partial for one in inner):
        inner, partial = [(None,) * len(one) for one in inner], set()
    of_xs = [(*rows, *one) for one in inner]
    of_ws = [(*outs, *one) if turned else (*one, *outs) for one in inner]
    operands = (*of_xs, *of_ws, (*rows, None), (*outs, None))
    return _Placed(operands, (*rows, *outs), tuple(sorted(partial)))


def _of_a_shard(terms: Terms, where: _Placed, turned: bool) -> jax.Array:
    """One device's part; of partial sums, the first alone has the delta in."""
    # The mesh that is set may have Explicit axes: of a shard's arrays it says nothing.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        if not where.partial:
            return sum_whole(terms, turned)
        at = [lax.axis_index(name) for name in where.partial]
        h = jnp.where(sum(at) == 0, terms.h, jnp.zeros_like(terms.h))
        return lax.psum(sum_whole(terms._replace(h=h), turned), where.partial)

"""The sum `Σ x·w + h·b` on a mesh: one operation with a partitioning rule.

Rows stay where they are, the rank is never sharded, contracted axes that are sharded
give partial sums, and a kernel is gathered where it lies along axes of the rows (FSDP),
as for the plain product. Left to itself XLA moves activations: a second, skinny reader
of `x` is sharded as the kernel is, and its say is as good as any.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from .._jax.sharding import names_of_entry
from .._jax.tiles import read_tiles
from .fused import How, Terms

Sum = Callable[[Terms, How], jax.Array]


def apart(value: jax.Array) -> jax.Array:
    """Returns a factor, or its gradient, whose sharding says nothing of what it meets.

    What it meets says nothing of its own either: it is moved where the two differ.
    """
    run = custom_partitioning(lambda value: value)
    names = lambda letter: " ".join(f"{letter}{i}" for i in range(value.ndim))

    def partition(mesh: Any, _: Any, result: Any) -> Any:
        return mesh, lambda value: value, result.sharding, (result.sharding,)

    rule = f"{names('i')} -> {names('j')}"
    run.def_partition(partition, sharding_rule=rule, decode_shardings=False)
    return run(value)


def sum_partitioned(terms: Terms, how: How, whole: Sum) -> jax.Array:
    """Returns the sum on a mesh, each device by `whole` for its own part."""
    terms = terms._replace(b=apart(terms.b))
    count, tree = len(terms.xs), jax.tree.structure(terms)
    run = custom_partitioning(lambda *leaves: whole(tree.unflatten(leaves), how))

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        arrays = [*operands, result]
        shardings = [array.sharding for array in arrays]
        mesh, specs = read_tiles(mesh, shardings, [len(v.shape) for v in arrays])
        # What the axes of no mesh can say is gathered.
        specs = specs or [(None,) * len(v.shape) for v in arrays]
        outs = specs[-1][terms.rows :]
        where = _placed(specs[:count], specs[count : 2 * count], outs, terms, how)
        own = lambda *leaves: _of_a_shard(tree.unflatten(leaves), where, how, whole)
        place = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))
        return mesh, own, place(where.result), tuple(map(place, where.operands))

    rule, inner = _sharding_rule(terms, how.turned)
    run.def_partition(
        partition=partition,
        sharding_rule=rule,
        reduction_factors=inner,
        need_replication_factors=("r",),
        decode_shardings=False,
    )
    return run(*jax.tree.leaves(terms))


def _sharding_rule(terms: Terms, turned: bool) -> tuple[str, tuple[str, ...]]:
    """Returns the rule that Shardy propagates by, and its summed factors.

    The summed axes of `x` are not those of `w`: a kernel that is sharded there, as by
    FSDP, says nothing of activations. What both are sharded along is summed apart. In
    the backward pass the other axes of `w` are those that were summed over forward, and
    say nothing of the gradient of `x` either: that lies as `x` does.
    """
    rows = [f"n{i}" for i in range(terms.rows)]
    outs = [f"m{i}" for i in range(terms.b.ndim - 1)]
    xs, ws, summed = [], [], ([], [])
    for t, x in enumerate(terms.xs):
        inner = [f"k{t}x{i}" for i in range(x.ndim - terms.rows)]
        of_w = [f"w{name}" for name in inner]
        xs.append([*rows, *inner])
        ws.append([f"t{t}{o}" for o in outs] + of_w if turned else [*of_w, *outs])
        summed[0].extend(inner)
        summed[1].extend(of_w)
    operands = [*xs, *ws, [*rows, "r"], [*outs, "r"]]
    text = ", ".join(" ".join(one) for one in operands)
    return f"{text} -> {' '.join([*rows, *outs])}", (*summed[0], *summed[1])


class _Placed(NamedTuple):
    operands: tuple[Any, ...]
    result: Any
    partial: tuple[str, ...]  # mesh axes over which the sum is partial


def _names(entries: Sequence[Any]) -> set[str]:
    return {name for entry in entries for name in names_of_entry(entry)}


def _without(entries: Sequence[Any], used: set[str]) -> tuple[Any, ...]:
    """Drops entries that name a mesh axis which is in use."""
    return tuple(None if used & set(names_of_entry(e)) else e for e in entries)


def _placed(
    xs: Sequence[Any], ws: Sequence[Any], outs: Any, terms: Terms, how: How
) -> _Placed:
    """Decides how each operand lies: first rows, then outputs, then what is summed.

    A few tokens go last: it is less to move them than to gather the kernel.

    Args:
        xs: the specs by which the operands lie now.
        ws: those of the kernels.
        outs: how the outputs of the result are to lie.
        terms: the arrays, of which only ranks are read.
        how: how the kernels lie.
    """
    rows, outputs = xs[0][: terms.rows], terms.b.ndim - 1
    ws = [w[outputs:] if how.turned else w[: len(w) - outputs] for w in ws]
    rows = _without(rows, _in_place(outs, ws, terms))
    outs = _without(outs, _names(rows))
    used = _names(rows) | _names(outs)
    inner = []
    for spec, of_w in zip(xs, ws, strict=True):
        of_x = spec[terms.rows :]
        inner.append(_without(of_x if _names(of_x) else of_w, used))
    partial = _names(inner[0])
    if any(_names(one) != partial for one in inner):
        inner, partial = [(None,) * len(one) for one in inner], set()
    of_xs = [(*rows, *one) for one in inner]
    of_ws = [(*outs, *one) if how.turned else (*one, *outs) for one in inner]
    operands = (*of_xs, *of_ws, (*rows, None), (*outs, None))
    return _Placed(operands, (*rows, *outs), tuple(sorted(partial)))


def _in_place(outs: Any, ws: Sequence[Any], terms: Terms) -> set[str]:
    """Returns the mesh axes along which kernels stay where they are, for a few rows.

    Along outputs the rows are gathered in their place, along what is summed they are
    moved to it, and the result is summed over devices, which moves it twice.
    """
    rows, outputs = math.prod(terms.h.shape[:-1]), math.prod(terms.b.shape[:-1])
    features = sum(math.prod(x.shape[terms.rows :]) for x in terms.xs)
    found = _names(outs) if rows < outputs else set()
    if rows * (features + 2 * outputs) < features * outputs:
        found |= _names([entry for w in ws for entry in w])
    return found


def _of_a_shard(terms: Terms, where: _Placed, how: How, whole: Sum) -> jax.Array:
    """One device's part; of partial sums, the first alone has the delta in."""
    # The mesh that is set may have Explicit axes: of a shard's arrays it says nothing.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        if not where.partial:
            return whole(terms, how)
        at = [lax.axis_index(name) for name in where.partial]
        h = jnp.where(sum(at) == 0, terms.h, jnp.zeros_like(terms.h))
        return lax.psum(whole(terms._replace(h=h), how), where.partial)

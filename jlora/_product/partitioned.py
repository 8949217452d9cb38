"""The sum `Σ x·w + h·b` on a mesh: one operation with a partitioning rule.

Or, where nothing else needs `h`, with the `x·a` that it is: partial sums then have each
their part of it, and it is not summed over devices by itself.

Rows stay where they are, the rank is never sharded, contracted axes that are sharded
give partial sums, and a kernel is gathered where it lies along axes of the rows (FSDP),
as for the plain product. Left to itself XLA moves activations: a second, skinny reader
of `x` is sharded as the kernel is, and its say is as good as any.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from .._jax.sharding import names_of_entry
from .._jax.tiles import read_tiles
from .fused import How, Product, Terms

Sum = Callable[[Terms, How], jax.Array]
Arrays = Terms | Product
Whole = Callable[[Any, How], jax.Array]


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


def sum_partitioned(terms: Arrays, how: How, whole: Whole) -> jax.Array:
    """Returns the sum on a mesh, each device by `whole` for its own part."""
    alone = {name: apart(getattr(terms, name)) for name in _factors_of(terms)}
    terms = terms._replace(**alone)
    count, tree = len(terms.xs), jax.tree.structure(terms)
    run = custom_partitioning(lambda *leaves: whole(tree.unflatten(leaves), how))

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        arrays = [*operands, result]
        shardings = [array.sharding for array in arrays]
        mesh, specs = read_tiles(mesh, shardings, [len(v.shape) for v in arrays])
        # What the axes of no mesh can say is gathered.
        specs = specs or [(None,) * len(v.shape) for v in arrays]
        outs = specs[-1][terms.rows :]
        of_terms = specs[:count], specs[count : 2 * count]
        where = _placed(*of_terms, outs, terms, how, dict(mesh.shape))
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


def _sharding_rule(terms: Arrays, turned: bool) -> tuple[str, tuple[str, ...]]:
    """Returns the rule that Shardy propagates by, and its summed factors, in its order.

    The summed axes of `x` are not those of `w`: a kernel that is sharded there, as by
    FSDP, says nothing of activations, nor does `a`. What both are sharded along is
    summed apart. In the backward pass the other axes of `w` are those that were summed
    over forward, and say nothing of the gradient of `x` either: that lies as `x` does.
    """
    rows: list[Any] = [f"n{i}" for i in range(terms.rows)]
    outs = [f"m{i}" for i in range(terms.b.ndim - 1)]
    xs, ws, of_as, summed = [], [], [], ([], [], [])
    for t, x in enumerate(terms.xs):
        inner = [f"k{t}x{i}" for i in range(x.ndim - terms.rows)]
        of_w, of_a = ([f"{one}{name}" for name in inner] for one in "wa")
        xs.append([*rows, *inner])
        ws.append([f"t{t}{o}" for o in outs] + of_w if turned else [*of_w, *outs])
        summed[0].extend(inner)
        summed[1].extend(of_w)
        of_as.append(of_a)
    skinny = _skinny(terms, rows, of_as)
    summed[2].extend(name for name in skinny if name not in rows)
    operands = [*xs, *ws, [*skinny, "r"], [*outs, "r"]]
    text = ", ".join(" ".join(one) for one in operands)
    return f"{text} -> {' '.join([*rows, *outs])}", tuple(itertools.chain(*summed))


def _factors_of(terms: Arrays) -> tuple[str, ...]:
    return ("a", "b") if isinstance(terms, Product) else ("b",)


def _skinny(terms: Arrays, rows: list[Any], inner: Sequence[Any]) -> list[Any]:
    """Returns what `h`, or `a`, has of each axis but its rank, given that of others."""
    return [*inner[0]] if isinstance(terms, Product) else rows


class _Placed(NamedTuple):
    operands: tuple[Any, ...]
    result: Any
    partial: tuple[str, ...]  # mesh axes over which the sum is partial
    cut: tuple[Any, ...]  # what of these `x` is cut along, axis by axis


def _names(entries: Sequence[Any]) -> set[str]:
    return {name for entry in entries for name in names_of_entry(entry)}


def _without(entries: Sequence[Any], used: set[str]) -> tuple[Any, ...]:
    """Drops entries that name a mesh axis which is in use."""
    return tuple(None if used & set(names_of_entry(e)) else e for e in entries)


def _placed(
    xs: Sequence[Any],
    ws: Sequence[Any],
    outs: Any,
    terms: Arrays,
    how: How,
    sizes: Mapping[str, int],
) -> _Placed:
    """Decides how each operand lies: first rows, then outputs, then what is summed.

    A few tokens go last: it is less to move them than to gather the kernel. So do
    outputs along what inputs and kernels are both cut along: there sums are partial.

    Args:
        xs: the specs by which the operands lie now.
        ws: those of the kernels.
        outs: how the outputs of the result are to lie.
        terms: the arrays, of which only shapes are read.
        how: how the kernels lie.
        sizes: those of the axes of the mesh.
    """
    rows, outputs = xs[0][: terms.rows], terms.b.ndim - 1
    ws = [w[outputs:] if how.turned else w[: len(w) - outputs] for w in ws]
    rows = _without(rows, _in_place(outs, ws, terms))
    of_xs = [spec[terms.rows :] for spec in xs]
    both = [_names(x) & _names(w) for x, w in zip(of_xs, ws, strict=True)]
    outs = _without(outs, _names(rows) | set.intersection(*both))
    used = _names(rows) | _names(outs)
    each = zip(of_xs, ws, strict=True)
    inner = [_without(x if _names(x) else w, used) for x, w in each]
    partial = _names(inner[0])
    if any(_names(one) != partial for one in inner):
        inner, partial = [(None,) * len(one) for one in inner], set()
    places = [(*rows, *one) for one in inner]
    cut = (None,) * len(inner[0])
    moves = isinstance(terms, Product) and not _names(of_xs[0])
    if moves and _divide(inner[0], terms.xs[0].shape[terms.rows :], sizes):
        # Nothing else reads `x` so that XLA would move it there in one piece.
        places, cut = [(*rows, *cut)], inner[0]
    of_ws = [(*outs, *one) if how.turned else (*one, *outs) for one in inner]
    skinny = (*_skinny(terms, [*rows], inner), None)
    operands = (*places, *of_ws, skinny, (*outs, None))
    return _Placed(operands, (*rows, *outs), tuple(sorted(partial)), cut)


def _divide(
    entries: Sequence[Any], shape: Sequence[int], sizes: Mapping[str, int]
) -> bool:
    """Whether parts of axes that lie so are equal, which XLA would pad otherwise."""
    parts = [math.prod(sizes[n] for n in names_of_entry(entry)) for entry in entries]
    return all(size % part == 0 for size, part in zip(shape, parts, strict=True))


def _in_place(outs: Any, ws: Sequence[Any], terms: Arrays) -> set[str]:
    """Returns the mesh axes along which kernels stay where they are, for a few rows.

    Along outputs the rows are gathered in their place, along what is summed they are
    moved to it, and the result is summed over devices, which moves it twice.
    """
    rows = math.prod(terms.xs[0].shape[: terms.rows])
    outputs = math.prod(terms.b.shape[:-1])
    features = sum(math.prod(x.shape[terms.rows :]) for x in terms.xs)
    found = _names(outs) if rows < outputs else set()
    if rows * (features + 2 * outputs) < features * outputs:
        found |= _names([entry for w in ws for entry in w])
    return found


def _of_a_shard(terms: Arrays, where: _Placed, how: How, whole: Whole) -> jax.Array:
    """One device's part; of partial sums, the first alone has a given delta in."""
    # The mesh that is set may have Explicit axes: of a shard's arrays it says nothing.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        if not where.partial:
            return whole(terms, how)
        at = [lax.axis_index(name) for name in where.partial]
        if isinstance(terms, Product):
            own: Arrays = terms._replace(x=_cut(terms.x, terms.rows, where.cut))
        else:
            h = jnp.where(sum(at) == 0, terms.h, jnp.zeros_like(terms.h))
            own = terms._replace(h=h)
        return lax.psum(whole(own, how), where.partial)


def _cut(x: jax.Array, first: int, entries: Sequence[Any]) -> jax.Array:
    """Returns a device's part of `x` along the axes from `first` on."""
    for axis, entry in enumerate(entries, first):
        if names := names_of_entry(entry):
            size = x.shape[axis] // math.prod(map(lax.axis_size, names))
            start = lax.axis_index(tuple(names)) * size
            x = lax.dynamic_slice_in_dim(x, start, size, axis)
    return x

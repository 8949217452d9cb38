"""Several adapters as one: every array with a leading axis of adapters.

`jax.vmap(..., in_axes=0)` over a stacked adapter is one adapter at a time, which trains
many at once or, with an index for each example, serves a mixed batch. Smaller ranks are
padded with zeros: a column of `a` and a row of `b` that are both zero add nothing, and
have no gradient, for that of either is a product with the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._adapter.factors import Adapter, LoraFactors
from .._jax.dtypes import common, summed_in
from .stackable import (
    as_adapters,
    checked_index,
    count_of,
    is_plain,
    misfit,
    nothing,
    of_kind,
    of_one_kind,
    problem,
    raise_all,
    refuse_unknown,
    too_small,
    unknown,
)


def stack(adapters: Sequence[Mapping[str, Any]], *, rank: int | None = None) -> Adapter:
    """Returns one adapter whose arrays have a leading axis for the adapters.

    `a: (N, *batch, *in, rank)` and `b: (N, *batch, rank, *out)`, with the roles of the
    kernel's own axes unchanged, so that `jax.vmap` with `in_axes=0` sees one adapter.
    Every adapter keeps its ΔW exactly:

    * Of each path the largest rank counts; smaller ones are padded with zeros, and a
      path that an adapter lacks gets zeros alone. Both stay zero under training, with
      weight decay and with Adam.
    * A scaling that all adapters share stays as it is. Where they differ, the first one
      counts and `b` takes in the ratio to it, which is exact for powers of two and else
      rounded once. Trained on, such a `b` is as large as the ratio says, and its steps
      are not: SGD moves ΔW by ratio⁻² and Adam by ratio⁻¹ of what it would, `a` as
      before. To train different ranks at once, give them the same scaling
      (alpha = c·rank).
    * A leaf that is trained whole must be so in all adapters: nothing but its own
      values, which are in the params, would leave it as it is.
    * Entries of another variant stay what they are where all adapters have them alike,
      with the same settings, scaling and shapes, DoRA's magnitude too; a scale (IA3)
      that is lacking is one. Others are lowered to factors, and trained on as LoRA.

    Args:
        adapters: the adapters, of the same params. Dtypes that differ are promoted.
        rank: pads the factors of every path to at least this rank, to leave room for
            `jlora.put`. Entries of other variants have the rank that they have.

    Returns:
        A dict by path, as an adapter is. It is no adapter of the params itself: use it
        under `jax.vmap`, by `Lora.apply_mixed`, or by `jlora.take`.

    Raises:
        AdapterError: with every entry that cannot be stacked.
        UnsupportedFeatureError: if an entry is none.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((5, 7))}
        >>> x = jnp.ones((2, 5))
        >>> of_rank = lambda rank: jlora.lora(
        ...     fn, jlora.LoraConfig("w", rank=rank, alpha=2.0 * rank)
        ... )
        >>> key, lora = jax.random.key(0), of_rank(2)
        >>> each = [of_rank(rank).init(key, params, x) for rank in (2, 4, 3)]
        >>> stacked = jlora.stack(each)
        >>> stacked["w"].a.shape, stacked["w"].b.shape, stacked["w"].scaling
        ((3, 5, 4), (3, 4, 7), 2.0)
        >>> jax.vmap(lora.apply, in_axes=(None, 0, None))(params, stacked, x).shape
        (3, 2, 7)

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
        <https://arxiv.org/abs/2106.09685>, 2021, equation 3.
    """
    adapters = as_adapters(adapters)
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter))
    raise_all("nothing to stack", [] if paths else ["the adapters are empty"])
    rows = {path: [adapter.get(path) for adapter in adapters] for path in paths}
    refuse_unknown(rows)
    rows = {path: of_one_kind(row) for path, row in rows.items()}
    raise_all("the adapters cannot be stacked", map(problem, rows, rows.values()))
    if rank is not None:
        raise_all("`rank` is too small", too_small(rows, rank))
    return {path: _stacked(row, rank or 1) for path, row in rows.items()}


def take(stacked: Mapping[str, Any], index: int | jax.Array) -> Adapter:
    """Returns one adapter of a stacked one.

    Its ranks stay padded, and its scaling is the common one; `unstack` can trim them.

    Args:
        stacked: what `jlora.stack` gave.
        index: which one, from 0. It may be traced; out of range it then gives NaNs,
            which show, where any other adapter would not.

    Raises:
        IndexError: if a concrete index is out of range.
        AdapterError: if `stacked` is no stacked adapter.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> stacked = jlora.stack([{"bias": jnp.zeros(3)}, {"bias": jnp.ones(3)}])
        >>> jlora.take(stacked, 1)
        {'bias': Array([1., 1., 1.], dtype=float32)}
    """
    count = count_of(stacked)
    index = checked_index(index, count)
    if not isinstance(index, Tracer):
        return jax.tree.map(lambda leaf: leaf[int(index)], dict(stacked))
    inside = (index >= 0) & (index < count)
    nan = lambda leaf: jnp.where(inside, leaf, jnp.nan)
    return jax.tree.map(nan, row_of(dict(stacked), index))


def unstack(stacked: Mapping[str, Any], *, trim: bool = False) -> list[Adapter]:
    """Returns the adapters of a stacked one, the inverse of `stack`.

    Args:
        stacked: what `jlora.stack` gave, or what it was trained to.
        trim: whether to leave out, at the end of the rank, columns that are zero in `a`
            and in `b`, and paths where all are. That takes back every padding; it reads
            values, so that it cannot be traced.

    Raises:
        AdapterError: if `stacked` is no stacked adapter.
        TypeError: if `trim` is asked for under `jax.jit`.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import KernelAxes, LoraFactors
        >>> axes = KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> a, b = jnp.ones((5, 3)), jnp.ones((3, 7))
        >>> two, three = (LoraFactors(a[:, :r], b[:r], axes, 1.5) for r in (2, 3))
        >>> stacked = jlora.stack([{"w": two}, {"w": three}])
        >>> [one["w"].rank for one in jlora.unstack(stacked)]
        [3, 3]
        >>> [one["w"].rank for one in jlora.unstack(stacked, trim=True)]
        [2, 3]
    """
    each = [take(stacked, i) for i in range(count_of(stacked))]
    return [_trimmed(one) for one in each] if trim else each


def put(
    stacked: Mapping[str, Any], index: int | jax.Array, adapter: Mapping[str, Any]
) -> Adapter:
    """Returns a stacked adapter with one adapter in the place of another.

    Shapes, dtypes and scalings stay, so that a function compiled for `stacked` serves
    the new adapter too. Its ranks are padded, its scaling is folded into `b`, and paths
    that it lacks are set to zero, as `jlora.stack` does it.

    Args:
        stacked: what `jlora.stack` gave.
        index: which one to replace, from 0. It may be traced; out of range it then
            changes nothing.
        adapter: the new adapter, of no larger rank.

    Raises:
        IndexError: if a concrete index is out of range.
        AdapterError: with every entry that has no place in `stacked`.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> stacked = jlora.stack([{"bias": jnp.zeros(3)}, {"bias": jnp.ones(3)}])
        >>> jlora.put(stacked, 0, {"bias": jnp.full(3, 5.0)})["bias"][:, 0]
        Array([5., 1.], dtype=float32)
    """
    count = count_of(stacked)
    index = checked_index(index, count)
    (adapter,) = as_adapters([adapter])
    slots = jax.eval_shape(lambda: take(stacked, 0))
    refuse_unknown({path: [entry] for path, entry in adapter.items()})
    adapter = {path: of_kind(slots.get(path), e) for path, e in adapter.items()}
    problems = [unknown(p, list(slots)) for p in adapter if p not in slots]
    problems += [misfit(p, slot, adapter.get(p)) for p, slot in slots.items()]
    raise_all("the adapter has no place in the stack", problems)
    # Out of range nothing is written; -1 would be the last.
    place = jnp.where(index < 0, count, index)
    write = lambda into, new: into.at[place].set(new.astype(into.dtype), mode="drop")
    new = {path: _as_slot(slot, adapter.get(path)) for path, slot in slots.items()}
    return jax.tree.map(write, dict(stacked), new)


def row_of(stacked: Any, index: jax.Array) -> Any:
    """Returns a row of every array; out of range the nearest one."""
    row = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return jax.tree.map(lambda leaf: row(leaf, index), stacked)


def _stacked(row: Sequence[Any], rank: int) -> Any:
    """Returns the entries of one path as one; None is an entry that is lacking."""
    held = [entry for entry in row if entry is not None]
    slot = held[0]
    if is_plain(slot):
        rank = max([rank, *(entry.rank for entry in held)])
        scaling = next((e.scaling for e in held if e.scaling), slot.scaling)
        fit = functools.partial(_fitted, rank=rank, scaling=scaling)
        held = [fit(entry) for entry in held]
    if len(held) < len(row):
        zeros, fitted = nothing(held[0]), iter(held)
        held = [zeros if entry is None else next(fitted) for entry in row]
    return jax.tree.map(_stack_arrays, *held)


def _stack_arrays(*arrays: Any) -> jax.Array:
    dtype = common(*(array.dtype for array in arrays))
    return jnp.stack([jnp.asarray(array, dtype) for array in arrays])


def _as_slot(slot: Any, entry: Any) -> Any:
    """Returns an entry in the shapes and with the scaling of a place in a stack."""
    if entry is None:
        return nothing(slot)
    if is_plain(slot):
        return _fitted(entry, slot.rank, slot.scaling)
    return jax.tree.map(jnp.asarray, entry)


def _fitted(entry: LoraFactors, rank: int, scaling: float) -> LoraFactors:
    """Returns factors of the same ΔW with this rank and this scaling."""
    a, b = jnp.asarray(entry.a), jnp.asarray(entry.b)
    if entry.scaling != scaling:
        wide = summed_in(b.dtype)
        b = (b.astype(wide) * (entry.scaling / scaling)).astype(b.dtype)
    a = _padded(a, a.ndim - 1, rank)
    b = _padded(b, len(entry.axes.batch), rank)
    return dataclasses.replace(entry, a=a, b=b, scaling=scaling)


def _padded(factor: jax.Array, axis: int, rank: int) -> jax.Array:
    missing = rank - factor.shape[axis]
    widths = [(0, missing if i == axis else 0) for i in range(factor.ndim)]
    return jnp.pad(factor, widths) if missing else factor


def _trimmed(adapter: Adapter) -> Adapter:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(adapter)):
        raise TypeError(
            "`jlora.unstack(trim=True)` looks at values, to see what is zero: call it "
            "outside of `jax.jit`"
        )
    ranks = {p: _used_rank(e) for p, e in adapter.items() if is_plain(e)}
    return {
        path: _cut(entry, ranks[path]) if is_plain(entry) else entry
        for path, entry in adapter.items()
        if ranks.get(path, 1)
    }


def _used_rank(entry: LoraFactors) -> int:
    """Returns the rank without the zeros at its end."""
    rank_axis = len(entry.axes.batch)
    others: Callable[..., tuple[int, ...]] = lambda factor, axis: tuple(
        i for i in range(factor.ndim) if i != axis
    )
    in_a = jnp.any(entry.a != 0, axis=others(entry.a, entry.a.ndim - 1))
    in_b = jnp.any(entry.b != 0, axis=others(entry.b, rank_axis))
    used = np.flatnonzero(np.asarray(in_a) | np.asarray(in_b))
    return int(used[-1]) + 1 if used.size else 0


def _cut(entry: LoraFactors, rank: int) -> LoraFactors:
    b = jax.lax.slice_in_dim(entry.b, 0, rank, axis=len(entry.axes.batch))
    return dataclasses.replace(entry, a=entry.a[..., :rank], b=b)

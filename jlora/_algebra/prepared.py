"""Stacked adapters laid out for serving: side by side along the rank, once for all.

`Lora.apply_mixed` can lay factors out so at each call. In a loop that decodes token by
token that is most of what it does: an array is read, looked through and written again
for a product with one row of each sequence.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from .._adapter.factors import LoraFactors, exportable
from .._jax.dots import where_first
from .._jax.sharding import joined_along, split_along, whole_along
from .._params.axes import KernelAxes
from .stackable import count_of, is_plain, plain_stack, raise_all


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreparedFactors:
    """The factors of one kernel of all adapters, side by side along the rank.

    Attributes:
        a: `[a_1 … a_N]`, of shape `(*batch, *in, N·rank)`.
        b: `[b_1; …; b_N]`, of shape `(*batch, N·rank, *out)`.
        sound: of each adapter whether all its numbers are finite, of shape `(N,)`.
            Those of the others are zeros in `a` and `b`: zero times NaN is NaN, and
            rows of all adapters go through one product.
        axes: which axes of the kernel are batch, input and output axes.
        scaling: that of all of them.
    """

    a: jax.Array
    b: jax.Array
    sound: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})

    @property
    def adapters(self) -> int:
        """How many adapters there are."""
        return self.sound.shape[0]

    @property
    def rank(self) -> int:
        """The rank of each of them."""
        return self.a.shape[-1] // self.adapters


exportable(PreparedFactors, "jlora.PreparedFactors")
Prepared: TypeAlias = dict[str, PreparedFactors | jax.Array]


def prepare(stacked: Mapping[str, Any]) -> Prepared:
    """Returns stacked adapters in the layout that serves a mixed batch fastest.

    `Lora.apply_mixed` takes it in the place of the stack, with the same results. Make
    it when adapters come or go, and not at each token; under `jax.jit`, with the stack
    donated where it is not needed, it takes no memory of its own for long.

    Args:
        stacked: what `jlora.stack` or `jlora.put` gave.

    Returns:
        A dict by path: `PreparedFactors`, of plain factors with the same bytes, and
        what has no factors as it is. It is for `apply_mixed` alone; `jlora.put` and
        `jlora.take` need the stack.

    Raises:
        AdapterError: if it is no stacked adapter.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=2))
        >>> params, x = {"w": jnp.ones((5, 7))}, jnp.ones((4, 5))
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> stacked = jlora.stack([lora.init(key, params, x) for key in keys])
        >>> prepared = jlora.prepare(stacked)
        >>> prepared["w"].a.shape, prepared["w"].b.shape
        ((5, 6), (6, 7))
        >>> lora.apply_mixed(params, prepared, jnp.array([2, 0, -1, 1]), x).shape
        (4, 7)

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
        <https://arxiv.org/abs/2106.09685>, 2021, equation 3.
    """
    count_of(stacked)
    plain = {path: plain_stack(entry) for path, entry in stacked.items()}
    return {p: side_by_side(e) if is_plain(e) else e for p, e in plain.items()}


def side_by_side(entry: LoraFactors) -> PreparedFactors:
    """Returns the stacked factors of one kernel side by side along the rank."""
    before = len(entry.axes.batch)
    a, b = jnp.asarray(entry.a), jnp.asarray(entry.b)
    a, b = whole_along(a, (0, a.ndim - 1)), whole_along(b, (0, 1 + before))
    finite = lambda v: jnp.isfinite(v).all(axis=tuple(range(1, v.ndim)))
    sound = finite(a) & finite(b)
    a = joined_along(where_first(sound, a, 0), a.ndim - 2)
    b = joined_along(where_first(sound, b, 0), before)
    return PreparedFactors(a, b, sound, entry.axes, entry.scaling)


def stacked_again(entry: PreparedFactors) -> LoraFactors:
    """Returns prepared factors as a stack, NaNs in `b` where they were not finite."""
    count, before = entry.adapters, len(entry.axes.batch)
    a = split_along(entry.a, entry.a.ndim - 1, count)
    b = split_along(entry.b, before, count)
    b = where_first(entry.sound, b, jnp.nan)
    return LoraFactors(a, b, entry.axes, entry.scaling)


def count_of_either(stacked: Mapping[str, Any]) -> int:
    """Returns how many adapters are stacked or prepared; raises if none are."""
    ready = {
        path: entry.adapters
        for path, entry in stacked.items()
        if isinstance(entry, PreparedFactors)
    }
    if not ready:
        return count_of(stacked)
    rest = {path: entry for path, entry in stacked.items() if path not in ready}
    counts = dict(ready)
    if rest:
        counts |= dict.fromkeys(rest, count_of(rest))
    told = [f"{path!r} has {count}" for path, count in counts.items()]
    differ = len(set(counts.values())) > 1
    raise_all("numbers of adapters that differ", told if differ else [])
    return next(iter(counts.values()))

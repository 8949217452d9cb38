"""What each example of a mixed batch gets of the stacked adapters, in one of two forms.

* gathered: its own copy of the factors of its adapter. Every product of the factors is
  then one for each example.
* side by side: the factors of all adapters, joined along the rank, and a gate that
  leaves the columns of its adapter. The factors are the same for all examples, so that
  `jax.vmap` makes one product of all examples to `x·[a_1 … a_N]` and one from it.
  `jlora.prepare` joins them once for many calls.

References:
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
    <https://arxiv.org/abs/2106.09685>, 2021, equation 3. With `a = [a_1 … a_N]` and
    `b = [b_1; …; b_N]`, `(x·a ∘ gate)·b` is `x·a_i·b_i` where the gate is 1 in the
    columns of adapter i and 0 elsewhere.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from .._adapter.factors import LoraFactors
from .._adapter.variants import variant_of_entry
from .._algebra.prepared import PreparedFactors, side_by_side, stacked_again
from .._errors import UnsupportedFeatureError
from .._jax.dots import as_laid_out
from .._jax.sharding import spec_of
from .._jax.symbolic import exceeds
from .._params.quantized import dequantized
from .._rules import CONSUME
from .._rules.view import Log, Use
from .adapt import Gated, Given
from .mixed_mesh import Examples, take_row, take_rows

# What a device computes in the time that it reads or writes one byte. (Accelerators
# reach a few hundred FLOPs in large products and less in skinny ones; CPUs some tens.)
_FLOPS_A_BYTE = 100


class Mixture(NamedTuple):
    """The stacked adapters of a mixed batch.

    Attributes:
        stacked: the adapters, as `jlora.stack` or `jlora.prepare` returns them.
        adapters: how many they are.
        base: the leaves of the params by path.
        examples: where the examples are on an Explicit mesh.
        size: the number of examples.
    """

    stacked: Mapping[str, Any]
    adapters: int
    base: Mapping[str, Any]
    examples: Examples
    size: int

    def of_one(self, index: jax.Array) -> Given:
        """Returns the adapter of one example, which is mapped over by `jax.vmap`."""
        arrays = {path: (entry, index) for path, entry in self.stacked.items()}
        entries = functools.partial(self._entries, index)
        shapes = {path: _shapes_of_one(entry) for path, entry in self.stacked.items()}
        return Given(shapes, arrays, entries, mixed=True)

    def _entries(self, index: jax.Array, log: Log) -> dict[str, Any]:
        self._refuse_ragged(log)
        found: dict[str, Any] = {}
        for path, entry in self.stacked.items():
            factors = isinstance(entry, LoraFactors | PreparedFactors)
            if factors and self._is_joined(path, entry, log):
                found[path] = self._side_by_side(entry, index)
            else:
                found[path] = self._gathered(path, entry, index)
        return found

    def _is_joined(
        self, path: str, entry: LoraFactors | PreparedFactors, log: Log
    ) -> bool:
        """Whether factors lie side by side: where every use can, and it is cheaper."""
        uses = [use for use in log.uses if use.path == path]
        if not self._can_be_joined(path, log):
            return False
        if any(map(_maps_kernel, uses)):
            return True
        prepared, rank_axis = isinstance(entry, PreparedFactors), len(entry.axes.batch)
        if not prepared:
            along = spec_of(entry.a)[0], spec_of(entry.a)[-1]
            if any(along) or spec_of(entry.b)[1 + rank_axis]:
                return False
        numbers = (entry.a.size + entry.b.size) // self.adapters
        # Of the six products of a step, two are the forward pass.
        flops = entry.rank * sum(use.factor_flops for use in uses) // 3
        size = -(-self.size // self.examples.devices)
        bytes_ = numbers * entry.a.dtype.itemsize
        return joining_pays(self.adapters, size, bytes_, flops, prepared=prepared)

    def _can_be_joined(self, path: str, log: Log) -> bool:
        """Whether all uses of a kernel put their `x·a` through a gate.

        Any other use would multiply the gate into a factor of the joined rank.
        """
        if any(use.path == path for use in log.obstacles):
            return False
        through = lambda u: u.chosen is not None or u.kind == "lookup"
        own = [use for use in log.uses if use.path == path]
        return all(through(use) or _maps_kernel(use) for use in own)

    def _refuse_ragged(self, log: Log) -> None:
        """Raises if a ragged product cannot be one for all examples; names all."""
        paths = {use.path for use in log.uses if _maps_kernel(use)}
        factors = LoraFactors | PreparedFactors
        adapted = [
            path
            for path in paths & set(self.stacked)
            if not isinstance(self.stacked[path], factors)
            or not self._can_be_joined(path, log)
        ]
        wrong = sorted(adapted if self.examples.mesh is None else paths)
        if wrong:
            raise UnsupportedFeatureError(
                f"{wrong} reach a ragged product, which JAX cannot map over examples. "
                "It is one product for all where each use is a product or a lookup, "
                "and no mesh has Explicit axes. Otherwise call `lora.apply(params, "
                "jlora.take(stacked, i), ...)` with the examples of adapter i"
            )

    def _side_by_side(
        self, entry: LoraFactors | PreparedFactors, index: jax.Array
    ) -> Gated:
        """Returns the factors of all adapters and the gate of one example.

        Those of an adapter that holds NaNs or infinities are zeros, so that they reach
        no other example; its own get NaN by their gate.
        """
        a, b = (self.examples.whole_across(v) for v in (entry.a, entry.b))
        entry = dataclasses.replace(entry, a=a, b=b)
        joined = side_by_side(entry) if isinstance(entry, LoraFactors) else entry
        own = jnp.arange(self.adapters) == index
        gate = jnp.where(own, jnp.where(joined.sound, 1.0, jnp.nan), 0.0)
        gate = jnp.where(index >= self.adapters, jnp.nan, gate)
        gate = jnp.broadcast_to(gate[:, None], (self.adapters, joined.rank)).reshape(-1)
        factors = LoraFactors(joined.a, joined.b, joined.axes, joined.scaling)
        return Gated(factors, gate)

    def _gathered(self, path: str, entry: Any, index: jax.Array) -> Any:
        """Returns the entry of one adapter: below 0 none, from `count` on NaNs.

        Out of range the nearest one is read.
        """
        if isinstance(entry, PreparedFactors):
            entry = stacked_again(entry)
        row = self._row(entry, jnp.clip(index, 0, self.adapters - 1))
        inside = (index >= 0) & (index < self.adapters)
        fill = jnp.where(index < 0, 0.0, jnp.nan)
        if isinstance(row, LoraFactors):
            # Both zero: the nearest row, which is read below 0, may hold NaNs in a.
            a = jnp.where(index < 0, 0, row.a).astype(row.a.dtype)
            b = jnp.where(inside, row.b, fill.astype(row.b.dtype))
            return LoraFactors(a, b, row.axes, row.scaling)
        variant: Any = variant_of_entry(row)
        ((name, value),) = variant.arrays(row).items()
        own = jnp.asarray(variant.origin(row, dequantized(self.base[path], path)))
        other = jnp.where(index < 0, own, jnp.nan)
        value = jnp.where(inside, as_laid_out(value.astype(own.dtype), own), other)
        return variant.replaced(row, {name: value})

    def _row(self, entry: Any, index: jax.Array) -> Any:
        """Returns one row of every array.

        Mapped over examples, it says where their rows lie on an Explicit mesh.
        """
        row = custom_vmap(lambda entry, index: take_row(entry, index, self.examples))

        @row.def_vmap
        def rule(size: int, batched: Any, entry: Any, index: Any) -> tuple[Any, Any]:
            every = jax.tree.map(lambda _: True, entry)
            return take_rows(entry, index, self.examples), every

        return row(entry, index)


def _maps_kernel(use: Use) -> bool:
    """Whether JAX maps an operation over examples only with its kernel."""
    rule = CONSUME.get(use.primitive)
    return rule is not None and rule.maps_kernel


def _shapes_of_one(entry: Any) -> Any:
    """Returns the shapes of an entry of one adapter."""
    if isinstance(entry, PreparedFactors):
        entry = jax.eval_shape(stacked_again, entry)
    shape = lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype)
    return jax.tree.map(shape, entry)


def joining_pays(
    count: int, examples: int, size: int, flops: int, *, prepared: bool = False
) -> bool:
    """Whether factors side by side cost less than a copy for each example.

    Side by side the factors of all adapters are read, and every row is multiplied by
    those of all. If they are not prepared they are read and written before: whether
    they are finite, and to lie side by side. Gathered, each example reads the factors
    of its adapter, writes them, and reads them again.

    Args:
        count: the number of adapters.
        examples: the number of examples, on one device.
        size: the bytes of the factors of one adapter.
        flops: what these take for one example.
        prepared: whether they lie side by side already.

    >>> joining_pays(8, 64, 1 << 16, 1 << 16)  # a token each of 64 sequences
    True
    >>> joining_pays(64, 64, 1 << 16, 1 << 16), joining_pays(
    ...     64, 64, 1 << 16, 1 << 16, prepared=True
    ... )
    (False, True)
    >>> joining_pays(64, 8, 1 << 16, 1 << 16)  # of eight: most adapters are not used
    False
    >>> joining_pays(8, 8, 1 << 16, 512 << 16)  # of eight, 512 tokens each
    False
    """
    read = _FLOPS_A_BYTE * size
    joined = (1 if prepared else 4) * count * read + count * examples * flops
    gathered = 3 * examples * read + examples * flops
    return exceeds(gathered, joined)

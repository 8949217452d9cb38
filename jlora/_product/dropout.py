"""Dropout on the input of the low-rank branch.

Each target has a key of its own, and each index of its batch axes (layers, experts) one
that is folded from it. The state of these keys travels with the factors, so that a scan
slices it along with the layers. A mask is made again in the backward pass: what is kept
is the key.

Keys are JAX's; what decides of each value is a hash of its place under the words of the
key. `jax.random.bernoulli` would take a block of Threefry for each value, some hundred
operations, where a mask needs no more than that nothing in it repeats.

References:
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
    <https://arxiv.org/abs/2106.09685>, 2021, appendix D (dropout of the branch).
    Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting, JMLR 15, 2014.
    Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011 (random numbers
    as a function of a counter and a key).
    Appleby, MurmurHash3, 2011 (the finalizer of 32 bits).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._jax.dots import as_laid_out
from .._jax.sharding import explicit_sharding, spec_of, without_axes
from .._params.axes import free_axes

_ALL = 1 << 32


@dataclasses.dataclass(frozen=True)
class Dropout:
    """What is static about the dropout of one target.

    Attributes:
        rate: the share of inputs that are set to zero, to within 2⁻³³; the others are
            divided by what is left of 1.
        impl: the implementation of the key.
    """

    rate: float
    impl: str

    @property
    def kept(self) -> int:
        """Of 2³² values of a hash, those with which an input is kept."""
        return min(max(round((1 - self.rate) * _ALL), 1), _ALL - 1)


def key_words(
    key: jax.Array, batch: tuple[int, ...], rate: float
) -> tuple[jax.Array, Dropout]:
    """Returns the state of one key per batch index, `(*batch, words)`.

    Args:
        key: a PRNG key, typed or legacy.
        batch: the sizes of the batch axes.
        rate: the share of inputs that are set to zero.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    keys = jax.random.split(key, batch) if batch else key
    return jax.random.key_data(keys), Dropout(rate, str(jax.random.key_impl(key)))


def more_keys(words: jax.Array, dropout: Dropout, sizes: tuple[int, ...]) -> jax.Array:
    """Returns the state of another key for each index of axes that had one for all.

    Args:
        words: the state of the keys, of any axes and the words.
        dropout: rate and implementation.
        sizes: the sizes of the new axes, in their places; 1 for all others.
    """
    own = jnp.broadcast_shapes(words.shape[:-1], sizes)
    number = jnp.arange(math.prod(sizes)).reshape(sizes)
    every = jnp.broadcast_to(words, (*own, words.shape[-1]))
    keys = jax.random.wrap_key_data(every, impl=dropout.impl).reshape(-1)
    numbers = jnp.broadcast_to(number, own).reshape(-1)
    keys = jax.vmap(jax.random.fold_in)(keys, numbers)
    return jax.random.key_data(keys).reshape(every.shape)


def drop(
    x: jax.Array, words: jax.Array, dropout: Dropout, batch: Sequence[int] = ()
) -> jax.Array:
    """Returns `x` with a share of its values set to zero and the others scaled up.

    Args:
        x: the input of a branch.
        words: the state of the keys, `(*sizes of the batch axes, words)`.
        dropout: rate and implementation.
        batch: the axes of `x` along which the keys differ, in the order of `words`.
    """
    return _drop((dropout, tuple(batch)), x, words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _drop(
    static: tuple[Dropout, tuple[int, ...]], x: jax.Array, words: jax.Array
) -> jax.Array:
    dropout, batch = static
    kept = bits(x, words, batch) < np.uint32(dropout.kept)
    scaled = x * (_ALL / dropout.kept)
    return jnp.where(as_laid_out(kept, x), scaled, 0).astype(x.dtype)


def _forward(static: Any, x: jax.Array, words: jax.Array) -> tuple[jax.Array, Any]:
    return _drop(static, x, words), words


def _backward(static: Any, words: jax.Array, dy: jax.Array) -> tuple[Any, None]:
    """The same mask on the cotangent: dropout is linear."""
    return _drop(static, dy, words), None


_drop.defvjp(_forward, _backward)


def bits(x: jax.Array, words: jax.Array, batch: tuple[int, ...] = ()) -> jax.Array:
    """Returns 32 random bits for each place of an array, as uint32, laid out as it is.

    A place has the hash of its number under the first and the last word of its key.
    Under one key no two of 2³² places have the same bits. All of it is elementwise, and
    so becomes a part of what reads the bits, on as many devices as there are.

    Args:
        x: the array, of which shape and layout are looked at.
        words: the state of the keys, `(*sizes of the batch axes, words)`.
        batch: the axes along which the keys differ, in the order of `words`.
    """
    low, high = numbers(x, [i for i in range(x.ndim) if i not in batch])
    first, last = (_beside(words[..., i], x.ndim, batch) for i in (0, -1))
    mixed = _mix(low ^ _mix(first)) + _mix(last)
    # Farther places are far apart: they have another key, as it were.
    return _mix(mixed if high is None else _mix(mixed) + high)


def numbers(
    x: jax.Array, axes: Sequence[int], limit: int = _ALL
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the number of each place along some axes of an array, as uint32.

    Args:
        x: the array.
        axes: the axes that are counted along.
        limit: how many places one number tells apart.

    Returns:
        The number; where there are more places, it begins again, and what tells them
        apart is the second one. Else that is None.
    """
    inner = list(axes)
    while len(inner) > 1 and math.prod(x.shape[i] for i in inner) > limit:
        inner = inner[1:]
    outer = [i for i in axes if i not in inner]
    return _count(x, inner), _count(x, outer) if outer else None


def _count(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    number, stride = jnp.zeros((1,) * x.ndim, jnp.uint32), 1
    sharding = explicit_sharding(x)
    for axis in reversed(axes):
        others = free_axes(x.ndim, [axis])
        sizes = [1 if i in others else n for i, n in enumerate(x.shape)]
        place = lax.broadcasted_iota(jnp.uint32, sizes, axis)
        if sharding is not None:  # each device counts its own places
            own = without_axes(sharding, spec_of(x), others)
            place = jax.sharding.reshard(place, own)
        number, stride = number + place * np.uint32(stride), stride * x.shape[axis]
    return number


def _beside(word: jax.Array, ndim: int, batch: tuple[int, ...]) -> jax.Array:
    """Lays a word of each key out along the batch axes of an array."""
    order = sorted(range(len(batch)), key=batch.__getitem__)
    sizes = dict(zip(batch, word.shape, strict=True))
    laid = [sizes.get(i, 1) for i in range(ndim)]
    return jnp.transpose(word, order).reshape(laid).astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """Returns a bijection of uint32 in which each bit depends on all."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)

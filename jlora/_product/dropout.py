"""Dropout on the input of the low-rank branch.

Each target has a key of its own, and each index of its batch axes (layers, experts) one
that is folded from it. The state of these keys travels with the factors, so that a scan
slices it along with the layers. A mask is made again in the backward pass: what is kept
is the key.

References:
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
    <https://arxiv.org/abs/2106.09685>, 2021, appendix D (dropout of the branch).
    Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting, JMLR 15, 2014.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.dots import as_laid_out


@dataclasses.dataclass(frozen=True)
class Dropout:
    """What is static about the dropout of one target.

    Attributes:
        rate: the share of inputs that are set to zero; the others are divided by
            `1 - rate`.
        impl: the implementation of the key.
    """

    rate: float
    impl: str


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
    keep = as_laid_out(_mask(x.shape, words, dropout, batch), x)
    return jnp.where(keep, x / (1 - dropout.rate), 0).astype(x.dtype)


def _forward(static: Any, x: jax.Array, words: jax.Array) -> tuple[jax.Array, Any]:
    return _drop(static, x, words), words


def _backward(static: Any, words: jax.Array, dy: jax.Array) -> tuple[Any, None]:
    """The same mask on the cotangent: dropout is linear."""
    return _drop(static, dy, words), None


_drop.defvjp(_forward, _backward)


def _mask(
    shape: tuple[int, ...],
    words: jax.Array,
    dropout: Dropout,
    batch: tuple[int, ...],
) -> jax.Array:
    """Returns which values are kept."""
    keys = jax.random.wrap_key_data(words, impl=dropout.impl)
    keep = 1 - dropout.rate
    if not batch:
        return jax.random.bernoulli(keys, keep, shape)
    rest = [i for i in range(len(shape)) if i not in batch]
    sizes = tuple(shape[i] for i in rest)
    draw = jax.vmap(lambda key: jax.random.bernoulli(key, keep, sizes))
    count = math.prod(shape[i] for i in batch)
    drawn = draw(keys.reshape(count)).reshape([shape[i] for i in (*batch, *rest)])
    order = [*batch, *rest]
    return jnp.transpose(drawn, [order.index(i) for i in range(len(shape))])

"""The initialisers, one function each. Whatever they draw, ΔW = 0 at the start.

Most draw `a` and leave `b` zero. `INITIALIZERS` has, by the names of `LoraConfig.init`,
what gives both factors.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from .._jax.dtypes import summed_in
from .._params.axes import KernelAxes, Shape


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The factors that are to be made.

    Attributes:
        axes: the roles of the kernel's axes.
        shape: the kernel's shape.
        rank: their rank.
        asked: the rank that was asked; larger if the kernel does not allow it.
        dtype: their dtype.
        places: the shardings of `a` and `b` on an Explicit mesh.
    """

    axes: KernelAxes
    shape: Shape
    rank: int
    asked: int
    dtype: Any
    places: tuple[Any, Any] = (None, None)

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """The shapes of `a` and `b`."""
        return self.axes.factor_shapes(self.shape, self.rank)

    @property
    def fan_in(self) -> int:
        """The product of the input axes."""
        return self.axes.fans(self.shape)[0]


Factors = tuple[jax.Array, jax.Array]
Initializer = Callable[[jax.Array, Wanted], Factors]
DrawA = Callable[
    [jax.Array, tuple[int, ...], int, jnp.dtype, NamedSharding | None], jax.Array
]


def kaiming_uniform(
    key: jax.Array,
    shape: tuple[int, ...],
    fan_in: int,
    dtype: jnp.dtype,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Returns `a ~ U(-1/√fan_in, 1/√fan_in)`, PEFT's and loralib's default.

    This is He's uniform initialisation with negative slope √5,
    `√(6 / ((1 + 5)·fan_in))`; it is √6 narrower than JAX's `he_uniform`.

    Args:
        key: a PRNG key.
        shape: the shape of `a`, `(*batch, *in, rank)`.
        fan_in: the product of the input axes alone: layers and experts do not count.
        dtype: the dtype of the result.
        out_sharding: its sharding on an Explicit mesh.

    References:
        He et al., Delving Deep into Rectifiers, <https://arxiv.org/abs/1502.01852>,
        2015, equation 10.
    """
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(
        key, shape, dtype, -bound, bound, out_sharding=out_sharding
    )


def gaussian(
    key: jax.Array,
    shape: tuple[int, ...],
    rank: int,
    dtype: jnp.dtype,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Returns `a ~ N(0, 1/rank²)`: standard deviation 1/rank, as PEFT's "gaussian".

    Args:
        key: a PRNG key.
        shape: the shape of `a`, `(*batch, *in, rank)`.
        rank: the rank that was asked, of which `a` may have fewer columns.
        dtype: the dtype of the result.
        out_sharding: its sharding on an Explicit mesh.

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models,
        <https://arxiv.org/abs/2106.09685>, 2021, section 4.1.
    """
    values = jax.random.normal(key, shape, dtype, out_sharding=out_sharding)
    return values / rank


def zero_a(key: jax.Array, wanted: Wanted) -> Factors:
    """Returns `a = 0` and `b ~ U(-1/√rank, 1/√rank)`: the start from the other side.

    Hayou et al. call it Init[B]; the variance of `b` is of the order of 1/rank, its
    fan-in (the rank that was asked, of which a kernel may have got less). They find
    that the usual start, Init[A], allows larger learning rates.

    Args:
        key: a PRNG key.
        wanted: the factors that are to be made.

    References:
        Hayou, Ghosh and Yu, The Impact of Initialization on LoRA Finetuning Dynamics,
        <https://arxiv.org/abs/2406.08447>, 2024, section 3.
    """
    (a, b), dtype = wanted.shapes, wanted.dtype
    return (
        jnp.zeros(a, dtype, out_sharding=wanted.places[0]),
        kaiming_uniform(key, b, wanted.asked, dtype, wanted.places[1]),
    )


def orthogonal(key: jax.Array, wanted: Wanted) -> Factors:
    """Returns `a = G·Q_odd/10` and `b = Q_evenᵀ·H/10`, both random, with `a·b = 0`.

    `Q` is a random orthogonal matrix, rank × rank, one for each slice of a stack: its
    odd rows are orthogonal to its even ones. `G: (in, rank/2)` and `H: (rank/2, out)`
    are Gaussian. This is PEFT's "orthogonal". Both factors have gradients at the first
    step, and ΔW is zero but for rounding; in bfloat16 the output moves by that of
    `x·a`, which is 2⁻⁸ of its size. The rank that is asked must be even; where a kernel
    gets an odd one `G` has a column more than `H` has rows, and of rank 1 `b` is zero.

    Args:
        key: a PRNG key.
        wanted: the factors that are to be made.

    References:
        Datta, Rethinking LoRA Initialisation,
        <https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation>.
    """
    (a, b), (place_a, place_b) = wanted.shapes, wanted.places
    n, half = len(wanted.axes.batch), wanted.rank // 2
    other = wanted.rank - half
    wide = summed_in(wanted.dtype)
    keys, draw = jax.random.split(key, 3), jax.random.normal
    g = draw(keys[0], (*a[:-1], other), wide, out_sharding=place_a)
    h = draw(keys[1], (*b[:n], half, *b[n + 1 :]), wide, out_sharding=place_b)
    q = jnp.linalg.qr(draw(keys[2], (*a[:n], wanted.rank, wanted.rank), wide)).Q
    if place_a is not None:  # its batch axes must lie as those of the factors
        own = PartitionSpec(*tuple(place_a.spec)[:n])
        q = jax.sharding.reshard(q, place_a.update(spec=own))
    batch = tuple(range(n)), tuple(range(n))
    product = lambda x, i, y, j, place: jax.lax.dot_general(
        x,
        y,
        (((i,), (j,)), batch),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=place,
    )
    a = product(g, len(a) - 1, q[..., 0::2, :], n, place_a) / 10
    b = product(q[..., 1::2, :], n, h, n, place_b) / 10
    return a.astype(wanted.dtype), b.astype(wanted.dtype)


def _with_zero_b(draw: DrawA, size: Callable[[Wanted], int]) -> Initializer:
    """Makes both factors with an initialiser of `a`, which is drawn as a size says."""

    def initialize(key: jax.Array, wanted: Wanted) -> Factors:
        (shape_a, shape_b), (place_a, place_b) = wanted.shapes, wanted.places
        a = draw(key, shape_a, size(wanted), wanted.dtype, place_a)
        return a, jnp.zeros(shape_b, wanted.dtype, out_sharding=place_b)

    return initialize


INITIALIZERS: dict[str, Initializer] = {
    "kaiming_uniform": _with_zero_b(kaiming_uniform, lambda wanted: wanted.fan_in),
    "gaussian": _with_zero_b(gaussian, lambda wanted: wanted.asked),
    "orthogonal": orthogonal,
    "zero_a": zero_a,
}

"""What keeps a value linear in its kernels: moves, cuts, joins.

Each function takes the builder and the name of a value, and returns an expression.
"""

import math
from collections.abc import Callable

import numpy as np

from programs.build import Builder, Unfit

Carry = Callable[[Builder, str], str]
CARRY: dict[str, tuple[float, Carry]] = {}


def carry(weight: float) -> Callable[[Carry], Carry]:
    """Registers a step under the name of its function."""

    def register(step: Carry) -> Carry:
        CARRY[step.__name__] = (weight, step)
        return step

    return register


def at(ndim: int, axis: int, index: str) -> str:
    """An index into one axis: `:, 2, :`."""
    return ", ".join(index if i == axis else ":" for i in range(ndim))


def along(ndim: int, axis: int, vector: str) -> str:
    """A vector laid along one axis, for ranks are not promoted: `v[None, :]`."""
    spread = ", ".join(":" if i == axis else "None" for i in range(ndim))
    return vector if ndim == 1 else f"{vector}[{spread}]"


def ints(values: object) -> str:
    """An array of constants, as the program writes it."""
    return f"np.array({np.asarray(values).tolist()})"


def whole(b: Builder, used_up: bool) -> None:
    """Lets a step leave a vector of a matrix seldom: it has no product any more."""
    if used_up and b.flip(0.9):
        raise Unfit("a vector would be left")


# moves


@carry(3)
def transpose(b: Builder, k: str) -> str:
    order = b.shuffled(range(len(b.shape(k))))
    return b.rng.choice([f"jnp.transpose({k}, {order})", f"{k}.T"])


@carry(1)
def swapaxes(b: Builder, k: str) -> str:
    i, j = b.axis(k), b.axis(k)
    return f"jnp.{b.rng.choice(['swapaxes', 'moveaxis'])}({k}, {i}, {j})"


@carry(2)
def split_axis(b: Builder, k: str) -> str:
    axis, shape = b.axis(k, 4), list(b.shape(k))
    parts = [n for n in range(2, shape[axis]) if shape[axis] % n == 0]
    if not parts or len(shape) > 4:
        raise Unfit("prime, or too many axes")
    n = b.rng.choice(parts)
    return f"{k}.reshape({(*shape[:axis], n, shape[axis] // n, *shape[axis + 1 :])})"


@carry(3)
def join_axes(b: Builder, k: str) -> str:
    shape = b.shape(k)
    if len(shape) < 2 or math.prod(shape) == 0:
        raise Unfit("nothing to join")
    i = b.rng.randint(0, len(shape) - 2)
    j = b.rng.randint(i + 2, len(shape))
    whole(b, j - i == len(shape))
    return f"{k}.reshape({(*shape[:i], math.prod(shape[i:j]), *shape[j:])})"


@carry(0.2)
def regroup(b: Builder, k: str) -> str:
    """A reshape that mixes axes: rows of another length."""
    size = math.prod(b.shape(k))
    parts = [n for n in range(2, size) if size % n == 0]
    if not parts:
        raise Unfit("prime")
    n = b.rng.choice(parts)
    return f"{k}.reshape({n}, {size // n})"


@carry(2)
def unit_axis(b: Builder, k: str) -> str:
    axis = b.rng.randint(0, len(b.shape(k)))
    return f"jnp.expand_dims({k}, {axis})"


@carry(2)
def squeeze(b: Builder, k: str) -> str:
    units = [i for i, n in enumerate(b.shape(k)) if n == 1]
    if not units:
        raise Unfit("no axis of size 1")
    return f"jnp.squeeze({k}, {b.rng.choice(units)})"


@carry(1)
def flip(b: Builder, k: str) -> str:
    axis = b.axis(k)
    backwards = f"{k}[{at(len(b.shape(k)), axis, '::-1')}]"
    return b.rng.choice([backwards, f"lax.rev({k}, ({axis},))"])


@carry(1)
def roll(b: Builder, k: str) -> str:
    return f"jnp.roll({k}, {b.rng.randint(1, 3)}, axis={b.axis(k, 2)})"


@carry(1)
def same(b: Builder, k: str) -> str:
    return b.rng.choice(
        [
            f"jnp.array({k}, copy=True)",
            f"lax.optimization_barrier({k})",
            f"lax.stop_gradient({k}) + 0.0 * {k}",
            f"{k} ** 1",
            f"jnp.asarray({k})",
            f"jnp.positive({k})",
        ]
    )


# cuts


@carry(3)
def cut(b: Builder, k: str) -> str:
    axis, shape = b.axis(k, 2), b.shape(k)
    n = shape[axis]
    start = b.rng.randint(0, n - 1)
    stop = b.rng.randint(start + 1, n)
    index = f"{start}:{stop}"
    if b.flip(0.3):
        index = f"{start}::{b.rng.randint(2, 3)}"
    size = max(n // 2, 1)
    return b.rng.choice(
        [
            f"{k}[{at(len(shape), axis, index)}]",
            f"lax.dynamic_slice_in_dim({k}, {start}, {size}, axis={axis})",
            f"jnp.split({k}, [{max(start, 1)}], axis={axis})[{b.rng.randint(0, 1)}]",
        ]
    )


@carry(1)
def cut_traced(b: Builder, k: str) -> str:
    """A slice whose start, out of bounds at times, is an input."""
    axis = b.axis(k, 2)
    n = b.shape(k)[axis]
    start = b.input((), 0, n + 2)
    size = b.rng.randint(1, n - 1)
    return b.rng.choice(
        [
            f"lax.dynamic_slice_in_dim({k}, {start}, {size}, axis={axis})",
            f"lax.dynamic_index_in_dim({k}, {start}, axis={axis}, keepdims=False)",
        ]
    )


@carry(2)
def index_number(b: Builder, k: str) -> str:
    if len(b.shape(k)) < 2:
        raise Unfit("a vector")
    whole(b, len(b.shape(k)) == 2)
    axis = b.axis(k)
    i = b.rng.randrange(b.shape(k)[axis])
    number = b.rng.choice([str(i), str(i - b.shape(k)[axis])])
    return b.rng.choice(
        [
            f"{k}[{at(len(b.shape(k)), axis, number)}]",
            f"jnp.take({k}, {number}, axis={axis})",
        ]
    )


@carry(3)
def index_constants(b: Builder, k: str) -> str:
    """Rows or columns in another order, repeated, or left out: constants."""
    axis, ndim = b.axis(k, 2), len(b.shape(k))
    n = b.shape(k)[axis]
    perm = b.shuffled(range(n))
    some = [b.rng.randrange(n) for _ in range(b.rng.randint(1, n + 2))]
    order = b.rng.choice([perm, perm[: max(n // 2, 1)], some, sorted(some)])
    mode = b.rng.choice(["", "", ", mode='clip'", ", mode='fill'", ", mode='wrap'"])
    mask = [bool(b.rng.randint(0, 1)) for _ in range(n - 1)] + [True]
    return b.rng.choice(
        [
            f"{k}[{at(ndim, axis, ints(order))}]",
            f"jnp.take({k}, {ints(order)}, axis={axis}{mode})",
            f"{k}[{at(ndim, axis, f'jnp.arange({2 * n}) // 2')}]",
            f"{k}[{at(ndim, axis, ints(mask))}]",
            f"jnp.compress({ints(mask)}, {k}, axis={axis})",
        ]
    )


# joins


@carry(2)
def join_itself(b: Builder, k: str) -> str:
    axis, ndim = b.axis(k, 2), len(b.shape(k))
    at_ = lambda index: f"{k}[{at(ndim, axis, index)}]"
    i = b.rng.randint(1, b.shape(k)[axis] - 1)
    return b.rng.choice(
        [
            f"jnp.concatenate([{at_(f'{i}:')}, {at_(f':{i}')}], axis={axis})",
            f"jnp.concatenate([{k}, -{k}], axis={axis})",
            f"jnp.stack([{k}, 2.0 * {k}], axis={axis})",
        ]
    )


@carry(3)
def join_other(b: Builder, k: str) -> str:
    """Beside another leaf, adapted or frozen, on either side."""
    ndim = len(b.shape(k))
    if not ndim:
        raise Unfit("a scalar")
    axis, shape = b.axis(k), list(b.shape(k))
    stacked = b.flip(0.4)
    if not stacked:
        shape[axis] = b.rng.choice(b.sizes)
    other = b.leaf(shape, adapted=b.flip(0.7), dtype=b.dtype(k))
    pair = ", ".join(b.shuffled([k, other]))
    if stacked:
        return f"jnp.stack([{pair}], axis={b.rng.randint(0, ndim)})"
    return f"jnp.concatenate([{pair}], axis={axis})"


@carry(0.7)
def combine(b: Builder, k: str) -> str:
    """The sum of two kernels, of a kernel and what is frozen, or of one and itself."""
    if b.flip(0.3):
        return f"{k} + {k}"
    other = b.leaf(b.shape(k), adapted=b.flip(0.5), dtype=b.dtype(k))
    return f"{k} {b.rng.choice('+-')} {other}"


@carry(2)
def pad(b: Builder, k: str) -> str:
    axis, ndim = b.axis(k), len(b.shape(k))
    low, high = b.rng.randint(0, 2), b.rng.randint(0, 3)
    widths = [(low, high) if i == axis else (0, 0) for i in range(ndim)]
    low, high, inner = b.rng.randint(-1, 2), b.rng.randint(-1, 2), b.rng.randint(0, 1)
    config = [(low, high, inner) if i == axis else (0, 0, 0) for i in range(ndim)]
    zero = f"jnp.zeros((), {k}.dtype)"
    mode = b.rng.choice(["edge", "wrap", "reflect"])
    return b.rng.choice(
        [
            f"jnp.pad({k}, {widths})",
            f"lax.pad({k}, {zero}, {config})",
            f"jnp.pad({k}, {widths}, mode={mode!r})",
        ]
    )


@carry(0.8)
def repeat(b: Builder, k: str) -> str:
    axis, ndim = b.axis(k), len(b.shape(k))
    n = b.rng.randint(2, 3)
    reps = [n if i == axis else 1 for i in range(ndim)]
    return b.rng.choice(
        [
            f"jnp.repeat({k}, {n}, axis={axis})",
            f"jnp.tile({k}, {reps})",
            f"jnp.broadcast_to({k}[None], {(2, *b.shape(k))})",
        ]
    )


@carry(0.4)
def put_into_zeros(b: Builder, k: str) -> str:
    """A block of a larger matrix of zeros."""
    axis, shape = b.axis(k), list(b.shape(k))
    n = shape[axis]
    shape[axis] = n + 2
    zeros = f"jnp.zeros({tuple(shape)}, {k}.dtype)"
    return b.rng.choice(
        [
            f"{zeros}.at[{at(len(shape), axis, f'1:{n + 1}')}].set({k})",
            f"lax.dynamic_update_slice_in_dim({zeros}, {k}, 1, axis={axis})",
        ]
    )

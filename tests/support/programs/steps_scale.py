"""What keeps a value linear in its kernels: scales, masks, selects, frozen products.

Each function takes the builder and the name of a value, and returns an expression.
"""

import math

from programs.build import Builder
from programs.steps_carry import along, carry, ints, whole

# scales


@carry(2)
def scale_number(b: Builder, k: str) -> str:
    return b.rng.choice([f"{k} * 0.5", f"1.5 * {k}", f"{k} / 4.0", f"-{k}"])


@carry(1)
def scale_leaf(b: Builder, k: str) -> str:
    s = b.leaf((), adapted=False)
    return b.rng.choice([f"{k} * {s}", f"{s} * {k}", f"{k} / (2.0 + {s} ** 2)"])


@carry(2)
def scale_along(b: Builder, k: str) -> str:
    """By a vector along one axis."""
    axis, shape = b.axis(k), b.shape(k)
    v = b.leaf((shape[axis],), adapted=False)
    spread = along(len(shape), axis, v)
    return b.rng.choice(
        [
            f"{k} * {spread}",
            f"{spread} * {k}",
            f"{k} / (2.0 + {spread} ** 2)",
            f"{k} * jnp.broadcast_to({spread}, {shape})",
        ]
    )


@carry(1)
def cast(b: Builder, k: str) -> str:
    kinds = ["LOW", "jnp.float32", "jnp.complex64"]
    kind = b.rng.choices(kinds, [2, 2, 1])[0]
    if b.dtype(k) == "complex64":
        return b.rng.choice([f"jnp.real({k})", f"jnp.conj({k})", f"1j * {k}"])
    return f"{k}.astype({kind})"


# selects


@carry(0.6)
def mask(b: Builder, k: str) -> str:
    """A mask of constants, of whole rows or of single entries."""
    shape = b.shape(k)
    n = math.prod(shape)
    single = ints([i % 3 != 1 for i in range(n)]) + f".reshape({shape})"
    axis = b.axis(k)
    rows = along(len(shape), axis, ints([i % 3 != 1 for i in range(shape[axis])]))
    return b.rng.choice(
        [
            f"jnp.where({single}, {k}, 0.0)",
            f"{k} * {single}",
            f"jnp.where(jnp.broadcast_to({rows}, {shape}), {k}, 0.0)",
            f"jnp.tril({k})",
        ]
    )


@carry(0.7)
def select(b: Builder, k: str) -> str:
    """One of two values that are linear in kernels, by constants or by an input."""
    shape = b.shape(k)
    other = b.rng.choice(["", f"2.0 * {k}"])
    other = other or b.leaf(shape, adapted=b.flip(0.8), dtype=b.dtype(k))
    masked = ints([i % 3 == 0 for i in range(math.prod(shape))]) + f".reshape({shape})"
    constant = f"jnp.where({masked}, {k}, {other})"
    if b.flip(0.3):
        return constant
    i = b.input((), 0, 2)
    return b.rng.choice(
        [
            f"lax.select_n({i}, {k}, {other})",
            f"jnp.where({i} > 0, {k}, {other})",
            f"lax.cond({i} > 0, lambda: {k}, lambda: {other})",
            f"lax.switch({i}, [lambda: {k}, lambda: {other}])",
        ]
    )


# products with what is frozen


@carry(2)
def frozen_product(b: Builder, k: str) -> str:
    """A matrix that acts on one axis, or mixes one axis with a new one."""
    shape = b.shape(k)
    axis = b.axis(k)
    m = b.leaf((shape[axis], b.rng.choice(b.sizes)), adapted=False)
    letters = "abcdef"[: len(shape)]
    out = letters.replace(letters[axis], "z")
    if b.flip(0.5):
        return f'jnp.einsum("{letters},{letters[axis]}z->{out}", {k}, {m})'
    return f'jnp.einsum("{letters[axis]}z,{letters}->{out}", {m}, {k})'


@carry(0.3)
def total(b: Builder, k: str) -> str:
    """A sum over an axis, running or whole."""
    axis = b.axis(k)
    whole(b, len(b.shape(k)) == 2)
    kind = b.rng.choice(["sum", "mean", "cumsum"])
    return f"jnp.{kind}({k}, axis={axis})"


@carry(0.15)
def bent(b: Builder, k: str) -> str:
    """What is not linear: refused, or materialized where that is allowed."""
    return b.rng.choice([f"jnp.maximum({k}, 0.0)", f"jnp.tanh({k})"])

"""Lookups, and other uses of a value that is linear in kernels.

Each function takes the builder and the name of the value, and returns an expression.
"""

import math

from programs.build import Builder, Unfit
from programs.steps_carry import along
from programs.steps_use import operand, use

# lookups


@use(3)
def lookup(b: Builder, k: str) -> str:
    shape = b.shape(k)
    if not shape:
        raise Unfit("a scalar")
    axis = 0 if b.flip(0.6) else b.axis(k)
    n = shape[axis]
    before = ":, " * axis
    # What is promised to be in bounds must be: the default of `k[ids]` promises it.
    template = b.rng.choice(
        [
            f"jnp.take({k}, OUT, axis={axis}, mode='fill')",
            f"jnp.take({k}, OUT, axis={axis}, mode='clip')",
            f"jnp.take({k}, OUT, axis={axis}, mode='wrap')",
            f"jnp.take({k}, OUT, axis={axis})",
            f"jnp.take({k}, IN, axis={axis})",
            f"{k}[{before}IN]",
            f"{k}.at[{before}IN].get(mode='promise_in_bounds')",
            f"{k}.at[{before}OUT].get(mode='clip')",
            f"{k}.at[{before}OUT].get(mode='wrap')",
            f"{k}.at[{before}OUT].get(mode='fill')",
            f"{k}.at[{before}OUT].get(mode='fill', fill_value=0)",
            f"{k}.at[{before}IN].get(indices_are_sorted=False)",
            f"jnp.take_along_axis({k}, SPREAD, axis={axis})",
        ]
    )
    low, high = (-n - 2, n + 3) if "OUT" in template else (0, n)
    ids = b.input((b.tokens[0],), low, high)
    spread = along(len(shape), axis, ids)
    return template.replace("SPREAD", spread).replace("OUT", ids).replace("IN", ids)


@use(0.4)
def lookup_pairs(b: Builder, k: str) -> str:
    """Entries at pairs of indices: of a batch axis and a row, say."""
    if len(b.shape(k)) < 3 or 0 in b.shape(k):
        raise Unfit("nothing is left")
    i, j = sorted(b.shuffled(range(len(b.shape(k))))[:2])
    first = b.input((b.tokens[0],), 0, b.shape(k)[i])
    second = b.input((b.tokens[0],), 0, b.shape(k)[j])
    parts = {i: first, j: second}
    index = ", ".join(parts.get(axis, ":") for axis in range(j + 1))
    return f"{k}[{index}]"


@use(0.7)
def one_hot(b: Builder, k: str) -> str:
    if len(b.shape(k)) != 2:
        raise Unfit("no table")
    ids = b.input((b.tokens[0],), -1, b.shape(k)[0] + 1)
    return f"jax.nn.one_hot({ids}, {b.shape(k)[0]}, dtype={k}.dtype) @ {k}"


# elsewhere


@use(0.7)
def complex_product(b: Builder, k: str) -> str:
    """With activations in the frequency domain."""
    if len(b.shape(k)) != 2:
        raise Unfit("no matrix")
    x = operand(b, (b.tokens[0], b.shape(k)[0]))
    kind = b.rng.choice(["rfft", "fft"])
    if "complex" in b.dtype(x):
        kind = "ifft"
    y = f"jnp.fft.{kind}({x}.astype(jnp.float32), axis=0) @ {k}"
    if "complex" in b.dtype(x):
        y = f"jnp.fft.ifft({x}, axis=0) @ {k}"
    return b.rng.choice([y, f"jnp.abs({y})", f"jnp.real({y})", f"jnp.imag({y})"])


@use(0.2)
def added(b: Builder, k: str) -> str:
    """As a bias, which is no use of a kernel, beside what else it is used for."""
    shape = b.shape(k)
    x = b.input((b.tokens[0], *shape))
    return f"{x} + {k}[None]"


@use(0.5)
def scaled_each(b: Builder, k: str) -> str:
    """A product with the kernel scaled by an input, one for each example."""
    if len(b.shape(k)) != 2 or math.prod(b.shape(k)) == 0:
        raise Unfit("no matrix")
    x, s = operand(b, (b.tokens[1], b.shape(k)[0])), b.input((b.tokens[0],))
    return f"jax.vmap(lambda s: {x} @ ({k} * s))({s})"

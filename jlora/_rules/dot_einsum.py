"""Products that cut across the roles of a kernel's axes, with a backward pass by hand.

Experts that are computed densely, `td,edf->tef`, may have factors of their own, though
`e` is an output axis of the product; or a product contracts a part of the input axes
alone. Then no two matrices say what the factors do, but two einsums do,
`h = td,edr->ter` and `y = ter,erf->tef`, each of them one `dot_general`. The residuals
are `x`, `a` and `b`; no value has the shape of the kernel.
"""

import dataclasses
import functools
import math
import string
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.dots import as_laid_out, as_type_of, wide_dot
from .._jax.dtypes import summands_in, summed_in, workable
from .._jax.versions import manual_axes, vary
from .._params.axes import free_axes
from .._product.gate import factor_through, through
from .adapted import Part, whole

_RANK = "R"


@dataclasses.dataclass(frozen=True)
class Labels:
    """The axes of a product with the parts of a kernel, as in an einsum.

    Attributes:
        x: of the other operand.
        first: of the factor that `x` is multiplied by, the rank last.
        second: of the other factor, the rank last.
        out: of the result.
        turned: whether `b` is the first factor.
    """

    x: str
    first: str
    second: str
    out: str
    turned: bool = False

    @classmethod
    def of(
        cls, eqn: Any, operand: int, a: Collection[int], b: Collection[int]
    ) -> "Labels":
        """Returns the labels of a `dot_general`.

        Args:
            eqn: the equation.
            operand: which operand is the kernel.
            a: the axes of the kernel that `a` has.
            b: those that `b` has.
        """
        contract, batch = eqn.params["dimension_numbers"]
        letters = iter(string.ascii_lowercase)
        kernel = [next(letters) for _ in range(eqn.invars[operand].aval.ndim)]
        x = [next(letters) for _ in range(eqn.invars[1 - operand].aval.ndim)]
        for axes in (contract, batch):
            for i, j in zip(axes[operand], axes[1 - operand], strict=True):
                x[j] = kernel[i]
        sides = (kernel, x) if operand == 0 else (x, kernel)
        taken = [
            free_axes(len(s), *pair)
            for s, *pair in zip(sides, contract, batch, strict=True)
        ]
        free = [s[i] for s, axes in zip(sides, taken, strict=True) for i in axes]
        out = [kernel[i] for i in batch[operand]] + free
        of_a, of_b = ([kernel[i] for i in sorted(axes)] + [_RANK] for axes in (a, b))
        # The factor that shares most axes with x goes first, so that h is small.
        turned = len({*of_b} & {*x}) > len({*of_a} & {*x})
        first, second = (of_b, of_a) if turned else (of_a, of_b)
        spell = "".join
        return cls(spell(x), spell(first), spell(second), spell(out), turned)

    @property
    def h(self) -> str:
        """The labels of `h = x·first`, the rank last."""
        later = {*self.out, *self.second}
        return "".join(c for c in dict.fromkeys(self.x + self.first) if c in later)

    def work(self, x: Any, out: Any) -> int:
        """Returns how many multiplications both products take for each rank.

        Args:
            x: the shape of the other operand.
            out: the shape of the result.
        """
        sizes = dict(zip(self.x, x, strict=True)) | dict(
            zip(self.out, out, strict=True)
        )
        count = lambda labels: math.prod(sizes[c] for c in {*labels} - {_RANK})
        return count(self.x + self.first) + count(self.h + self.second)


def cuts_across(eqn: Any, operand: int, a: Collection[int], b: Collection[int]) -> bool:
    """Whether the factors are no matrices over the contracted and the free axes.

    Args:
        eqn: a `dot_general`.
        operand: which operand is the kernel.
        a: the axes of the kernel that `a` has.
        b: those that `b` has.
    """
    contract, batch = (axes[operand] for axes in eqn.params["dimension_numbers"])
    free = free_axes(eqn.invars[operand].aval.ndim, contract, batch)
    splits = lambda p, q: not {*p} & {*free} and not {*q} & {*contract}
    return not (splits(a, b) or splits(b, a))


class Static(NamedTuple):
    """What is static about a branch.

    Attributes:
        labels: the labels of its products.
        scaling: the scaling of its delta.
        dtype: the dtype of its skinny product.
        precision: the precision of the program's product.
    """

    labels: Labels
    scaling: float
    dtype: Any
    precision: Any


class Arrays(NamedTuple):
    """The operand and the factors, without the axes that they lack, the rank last.

    `gate` has the rank alone, see `_product.gate`.
    """

    x: jax.Array
    first: jax.Array
    second: jax.Array
    gate: jax.Array | None = None


def add_labelled(
    eqn: Any, operand: int, x: jax.Array, dtype: Any, part: Part, y: Any, *, derive: str
) -> jax.Array:
    """Returns `y + s·(x·a)·b`, in the dtype and layout of `y`.

    Args:
        eqn: the `dot_general` of the base product.
        operand: which operand is the kernel.
        x: the other operand, in a dtype that products are computed in.
        dtype: the dtype of the skinny products.
        part: factors that are laid out along the axes of the kernel.
        y: the base product.
        derive: who derives the backward pass.
    """
    gate = None if part.gate is None else part.gate.reshape(-1)
    part = whole(dataclasses.replace(part, gate=None))
    own = [[i for i, n in enumerate(v.shape[:-1]) if n != 1] for v in (part.a, part.b)]
    labels = Labels.of(eqn, operand, *own)
    bare = [
        lax.squeeze(v, free_axes(v.ndim - 1, axes))
        for v, axes in zip((part.a, part.b), own, strict=True)
    ]
    first, second = bare[::-1] if labels.turned else bare
    arrays = Arrays(x, first, second, gate)
    leaves = jax.tree.leaves((arrays, y))
    varying = frozenset().union(*map(manual_axes, leaves))
    arrays, y = jax.tree.map(lambda array: vary(array, varying), (arrays, y))
    static = Static(labels, part.scaling, dtype, eqn.params["precision"])
    run = _branch if derive == "custom" else _evaluate
    return run(static, arrays, y)


def _evaluate(static: Static, arrays: Arrays, y: jax.Array) -> jax.Array:
    labels, second = static.labels, arrays.second.astype(static.dtype)
    h = static.scaling * _shrink(static, arrays)
    wide = summands_in(y.dtype, h.dtype)
    delta = _dot(static, h, labels.h, second, labels.second, labels.out, wide)
    delta = as_laid_out(jnp.broadcast_to(delta, y.shape), y)
    return (y.astype(wide) + delta).astype(y.dtype)


def _shrink(static: Static, arrays: Arrays) -> jax.Array:
    """Returns `h = x·first`, through the gate."""
    labels, dtype = static.labels, static.dtype
    first = arrays.first.astype(dtype)
    h = _dot(static, arrays.x, labels.x, first, labels.first, labels.h, dtype)
    return through(h, arrays.gate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _branch(static: Static, arrays: Arrays, y: jax.Array) -> jax.Array:
    return _evaluate(static, arrays, y)


def _forward(static: Static, arrays: Arrays, y: jax.Array) -> tuple[jax.Array, Arrays]:
    return _branch(static, arrays, y), arrays


def _backward(static: Static, arrays: Arrays, dy: jax.Array) -> tuple[Arrays, Any]:
    """With `g = s·dy·second`: `dx = g·first`, `dfirst = x·g`, `dsecond = s·h·dy`."""
    labels, dtype = static.labels, static.dtype
    x, first, second, gate = arrays
    own = workable(dy, dtype)
    g = static.scaling * _dot(
        static, own, labels.out, second.astype(dtype), labels.second, labels.h, dtype
    )
    g = through(g, gate)
    h = static.scaling * _shrink(static, arrays)
    dx = _dot(static, g, labels.h, first.astype(dtype), labels.first, labels.x, dtype)
    of_first = _gradient(static, x, labels.x, g, labels.h, labels.first, first)
    of_second = _gradient(static, h, labels.h, own, labels.out, labels.second, second)
    return Arrays(
        as_type_of(jnp.broadcast_to(dx, x.shape), x),
        factor_through(of_first, gate),
        factor_through(of_second, gate),
        None,
    ), dy


_branch.defvjp(_forward, _backward)


def _gradient(
    static: Static,
    lhs: jax.Array,
    left: str,
    rhs: jax.Array,
    right: str,
    out: str,
    factor: jax.Array,
) -> jax.Array:
    """Returns the gradient of a factor, accumulated in float32 at least."""
    dtype = summed_in(factor.dtype, lhs.dtype, rhs.dtype)
    return as_type_of(_dot(static, lhs, left, rhs, right, out, dtype), factor)


def _dot(
    static: Static,
    lhs: jax.Array,
    left: str,
    rhs: jax.Array,
    right: str,
    out: str,
    dtype: Any,
) -> jax.Array:
    """Returns an einsum as one `dot_general`; axes that no operand has are of size 1.

    What is in both operands and the result is a batch axis of the product.
    """
    lhs, left = _summed(lhs, left, {*right, *out})
    rhs, right = _summed(rhs, right, {*left, *out})
    shared = [c for c in left if c in right]
    batch = [c for c in shared if c in out]
    contract = [c for c in shared if c not in out]
    places = lambda labels, which: [labels.index(c) for c in which]
    pairs = [(places(left, w), places(right, w)) for w in (contract, batch)]
    if jnp.issubdtype(dtype, jnp.complexfloating):
        lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    product = wide_dot(lhs, rhs, pairs[0], pairs[1], dtype, static.precision)
    found = batch + [c for c in left + right if c not in shared]
    product = lax.transpose(product, [found.index(c) for c in out if c in found])
    return lax.expand_dims(product, [i for i, c in enumerate(out) if c not in found])


def _summed(
    value: jax.Array, labels: str, needed: Iterable[str]
) -> tuple[jax.Array, str]:
    """Sums over the axes that nothing else has."""
    alone = [i for i, c in enumerate(labels) if c not in needed]
    if not alone:
        return value, labels
    kept = "".join(c for c in labels if c in needed)
    return value.sum(alone, dtype=value.dtype), kept

"""`Σ x·w + h·b` in one kernel for TPUs: `h·b` is the last step of its reduction.

A block of the result is summed in float32 in the chip's own memory, over the steps of
every product and one more for the rank, and is written once. Nothing is joined or
copied. The compiler gives no cycles for such a kernel, and it was compiled for TPUs and
interpreted, never run on one: it is for those who ask for it (`contraction="fused"`).
(https://docs.jax.dev/en/latest/pallas/tpu/matmul.html)
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.versions import shape_within

# Rows, columns and depths of blocks, largest first: two of each operand of three terms
# and the sum take 12 MB of the 16 that a kernel may have.
_ROWS, _COLUMNS, _DEPTHS = (512, 256), (512, 256, 128), (512, 256, 128)
# Terms that one kernel sums: each has blocks of its own.
_SUMMED = 3


class _Term(NamedTuple):
    """One product of the sum: its steps follow those of the terms before it."""

    start: int
    steps: int
    depth: int

    def at(self, step: Any) -> Any:
        """Returns which of its blocks a step reads; before and after, the nearest."""
        return jnp.clip(step - self.start, 0, self.steps - 1)

    def holds(self, step: Any) -> Any:
        """Whether a step is one of its own."""
        return (step >= self.start) & (step < self.start + self.steps)


def tiles(rows: int, depths: Sequence[int], columns: int) -> bool:
    """Returns whether products of these sizes divide into blocks.

    >>> tiles(8192, [2048, 5632], 2048), tiles(8192, [2048], 2049), tiles(7, [128], 128)
    (True, False, False)
    """
    found = [_block(rows, _ROWS), _block(columns, _COLUMNS)]
    found += [_block(depth, _DEPTHS) for depth in depths]
    return len(depths) <= _SUMMED and all(found)


def _block(size: int, choices: Sequence[int]) -> int:
    return next((one for one in choices if size and size % one == 0), 0)


@functools.partial(jax.jit, static_argnames=("turned", "interpret"))
def sum_of_products(
    xs: Sequence[jax.Array],
    ws: Sequence[jax.Array],
    h: jax.Array,
    b: jax.Array,
    *,
    turned: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Returns `Σ x·w + h·b: (rows, columns)`, summed in float32 and rounded once.

    Args:
        xs: each `(rows, depth)`, bfloat16 as all of them, of sizes that `tiles`.
        ws: for each of them one of `(depth, columns)`.
        h: `(rows, rank)`, of any rank.
        b: `(rank, columns)`.
        turned: whether each of `ws` is `(columns, depth)` instead.
        interpret: whether it is computed by XLA, block by block, on any device.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (rows, rank), columns = h.shape, b.shape[1]
    m, n = _block(rows, _ROWS), _block(columns, _COLUMNS)
    terms, start = [], 0
    for x in xs:
        depth = _block(x.shape[1], _DEPTHS)
        terms.append(_Term(start, x.shape[1] // depth, depth))
        start += terms[-1].steps
    last = start  # the step of the rank

    def specs(term: _Term) -> tuple[Any, Any]:
        x = pl.BlockSpec((m, term.depth), lambda i, j, k: (i, term.at(k)))
        if turned:
            return x, pl.BlockSpec((n, term.depth), lambda i, j, k: (j, term.at(k)))
        return x, pl.BlockSpec((term.depth, n), lambda i, j, k: (term.at(k), j))

    def body(*refs: Any) -> None:
        *operands, h, b, out, total = refs
        step = pl.program_id(2)

        @pl.when(step == 0)
        def begin() -> None:
            total[...] = jnp.zeros_like(total)

        for i, term in enumerate(terms):
            x, w = operands[2 * i : 2 * i + 2]

            @pl.when(term.holds(step))
            def add(x: Any = x, w: Any = w) -> None:
                total[...] += _dot(x[...], w[...], turned)

        @pl.when(step == last)
        def end() -> None:
            out[...] = (total[...] + _dot(h[...], b[...], False)).astype(out.dtype)

    pairs = [specs(term) for term in terms]
    call = pl.pallas_call(
        body,
        grid=(rows // m, columns // n, last + 1),
        in_specs=[
            *(spec for pair in pairs for spec in pair),
            pl.BlockSpec((m, rank), lambda i, j, k: (i, 0)),
            pl.BlockSpec((rank, n), lambda i, j, k: (0, j)),
        ],
        out_specs=pl.BlockSpec((m, n), lambda i, j, k: (i, j)),
        out_shape=shape_within(h, (rows, columns), h.dtype),
        scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        interpret=interpret,
        **_settings(pltpu),
    )
    return call(*(v for pair in zip(xs, ws, strict=True) for v in pair), h, b)


def _settings(pltpu: Any) -> dict[str, Any]:
    """Blocks of the result may be computed in any order, steps of one in theirs."""
    axes = ("parallel", "parallel", "arbitrary")
    return {"compiler_params": pltpu.CompilerParams(dimension_semantics=axes)}


def _dot(x: jax.Array, w: jax.Array, turned: bool) -> jax.Array:
    pairs = (((1,), (1 if turned else 0,)), ((), ()))
    return lax.dot_general(x, w, pairs, preferred_element_type=jnp.float32)

"""`x·W + s·(x·a)·b` of few rows, siblings in one kernel, for GPUs.

A token of a few sequences computes little: it waits for kernels to be launched, and for
weights to be read. So the products of all siblings are blocks of one launch, and a
block of columns makes the `x·a` that it needs along its own reduction. Where there are
too few blocks to fill the GPU the reduction is cut: each part is an exact part of the
sum, `x_p·W_p + s·(x_p·a_p)·b`, and all are added in float32.

The kernel is written in the part of Pallas that becomes Triton's language.
(https://docs.jax.dev/en/latest/pallas/design/design.html)
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.versions import shape_within
from .gate import through
from .hopper_tiles import processors

# Rows up to which a kernel is read faster than it is multiplied.
MOST_ROWS = 64
# The largest rank of which each block makes its own `x·a`: more is work done again. A
# gated one takes three launches else, its product, a sum and the gate, which cost more
# than that work up to some rank and rows. (Measured where factors have 16 bits.)
LARGEST_OWN, LARGEST_GATED, MOST_GATED_ROWS = 32, 128, 16
# Columns of all kernels, and the depth of a step: both divide them.
_COLUMNS, _DEPTH = 128, 64
# The least and the most of a rank that one product takes in.
_LEAST, _MOST = 16, 64
# Warps of a block, and steps that are read ahead; the same where a rank is large and
# the reduction is cut. Parts of a reduction, at most.
_USUAL, _LARGE_AND_CUT = (4, 5), (8, 4)
_PARTS = 8


class Linear(NamedTuple):
    """One kernel of a group, and its factors.

    Attributes:
        w: `(depth, columns)`.
        a: `(depth, rank)`, or None where `h` is given.
        h: `s·x·a: (rows, rank)`, or None where it is made here.
        b: `(rank, columns)`, as adapters hold it: to turn it were a launch of its own.
        gate: `(rows, rank)`, what an `s·x·a` that is made here goes through, see
            `_product.gate`; or None.
    """

    w: jax.Array
    a: jax.Array | None
    h: jax.Array | None
    b: jax.Array
    gate: jax.Array | None = None

    @classmethod
    def of(
        cls,
        w: jax.Array,
        a: jax.Array,
        b: jax.Array,
        h: jax.Array | None = None,
        gate: jax.Array | None = None,
    ) -> "Linear":
        """Returns it of arrays with several axes: those of a group, the rank last.

        Turned back, `b` is what an adapter holds: it is read as it lies.
        """
        rank = a.shape[-1]
        matrix = lambda value: None if value is None else value.reshape(-1, rank)
        a, b = a.reshape(-1, rank), jnp.moveaxis(b, -1, 0).reshape(rank, -1)
        w, given = w.reshape(len(a), -1), matrix(h)
        return cls(w, a if given is None else None, given, b, matrix(gate))

    @property
    def rank(self) -> int:
        """The rank of its factors."""
        return self.b.shape[0]


def divides(depth: int, columns: int) -> bool:
    """Returns whether a kernel of this size divides into blocks.

    >>> divides(2048, 5632), divides(2048, 1000), divides(0, 128)
    (True, False, False)
    """
    return depth % _DEPTH == 0 and columns % _COLUMNS == 0 and min(depth, columns) > 0


@functools.partial(jax.jit, static_argnames=("scalings", "interpret"))
def adapted_products(
    x: jax.Array,
    linears: Sequence[Linear],
    scalings: tuple[float, ...],
    *,
    interpret: bool = False,
) -> list[jax.Array]:
    """Returns `x·w + s·(x·a)·b: (rows, columns)` of each kernel, in the dtype of `x`.

    Args:
        x: `(rows, depth)`, up to `MOST_ROWS`, bfloat16 or float16 as all kernels are.
        linears: the kernels, of sizes that `divides`; factors of any float dtype.
        scalings: those of the deltas; of what is given as `h` none is needed.
        interpret: whether it is computed by XLA, block by block, on any device.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (rows, depth), columns = x.shape, [one.w.shape[1] for one in linears]
    large = any(one.a is not None and one.rank > LARGEST_OWN for one in linears)
    blocks = _Blocks.of(rows, depth, columns, large)
    shapes = [(blocks.parts, rows, n) for n in columns]
    dtype = x.dtype if blocks.parts == 1 else jnp.float32
    # Without an axis for parts where there is one part alone.
    shapes = [shape[blocks.parts == 1 :] for shape in shapes]
    leaves, tree = jax.tree.flatten((x, list(linears)))
    warps, ahead = _LARGE_AND_CUT if large and blocks.parts > 1 else _USUAL
    call = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, tree=tree, scalings=scalings),
        grid=(sum(n // blocks.columns for n in columns), blocks.parts),
        out_shape=[shape_within(x, shape, dtype) for shape in shapes],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=ahead),
        interpret=interpret,
    )
    ys = call(*leaves)
    return ys if blocks.parts == 1 else [_sum_of_parts(y, x.dtype) for y in ys]


def _sum_of_parts(y: jax.Array, dtype: Any) -> jax.Array:
    """Returns the sum over the first axis, in additions: XLA makes them a part of what
    comes next, where a reduction would be a launch of its own.
    """
    return functools.reduce(jnp.add, [y[i] for i in range(len(y))]).astype(dtype)


class _Blocks(NamedTuple):
    """How the work is divided.

    Attributes:
        given: the rows that there are.
        rows: a power of two that holds them; the last row stands in for the rest.
        columns: those of a block.
        parts: how many parts a reduction is cut into.
        steps: of `_DEPTH` each, in a part.
        turned: whether a block is computed as `Wᵀ·xᵀ`: the units of a Hopper GPU take
            64 rows of the left operand, and 8 columns of the right one.
    """

    given: int
    rows: int
    columns: int
    parts: int
    steps: int
    turned: bool

    @classmethod
    def of(
        cls, given: int, depth: int, columns: Sequence[int], large: bool
    ) -> "_Blocks":
        """Returns blocks that fill two thirds of the GPU, where there can be as many.

        Fewer, larger blocks read `x` and `a` less often; where a rank is `large`, half
        as many columns are better than a sum of parts. (An H200, kernels of 2048 to
        5632 and rank 128: 13.5 in place of 16.7 µs for query, key and value.)
        """
        rows = max(_LEAST, 1 << (given - 1).bit_length())
        turned = rows < MOST_ROWS
        width = _COLUMNS if turned else _COLUMNS // 2
        parts, steps = 1, depth // _DEPTH
        few = lambda parts, width: 3 * parts * sum(columns) < 2 * processors() * width
        if large and turned and few(1, width) and not few(1, width // 2):
            width //= 2
        while few(parts, width) and parts < _PARTS and steps % 2 == 0:
            parts, steps = 2 * parts, steps // 2
        return cls(given, rows, width, parts, steps, turned)


def _kernel(*refs: Any, blocks: _Blocks, tree: Any, scalings: Sequence[float]) -> None:
    """The body: a block of columns of one kernel, or one part of its reduction."""
    from jax.experimental import pallas as pl

    x, linears = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    outs, start = refs[tree.num_leaves :], 0
    block, part = pl.program_id(0), pl.program_id(1)
    for one, scaling, out in zip(linears, scalings, outs, strict=True):
        task = _Task(blocks, x, one, out, scaling)
        end = start + one.w.shape[1] // blocks.columns
        run = functools.partial(task.run, block - start, part)
        if len(linears) == 1:
            run()
        else:
            pl.when((block >= start) & (block < end))(run)
        start = end


class _Task(NamedTuple):
    """The blocks of one kernel; its arrays are references to the GPU's memory."""

    blocks: _Blocks
    x: Any
    one: Linear
    out: Any
    scaling: float

    def run(self, block: Any, part: Any) -> None:
        """Computes a block of columns, and a part of the reduction."""
        columns = self._along(block, self.blocks.columns)
        total, h = self._reduced(columns, part)
        if h is not None:
            total = self._with_delta(total, h, columns, 0, self.blocks.turned)
        else:
            total = self._with_given(total, columns, part)
        self._write(total, columns, part)

    def _reduced(self, columns: Any, part: Any) -> tuple[Any, Any]:
        """Returns `x·w` of a block, and `s·x·a` where that is made here."""

        def step(i: Any, sums: Any) -> Any:
            depth = self._along(part * self.blocks.steps + i, _DEPTH)
            x = _load(self.x, self._rows, depth)
            total = sums[0] + self._product(x, _load(self.one.w, depth, columns))
            if self.one.a is None:
                return (total,)
            a = self._load_piece(self.one.a, depth, 0).astype(x.dtype)
            return total, sums[1] + self._product(x, a)

        widths = [self.blocks.columns]
        widths += [] if self.one.a is None else [self._rank_block]
        order = (lambda *v: v[::-1]) if self.blocks.turned else (lambda *v: v)
        zeros = [jnp.zeros(order(self.blocks.rows, n), jnp.float32) for n in widths]
        total, *h = lax.fori_loop(0, self.blocks.steps, step, tuple(zeros))
        return total, self._through_gate(self.scaling * h[0]) if h else None

    def _through_gate(self, h: jax.Array) -> jax.Array:
        """Returns what was made here in the dtype of `x`, through its gate."""
        h = h.astype(self.x.dtype)
        if self.one.gate is None:
            return h
        gate = self._load_piece(self.one.gate, self._rows, 0)
        return through(h, gate.T if self.blocks.turned else gate)

    def _product(self, x: jax.Array, other: jax.Array) -> jax.Array:
        """Returns `x·other` in float32, turned if blocks are."""
        if self.blocks.turned:
            return _dot(other, x, 0, 1)
        return _dot(x, other, 1, 0)

    def _with_given(self, total: jax.Array, columns: Any, part: Any) -> jax.Array:
        """Returns the sum with that of `h·b`, in the first part of the reduction."""

        def add(i: Any, total: jax.Array) -> jax.Array:
            h = self._load_piece(self.one.h, self._rows, i)
            return self._with_delta(total, h, columns, i, turned=False)

        pieces = -(-self.one.rank // self._rank_block)
        there = add(0, total) if pieces == 1 else lax.fori_loop(0, pieces, add, total)
        return there if self.blocks.parts == 1 else jnp.where(part == 0, there, total)

    def _with_delta(
        self, total: jax.Array, h: jax.Array, columns: Any, piece: Any, turned: bool
    ) -> jax.Array:
        """Returns the sum with `h·b`, of a piece of the rank; `h` may be turned."""
        b = self._load_piece(self.one.b, columns, piece, first=True).astype(h.dtype)
        if self.blocks.turned:
            return total + _dot(b, h, 0, 0 if turned else 1)
        return total + _dot(h, b, 1, 0)

    def _write(self, total: jax.Array, columns: Any, part: Any) -> None:
        """Writes the rows that there are."""
        from jax.experimental.pallas import triton

        value = total.T if self.blocks.turned else total
        rows = jnp.arange(self.blocks.rows)
        at = (rows[:, None], columns[None])
        at = at if self.blocks.parts == 1 else (part, *at)
        there = jnp.broadcast_to((rows < self.blocks.given)[:, None], value.shape)
        triton.store(self.out.at[at], value.astype(self.out.dtype), mask=there)

    @property
    def _rows(self) -> Any:
        """The rows that are read: where there are no more, the last one."""
        return jnp.minimum(jnp.arange(self.blocks.rows), self.blocks.given - 1)

    @property
    def _rank_block(self) -> int:
        """The part of the rank that one product takes in."""
        whole = max(1 << (self.one.rank - 1).bit_length(), _LEAST)
        return min(whole, _MOST) if self.one.a is None else whole

    def _load_piece(
        self, ref: Any, other: Any, piece: Any, *, first: bool = False
    ) -> jax.Array:
        """Returns a piece of the rank, which is the first or the last axis of a matrix.

        Zeros are beyond the last. (An index that is bounded in place of a mask is not
        known to go on side by side, and is read value by value.)
        """
        ranks = self._along(piece, self._rank_block)
        there = ranks < self.one.rank if self.one.rank % self._rank_block else None
        if first:
            return _load(ref, ranks, other, None if there is None else there[:, None])
        return _load(ref, other, ranks, None if there is None else there[None])

    def _along(self, index: Any, size: int) -> Any:
        """The indices of a block of an axis."""
        return index * size + jnp.arange(size)


def _load(ref: Any, rows: Any, columns: Any, there: Any = None) -> jax.Array:
    """Returns a block of a matrix, with zeros where there is none of it."""
    from jax.experimental.pallas import triton

    at, shape = ref.at[rows[:, None], columns[None]], (len(rows), len(columns))
    if there is None:
        return triton.load(at)
    there = jnp.broadcast_to(there, shape)
    return triton.load(at, mask=there, other=jnp.zeros(shape, ref.dtype))


def _dot(x: jax.Array, y: jax.Array, of_x: int, of_y: int) -> jax.Array:
    pairs = (((of_x,), (of_y,)), ((), ()))
    return lax.dot_general(x, y, pairs, preferred_element_type=jnp.float32)

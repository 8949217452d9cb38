"""`Σ x·w + h·b` in one kernel, for Hopper GPUs: `h·b` is the end of its reduction.

The accumulators that hold `Σ x·w` take `h·b` in before they are rounded and written, so
that no operand is copied and the result is written once. Where the rows are those of
several adapters, each tile takes the `b` of its own. The kernel is persistent and
warp-specialised, as in the tutorial of Mosaic GPU: one warpgroup loads, two multiply;
each multiplies 128 rows by 128 columns, or less where that makes too few blocks to fill
the GPU.
(https://docs.jax.dev/en/latest/pallas/gpu/index.html)

JAX says of Mosaic GPU that its API may change any week: it is imported where it is
used, and `gpu_probe` tries the kernel before it is trusted.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .hopper_tiles import GROUPS, TILES, Tile, processors, tile_of

# The depth of a step.
_DEPTH = 64
# Rows and columns that are written at a time.
_WRITTEN = (64, 32)
# Blocks of rows that take turns before the next block of columns, for the L2 cache.
_TURN = 8
# A row of `h` is one swizzled segment of shared memory: 32, 64 or 128 bytes.
_RANKS = 16, 32, 64
LARGEST = max(_RANKS)
# Shared memory of a block, in values of 16 bits; barriers take the rest of 227 KB.
_SHARED = 226 * 512
# Registers of a thread that loads, and of one that multiplies: of 512 for all three.
_LOADER_REGISTERS, _REGISTERS = 40, 232


def sum_of_products(
    xs: Sequence[jax.Array],
    ws: Sequence[jax.Array],
    h: jax.Array,
    b: jax.Array,
    *,
    turned: bool = False,
    tile: Tile | None = None,
) -> jax.Array:
    """Returns `Σ x·w + h·b: (rows, columns)`, summed in float32 and rounded once.

    Args:
        xs: each `(rows, depth)`, bfloat16 or float16 as all of them; see `fits`.
        ws: for each of them one of `(depth, columns)`.
        h: `(rows, rank)`, of any rank; of what is over 64, it becomes one more `x`.
        b: `(rank, columns)`; or `(adapters, rank, columns)`, where the rows are those
            of the first adapter, of the next, and so on, see `apart`.
        turned: each `w` is `(columns, depth)`, and is read as it lies.
        tile: that of a warpgroup; without it `tile_of` chooses.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    over = -(-max(h.shape[1] - LARGEST, 0) // _DEPTH) * _DEPTH
    if over:
        xs, ws = [*xs, h[:, :over]], [*ws, b[:over].T if turned else b[:over]]
        h, b = h[:, over:], b[over:]
    b = b if b.ndim == 3 else b[None]
    each, columns = h.shape[0] // b.shape[0], b.shape[2]
    tile = tile or tile_of(h.shape[0], columns, each) or TILES[-1]
    rank = next(r for r in _RANKS if r >= h.shape[1])
    missing, none = (0, rank - h.shape[1]), (0, 0)
    h, b = jnp.pad(h, (none, missing)), jnp.pad(b, (none, missing, none))
    run = plgpu.kernel(
        functools.partial(_kernel, terms=len(xs), turned=turned, each=each, tile=tile),
        out_type=jax.ShapeDtypeStruct((h.shape[0], columns), h.dtype),
        grid=(processors(),),
        grid_names=("tiles",),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    return run(*xs, *ws, h, b.reshape(-1, columns))


class _Task(NamedTuple):
    """What is computed: references to global memory, and how they are divided.

    `b` has the rows of all adapters, below each other; `each` is how many rows of `h`
    an adapter has; `tile` is that of a warpgroup.
    """

    xs: tuple[Any, ...]
    ws: tuple[Any, ...]
    h: Any
    b: Any
    out: Any
    turned: bool
    each: int
    tile: Tile

    @property
    def steps(self) -> list[int]:
        """The steps along the reduction of each term."""
        return [x.shape[1] // _DEPTH for x in self.xs]

    @property
    def ahead(self) -> int:
        """The buffers of the ring."""
        height, columns = self.tile.height, self.tile.columns
        factors = (height + GROUPS * columns) * self.h.shape[1]
        rest = _SHARED - factors - GROUPS * 2 * math.prod(_WRITTEN)
        return min(rest // (_DEPTH * (height + columns)), sum(self.steps))

    def over_blocks(self, run: Callable[[Any, Any, Any], Any]) -> Any:
        """Runs `run(rows, columns, steps so far)` for the blocks of this processor."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import mosaic_gpu as plgpu

        height, columns = self.tile.height, self.tile.columns
        blocks = self.out.shape[0] // height, self.out.shape[1] // columns

        @plgpu.nd_loop((math.prod(blocks),), collective_axes="tiles", init_carry=0)
        def steps_done(loop: Any, carry: Any) -> Any:
            row, column = plgpu.planar_snake(loop.index[0], blocks, 0, _TURN)
            rows = pl.ds(row * height, height)
            run(rows, pl.ds(column * columns, columns), carry)
            return carry + sum(self.steps)

        return steps_done


class _Memory(NamedTuple):
    """Shared memory, and the barriers that pass it from warpgroup to warpgroup."""

    x: Any
    w: Any
    h: Any
    b: Any
    out: Any
    # For each buffer of the ring of `x` and `w`: filled, and read by all.
    loaded: Any
    free: Any
    # For each warpgroup that multiplies: its `h` and `b` are there.
    arrived: Any


def _kernel(*refs: Any, terms: int, turned: bool, each: int, tile: Tile) -> None:
    """The body: all arguments are references to global memory.

    The tiles of all terms pass through one ring of buffers, from one block of the
    output to the next without a pause. A buffer is `loaded` once for each time that it
    is `free`; both are counted from the first block on.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (h, b, out), both = refs[2 * terms :], refs[: 2 * terms]
    task = _Task(both[:terms], both[terms:], h, b, out, turned, each, tile)
    rank, ahead = h.shape[1], task.ahead
    across = tile.columns, _DEPTH
    shared = functools.partial(_shared, plgpu, h.dtype)

    @functools.partial(
        pl.run_scoped,
        x=shared((ahead, tile.height, _DEPTH), _DEPTH),
        w=shared((ahead, *(across if turned else across[::-1])), _DEPTH),
        h=shared((GROUPS, tile.rows, rank), rank),
        b=shared((GROUPS, rank, tile.columns), rank),
        out=shared((GROUPS, 2, *_WRITTEN), _WRITTEN[1]),
        loaded=plgpu.Barrier(num_arrivals=2, num_barriers=ahead),
        free=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=ahead),
        arrived=plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
        collective_axes="warpgroup",
    )
    def _(**allocated: Any) -> None:
        memory, group = _Memory(**allocated), lax.axis_index("warpgroup")
        pl.when(group == GROUPS)(functools.partial(_load, task, memory))
        pl.when(group < GROUPS)(functools.partial(_multiply, task, memory, group))

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _load(task: _Task, memory: _Memory) -> None:
    """What the warpgroup does that loads."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")

    def term(rows: Any, columns: Any, x: Any, w: Any, k: Any, done: Any) -> Any:
        slot, depth = lax.rem(done, task.ahead), pl.ds(k * _DEPTH, _DEPTH)
        at = (columns, depth) if task.turned else (depth, columns)
        plgpu.barrier_wait(memory.free.at[slot])
        here = memory.loaded.at[slot]
        plgpu.copy_gmem_to_smem(x.at[rows, depth], memory.x.at[slot], here)
        plgpu.copy_gmem_to_smem(w.at[at], memory.w.at[slot], here)
        return done + 1

    def block(rows: Any, columns: Any, done: Any) -> None:
        for x, w, steps in zip(task.xs, task.ws, task.steps, strict=True):
            step = functools.partial(term, rows, columns, x, w)
            done = lax.fori_loop(0, steps, step, done)

    done = task.over_blocks(block)
    for slot in range(task.ahead):
        plgpu.barrier_wait(memory.free.at[lax.rem(done + slot, task.ahead)])


def _multiply(task: _Task, memory: _Memory, group: Any) -> None:
    """What each warpgroup does that multiplies, for its rows of a block."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.set_max_registers(_REGISTERS, action="increase")
    for slot in range(task.ahead):
        plgpu.barrier_arrive(memory.free.at[slot])
    mine = pl.ds(group * task.tile.rows, task.tile.rows)
    h, b, here = memory.h.at[group], memory.b.at[group], memory.arrived.at[group]

    def block(rows: Any, columns: Any, done: Any) -> None:
        plgpu.copy_gmem_to_smem(task.h.at[rows].at[mine], h, here)
        adapter = lax.div(rows.start + group * task.tile.rows, task.each)
        own = pl.ds(adapter * b.shape[0], b.shape[0])
        plgpu.copy_gmem_to_smem(task.b.at[own, columns], b, here)

        def reduce(sum_: Any) -> None:
            def step(k: Any, _: Any) -> None:
                slot = lax.rem(done + k, task.ahead)
                w = memory.w.at[slot]
                plgpu.barrier_wait(memory.loaded.at[slot])
                w = w.transpose((1, 0)) if task.turned else w
                plgpu.wgmma(sum_, memory.x.at[slot].at[mine], w)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(memory.free.at[slot])

            lax.fori_loop(0, sum(task.steps), step, None)
            plgpu.barrier_wait(here)
            plgpu.wgmma(sum_, h, b)
            plgpu.wgmma_wait(0)
            value = sum_[...].astype(task.out.dtype)
            target = task.out.at[rows, columns].at[mine]
            _write(plgpu, value, memory.out.at[group], target)

        square = plgpu.WGMMAAccumulatorRef(
            (task.tile.rows, task.tile.columns), jnp.float32
        )
        pl.run_scoped(reduce, square)

    task.over_blocks(block)


def _write(plgpu: Any, value: jax.Array, tiles: Any, target: Any) -> None:
    """Writes an accumulator by way of two tiles of shared memory in turn."""
    height, width = _WRITTEN
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    rows, columns = value.shape
    for turn in range(rows * columns // (height * width)):
        i, j = divmod(turn, columns // width)
        part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        tiles[turn % 2] = value[part]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tiles.at[turn % 2], target.at[part])


def _shared(plgpu: Any, dtype: Any, shape: tuple[int, ...], segment: int) -> Any:
    transforms = _swizzled(plgpu, dtype, segment)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _swizzled(plgpu: Any, dtype: Any, segment: int) -> tuple[Any, ...]:
    """Returns how a tile lies in shared memory, so that banks do not collide."""
    tiling = plgpu.TilingTransform((8, segment))
    return tiling, plgpu.SwizzleTransform(segment * jnp.dtype(dtype).itemsize)

"""`x·w + h·b` in one kernel, for Hopper GPUs: `h·b` is the last step of its reduction.

The accumulators that hold `x·w` take `h·b` in before they are rounded and written, so
that neither operand is copied and the result is written once. The kernel is persistent
and warp-specialised, as in the tutorial of Mosaic GPU: one warpgroup loads, two
multiply; each multiplies 128 rows by 128 columns.
(https://docs.jax.dev/en/latest/pallas/gpu/index.html)

JAX says of Mosaic GPU that its API may change any week: it is imported where it is
used, and nothing is computed by it unless asked for.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# A warpgroup's rows and columns, and the depth of a step.
_TILE, _DEPTH = 128, 64
_GROUPS = 2
# Rows and columns that are written at a time.
_WRITTEN = (64, 32)
# Blocks of rows that take turns before the next block of columns, for the L2 cache.
_TURN = 8
# A row of `h` is one swizzled segment of shared memory: 32, 64 or 128 bytes. With what
# it leaves of 227 KB, that many steps are loaded ahead.
_AHEAD = {16: 4, 32: 3, 64: 3}


def padded_rank(rank: int) -> int | None:
    """Returns the rank that a kernel exists for, None if that would be too large."""
    return next((r for r in _AHEAD if r >= rank), None)


def fits(rows: int, depth: int, columns: int) -> bool:
    """Returns whether a product divides into tiles, and so does that of its gradient.

    They are `(rows, depth)·(depth, columns)` and `(rows, columns)·(columns, depth)`.
    """
    tiles = rows % (_GROUPS * _TILE), depth % _TILE, columns % _TILE
    return not any(tiles) and min(rows, depth, columns) > 0


def on_hopper() -> bool:
    """Returns whether the default device is a GPU of compute capability 9.0."""
    device = jax.devices()[0]
    return getattr(device, "compute_capability", None) == "9.0"


def product_and_delta(
    x: jax.Array, w: jax.Array, h: jax.Array, b: jax.Array, *, turned: bool = False
) -> jax.Array:
    """Returns `x·w + h·b: (rows, columns)`, summed in float32 and rounded once.

    Args:
        x: `(rows, depth)`, bfloat16 or float16 as all of them; see `fits`.
        w: `(depth, columns)`.
        h: `(rows, rank)`, of any rank up to 64.
        b: `(rank, columns)`.
        turned: `w` is `(columns, depth)`, and is read as it lies.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rank = padded_rank(h.shape[1])
    if rank is None:
        raise ValueError(f"there is no kernel for rank {h.shape[1]}, only up to 64")
    missing = (0, rank - h.shape[1])
    h, b = jnp.pad(h, ((0, 0), missing)), jnp.pad(b, (missing, (0, 0)))
    run = plgpu.kernel(
        functools.partial(_kernel, turned=turned),
        out_type=jax.ShapeDtypeStruct((x.shape[0], b.shape[1]), x.dtype),
        grid=(_processors(),),
        grid_names=("tiles",),
        num_threads=_GROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )
    return run(x, w, h, b)


def _processors() -> int:
    return getattr(jax.devices()[0], "core_count", 132)


def _kernel(x: Any, w: Any, h: Any, b: Any, out: Any, *, turned: bool) -> None:
    """The body: all arguments are references to global memory."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (rows, depth), (rank, columns), dtype = x.shape, b.shape, x.dtype
    blocks = rows // (_GROUPS * _TILE), columns // _TILE
    shared = functools.partial(_shared, plgpu, dtype)
    pipeline = functools.partial(
        _pipeline, plgpu, dtype, depth // _DEPTH, _AHEAD[rank], turned
    )
    nothing: Callable[..., None] = lambda *_, **__: None

    @functools.partial(
        pl.run_scoped,
        buffers=pipeline(nothing, nothing).get_allocations(x, w),
        h_tile=shared((_GROUPS, _TILE, rank), rank),
        b_tile=shared((_GROUPS, rank, _TILE), rank),
        out_tile=shared((_GROUPS, 2, *_WRITTEN), _WRITTEN[1]),
        arrived=plgpu.Barrier(num_arrivals=2, num_barriers=_GROUPS),
        collective_axes="warpgroup",
    )
    def _(buffers: Any, h_tile: Any, b_tile: Any, out_tile: Any, arrived: Any) -> None:
        group = lax.axis_index("warpgroup")

        @plgpu.nd_loop((blocks[0] * blocks[1],), collective_axes="tiles")
        def _(loop: Any) -> None:
            row, column = plgpu.planar_snake(loop.index[0], blocks, 0, _TURN)
            block = pl.ds(row * (_GROUPS * _TILE), _GROUPS * _TILE)
            columns_of = pl.ds(column * _TILE, _TILE)
            mine = pl.ds(group * _TILE, _TILE)

            def multiply(_: Any, x_tile: Any, w_tile: Any, sum_: Any) -> Any:
                w_tile = w_tile.transpose((1, 0)) if turned else w_tile
                plgpu.wgmma(sum_, x_tile.at[mine], w_tile)
                plgpu.wgmma_wait(0)
                return sum_

            def reduce(run_pipeline: Callable[[Any], None]) -> None:
                @functools.partial(
                    pl.run_scoped,
                    sum_=plgpu.WGMMAAccumulatorRef((_TILE, _TILE), jnp.float32),
                )
                def _(sum_: Any) -> None:
                    here = arrived.at[group]
                    ours, theirs = h_tile.at[group], b_tile.at[group]
                    plgpu.copy_gmem_to_smem(h.at[block].at[mine], ours, here)
                    plgpu.copy_gmem_to_smem(b.at[:, columns_of], theirs, here)
                    run_pipeline(sum_)
                    plgpu.barrier_wait(here)
                    plgpu.wgmma(sum_, ours, theirs)
                    plgpu.wgmma_wait(0)
                    target = out.at[block, columns_of].at[mine]
                    _write(plgpu, sum_[...].astype(dtype), out_tile.at[group], target)

            x_rows = x.at[block]
            w_columns = w.at[columns_of] if turned else w.at[:, columns_of]
            pipeline(multiply, reduce)(x_rows, w_columns, allocations=buffers)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _write(plgpu: Any, value: jax.Array, tiles: Any, target: Any) -> None:
    """Writes an accumulator by way of two tiles of shared memory in turn."""
    height, width = _WRITTEN
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for turn in range(_TILE * _TILE // (height * width)):
        i, j = divmod(turn, _TILE // width)
        part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        tiles[turn % 2] = value[part]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tiles.at[turn % 2], target.at[part])


def _pipeline(
    plgpu: Any,
    dtype: Any,
    steps: int,
    ahead: int,
    turned: bool,
    body: Callable[..., Any],
    context: Callable[..., Any],
) -> Any:
    """Returns the loop over the reduction, whose loads run ahead of its products."""
    x_tile, w_tile = (_GROUPS * _TILE, _DEPTH), (_DEPTH, _TILE)
    w_at: Callable[[Any], Any] = lambda step: (step, 0)
    x_at: Callable[[Any], Any] = lambda step: (0, step)
    if turned:
        w_tile, w_at = w_tile[::-1], x_at
    spec = functools.partial(
        plgpu.BlockSpec,
        transforms=_swizzled(plgpu, dtype, _DEPTH),
        memory_space=plgpu.SMEM,
    )
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=40,
        in_specs=[spec(x_tile, x_at), spec(w_tile, w_at)],
        wg_axis="warpgroup",
        num_compute_wgs=_GROUPS,
        max_concurrent_steps=ahead,
        compute_context=context,
    )


def _shared(plgpu: Any, dtype: Any, shape: tuple[int, ...], segment: int) -> Any:
    transforms = _swizzled(plgpu, dtype, segment)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _swizzled(plgpu: Any, dtype: Any, segment: int) -> tuple[Any, ...]:
    """Returns how a tile lies in shared memory, so that banks do not collide."""
    tiling = plgpu.TilingTransform((8, segment))
    return tiling, plgpu.SwizzleTransform(segment * jnp.dtype(dtype).itemsize)

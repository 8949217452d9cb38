"""How the results of `hopper_kernel` are divided into tiles, and when that pays."""

from typing import Any, NamedTuple

import jax

# Warpgroups that multiply, each a tile of a block.
GROUPS = 2


class Tile(NamedTuple):
    """What a warpgroup multiplies: a part of the result.

    Attributes:
        rows: its rows; a block has one tile for each warpgroup, below each other.
        columns: its columns.
        cost: the time of a block, over that of the smallest ones (an H200).
    """

    rows: int
    columns: int
    cost: float

    @property
    def height(self) -> int:
        """The rows of a block."""
        return GROUPS * self.rows

    def divides(self, rows: int, columns: int, each: int) -> bool:
        """Returns whether a result divides into blocks, a tile has rows of one adapter.

        `each` are the rows of an adapter.
        """
        whole = rows % self.height == 0 and columns % self.columns == 0
        return whole and each % self.rows == 0 and min(rows, columns) > 0

    def time(self, rows: int, columns: int, processors: int) -> float:
        """Returns the time of a result, over that of one of the smallest blocks."""
        blocks = rows // self.height * (columns // self.columns)
        return -(-blocks // processors) * self.cost


# Smaller blocks leave fewer processors idle, and read their operands more often.
TILES = Tile(128, 128, 2.5), Tile(64, 128, 1.45), Tile(64, 64, 1.0)
_LARGEST_TILE = TILES[0]


def divides(depth: int, columns: int) -> bool:
    """Returns whether kernels of this size divide into tiles, for some rows."""
    least = _LARGEST_TILE.columns  # which a step is a part of
    return depth % least == 0 and columns % least == 0 and min(depth, columns) > 0


def fits(rows: int, depth: int, columns: int) -> bool:
    """Returns whether a product divides into tiles, and so does that of its gradient.

    They are `(rows, depth)·(depth, columns)` and `(rows, columns)·(columns, depth)`.
    """
    return apart(rows, depth, columns, rows)


def apart(rows: int, depth: int, columns: int, each: int) -> bool:
    """Returns the same where each so many of the rows have a `b` of their own."""
    both = (tile_of(rows, side, each) for side in (depth, columns))
    return divides(depth, columns) and None not in both


def tile_of(rows: int, columns: int, each: int, devices: int = 1) -> Tile | None:
    """Returns the fastest tile for a result, or None where it divides into none."""
    can = [tile for tile in TILES if tile.divides(rows, columns, each)]
    count = devices * processors()
    return min(can, key=lambda t: t.time(rows, columns, count), default=None)


def filled(rows: int, depth: int, columns: int, devices: int) -> float:
    """Returns which part of some GPUs a product fills, the less of both ways.

    It is the time at the rate of the largest tiles, all at work, over that of the
    fastest ones.
    """
    count = devices * processors()

    def part(side: int) -> float:
        tile = tile_of(rows, side, rows, devices)
        if tile is None:
            return 0.0
        area = rows * side / (_LARGEST_TILE.height * _LARGEST_TILE.columns)
        return area / count * _LARGEST_TILE.cost / tile.time(rows, side, count)

    return min(part(side) for side in (depth, columns))


def local_gpu() -> Any:
    """Returns a GPU of this host, or None."""
    try:
        return jax.local_devices(backend="cuda")[0]
    except RuntimeError:  # no such platform
        return None


def processors() -> int:
    """Returns the number of its multiprocessors, or of an H100's."""
    return getattr(local_gpu(), "core_count", None) or 132

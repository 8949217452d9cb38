"""The rows of a plan's table, and how it is fitted into a width."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from .._rules.view import Use
from .groups import grouped
from .target import Target, entry_of, variant_of

HEAD = (
    "path",
    "shape",
    "axes",
    "uses",
    "product",
    "rank",
    "scaling",
    "trainable",
    "share",
)
_LEFT = ("path", "shape", "axes", "uses", "product")  # the others to the right
# Letters of `uses` that are worth more than other columns: an operation and its file.
_OPERATION, _SOURCE = 11, 22
_LEAST_PATH = 20


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: one target, or several that differ in numbers alone.

    Attributes:
        path: the path, or those of all as one.
        cells: shape, axes, uses, product, rank and scaling.
        trainable: the number of trained values.
    """

    path: str
    cells: tuple[str, ...]
    trainable: int


def rows_of(targets: Sequence[Target], *, fold: bool) -> list[Row]:
    """Returns the rows of targets, one each or one for all of the same kind."""
    rows = [_row(target) for target in targets]
    if not fold:
        return rows
    uses = HEAD.index("uses") - 1  # differ in the lines of the model alone
    same = [(*row.cells[:uses], *row.cells[uses + 1 :]) for row in rows]
    kinds = [tuple(sorted(set(map(_how, target.uses)))) for target in targets]
    keys = zip(same, kinds, strict=True)
    pairs = [(row.path, key) for row, key in zip(rows, keys, strict=True)]
    return [
        _joined(group.name, [rows[place] for place in group.members])
        for group in grouped(pairs)
    ]


def _joined(name: str, rows: Sequence[Row]) -> Row:
    uses = HEAD.index("uses") - 1
    first = list(rows[0].cells)
    first[uses] = ", ".join(dict.fromkeys(row.cells[uses] for row in rows))
    return Row(name, tuple(first), sum(row.trainable for row in rows))


def cells_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Returns the cells of all columns, with the share of each row."""
    total = max(sum(row.trainable for row in rows), 1)
    return [
        (
            row.path,
            *row.cells,
            f"{row.trainable:,}",
            f"{100 * row.trainable / total:.1f} %",
        )
        for row in rows
    ]


def lines_of(rows: Sequence[Row], width: int | None) -> list[str]:
    """Returns the lines of the table, the head first.

    Args:
        rows: the rows.
        width: the longest line in letters, or None for any. Columns that others imply
            are left out first, then `uses` is cut, and the path last, at its beginning.
    """
    columns = [list(column) for column in zip(HEAD, *cells_of(rows), strict=True)]
    notes = []
    if width is not None:
        columns, notes = _fitted(columns, width)
    widths = [max(map(len, column)) for column in columns]
    left = [column[0] in _LEFT for column in columns]
    lines = [_line(row, widths, left) for row in zip(*columns, strict=True)]
    lines.insert(1, "  ".join("-" * size for size in widths))
    return [*lines, *notes]


def _fitted(columns: list[list[str]], width: int) -> tuple[list[list[str]], list[str]]:
    """Returns columns that fit, and what is said of those that are left out."""
    notes = []

    def excess() -> int:
        widths = [max(map(len, column)) for column in columns]
        return sum(widths) + 2 * (len(columns) - 1) - width

    def shorten(name: str, least: int) -> None:
        place = next(i for i, column in enumerate(columns) if column[0] == name)
        room = max(max(map(len, columns[place])) - max(excess(), 0), least)
        cut = _without_beginning if name == "path" else _without_end
        columns[place] = [cut(cell, room) for cell in columns[place]]

    shorten("uses", _SOURCE)
    if excess() > 0:
        columns.pop(HEAD.index("share"))
    scaling = columns[HEAD.index("scaling")][1:]
    if excess() > 0 and len(set(scaling)) == 1 and scaling[0]:
        columns.pop(HEAD.index("scaling"))
        notes.append(f"scaling {scaling[0]}")
    uses = max(map(len, columns[HEAD.index("uses")]))
    if excess() > max(uses - _OPERATION, 0):
        columns.pop(HEAD.index("product"))
    shorten("uses", len("uses"))
    shorten("path", _LEAST_PATH)
    return columns, notes


def _without_end(cell: str, room: int) -> str:
    return cell if len(cell) <= room else cell[: room - 1].rstrip(" (,") + "…"


def _without_beginning(cell: str, room: int) -> str:
    """Returns the last segments of a path that there is room for."""
    if len(cell) <= room:
        return cell
    end = cell[1 - room :]
    _, slash, whole = end.partition("/")
    return f"…/{whole}" if slash and len(whole) > room // 2 else f"…{end}"


def _line(cells: Sequence[str], widths: Sequence[int], left: Sequence[bool]) -> str:
    padded = [
        cell.ljust(width) if is_left else cell.rjust(width)
        for cell, width, is_left in zip(cells, widths, left, strict=True)
    ]
    return "  ".join(padded).rstrip()


# the cells of a target


def _row(target: Target) -> Row:
    cells = (
        _shape(target),
        _axes(target),
        _uses(target),
        _products(target),
        _rank(target),
        "" if target.scaling is None else f"{target.scaling:g}",
    )
    return Row(target.path, cells, target.trainable)


def _rank(target: Target) -> str:
    """Tells the rank, or what is trained instead, and what else the factors have."""
    config = target.config
    note = variant_of(target).note(entry_of(target, target.abstract_arrays))
    if target.rank is None:
        return note
    told = [note] if note else []
    told += [f" dropout {config.dropout:g}"] if config.dropout else []
    asked = f" of {config.rank}" if target.rank != config.rank else ""
    return f"{target.rank}{asked}" + ",".join(told)


def _shape(target: Target) -> str:
    shape = "×".join(map(str, target.shape)) or "scalar"
    return shape if target.qtype is None else f"{shape} {target.qtype}"


def _axes(target: Target) -> str:
    if target.axes is None:
        return "whole"
    roles = (
        ("batch", target.axes.batch),
        ("in", target.axes.in_),
        ("out", target.axes.out),
    )
    told = " ".join(
        f"{name} {','.join(map(str, axes))}" for name, axes in roles if axes
    )
    given = {i % target.axes.ndim for i in target.config.batch_axes}
    own = ",".join(map(str, sorted(given)))
    return f"{told} (batch={own} by config)" if given else told


def _uses(target: Target) -> str:
    if target.axes is None:
        return "trained whole"
    counted = Counter(target.uses)
    if not counted:
        return "not traced"
    told = []
    for use, times in counted.items():
        told.append(f"{_how(use)} ({use.source})" + (f" ×{times}" if times > 1 else ""))
    return ", ".join(told)


def _how(use: Use) -> str:
    return use.kind if use.factored else f"{use.kind}: materialized"


def _products(target: Target) -> str:
    """Names the form of each product, and how many share its operand."""
    told = []
    for use in target.uses:
        if use.form is not None:
            told.append(use.form + (f" ×{use.siblings}" if use.siblings > 1 else ""))
    return ", ".join(dict.fromkeys(told))

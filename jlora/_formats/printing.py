"""Tables as text, of what `python -m jlora` finds in files."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns lines with columns; the head is the first."""
    plain = lambda cell: (
        cell if cell.isprintable() else repr(cell)
    )  # paths are any text
    lines = [tuple(map(plain, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    padded = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    return "\n".join(padded)

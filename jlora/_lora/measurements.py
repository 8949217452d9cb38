"""The file in which `benchmarks/tune.py` says what is fastest on a device."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._product.measured import FIELDS, TIMED, Measurements, Timed

_SIZES = ("tokens", "features", "outputs")


def read_measurements(path: Path) -> Measurements:
    """Returns what a file says.

    Raises:
        ValueError: if it is no such file; all rows that are wrong are named.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(_message(path, [f"it is no JSON: {error}"])) from None
    if not isinstance(told, Mapping) or not isinstance(told.get("device"), str):
        raise ValueError(_message(path, ['it names no "device"']))
    rows = told.get("forms")
    if not isinstance(rows, list) or not rows:
        raise ValueError(_message(path, ['it has no list "forms"']))
    wrong = [f"row {i}: {why}" for i, row in enumerate(rows) if (why := _problem(row))]
    if wrong:
        raise ValueError(_message(path, wrong))
    return Measurements(
        told["device"],
        tuple(Timed(**{name: row[name] for name in FIELDS}) for row in rows),
    )


def _message(path: Path, problems: list[str]) -> str:
    head = f"`jlora.lora(contraction=...)`: {path} is no file of forms:"
    return "\n".join([head, *problems, "`python benchmarks/tune.py` writes one"])


def _problem(row: Any) -> str | None:
    if not isinstance(row, Mapping) or not set(FIELDS) <= set(row):
        return f"needs {', '.join(FIELDS)}"
    sizes = [row[name] for name in _SIZES]
    if not all(type(size) is int and size > 0 for size in sizes):
        return f"{', '.join(_SIZES)} must be positive ints, got {sizes}"
    if not isinstance(row["dtype"], str):
        return f'"dtype" must be the name of a dtype, got {row["dtype"]!r}'
    if row["form"] not in TIMED:
        return f'"form" must be one of {TIMED}, got {row["form"]!r}'
    return None

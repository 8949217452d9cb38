"""The shapes of a model's leaves by path, as JSON, for placing what torch names."""

from pathlib import Path
from typing import Any

from .untrusted import JSON_LIMIT, parse_json, read_file


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes in a file, `{"params/up/kernel": [64, 256], ...}`.

    Raises:
        OSError: if it cannot be read.
        AdapterError: if it is no JSON.
        ValueError: if it is anything but shapes by path.
    """
    values = parse_json(read_file(path, JSON_LIMIT), str(path))
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path} is no object of shapes by path")
    wrong = [name for name, shape in values.items() if not _is_shape(shape)]
    if wrong:
        raise ValueError(
            f"{path}: {wrong[0]!r} has {values[wrong[0]]!r}, which is no shape, a list "
            "of sizes"
        )
    parents = {name[:i] for name in values for i, c in enumerate(name) if c == "/"}
    both = sorted(parents & set(values))
    if both:
        raise ValueError(f"{path}: {both[0]!r} is a leaf, and above others")
    return {name: tuple(shape) for name, shape in values.items()}


def _is_shape(value: Any) -> bool:
    whole = lambda size: isinstance(size, int) and not isinstance(size, bool)
    return isinstance(value, list) and all(whole(n) and n >= 0 for n in value)

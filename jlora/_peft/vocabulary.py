"""Tables of a vocabulary that was extended before the adapter was trained."""

from collections.abc import Mapping
from typing import Any

from .._errors import AdapterError
from .named_weights import NamedWeights
from .read import AdapterFiles
from .tables import BASE_LAYER, is_table

VOCABULARY = "vocab_size"


def extended(
    weights: NamedWeights, files: AdapterFiles, *, extend: bool
) -> dict[int, int]:
    """Gives tables the rows that an adapter's files have of them.

    PEFT writes the tables whole where the vocabulary was resized.

    Args:
        weights: the tensors of the model.
        files: what the adapter's files hold.
        extend: whether that is asked for.

    Returns:
        The new numbers of rows by the old ones.

    Raises:
        AdapterError: if tables have other rows, and it is not asked for.
    """
    found, told, counts = {}, [], set()
    for name, table in files.whole.items():
        own = name.replace(BASE_LAYER, ".")
        if own not in weights or not is_table(own, table) or table.ndim != 2:
            continue
        shape = weights.shape(own).shape
        if len(shape) != 2 or shape[1] != table.shape[1] or shape == table.shape:
            continue
        more = table.shape[0] - shape[0]
        if extend and more > 0:
            found[shape[0]] = table.shape[0]
            weights.extend(own, table)
        else:
            told.append(f"{own!r} has {shape[0]} rows, {table.shape[0]} in the file")
            how = "added to" if more > 0 else "taken from"
            counts.add(f"{abs(more)} tokens were {how} the vocabulary")
    if told:
        raise AdapterError(
            f"{files.where}: {', '.join(sorted(counts))}: {'; '.join(told[:5])}. "
            "`jlora.weights.merge_folder(..., extend_tables=True)` writes tables with "
            "rows that were added; otherwise give a base with the rows of the file"
        )
    _check_all(weights, found, files)
    return found


def _check_all(
    weights: NamedWeights, rows: Mapping[int, int], files: AdapterFiles
) -> None:
    """Raises if a table would keep its rows beside one that has more.

    PEFT writes no table that is not adapted where another is.
    """
    lacking = [
        name
        for name in weights
        if is_table(name, shape := weights.shape(name)) and len(shape.shape) == 2
        if shape.shape[0] in rows
    ]
    if lacking:
        raise AdapterError(
            f"{files.where} has more rows of some tables and nothing of {lacking[:5]}, "
            "whose new rows PEFT did not write: save the adapter again with "
            "`save_embedding_layers=True`, or give the base that was resized"
        )


def with_vocabulary(
    config: Mapping[str, Any], rows: Mapping[int, int]
) -> dict[str, Any]:
    """Returns a model's config with other numbers of rows in place of some."""
    changed = dict(config)
    for key, value in config.items():
        if key == VOCABULARY and isinstance(value, int):
            changed[key] = rows.get(value, value)
        elif isinstance(value, dict) and VOCABULARY in value:
            changed[key] = with_vocabulary(value, rows)
    return changed

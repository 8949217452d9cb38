"""Entries of an adapter for `flax.serialization`, which knows trees by their classes.

Flax is imported by its doors alone: they hand its module in.
"""

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from .._adapter.variants import variants
from .._algebra.triplets import SvdFactors


def register_if_imported() -> None:
    """Makes entries of all kinds known to `flax.serialization`, if that is imported."""
    serialization = sys.modules.get("flax.serialization")
    if serialization is not None:
        entries = [v.entry for v in variants() if dataclasses.is_dataclass(v.entry)]
        register(serialization, [*entries, SvdFactors])


def register(serialization: Any, classes: Iterable[type]) -> None:
    """Makes classes of entries known to `flax.serialization`.

    The state dict of an entry holds its arrays by name; what is static (roles of axes,
    scaling) is that of the target, as Flax has it for the structure of a tree.

    Args:
        serialization: the module `flax.serialization`.
        classes: registered dataclasses of arrays.
    """

    def to_state(entry: Any) -> dict[str, Any]:
        return {n: serialization.to_state_dict(v) for n, v in _arrays(entry).items()}

    def from_state(entry: Any, state: dict[str, Any]) -> Any:
        arrays, kind = _arrays(entry), type(entry).__name__
        if set(arrays) != set(state):
            raise ValueError(
                f"the state has {sorted(state)} for a {kind} with {sorted(arrays)}; "
                "give `from_state_dict` the adapter of the config that it was saved for"
            )
        shapes = {n: (np.shape(state[n]), np.shape(v)) for n, v in arrays.items()}
        if any(given != own for given, own in shapes.values()):
            raise ValueError(
                f"the state has other shapes (its own, that of the {kind}): {shapes}"
            )
        read = serialization.from_state_dict
        new = {n: read(v, state[n], name=n) for n, v in arrays.items()}
        return dataclasses.replace(entry, **new)

    for kind in classes:
        serialization.register_serialization_state(
            kind, to_state, from_state, override=True
        )


def _arrays(entry: Any) -> dict[str, Any]:
    """Returns the fields of an entry that are no static ones, without those of None."""
    fields = [f for f in dataclasses.fields(entry) if not f.metadata.get("static")]
    values = {f.name: getattr(entry, f.name) for f in fields}
    return {name: value for name, value in values.items() if value is not None}

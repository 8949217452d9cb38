"""Whether moments of inputs fit the kernels of an adapter."""

from collections.abc import Mapping
from typing import Any

from .._adapter.factors import LoraFactors
from .._errors import AdapterError


def check_stats(
    name: str,
    adapter: Mapping[str, Any],
    stats: Mapping[str, Any],
    *,
    whole: bool = False,
) -> None:
    """Raises with every target whose statistics are missing or do not fit."""
    problems = []
    for path, entry in adapter.items():
        if not isinstance(entry, LoraFactors):
            continue
        size = entry.axes.fans(entry.kernel_shape)[0]
        wanted = (*entry.a.shape[: len(entry.axes.batch)], size)
        given = getattr(stats.get(path), "moment", None)
        if given is None:
            problems.append(f"{path!r} has no statistics of its inputs")
        elif given.shape[:-1] != wanted or given.shape[-1] > size:
            told = (*wanted, size)
            problems.append(f"{path!r} needs a moment {told}, got {given.shape}")
        elif whole and given.shape[-1] != size:
            problems.append(f"{path!r} has a sketch of its moment, not the whole")
        elif given.shape[-1] < entry.rank:
            problems.append(f"{path!r} has a sketch of fewer columns than its rank")
    if problems:
        raise AdapterError(
            f"`jlora.{name}` takes what `lora.inputs(params, ...)` gives:\n"
            + "\n".join(problems)
        )

"""What can be stacked, and what is a stacked adapter; every offender is named."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._adapter.factors import LoraFactors
from .._errors import AdapterError, UnsupportedFeatureError
from .._params.given import described
from .._params.paths import is_array, nearest


def count_of(stacked: Mapping[str, Any]) -> int:
    """Returns how many adapters are stacked; raises if it is no stacked adapter."""
    if not isinstance(stacked, Mapping):
        raise TypeError(
            "a stacked adapter is a dict, as `jlora.stack(adapters)` returns it, got "
            f"{described(stacked)}"
        )
    refuse_unknown({path: [entry] for path, entry in stacked.items()})
    found = {path: _leading(entry) for path, entry in stacked.items()}
    wrong = [
        f"{path!r} has arrays {' and '.join(map(str, map(jnp.shape, leaves)))}"
        for path, entry in stacked.items()
        if found[path] is None and (leaves := jax.tree.leaves(entry))
    ]
    counts = {count for count in found.values() if count is not None}
    if len(counts) > 1:
        wrong += [f"{path!r} has {count} adapters" for path, count in found.items()]
    if not found:
        wrong.append("it is empty")
    raise_all(
        "no stacked adapter, whose arrays have one leading axis more, the same for all "
        "(`jlora.stack` makes one)",
        wrong,
    )
    return counts.pop()


def checked_index(index: Any, count: int) -> Any:
    """Returns one index as an array; a concrete one must be in range."""
    if not isinstance(index, Tracer):
        index = np.asarray(index)
    if index.ndim or not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            "the index of an adapter is one whole number, got shape "
            f"{index.shape} of {index.dtype}"
        )
    if not isinstance(index, Tracer) and not 0 <= index < count:
        raise IndexError(f"there are {count} adapters, from 0; got index {index}")
    return index


def as_adapters(adapters: Any) -> list[Mapping[str, Any]]:
    """Returns a list of adapters, which must be one."""
    takes = "`jlora.stack` takes a list of adapters, each a dict by path"
    if isinstance(adapters, Mapping):
        raise TypeError(
            f"{takes}, got {described(adapters)}: give `[one, other]`, or "
            "`list(adapters.values())` of adapters by name"
        )
    if not isinstance(adapters, Iterable):
        raise TypeError(f"{takes}, got {described(adapters)}")
    several = list(adapters)
    if not several:
        raise TypeError(
            f"{takes}, got an empty one: at least one adapter says what is stacked"
        )
    wrong = {i: one for i, one in enumerate(several) if not isinstance(one, Mapping)}
    if wrong:
        told = ", ".join(f"at {i} {described(one)}" for i, one in wrong.items())
        raise TypeError(f"{takes}, got {told}")
    return several


def raise_all(subject: str, problems: Iterable[str | None]) -> None:
    """Raises with all problems, if there are any; None is none."""
    found = [text for text in problems if text]
    if found:
        raise AdapterError(f"{subject}:\n" + "\n".join(found))


def refuse_unknown(rows: Mapping[str, Sequence[Any]]) -> None:
    """Raises for entries of which no rule here says what zero would be."""
    found = []
    for path, row in rows.items():
        for entry in row:
            if isinstance(entry, LoraFactors) and entry.magnitude is not None:
                found.append(f"{path!r} has a magnitude (DoRA)")
            elif not isinstance(entry, LoraFactors) and not _is_none_or_array(entry):
                found.append(f"{path!r} holds a {type(entry).__name__}")
    if found:
        raise UnsupportedFeatureError(
            "only factors and whole arrays can be stacked:\n"
            + "\n".join(dict.fromkeys(found))
        )


def _is_none_or_array(entry: Any) -> bool:
    return entry is None or is_array(entry)


def _kind(entry: Any) -> str:
    """Says what must agree for entries to be stacked."""
    if not isinstance(entry, LoraFactors):
        return f"an array of shape {tuple(entry.shape)}, trained whole"
    a, b, axes = entry.a, entry.b, entry.axes
    batch = len(axes.batch)
    sizes = (batch + len(axes.in_) + 1, batch + 1 + len(axes.out))
    fits = (a.ndim, b.ndim) == sizes and a.shape[:batch] == b.shape[:batch]
    if not fits or a.shape[-1] != b.shape[batch]:
        return f"a {a.shape} and b {b.shape}, which are no factors of {axes}"
    return f"factors of a kernel {entry.kernel_shape} with {axes}"


def problem(path: str, row: Sequence[Any]) -> str | None:
    """Says why the entries of one path cannot be stacked, if so."""
    kinds = {i: _kind(entry) for i, entry in enumerate(row) if entry is not None}
    (first, kind), *others = kinds.items()
    wrong = [f"adapter {i} {k}" for i, k in others if k != kind]
    if wrong or "no factors" in kind:
        return f"{path!r}: adapter {first} has {', '.join([kind, *wrong])}"
    lacking = [str(i) for i, entry in enumerate(row) if entry is None]
    if lacking and not isinstance(row[first], LoraFactors):
        return (
            f"{path!r} is trained whole by adapter {first} and is not in "
            f"{', '.join(lacking)}; give those the leaf of the params"
        )
    return None


def too_small(rows: Mapping[str, Sequence[Any]], rank: int) -> Iterator[str]:
    """Names the entries of a larger rank than the one that is asked for."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`jlora.stack(rank=...)` must be at least 1, got {rank!r}")
    for path, row in rows.items():
        for i, entry in enumerate(row):
            if isinstance(entry, LoraFactors) and entry.rank > rank:
                yield f"{path!r} has rank {entry.rank} in adapter {i}, asked {rank}"


def unknown(path: str, paths: list[str]) -> str:
    """Says that a path is not in a stack, and which ones are near."""
    near = ", ".join(map(repr, nearest(path, paths)))
    return f"{path!r} is not in the stack. Nearest: {near}"


def misfit(path: str, slot: Any, entry: Any) -> str | None:
    """Says why an entry cannot take the place of one of a stack, if so."""
    if entry is None:
        whole = not isinstance(slot, LoraFactors)
        return f"{path!r} is trained whole; the adapter lacks it" if whole else None
    if _kind(entry) != _kind(slot):
        return f"{path!r}: the stack has {_kind(slot)}, the adapter {_kind(entry)}"
    if isinstance(slot, LoraFactors) and entry.rank > slot.rank:
        return (
            f"{path!r} has rank {entry.rank}, the stack {slot.rank}: make it with "
            "`jlora.stack(..., rank=...)`"
        )
    if isinstance(slot, LoraFactors) and entry.scaling and not slot.scaling:
        return f"{path!r} has scaling {entry.scaling}, the stack 0"
    return None


def _leading(entry: Any) -> int | None:
    """Returns how many adapters an entry is of; None if it is not stacked."""
    leaves = jax.tree.leaves(entry)
    if not all(leaf.ndim for leaf in leaves):
        return None
    one = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), entry)
    counts = {leaf.shape[0] for leaf in leaves}
    return counts.pop() if len(counts) == 1 and "no factors" not in _kind(one) else None

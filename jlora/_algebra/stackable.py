"""What can be stacked, and what is a stacked adapter; every offender is named."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._adapter.entries import (
    axes_of,
    given_shapes,
    kernel_shape,
    lowered,
    wanted_shapes,
)
from .._adapter.factors import LoraFactors
from .._adapter.variants import variant_of_entry
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
    """Raises for what is no entry of an adapter."""
    strange = {
        f"{path!r} holds a {type(entry).__name__}": None
        for path, row in rows.items()
        for entry in row
        if not (entry is None or is_array(entry) or variant_of_entry(entry).has_roles)
    }
    if strange:
        raise UnsupportedFeatureError(
            "only entries of adapters can be stacked:\n" + "\n".join(strange)
        )


# --- kinds ---


def is_plain(entry: Any) -> TypeGuard[LoraFactors]:
    """Returns whether an entry is two factors and nothing else, of any rank."""
    return isinstance(entry, LoraFactors) and entry.magnitude is None


def nothing(entry: Any) -> Any:
    """Returns an entry of the same kind and shapes that changes nothing.

    None if zeros are no such entry, or if it is told by the base.
    """
    # On an Explicit mesh zeros of an array lie where it does; shapes alone lie nowhere.
    is_real = lambda v: isinstance(v, jax.Array | np.ndarray)
    zero = lambda v: jnp.zeros_like(v) if is_real(v) else jnp.zeros(v.shape, v.dtype)
    zeros = jax.tree.map(zero, entry)
    if is_plain(entry):
        return zeros
    variant = variant_of_entry(entry)
    if variant.origin is None or variant.origin(zeros, None) is None:
        return None
    ((name, _),) = variant.arrays(zeros).items()
    return variant.replaced(zeros, {name: variant.origin(zeros, None)})


def of_one_kind(row: Sequence[Any]) -> list[Any]:
    """Returns entries as they are if all are alike, else as plain factors.

    None is an entry that is lacking, which other kinds than plain factors and scales
    have no values for. What is no factors is returned as it is.
    """
    held = [entry for entry in row if entry is not None]
    alike = len({_kind(entry) for entry in held}) == 1
    if alike and (len(held) == len(row) or nothing(held[0]) is not None):
        return list(row)
    if not all(map(_has_plain, held)):
        return list(row)
    return [None if entry is None else lowered(entry, None) for entry in row]


def of_kind(slot: Any, entry: Any) -> Any:
    """Returns an entry in the kind of a place in a stack, if it can be that."""
    if entry is None or not is_plain(slot) or not _has_plain(entry):
        return entry
    return lowered(entry, None)


def plain_stack(entry: Any) -> Any:
    """Returns a stacked entry as stacked factors, if its kind has any."""
    if is_plain(entry) or not _can_lower(entry):
        return entry
    return jax.vmap(lambda one: lowered(one, None))(entry)


def _can_lower(entry: Any) -> bool:
    variant = variant_of_entry(entry)
    return variant.has_factors(entry) and not variant.reads(entry)


def _has_plain(entry: Any) -> bool:
    return _can_lower(entry) and _is_whole(entry)


def _is_whole(entry: Any) -> bool:
    """Returns whether the arrays of an entry fit each other."""
    variant, axes = variant_of_entry(entry), axes_of(entry)
    if axes is None:
        return True
    given, settings = given_shapes(entry), variant.settings_of(entry)
    rank = None if variant.rank is None else 1
    axes_each = variant.shapes(axes, (1,) * axes.ndim, rank, **settings)
    if any(len(axes_each[name]) != len(shape) for name, shape in given.items()):
        return False
    return wanted_shapes(entry, kernel_shape(entry)) == given


def _kind(entry: Any) -> str:
    """Says what must agree for entries to be stacked."""
    variant, axes, given = variant_of_entry(entry), axes_of(entry), given_shapes(entry)
    if axes is None:
        return f"an array of shape {tuple(entry.shape)}, trained whole"
    arrays = " and ".join(f"{name} {shape}" for name, shape in given.items())
    if not _is_whole(entry):
        return f"{arrays}, which are no factors of {axes}"
    kernel = f"of a kernel {kernel_shape(entry)} with {axes}"
    if is_plain(entry):
        return f"factors {kernel}"
    settings = variant.settings_of(entry)
    if variant.rank is not None:
        settings["scaling"] = entry.scaling
    said = "".join(f", {name} {value}" for name, value in settings.items())
    dora = ", of DoRA" if variant.is_dora(entry) else ""
    return f"{variant.name} ({arrays}{said}{dora}) {kernel}"


def problem(path: str, row: Sequence[Any]) -> str | None:
    """Says why the entries of one path cannot be stacked, if so."""
    kinds = {i: _kind(entry) for i, entry in enumerate(row) if entry is not None}
    (first, kind), *others = kinds.items()
    wrong = [f"adapter {i} {k}" for i, k in others if k != kind]
    if wrong or not _is_whole(row[first]):
        return f"{path!r}: adapter {first} has {', '.join([kind, *wrong])}"
    lacking = [str(i) for i, entry in enumerate(row) if entry is None]
    if lacking and nothing(row[first]) is None:
        what, of_params = _what(row[first])
        return (
            f"{path!r} {what} by adapter {first} and is not in {', '.join(lacking)}; "
            f"give those {of_params}"
        )
    return None


def _what(entry: Any) -> tuple[str, str]:
    """Says how an entry is trained, and what to give in the place of none."""
    variant = variant_of_entry(entry)
    if not variant.has_roles:
        return "is trained whole", "the leaf of the params"
    kind = "DoRA" if variant.is_dora(entry) else variant.name
    return f"is trained as {kind}", "a new entry, as `init` makes it"


def too_small(rows: Mapping[str, Sequence[Any]], rank: int) -> Iterator[str]:
    """Names the entries of a larger rank than the one that is asked for."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`jlora.stack(rank=...)` must be at least 1, got {rank!r}")
    for path, row in rows.items():
        for i, entry in enumerate(row):
            if is_plain(entry) and entry.rank > rank:
                yield f"{path!r} has rank {entry.rank} in adapter {i}, asked {rank}"


def unknown(path: str, paths: list[str]) -> str:
    """Says that a path is not in a stack, and which ones are near."""
    near = ", ".join(map(repr, nearest(path, paths)))
    return f"{path!r} is not in the stack. Nearest: {near}"


def misfit(path: str, slot: Any, entry: Any) -> str | None:
    """Says why an entry cannot take the place of one of a stack, if so."""
    if entry is None:
        lacks = nothing(slot) is None
        return f"{path!r} {_what(slot)[0]}; the adapter lacks it" if lacks else None
    if _kind(entry) != _kind(slot):
        return f"{path!r}: the stack has {_kind(slot)}, the adapter {_kind(entry)}"
    if not is_plain(slot):
        return None
    if entry.rank > slot.rank:
        return (
            f"{path!r} has rank {entry.rank}, the stack {slot.rank}: make it with "
            "`jlora.stack(..., rank=...)`"
        )
    if entry.scaling and not slot.scaling:
        return f"{path!r} has scaling {entry.scaling}, the stack 0"
    return None


def _leading(entry: Any) -> int | None:
    """Returns how many adapters an entry is of; None if it is not stacked."""
    leaves = jax.tree.leaves(entry)
    if not all(leaf.ndim for leaf in leaves):
        return None
    one = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), entry)
    counts = {leaf.shape[0] for leaf in leaves}
    return counts.pop() if len(counts) == 1 and _is_whole(one) else None

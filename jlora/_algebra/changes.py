"""What the entries of adapters change, in a form that can be computed with.

Every operation of the algebra begins here, so that none of them knows a variant. The
change of a leaf is either ΔW = scaling·a·b, by the factors that its entry is lowered to
(of each part, where it is of some parts of a kernel), or it is linear in the one array
that is trained, such as a leaf that is trained whole. What is neither, as the magnitude
of DoRA, is refused by name.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .._adapter.check import check_adapter
from .._adapter.entries import are_alike, axes_of, entry_with, kernel_shape, lowered
from .._adapter.factors import LoraFactors
from .._adapter.variants import variant_of_entry
from .._errors import AdapterError, UnsupportedFeatureError
from .._params.given import described
from .._params.paths import FlatParams, PyTree, is_array
from .._params.quantized import dequantized
from .matrices import Array


class Factored(NamedTuple):
    """The change of one leaf in several adapters, as factors.

    Attributes:
        parts: by the number of the adapter, the factors of each part of the kernel; of
            most kernels there is one part, the whole.
        rejoined: an entry with other factors of the parts.
    """

    parts: dict[int, tuple[LoraFactors, ...]]
    rejoined: Callable[[Sequence[LoraFactors]], Any]


class Valued(NamedTuple):
    """The change of one leaf in several adapters, as an array that moves from another.

    Attributes:
        values: by the number of the adapter, the array that is trained.
        origin: the array that changes nothing.
        rejoined: an entry with another array.
    """

    values: dict[int, Array]
    origin: Array
    rejoined: Callable[[Array], Any]


def factored(
    caller: str,
    adapters: Sequence[Mapping[str, Any]],
    params: PyTree = None,
    *,
    ranks: bool = False,
    whole: bool = False,
) -> dict[str, Factored]:
    """Returns the factors of what adapters change, by path.

    Args:
        caller: the function that is called, for messages.
        adapters: the adapters.
        params: the frozen params, which some entries are lowered beside.
        ranks: whether the ranks of all must be the same.
        whole: whether parts of a kernel are joined to one.

    Raises:
        TypeError: if an adapter is no mapping.
        AdapterError: with every path whose kernels (or, if `ranks`, ranks) differ.
        UnsupportedFeatureError: with every entry that has no two factors.
    """
    rows, leaves = _rows(caller, adapters, params)
    _refuse(caller, rows, leaves, _no_factors)
    _check_alike(caller, rows)
    made = {p: _factored(row, leaves.get(p), whole) for p, row in rows.items()}
    if ranks:
        _raise_unlike(caller, [_unlike_ranks(p, made[p].parts) for p in made])
    return made


def summable(
    caller: str, adapters: Sequence[Mapping[str, Any]], params: PyTree = None
) -> dict[str, Factored | Valued]:
    """Returns what adapters change, by path, in a form that has sums and multiples.

    Args:
        caller: the function that is called, for messages.
        adapters: the adapters.
        params: the frozen params, which some entries are counted from.

    Raises:
        TypeError: if an adapter is no mapping.
        AdapterError: with every path whose kernels or kinds of entries differ.
        UnsupportedFeatureError: with every entry that cannot be added.
    """
    rows, leaves = _rows(caller, adapters, params)
    _refuse(caller, rows, leaves, _no_sum)
    _check_alike(caller, rows)
    made: dict[str, Factored | Valued] = {}
    for path, row in rows.items():
        leaf, first = leaves.get(path), next(iter(row.values()))
        valued = variant_of_entry(first).origin and are_alike(list(row.values()))
        made[path] = _valued(row, leaf) if valued else _factored(row, leaf, False)
    return made


def check_plain(caller: str, adapter: Any) -> None:
    """Raises if an entry is more or other than two factors or a leaf trained whole.

    Raises:
        TypeError: if the adapter is no mapping.
        UnsupportedFeatureError: with every entry that is refused.
    """
    rows, _ = _rows(caller, [adapter], None)
    _refuse(caller, rows, {}, _not_plain)


# --- the arguments ---


def _rows(
    caller: str, adapters: Sequence[Mapping[str, Any]], params: PyTree
) -> tuple[dict[str, dict[int, Any]], dict[str, Any]]:
    """Returns the entries of each path by the adapter's number, and the leaves."""
    for adapter in adapters:
        if not isinstance(adapter, Mapping):
            listed = isinstance(adapter, list | tuple)
            several = f": give each by itself, `{caller}(*adapters)`" if listed else ""
            raise TypeError(
                f"`{caller}` takes adapters, dicts from path to `LoraFactors`; got "
                f"{described(adapter)}{several}"
            )
    paths = dict.fromkeys(path for adapter in adapters for path in adapter)
    rows = {p: {i: x[p] for i, x in enumerate(adapters) if p in x} for p in paths}
    if params is None:
        return rows, {}
    flat = FlatParams.of(params)
    for adapter in adapters:
        check_adapter(flat, adapter)
    leaves = flat.by_path()
    return rows, {path: dequantized(leaves[path], path) for path in paths}


# --- what is refused ---


def _refuse(
    caller: str,
    rows: Mapping[str, Mapping[int, Any]],
    leaves: Mapping[str, Any],
    reason: Callable[[Any, Any], str | None],
) -> None:
    """Raises with all entries for which there is a reason."""
    told = {
        f"{path!r} {text}": None
        for path, row in rows.items()
        for entry in row.values()
        if (text := _no_entry(entry) or reason(entry, leaves.get(path)))
    }
    if told:
        raise UnsupportedFeatureError(
            f"`{caller}` cannot take these entries; do as their lines say, or leave "
            "their paths out of what you give it:\n" + "\n".join(told)
        )


def _no_entry(entry: Any) -> str | None:
    if variant_of_entry(entry).has_roles or is_array(entry):
        return None
    return f"is of type {type(entry).__name__}"


def _no_factors(entry: Any, leaf: Any) -> str | None:
    """Says why an entry has no two factors, beside its leaf or without one."""
    variant = variant_of_entry(entry)
    if not variant.has_roles:
        return f"{tuple(entry.shape)} is trained whole and has no factors"
    if variant.is_dora(entry):
        return (
            "has a magnitude (DoRA), which scales W too: it is no sum of W and two "
            "factors. `jlora.merge` forms its kernel"
        )
    if not variant.has_factors(entry):
        return (
            f"is a scale of its kernel ({variant.name}), no sum of W and two factors. "
            "`jlora.merge` forms its kernel"
        )
    if leaf is None and variant.reads(entry):
        return f"has new values ({variant.note(entry)}); {_NEEDED}"
    return None


_NEEDED = "its ΔW needs the base: give `params=`"


def _no_sum(entry: Any, leaf: Any) -> str | None:
    """Says why an entry has no sums and multiples, beside its leaf or without one."""
    variant = variant_of_entry(entry)
    if variant.origin is None:
        return _no_factors(entry, leaf)
    if leaf is not None or variant.origin(entry, None) is not None:
        return None
    if not variant.has_roles:
        return f"{tuple(entry.shape)} is trained whole; {_NEEDED}"
    return _no_factors(entry, leaf)


def _not_plain(entry: Any, leaf: Any) -> str | None:
    variant = variant_of_entry(entry)
    if variant.is_dora(entry):
        return _no_factors(entry, leaf)
    if isinstance(entry, LoraFactors) or not variant.has_roles:
        return None
    return f"is of kind {variant.name}, and no `LoraFactors` of `a` and `b`"


def _check_alike(caller: str, rows: Mapping[str, Mapping[int, Any]]) -> None:
    _raise_unlike(caller, [_unlike(path, row) for path, row in rows.items()])


def _raise_unlike(caller: str, told: Sequence[str | None]) -> None:
    problems = [problem for problem in told if problem]
    if problems:
        raise AdapterError(f"`{caller}` got unlike adapters:\n" + "\n".join(problems))


def _unlike(path: str, row: Mapping[int, Any]) -> str | None:
    """Says how the kernels of a path differ, or kinds that have no form in common."""
    kernels = {i: (kernel_shape(entry), axes_of(entry)) for i, entry in row.items()}
    different = list(kernels.values()).count(kernels[next(iter(row))]) < len(row)
    if different:
        told = [f"{shape} with {axes} in {i}" for i, (shape, axes) in kernels.items()]
        return f"{path!r} is of a kernel {', '.join(told)}"
    variants = {i: variant_of_entry(entry) for i, entry in row.items()}
    if are_alike(list(row.values())) or all(
        variant.has_factors(row[i]) for i, variant in variants.items()
    ):
        return None
    told = [f"{v.note(row[i]).strip() or v.name} in {i}" for i, v in variants.items()]
    return f"{path!r} is {', '.join(told)}, of which there is no sum of one kind"


def _unlike_ranks(path: str, parts: Mapping[int, Sequence[LoraFactors]]) -> str | None:
    ranks = {i: [part.rank for part in own] for i, own in parts.items()}
    if len({tuple(own) for own in ranks.values()}) < 2:
        return None
    told = [f"{own[0]} in {i}" for i, own in ranks.items()]
    return (
        f"{path!r} has rank {', '.join(told)}, and its factors are added one by one; "
        'use method="sum", or `jlora.truncate` them to one rank first'
    )


# --- the two forms ---


def _factored(row: Mapping[int, Any], leaf: Any, whole: bool) -> Factored:
    """Returns factors: of parts, if all entries are of the same, else of the kernel."""
    first = next(iter(row.values()))
    variant = variant_of_entry(first)
    parts, rejoined = variant.parts, variant.rejoined
    if whole or parts is None or rejoined is None or not are_alike(list(row.values())):
        made = {i: (lowered(entry, leaf),) for i, entry in row.items()}
        return Factored(made, lambda parts: parts[0])
    cut = {i: tuple(parts(entry)) for i, entry in row.items()}
    return Factored(cut, lambda parts: rejoined(first, parts))


def _valued(row: Mapping[int, Any], leaf: Any) -> Valued:
    first = next(iter(row.values()))
    variant = variant_of_entry(first)
    ((name, _),) = variant.arrays(first).items()
    values = {i: variant.arrays(entry)[name] for i, entry in row.items()}
    origin: Any = variant.origin
    rejoined = lambda value: entry_with(first, {name: value})
    return Valued(values, origin(first, leaf), rejoined)

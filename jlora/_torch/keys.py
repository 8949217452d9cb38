"""The keys of a file with two factors a torch module, for formats with such names."""

from collections.abc import Iterable, Mapping

import numpy as np

from .._errors import AdapterError, CorruptFileError, UnsupportedFeatureError
from .._params.given import listed
from .modules import misfit

NAME_LIMIT = 512


def has_endings(keys: Iterable[str], endings: Iterable[str]) -> bool:
    """Returns whether a key is that of a module's tensor."""
    ends = tuple(f".{ending}" for ending in endings)
    return any(key.endswith(ends) for key in keys)


def tensors_by_module(
    tensors: Mapping[str, np.ndarray],
    endings: Mapping[str, str],
    refused: Mapping[str, str],
    where: str,
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the tensors of each module by kind, both factors "a" and "b" among them.

    Args:
        tensors: by their keys in the file.
        endings: kinds by what a key ends with.
        refused: what it is that jlora has not, by what a key of it ends with.
        where: the name of the file, for messages.

    Raises:
        CorruptFileError: if a key is absurd.
        UnsupportedFeatureError: if tensors are those of something that jlora has not.
        AdapterError: if keys are unknown, or a module lacks a factor or has one twice,
            or they do not fit each other; all are named.
    """
    odd = [k[:80] for k in tensors if len(k) > NAME_LIMIT or not k.isprintable()]
    if odd:
        raise CorruptFileError(f"{where}: the keys {odd[:3]} are no names of modules")
    others = {key: what for key in tensors if (what := _ending(key, refused)[1])}
    if others:
        told = [f"{key!r} ({what})" for key, what in others.items()]
        raise UnsupportedFeatureError(f"{where} has what jlora has not: {listed(told)}")
    found: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for key, tensor in tensors.items():
        module, kind = _ending(key, endings)
        own = found.setdefault(module, {}) if kind else {}
        if not kind or kind in own:
            why = "a factor under two keys" if kind else f"none of {[*endings]}"
            problems.append(f"{key!r} is {why}")
        own[kind] = tensor
    problems += [f"{n!r} {p}" for n, own in found.items() if (p := _problem(own))]
    if problems:
        raise AdapterError(f"{where}: {listed(problems)}")
    return found


def _ending(key: str, endings: Mapping[str, str]) -> tuple[str, str]:
    """Returns the module of a key, and what its ending means; both "" if nothing."""
    for ending, what in endings.items():
        if key.endswith(f".{ending}") and len(key) > len(ending) + 1:
            return key[: -len(ending) - 1], what
    return "", ""


def _problem(own: Mapping[str, np.ndarray]) -> str | None:
    if not own.keys() >= {"a", "b"}:
        return f"has {sorted(own)} of the two factors that it needs"
    return misfit(own["a"], own["b"])

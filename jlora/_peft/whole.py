"""Leaves that are trained whole, in a PEFT adapter: `modules_to_save` and biases."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._errors import AdapterError
from .._torch.leaves import leaf_from_torch, leaves_to_torch
from .._torch.named_params import Base
from .config import PeftConfig
from .tables import (
    BASE_LAYER,
    copy_problem,
    frozen_copies,
    is_table,
    rows_problem,
    tied_copies,
    tied_heads,
)


def read_whole(
    tensors: Mapping[str, np.ndarray],
    adapted: Iterable[str],
    config: PeftConfig,
    base: Base,
    where: str,
) -> dict[str, np.ndarray]:
    """Returns what is trained whole, by path.

    Args:
        tensors: the tensors that are no factors, by name.
        adapted: the torch modules that have factors.
        config: what the file's config says.
        base: the params.
        where: the name of the file, for messages.

    Raises:
        AdapterError: with each tensor that the config or the params do not explain, and
            everything that the config promises and the file lacks.
    """
    plain = {name.replace(BASE_LAYER, "."): t for name, t in tensors.items()}
    if len(plain) < len(tensors):
        raise AdapterError(f"{where} holds tensors twice, below `base_layer` and not")
    copies = frozen_copies(tensors, base)
    given = {name: tensor for name, tensor in plain.items() if name not in copies}
    again = tied_copies(given, config, base)
    problems = [
        p for n, own in copies.items() if (p := copy_problem(base, n, own, plain[n]))
    ]
    trained = {name: tensor for name, tensor in given.items() if name not in again}
    problems += [p for name in trained if (p := _problem(name, plain, config, base))]
    problems += _missing(plain, set(adapted), config, base)
    if problems:
        raise AdapterError(f"{where}:\n" + "\n".join(problems[:50]))
    whole = [
        path
        for path in base.bindings
        if any(name in trained for _, name in base.names_of(path))
    ]
    for path in whole:
        base.check_table(path)
    return {path: leaf_from_torch(base, path, plain.__getitem__) for path in whole}


def _problem(
    name: str, tensors: Mapping[str, np.ndarray], config: PeftConfig, base: Base
) -> str | None:
    told = _is_saved(config, name) or _is_bias(config, name)
    told = told or config.decided_by_keys("modules_to_save")
    if not told and not is_table(name, tensors[name]):
        return f"{name!r}: the config does not say that it is trained"
    homes = base.homes(name)
    if not homes:
        return f"{name!r}: no leaf of the params has this name in torch"
    if problem := rows_problem(base, name, name, tensors[name]):
        return problem
    names = [n for home in homes for _, n in base.names_of(home.path)]
    lacking = sorted(set(names) - set(tensors))
    if lacking:
        return f"{homes[0].path!r} is there in part: {lacking[:3]} are missing"
    return None


def _is_saved(config: PeftConfig, name: str) -> bool:
    return config.saves(name.rpartition(".")[0] or name)


def _is_bias(config: PeftConfig, name: str) -> bool:
    said = config.bias != "none" or config.decided_by_keys("bias")
    return said and name.rpartition(".")[2] == "bias"


def _missing(
    given: Mapping[str, Any], adapted: set[str], config: PeftConfig, base: Base
) -> list[str]:
    problems = []
    for binding_path, binding in base.bindings.items():
        for _, name in base.names_of(binding_path):
            beside = config.bias == "all" or name.rpartition(".")[0] in adapted
            bias = binding.leaf == "bias" and config.bias != "none" and beside
            bias = bias and not config.is_left_out(name)
            if (bias or _is_saved(config, name)) and name not in given:
                field = "bias" if bias else "modules_to_save"
                problems.append(f"{name!r} is missing, which `{field}` promises")
    return problems


# --- writing ---


def write_whole(
    entries: Mapping[str, np.ndarray], adapted: Sequence[str], base: Base
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors by name, and the fields of the config that explain them.

    Args:
        entries: what is trained whole, by path.
        adapted: the torch modules that have factors.
        base: the params; of a module that is trained in part, the rest is written, too,
            and all that is below it.

    Raises:
        AdapterError: if PEFT has no way to say what is trained, or would train more
            of which there are no values.
    """
    if not entries:
        return {}, {}
    for path in entries:
        base.check_table(path)
    biases = {p for p in entries if base.bindings[p].leaf == "bias"}
    names = lambda path: [name for _, name in base.names_of(path)]
    saved = _modules_of([p for p in entries if p not in biases], base)
    said = PeftConfig(modules_to_save=saved)
    _check_apart(said, adapted)
    beside = {p for p in biases if all(_is_saved(said, n) for n in names(p))}
    saved_along = {
        path
        for path, binding in base.bindings.items()
        if binding.leaf == "bias" and all(_is_saved(said, n) for n in names(path))
    }
    kind = _bias_kind(biases - beside, set(adapted), base, saved_along)
    # PEFT saves all that is in a module, and modules whose names end with its name.
    paths = [p for p in base.bindings if any(_is_saved(said, n) for n in names(p))]
    values = {p: entries.get(p, base.value(p)) for p in {*paths, *biases}}
    abstract = sorted(p for p, value in values.items() if value is None)
    if abstract:
        raise AdapterError(
            f"PEFT saves {list(saved)[:5]} whole, and modules whose names end so, so "
            f"the file needs the values of {abstract[:5]} as well; give the params as "
            "arrays"
        )
    ordered = [p for p in base.bindings if p in values]
    known = {p: value for p, value in values.items() if value is not None}
    tensors = leaves_to_torch(base, ordered, known.__getitem__)
    wrapped = {f"{m}.bias" for m in adapted}
    named = {
        n.removesuffix("bias") + "base_layer.bias" if n in wrapped else n: t
        for n, t in tensors.items()
    }
    fields: dict[str, Any] = {"bias": kind}
    heads = tied_heads(entries, base)
    if heads:
        fields["ensure_weight_tying"] = True
    named |= {head: named[table] for head, table in heads.items()}
    return named, fields | ({"modules_to_save": saved} if saved else {})


def _modules_of(paths: Iterable[str], base: Base) -> tuple[str, ...]:
    """Returns the modules that some leaves are in."""
    names = {name: path for path in paths for _, name in base.names_of(path)}
    bare = sorted(path for name, path in names.items() if "." not in name)
    if bare:
        raise AdapterError(
            f"PEFT saves modules, and {bare[:5]} are parameters of the whole model in "
            "torch; merge them into the params instead"
        )
    return tuple(sorted({name.rpartition(".")[0] for name in names}))


def _check_apart(said: PeftConfig, adapted: Sequence[str]) -> None:
    """Raises for factors that PEFT would not load: they are in a module it saves."""
    wrong = sorted(module for module in adapted if said.saves(module))
    if wrong:
        raise AdapterError(
            f"torch's {wrong[:5]} are adapted and trained whole, too: they are in "
            f"{list(said.modules_to_save or ())[:5]} or have names that end so, and "
            "PEFT drops factors there; train all of it whole, or merge it into the "
            "params"
        )


def _bias_kind(
    trained: set[str], adapted: set[str], base: Base, saved: set[str]
) -> str:
    """Returns PEFT's `bias` for the biases that are trained, but for those it saves."""
    if not trained:
        return "none"
    every = {p for p, binding in base.bindings.items() if binding.leaf == "bias"}
    every -= saved
    beside = {
        path
        for path in every
        if any(name.removesuffix(".bias") in adapted for _, name in base.names_of(path))
    }
    if trained in (beside, every):
        return "lora_only" if trained == beside else "all"
    raise AdapterError(
        "PEFT trains no bias, all of them, or those of adapted modules; here "
        f"they are {sorted(trained)[:5]}. Of all, not "
        f"trained: {sorted(every - trained)[:5]}; "
        f"of adapted modules: {sorted(trained ^ beside)[:5]} differ"
    )

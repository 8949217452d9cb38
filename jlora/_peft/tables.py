"""Tables of rows in a PEFT adapter: those that are written along, and tied heads.

PEFT writes whole tables that no field of the config names: where the vocabulary was
resized, where a table or a head is adapted (its frozen weight, below `base_layer`), and
the second name of a tied one.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from .._errors import AdapterError, UnsupportedFeatureError
from .._torch.leaves import leaves_to_torch
from .._torch.named_params import Base
from .config import PeftConfig

BASE_LAYER = ".base_layer."
# What torch's models call their tables and heads.
_NAMES = frozenset(
    """
    embed_tokens lm_head wte word_embeddings embed_in embed_out tok_embeddings embedding
    embeddings tokens_embed shared output_projection
    """.split()
)


def is_table(name: str, tensor: Any) -> bool:
    """Returns whether a tensor is one that PEFT writes without a field that says so."""
    module, _, leaf = name.rpartition(".")
    known = module.rpartition(".")[2] in _NAMES
    return known and ((leaf == "weight" and tensor.ndim == 2) or leaf == "bias")


# --- frozen weights ---


def frozen_copies(tensors: Mapping[str, np.ndarray], base: Base) -> dict[str, str]:
    """Returns the tensors that are frozen weights, with torch's name of them.

    PEFT writes the weight of an adapted table or head along, and of a tied one again.
    """
    copies = {
        name: name
        for own in tensors
        if own.endswith(".base_layer.weight")
        for name in [own.replace(BASE_LAYER, ".")]
    }
    for binding in base.bindings.values():
        head = f"{binding.steps.get('tied')}.weight"
        if head in copies:
            copies[head] = binding.parameter(binding.slots[0].template)
    return copies


def copy_problem(base: Base, name: str, own: str, tensor: np.ndarray) -> str | None:
    """Returns what is wrong with a frozen weight of a file, if it is not the base's.

    A base that is not there has no values to compare, and one that the adapter's was
    loaded in another dtype from has them as that dtype rounds them.
    """
    homes = base.homes(own)
    if not homes:
        return f"{name!r}: no leaf of the params has this name in torch"
    if problem := rows_problem(base, name, own, tensor):
        return problem
    values = {home.path: base.value(home.path) for home in homes}
    known = {path: value for path, value in values.items() if value is not None}
    if len(known) < len(values):
        return None
    expected = leaves_to_torch(base, known, known.__getitem__)[own]
    if expected.shape == tensor.shape and _same(expected, tensor):
        return None
    return f"{name!r}: the file's own weight is not that of {homes[0].path!r}"


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one.astype(other.dtype), other) or np.array_equal(
        one, other.astype(one.dtype)
    )


def rows_problem(base: Base, name: str, own: str, tensor: np.ndarray) -> str | None:
    """Returns what to say of a table with another number of rows than the base's."""
    shape = torch_shape(base, own)
    if shape is None or tensor.ndim != 2 or shape[-1] != tensor.shape[1]:
        return None
    more = tensor.shape[0] - shape[0] if len(shape) == 2 else 0
    if not more:
        return None
    change = f"{abs(more)} tokens were {'added to' if more > 0 else 'taken from'}"
    return (
        f"{name!r}: {change} the vocabulary, of which the file has {tensor.shape[0]} "
        f"rows and {base.homes(own)[0].path!r} {shape[0]}; give params with its rows"
    )


def torch_shape(base: Base, name: str) -> tuple[int, ...] | None:
    """Returns the shape of a weight of two axes in torch, if it is known."""
    homes = base.homes(name)
    if len(homes) != 1 or homes[0].index:
        return None
    path = homes[0].path
    binding, shape = base.bindings[path], base.shape(path)
    if "parameter" in binding.steps:
        return shape
    if [slot.part for slot in binding.slots] != [None]:
        return None
    try:
        fans = base.axes(path).fans(shape)
    except AdapterError:
        return None
    return fans if {"embedding", "fan_in_fan_out"} & {*binding.steps} else fans[::-1]


# --- tied tables ---


def tied_copies(
    tensors: Mapping[str, np.ndarray], config: PeftConfig, base: Base
) -> set[str]:
    """Returns the tensors that repeat a table under the name of its tied head.

    Args:
        tensors: what is trained whole, by torch's names.
        config: what the file's config says.
        base: the params.

    Raises:
        UnsupportedFeatureError: if the params have one table where the file has two,
            or trains one of the two.
    """
    found = set()
    for path, binding in base.bindings.items():
        if "tied" not in binding.steps:
            continue
        table = binding.parameter(binding.slots[0].template)
        head = f"{binding.steps['tied']}.weight"
        if not {table, head} & set(tensors):
            continue
        alone = head not in tensors and config.ensure_weight_tying
        if not (alone or repeats(head, table, tensors)):
            both = {table, head} <= set(tensors)
            trained = "both, apart" if both else "one of them"
            raise UnsupportedFeatureError(
                f"{path!r} is a table and torch's {head!r}, which are one leaf in "
                f"these params; the file trains {trained}. Load it into "
                "params that are not tied"
            )
        found |= {head} & set(tensors)
    tables = [n for n, t in tensors.items() if is_table(n, t) and base.homes(n)]
    for name in sorted(set(tensors) - found):
        if not base.homes(name) and is_table(name, tensors[name]):
            if any(_is_tied(name, table, tensors, config) for table in tables):
                found.add(name)
    return found


def check_head(
    paths: Collection[str],
    tensors: Mapping[str, np.ndarray],
    config: PeftConfig,
    base: Base,
) -> None:
    """Refuses a table that is trained whole, alone, and may be the params' head.

    The rules know a head, and none of the leaves is it: the program has none, or takes
    the table. A plan tells which, of a table that is among its targets.

    Raises:
        UnsupportedFeatureError: with the path of the table.
    """
    if base.missing_head is None or config.ensure_weight_tying:
        return
    head = f"{base.missing_head}.weight"
    for path in sorted(paths):
        binding = base.bindings[path]
        table = binding.parameter(binding.slots[0].template)
        known = path in base.uses or "tied" in binding.steps
        if "embedding" in binding.steps and not known:
            if not repeats(head, table, tensors):
                raise UnsupportedFeatureError(
                    f"{path!r} is trained whole, and no leaf of the params is torch's "
                    f"{base.missing_head!r}: if the table is the head as well, both "
                    "would change. Give a plan that has it among its targets, or a "
                    'rule with the transform "tied(…)"; for a program without a head, '
                    "rules without one"
                )


def tied_heads(paths: Collection[str], base: Base) -> dict[str, str]:
    """Returns torch's names of the tied heads of some tables, with those of the tables.

    PEFT writes both, with `ensure_weight_tying`.
    """
    bindings = [base.bindings[path] for path in paths]
    return {
        f"{binding.steps['tied']}.weight": binding.parameter(binding.slots[0].template)
        for binding in bindings
        if "tied" in binding.steps
    }


def repeats(head: str, table: str, tensors: Mapping[str, np.ndarray]) -> bool:
    """Returns whether two tensors are there and the same."""
    there = head in tensors and table in tensors
    return there and np.array_equal(tensors[head], tensors[table])


def _is_tied(
    head: str, table: str, tensors: Mapping[str, np.ndarray], config: PeftConfig
) -> bool:
    """Whether PEFT wrote a tensor as a second name, not as one of its own."""
    tied = config.ensure_weight_tying or not config.saves(head.rpartition(".")[0])
    return tied and repeats(head, table, tensors)

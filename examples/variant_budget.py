"""For compare_variants.py: each variant of jlora, at about as many trained values.

A variant of the reader's own appears by itself once it is registered.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jlora

MOST = 4096  # the largest rank that is tried


class Entrant(NamedTuple):
    """A variant with the rank at which it trains about as many values as the others."""

    name: str
    rank: int
    trained: int
    lora: jlora.Lora


def settings_of_all() -> dict[str, dict[str, Any]]:
    """Returns what a config says of each variant, by name."""
    named = {name: {"variant": name} for name in jlora.variant_names()}
    return {**named, "dora": {"dora": True}, "rslora": {"rslora": True}}


def enter(
    task: Any, name: str, settings: dict[str, Any], budget: int | None, rank: int
) -> Entrant:
    """Returns a variant of a task with the largest rank that the budget allows.

    Where a rank of 1 is above it, that is taken; a variant without ranks trains what it
    trains.

    Args:
        task: what is trained; see compare_variants.py.
        name: what the variant is called.
        settings: the fields of `LoraConfig` that ask for it.
        budget: how many values may be trained; None for those of `rank`.
        rank: the rank where there is no budget.

    Raises:
        ValueError: if the variant does not fit the kernels of the task.
    """

    def at(rank: int) -> Entrant:
        config = jlora.LoraConfig(task.target, rank=rank, alpha=2.0 * rank, **settings)
        lora = jlora.lora(task.apply, [*task.besides, config])
        targets = lora.plan(*task.example).targets
        own = sum(t.trainable for t in targets if not t.config.full)
        return Entrant(name, rank, own, lora)

    if budget is None:
        return at(rank)
    best, low, high = at(1), 1, 2
    while high <= MOST and (found := at(high)).trained <= budget:
        if found.trained == best.trained:  # kernels have no more
            return best
        best, low, high = found, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        found = at(middle)
        if found.trained <= budget:
            best, low = found, middle
        else:
            high = middle
    return best


def names_among(asked: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Returns the settings of the variants that are asked for, of all by default.

    Raises:
        ValueError: if there is no such variant.
    """
    every = settings_of_all()
    if unknown := sorted({*(asked or ())} - {*every}):
        raise ValueError(f"`--variants` {unknown} are none of {sorted(every)}")
    return {name: every[name] for name in asked or every}

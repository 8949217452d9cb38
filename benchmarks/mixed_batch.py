"""Serving one batch whose sequences use different adapters; `many_adapters.py` runs it.

The sequences of an adapter are equally many and known beforehand, which favours the
runs one by one: they need no padding, no second compilation and no sorting.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from forwards import prefill, served
from models import Decoder, Params
from steps import adapter_of
from timing import Contender

import jlora

MIXED = "jlora, a gathered adapter per sequence"
GROUPED = "jlora, vmapped over adapters, sorted"
SEPARATE = "one adapter after the other"
MERGED = "merged copies, one after the other"
BASE = "base alone, the whole batch"
ROOM_FOR_COPIES = 30e9


def contenders(model: Decoder, params: Params, adapters: int) -> list[Contender]:
    """Returns what serves `model.batch` prompts, each with one of the adapters.

    Sequence i uses adapter `i % adapters`: neighbours differ. Merging is done before
    any time is taken; copies that would take too much memory are left out.
    """
    tokens = model.data(jax.random.key(1))
    lora = served(model, prefill(model))
    each = [adapter_of(lora, params, tokens, seed) for seed in range(adapters)]
    own = [tokens[i::adapters] for i in range(adapters)]
    made = [
        mixed(lora, params, each, tokens),
        grouped(lora, params, each, own),
        separate(lora, params, each, own),
    ]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]))
    if size * adapters <= ROOM_FOR_COPIES:
        made.append(merged(prefill(model), params, each, own))
    else:
        print(f"{adapters} merged copies, {size * adapters / 1e9:.0f} GB: left out")
    return [*made, contender(BASE, prefill(model), params, tokens)]


def mixed(
    lora: jlora.Lora, params: Params, each: list[jlora.Adapter], tokens: jax.Array
) -> Contender:
    """Every sequence picks its adapter; the order of the batch is free."""

    index = jnp.arange(len(tokens)) % len(each)
    return contender(MIXED, lora.apply_mixed, params, jlora.stack(each), index, tokens)


def grouped(
    lora: jlora.Lora, params: Params, each: list[jlora.Adapter], own: list[jax.Array]
) -> Contender:
    """The same for sequences that are sorted by adapter: no factors are gathered."""
    fn = jax.vmap(lora.apply, in_axes=(None, 0, 0))
    return contender(GROUPED, fn, params, jlora.stack(each), jnp.stack(own))


def separate(
    lora: jlora.Lora, params: Params, each: list[jlora.Adapter], own: list[jax.Array]
) -> Contender:
    """A forward pass for each adapter, over its own sequences."""
    program = jax.jit(lora.apply).lower(params, each[0], own[0]).compile()
    given = [(params, *both) for both in zip(each, own, strict=True)]
    return in_turn(SEPARATE, program, given)


def merged(
    fn: Callable[..., jax.Array],
    params: Params,
    each: list[jlora.Adapter],
    own: list[jax.Array],
) -> Contender:
    """The same with a copy of the kernels for each adapter."""
    copies = [jax.block_until_ready(jlora.merge(params, one)) for one in each]
    program = jax.jit(fn).lower(params, own[0]).compile()
    return in_turn(MERGED, program, list(zip(copies, own, strict=True)))


def contender(name: str, fn: Callable[..., Any], *given: Any) -> Contender:
    """Returns a contender that computes the same logits again and again."""
    program = jax.jit(fn).lower(*given).compile()
    return Contender(name, lambda _: (program(*given),), (None,))


def in_turn(name: str, program: Any, given: list[tuple[Any, ...]]) -> Contender:
    """Returns a contender of several runs, which are waited for once."""
    return Contender(name, lambda _: ([program(*one) for one in given],), (None,))


def agreement(made: list[Contender], adapters: int) -> float:
    """Returns how far the ways differ, over the largest logit: rounding only.

    Call it when every contender has run.
    """
    logits = {c.name: c.state[0] for c in made}
    flat = lambda parts: jnp.stack(list(parts)).astype(jnp.float32)
    first = logits.pop(MIXED)
    first = flat(first[i::adapters] for i in range(adapters))
    logits.pop(BASE)
    worst = max(float(jnp.abs(flat(other) - first).max()) for other in logits.values())
    return worst / float(jnp.abs(first).max())

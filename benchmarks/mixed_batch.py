"""Serving one batch whose sequences use different adapters.

`python benchmarks/mixed_batch.py` measures one token for each sequence, from a cache of
keys and values, with 1 to 128 adapters: the base, `lora.apply_mixed`, which chooses
between two forms, the same of adapters that `jlora.prepare` has laid out before, and
the form in which each sequence has a copy of its factors.

`many_adapters.py` runs whole prompts. There the sequences of an adapter are equally
many and known beforehand, which favours the runs one by one: they need no padding, no
second compilation and no sorting.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from forwards import (
    decode,
    decoder,
    empty_cache,
    parser,
    prefill,
    served,
    unrolled,
)
from models import Decoder, Params
from steps import adapter_of
from timing import Contender, interleave, lines, summarize, table, write

import jlora

MIXED = "jlora, an adapter per sequence"
PREPARED = f"{MIXED}, prepared"
GATHERED = "a copy of its factors per sequence"
GROUPED = "jlora, vmapped over adapters, sorted"
SEPARATE = "one adapter after the other"
MERGED = "merged copies, one after the other"
BASE = "base alone, the whole batch"
AXES = "adapters", "time / base"
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


# --- one token more ---


def decode_contenders(
    model: Decoder, params: Params, adapters: int, length: int, steps: int
) -> list[Contender]:
    """Returns what gives each of `model.batch` sequences some tokens.

    Args:
        model: unrolled, as are its params (`forwards.unrolled`).
        params: the base.
        adapters: how many there are; sequence i uses adapter `i % adapters`.
        length: that of the cache, whose last token is decoded again and again.
        steps: how many are decoded before any is waited for, as a server would.
    """
    lora = served(model, decode(model))
    # The kernels, and so their adapters, are those of whole prompts.
    whole, prompts = served(model, prefill(model)), model.data(jax.random.key(1))
    each = [adapter_of(whole, params, prompts, seed) for seed in range(adapters)]
    stacked, index = jlora.stack(each), jnp.arange(model.batch) % adapters

    def mixed(cache: Any, params: Params, stacked: Any, *given: Any) -> Any:
        index, tokens, position = given
        own = params, stacked, index, tokens, cache, position
        return lora.apply_mixed(*own, in_axes=(0, 0, None))

    def gathered(cache: Any, params: Params, stacked: Any, *given: Any) -> Any:
        index, tokens, position = given

        def one(row: Any, token: jax.Array, cache: Any) -> Any:
            cache = jax.tree.map(lambda v: v[None], cache)
            token, cache = lora.apply(params, row, token[None], cache, position)
            return token[0], jax.tree.map(lambda v: v[0], cache)

        rows = jax.tree.map(lambda v: v[index], stacked)
        return jax.vmap(one)(rows, tokens, cache)

    def base(cache: Any, params: Params, tokens: jax.Array, position: Any) -> Any:
        return decode(model)(params, tokens, cache, position)

    given = jnp.arange(model.batch) % model.vocab, jnp.int32(length - 1)
    cache, own = functools.partial(empty_cache, model, length), (params, stacked, index)
    ready = params, jax.jit(jlora.prepare)(stacked), index
    ways = [
        (BASE, base, (params, *given)),
        (MIXED, mixed, (*own, *given)),
        (PREPARED, mixed, (*ready, *given)),
        (GATHERED, gathered, (*own, *given)),
    ]
    return [next_tokens(name, fn, steps, cache(), *args) for name, fn, args in ways]


def next_tokens(
    name: str, fn: Callable[..., Any], steps: int, cache: Any, *given: Any
) -> Contender:
    """Returns a contender that decodes the same tokens, its cache updated in place."""
    program = jax.jit(fn, donate_argnums=0).lower(cache, *given).compile()

    def step(tokens: Any, cache: Any) -> tuple[Any, Any]:
        for _ in range(steps):
            tokens, cache = program(cache, *given)
        return tokens, cache

    return Contender(name, step, (None, cache))


def flags_of() -> argparse.Namespace:
    """Returns the flags."""
    cpu = jax.default_backend() == "cpu"
    made = parser(str(__doc__).splitlines()[0], rounds=12 if cpu else 30)
    counts = [1, 8, 64] if cpu else [1, 2, 4, 8, 16, 32, 64, 128]
    made.add_argument("--adapters", type=int, nargs="+", default=counts)
    made.add_argument("--sequences", type=int, default=64)
    made.add_argument("--cache", type=int, default=128 if cpu else 512)
    made.add_argument("--decode-steps", type=int, default=4 if cpu else 16)
    return made.parse_args()


def over_base(seconds: dict[int, Any]) -> dict[str, dict[int, float]]:
    """Returns the time of each way over that of the base, by the number of adapters."""
    median = lambda each, name: each[name]["median"]
    return {
        name: {n: median(e, name) / median(e, BASE) for n, e in seconds.items()}
        for name in (MIXED, PREPARED, GATHERED)
    }


def main() -> None:
    """Measures, prints and writes."""
    flags = flags_of()
    model = decoder(flags, batch=flags.sequences, seq=1)
    params = jax.jit(model.init)(jax.random.key(0))
    model, params = unrolled(model, params)
    print(model)
    seconds, equal, rows = {}, {}, []
    for count in flags.adapters:
        steps = flags.decode_steps
        made = decode_contenders(model, params, count, flags.cache, steps)
        times = summarize(interleave(made, rounds=flags.rounds), steps)
        equal[count] = float(jnp.mean(made[2].state[0] == made[3].state[0]))
        seconds[count] = times
        base = times[BASE]["median"]
        for name, t in times.items():
            ratio = f"{t['median'] / base:.2f}"
            rows.append([str(count), name, f"{t['median'] * 1e3:.2f}", ratio])
        print(f"{count} adapters: {equal[count]:.1%} of tokens are those of the copies")
    print(table(["adapters", "", "median ms", "/ base"], rows))
    about = f"{flags.sequences} sequences, a cache of {flags.cache}"
    named = {f"{n} adapters, {about}": each for n, each in seconds.items()}
    result = {"model": str(model), "seconds": named, "equal tokens": equal}
    path = write("mixed_batch", result, flags.out)
    title = f"A token of {flags.sequences} sequences, each with one of the adapters"
    lines(path.with_suffix(".png"), title, over_base(seconds), AXES)


if __name__ == "__main__":
    main()

"""What an adapter costs at inference: merged nothing, unmerged two thin products.

`python benchmarks/inference.py`. Prefill is the forward pass of whole prompts; decode
is one token per sequence, greedy, with a cache of keys and values that is updated in
place, layers unrolled. Decode steps are dispatched several at a time, as a server does
that does not wait for each token. `--mesh tensor=2` runs all on a mesh of devices.
"""

import argparse
import dataclasses
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
from jax.sharding import Mesh
from models import Decoder, Params
from placing import add_mesh, decode_places, drawn, mesh_named, on_mesh
from programs import ratio_lines
from steps import adapter_of, on_a_mesh, where
from timing import Contender, bars, interleave, summarize, table, write

import jlora
from jlora._product.gpu_probe import fault

BASE, MERGED, UNMERGED = "base", "jlora merged", "jlora unmerged"
PORTABLE = f"{UNMERGED}, factored"  # without the kernel, where that is chosen
TARGETS = {
    "merged / base": "1.00 +- 0.03",
    "unmerged / base prefill": "<= 1.12",
    "unmerged factored / base prefill": "<= 1.12",
    "unmerged / base decode, batch 1": "<= 1.10",
    "unmerged / base decode, batch 8": "<= 1.18",
    "unmerged / base decode, batch 64": "<= 1.12",
}


def flags_of() -> argparse.Namespace:
    """Returns the flags."""
    cpu = jax.default_backend() == "cpu"
    made = parser(str(__doc__).splitlines()[0], rounds=20 if cpu else 30)
    made.add_argument("--batch", type=int, default=4 if cpu else 8, help="of prefill")
    made.add_argument("--seq", type=int, default=256 if cpu else 1024)
    made.add_argument("--cache", type=int, default=256 if cpu else 1024)
    made.add_argument("--decode-batches", type=int, nargs="*", default=[1, 8, 64])
    made.add_argument("--decode-steps", type=int, default=8 if cpu else 16)
    add_mesh(made)
    flags = made.parse_args()
    flags.mesh = mesh_named(made, flags)
    return flags


def prefill_contenders(
    model: Decoder,
    params: Params,
    merged: Params,
    adapter: jlora.Adapter,
    tokens: jax.Array,
) -> tuple[list[Contender], bool]:
    """Returns base, merged and unmerged, and whether the first two are one program.

    Where the kernel runs, unmerged is there with each of two contractions.
    """
    fn = prefill(model)
    # Each jitted anew, as a cached executable would be equal to itself; from one line,
    # as the text names the line it was made from.
    anew = lambda held: jax.jit(prefill(model)).lower(held, tokens).compile()
    base, again = map(anew, (params, merged))
    options = {UNMERGED: {}}
    if fault() is None:
        options[PORTABLE] = {"contraction": "factored"}
    same = base.as_text() == again.as_text()
    # The logits are the state, so that what is waited for is what is computed.
    run = lambda program, *given: lambda _: (program(*given),)
    made = [
        Contender(BASE, run(base, params, tokens), (None,)),
        Contender(MERGED, run(again, merged, tokens), (None,)),
    ]
    for name, chosen in options.items():
        given = params, adapter, tokens
        lora = jax.jit(served(model, fn, **chosen).apply).lower(*given).compile()
        made.append(Contender(name, run(lora, *given), (None,)))
    return made, same


def decode_contenders(
    model: Decoder,
    params: Params,
    adapter: jlora.Adapter,
    length: int,
    steps: int,
    mesh: Mesh | None = None,
) -> list[Contender]:
    """Returns `steps` tokens of base and unmerged, each with its own cache."""
    fn = decode(model)
    lora = served(model, fn)
    base = lambda held, *rest: fn(held["params"], *rest)
    adapted = lambda held, *rest: lora.apply(held["params"], held["adapter"], *rest)
    made = []
    for name, step in ((BASE, base), (UNMERGED, adapted)):
        held = {"params": params} | ({"adapter": adapter} if step is adapted else {})
        tokens = jnp.zeros(model.batch, jnp.int32)
        positions = [jnp.int32(length - steps + i) for i in range(steps)]
        start = (held, tokens, empty_cache(model, length), positions[0])
        if mesh is not None:
            places = decode_places(mesh, model.batch)
            start = (held, *map(jax.device_put, start[1:], places))
            positions = jax.device_put(positions, places[-1])
        program = compiled(step, start)
        many = repeated(program, held, positions)
        made.append(Contender(name, many, start[1:3]))
    return made


def compiled(step: Callable[..., Any], start: tuple[Any, ...]) -> Any:
    """Returns a compiled step whose tokens and cache come out where they went in."""
    out = where(start[1:3]) if on_a_mesh(start[0]) else None
    return (
        jax.jit(step, donate_argnums=(1, 2), out_shardings=out).lower(*start).compile()
    )


def repeated(
    program: Callable[..., Any], held: Any, positions: list[jax.Array]
) -> Callable[..., tuple[Any, ...]]:
    """Returns a step that decodes one token at each of the positions."""

    def step(tokens: jax.Array, cache: Any) -> tuple[Any, ...]:
        for position in positions:
            tokens, cache = program(held, tokens, cache, position)
        return tokens, cache

    return step


def measured(
    contenders: list[Contender], rounds: int, per: int = 1
) -> dict[str, dict[str, float]]:
    """Returns the times of each contender, and prints them."""
    times = summarize(interleave(contenders, rounds=rounds), per)
    ratio = {n: t["median"] / times[BASE]["median"] for n, t in times.items()}
    rows = [
        (name, *(f"{t[k] * 1e3:.3f}" for k in ("median", "min")), f"{ratio[name]:.3f}")
        for name, t in times.items()
    ]
    print(table(("", "median ms", "min ms", "ratio to base"), rows) + "\n")
    return times


def main() -> None:
    """Measures, prints and writes."""
    flags = flags_of()
    model = decoder(flags, batch=flags.batch, seq=flags.seq)
    model = on_mesh(model, flags.mesh) if flags.mesh else model
    params, tokens = drawn(model, flags.mesh)
    lora = served(model, prefill(model))
    adapter = adapter_of(lora, params, tokens)
    merged = jax.block_until_ready(jlora.merge(params, adapter))
    print(model)

    print(f"\nprefill, {model.batch} x {model.seq} tokens")
    contenders, same = prefill_contenders(model, params, merged, adapter, tokens)
    results = {"prefill": measured(contenders, flags.rounds)}
    ratio = lambda name, case: (
        results[case][name]["median"] / results[case][BASE]["median"]
    )
    ratios = {
        "merged / base": ratio(MERGED, "prefill"),
        "unmerged / base prefill": ratio(UNMERGED, "prefill"),
    }
    if PORTABLE in results["prefill"]:
        ratios["unmerged factored / base prefill"] = ratio(PORTABLE, "prefill")
    del contenders, merged
    flat, params = unrolled(model, params)
    lora = served(flat, prefill(flat))
    adapter = adapter_of(lora, params, tokens)
    for batch in flags.decode_batches:
        case = f"decode, batch {batch}"
        print(f"{case}, the last tokens of a cache of {flags.cache}, per token")
        small = dataclasses.replace(flat, batch=batch, seq=1)
        steps = flags.decode_steps
        lengths = flags.cache, steps
        both = decode_contenders(small, params, adapter, *lengths, flags.mesh)
        results[case] = measured(both, flags.rounds, per=steps)
        ratios[f"unmerged / base {case}"] = ratio(UNMERGED, case)
    report(model, results, ratios, same, flags)


def report(
    model: Decoder,
    results: dict[str, Any],
    ratios: dict[str, float],
    same: bool,
    flags: argparse.Namespace,
) -> None:
    """Writes the results and prints the ratios."""
    given = {key: str(value) for key, value in vars(flags).items() if key != "out"}
    written = {"model": str(model), "flags": given, "seconds": results}
    written |= {"ratios": ratios, "merged is the program of the base": same}
    sizes = flags.mesh.shape.items() if flags.mesh else ()
    on = "".join(f"-{axis}={size}" for axis, size in sizes)
    path = write(f"inference{on}", written, flags.out)
    bars(path.with_suffix(".png"), "Time over the base model's", ratios, "ratio")
    print(f"merged params run the compiled program of the base: {yes(same)}")
    targets = {} if flags.mesh else {n: t for n, t in TARGETS.items() if n in ratios}
    print(ratio_lines(ratios, targets))


def yes(fact: bool) -> str:
    """Returns a fact in a word."""
    return "yes" if fact else "no"


if __name__ == "__main__":
    main()

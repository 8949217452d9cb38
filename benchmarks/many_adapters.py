"""Many adapters on one frozen base: trained by one vmapped step, served in one batch.

`python benchmarks/many_adapters.py`. The rival of the vmapped step is the same step run
once for each adapter, all of them dispatched before any is waited for.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mixed_batch
from forwards import decoder, parser
from models import Decoder, Params
from programs import ratio_lines
from steps import (
    OPTIMIZER,
    RANK,
    adapter_of,
    compiled,
    frozen_step,
    lora_of,
    low_rank_losses,
    trained_step,
)
from timing import Contender, bars, interleave, summarize, table, write

import jlora

FROZEN, JLORA, FACTORED = "frozen limit", "jlora", "factored, autodiff"
VMAPPED = {JLORA: "jlora vmapped", FACTORED: "factored, autodiff, vmapped"}
TARGETS = {64: ">= 4.7", 256: ">= 3.4"}
LIMITS = {64: "<= 1.3", 256: "<= 1.12"}


def flags_of() -> argparse.Namespace:
    """Returns the flags."""
    cpu = jax.default_backend() == "cpu"
    made = parser(str(__doc__).splitlines()[0], rounds=8 if cpu else 20)
    tokens = [64, 256] if cpu else [64, 256, 1024]
    made.add_argument("--adapters", type=int, default=8)
    made.add_argument("--tokens", type=int, nargs="*", default=tokens)
    made.add_argument("--prompts", type=int, default=32, help="of the mixed batch")
    made.add_argument("--prompt-tokens", type=int, default=32)
    flags = made.parse_args()
    if flags.prompts % flags.adapters:
        made.error("every adapter has as many prompts: --prompts, --adapters")
    return flags


def states_of(model: Decoder, params: Params, count: int) -> list[tuple[Any, ...]]:
    """Returns (adapter, optimizer state, batch) of each of the runs."""
    batches = [model.data(jax.random.key(10 + i)) for i in range(count)]
    first = adapter_of(lora_of(model), params, batches[0])
    scale = lambda i: jax.tree.map(lambda leaf: leaf * (1 + i / 99), first)
    adapters = [scale(i) for i in range(count)]
    return [(a, OPTIMIZER.init(a), b) for a, b in zip(adapters, batches, strict=True)]


def separate(
    loss: Callable[..., jax.Array], params: Params, states: list[tuple[Any, ...]]
) -> tuple[Contender, Any]:
    """Returns the runs one after the other, and their one compiled step."""
    copies = [jax.tree.map(jnp.copy, state) for state in states]
    held = [state[:2] for state in copies]
    batches = [state[2] for state in copies]
    program = compiled(trained_step(loss), (*held[0], params, batches[0]), 2)

    def step(held: list[Any]) -> tuple[Any, ...]:
        pairs = zip(held, batches, strict=True)
        return ([program(*own, params, batch) for own, batch in pairs],)

    return Contender(f"{len(states)} runs", step, (held,)), program


def together(trees: Sequence[Any]) -> Any:
    """Returns the leaves of all trees, with an axis in front."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def vmapped(
    name: str,
    loss: Callable[..., jax.Array],
    params: Params,
    states: list[tuple[Any, ...]],
) -> tuple[Contender, Any]:
    """Returns the step over all states at once, and the same compiled.

    The axis of adapters is behind the one of layers, over which a scan goes: it would
    put it there at each step.
    """
    adapters, optimizers, batches = zip(*states, strict=True)
    behind = lambda leaf: min(1, leaf.ndim - 1)
    adapter, optimizer = (
        jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, behind(leaf)), stacked)
        for stacked in (jlora.stack(adapters), together(optimizers))
    )
    state = adapter, optimizer, params, together(batches)
    axes = (*jax.tree.map(behind, state[:2]), None, 0)
    step = jax.vmap(trained_step(loss), in_axes=axes, out_axes=axes)
    program = compiled(step, state, 2)
    return Contender(name, program, state), program


def frozen(model: Decoder, params: Params, count: int) -> tuple[Contender, Any]:
    """Returns the step of the frozen base on the tokens of all adapters at once."""
    whole = dataclasses.replace(model, batch=count * model.batch)
    batch = whole.data(jax.random.key(3))
    inputs = jnp.zeros_like(whole.embed(params, batch))
    state = (jnp.zeros(()), inputs), params, batch
    program = compiled(frozen_step(whole), state, 1)
    return Contender(FROZEN, program, state), program


def held_once(text: str, model: Decoder, count: int) -> str:
    """Returns "yes", or "no" and the shapes that hold a kernel `count` times.

    A base product that is not batched over the adapters has the kernel as its operand,
    and nothing of the kernel's size times the adapters occurs.
    """
    kernels = set(model.kernel_shapes().values())
    # Activations, and factors of up to three siblings side by side.
    alike = {model.seq, RANK, 2 * RANK, 3 * RANK}
    if model.layers == count or alike & {side for kernel in kernels for side in kernel}:
        return "cannot tell, other arrays have such shapes"
    wanted = set()
    for d_in, d_out in kernels:
        wanted |= {(count, d_in, d_out), (count, model.layers, d_in, d_out)}
        wanted |= {(count * d_in, d_out), (d_in, count * d_out)}
    wanted = {tuple(sorted(shape)) for shape in wanted}
    found = set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))
    sizes = lambda shape: tuple(sorted(int(n) for n in shape.split(",") if n != "1"))
    copies = [f"[{shape}]" for shape in sorted(found) if sizes(shape) in wanted]
    return f"no, {' '.join(copies)}" if copies else "yes"


def megabytes(program: Any) -> float:
    """Returns what a program needs: its arguments and its temporary arrays."""
    memory = program.memory_analysis()
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6


def train(model: Decoder, params: Params, flags: argparse.Namespace) -> dict[str, Any]:
    """Measures the training steps at one length."""
    states = states_of(model, params, flags.adapters)
    losses = low_rank_losses(model)
    runs, single = separate(losses[JLORA], params, states)
    contenders, memory = [runs], {runs.name: megabytes(single)}
    limit, program = frozen(model, params, flags.adapters)
    contenders.append(limit)
    memory[FROZEN] = megabytes(program)
    held = ""
    for name, label in VMAPPED.items():
        contender, program = vmapped(label, losses[name], params, states)
        contenders.append(contender)
        memory[label] = megabytes(program)
        if name == JLORA:
            held = held_once(program.as_text(), model, flags.adapters)
    times = summarize(interleave(contenders, rounds=flags.rounds))
    show(times, memory)
    print(f"base kernels are held once: {held}")
    first = times[runs.name]["median"]
    gains = {name: first / t["median"] for name, t in times.items()}
    return {"seconds": times, "megabytes": memory, "held once": held, "gains": gains}


def show(times: dict[str, Any], memory: dict[str, float] | None = None) -> None:
    """Prints the times of one case."""
    first = next(iter(times.values()))["median"]
    head = ["", "median ms", "min ms", "first / this"]
    rows = []
    for name, t in times.items():
        median, least = t["median"], t["min"]
        row = [name, f"{median * 1e3:.2f}", f"{least * 1e3:.2f}"]
        row.append(f"{first / median:.2f}")
        rows.append(row + ([f"{memory[name]:.1f}"] if memory else []))
    print(table(head + (["MB of a program"] if memory else []), rows))


def serve(model: Decoder, params: Params, flags: argparse.Namespace) -> dict[str, Any]:
    """Measures the ways to serve a mixed batch."""
    made = mixed_batch.contenders(model, params, flags.adapters)
    times = summarize(interleave(made, rounds=flags.rounds))
    show(times)
    apart = mixed_batch.agreement(made, flags.adapters)
    print(f"logits differ by {apart:.1e} of the largest")
    return {"seconds": times, "difference": apart}


def ratios_of(
    trained: dict[int, Any], served: dict[str, Any], count: int
) -> dict[str, tuple[float, str | None]]:
    """Returns each ratio with its target."""
    ratios: dict[str, tuple[float, str | None]] = {}
    for tokens, result in trained.items():
        gain, by_hand = (result["gains"][VMAPPED[n]] for n in (JLORA, FACTORED))
        at = f"at {tokens} tokens"
        ratios[f"{count} runs / vmapped {at}"] = gain, TARGETS.get(tokens)
        ratios[f"factored, autodiff / jlora, vmapped {at}"] = gain / by_hand, None
        limit = result["gains"][FROZEN] / gain
        ratios[f"vmapped / {FROZEN} {at}"] = limit, LIMITS.get(tokens)
    seconds = {name: t["median"] for name, t in served["seconds"].items()}
    for name in (mixed_batch.SEPARATE, mixed_batch.MERGED):
        if name in seconds:
            ratio = seconds[name] / seconds[mixed_batch.MIXED]
            ratios[f"{name} / mixed batch"] = ratio, None
    for name in (mixed_batch.MIXED, mixed_batch.GROUPED):
        ratios[f"{name} / base"] = seconds[name] / seconds[mixed_batch.BASE], None
    return ratios


def main() -> None:
    """Measures, prints and writes."""
    flags = flags_of()
    count, trained = flags.adapters, {}
    params = jax.jit(decoder(flags).init)(jax.random.key(0))
    print(decoder(flags))
    for tokens in flags.tokens:
        print(f"\n{count} adapters trained on one base, {tokens} tokens each")
        model = decoder(flags, batch=1, seq=tokens)
        trained[tokens] = train(model, params, flags)
    print(
        f"\n{flags.prompts} prompts of {flags.prompt_tokens} tokens, {count} adapters"
    )
    model = decoder(flags, batch=flags.prompts, seq=flags.prompt_tokens)
    served = serve(model, params, flags)
    ratios = ratios_of(trained, served, count)
    report(model, {"trained": trained, "served": served}, ratios, flags)


def report(
    model: Decoder,
    results: dict[str, Any],
    ratios: dict[str, tuple[float, str | None]],
    flags: argparse.Namespace,
) -> None:
    """Writes the results and prints the ratios."""
    given = {key: str(value) for key, value in vars(flags).items() if key != "out"}
    values = {name: value for name, (value, _) in ratios.items()}
    written = {"model": str(model), "flags": given, **results, "ratios": values}
    path = write("many_adapters", written, flags.out)
    bars(path.with_suffix(".png"), f"{flags.adapters} adapters", values, "ratio")
    print(ratio_lines(values, {name: t for name, (_, t) in ratios.items() if t}))


if __name__ == "__main__":
    main()

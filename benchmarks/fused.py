"""What the fused form gives on a Hopper GPU: alone, and in a training step.

`python benchmarks/fused.py`. The kernel computes `x·W + h·b` in one product; beside it
are the base product alone and the other forms, forward and with the kernel turned, as
backward. In the step, `contraction="fused"` is beside the default and the frozen limit.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from cases import FROZEN, JLORA
from cases import decoder as sized
from programs import ratio_lines
from steps import adapter_of, contender, lora_of, makers
from timing import RESULTS, Contender, bars, interleave, summarize, write

from jlora._product.gpu_probe import fault
from jlora._product.hopper_kernel import sum_of_products

ROWS, RANK = 8192, 16
SHAPES = ((2048, 2048), (2048, 5632), (5632, 2048), (4096, 4096))
OTHER_RANKS = (8, 32, 64)
FUSED = "jlora fused"
STEPS = (JLORA, FUSED)
TARGETS = {f"{FUSED} / {FROZEN}, d2048": "<= 1.15"}
TARGETS |= {f"{FUSED} / {FROZEN}, d4096": "<= 1.08"}
REPEATS = 20


def products(turned: bool) -> dict[str, Callable[..., jax.Array]]:
    """Returns the ways to compute `x·W + h·b`, and `x·W` alone."""
    axes = (((1,), (1 if turned else 0,)), ((), ()))
    base = lambda x, w: jax.lax.dot_general(x, w, axes)

    def extended(x: jax.Array, w: jax.Array, h: jax.Array, b: jax.Array) -> jax.Array:
        both = jnp.concatenate([w, b.T if turned else b], axis=int(turned))
        return base(jnp.concatenate([x, h], axis=1), both)

    return {
        "base": lambda x, w, h, b: base(x, w),
        "separate": lambda x, w, h, b: base(x, w) + h @ b,
        "extended": extended,
        "fused": lambda x, w, h, b: sum_of_products([x], [w], h, b, turned=turned),
    }


def operands(depth: int, columns: int, rank: int, turned: bool) -> list[jax.Array]:
    """Returns random operands, `h·b` about as large as `x·W`."""
    kernel = (columns, depth) if turned else (depth, columns)
    shapes = [(ROWS, depth), kernel, (ROWS, rank), (rank, columns)]
    keys = jax.random.split(jax.random.key(0), 4)
    pairs = zip(keys, shapes, strict=True)
    x, w, h, b = (jax.random.normal(k, s, jnp.bfloat16) for k, s in pairs)
    return [x, w, h, (depth / rank) ** 0.5 * b]


def queued(fn: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Returns a step that runs `fn` several times, and waits for the last."""

    def step(*args: jax.Array) -> tuple[Any, ...]:
        jax.block_until_ready([fn(*args) for _ in range(REPEATS)][-1])
        return ()

    return step


def product_row(
    depth: int, columns: int, rank: int, turned: bool, rounds: int
) -> dict[str, Any]:
    """Returns the microseconds of each way, and the fused one's largest error.

    It is relative to the largest value, beside the product of the same operands in
    float32; rounding to bfloat16 alone makes up to 2⁻⁸ = 0.004.
    """
    args = operands(depth, columns, rank, turned)
    ways = {n: jax.jit(fn) for n, fn in products(turned).items()}
    made = [Contender(n, queued(fn), tuple(args)) for n, fn in ways.items()]
    times = summarize(interleave(made, rounds=rounds))
    wide = [v.astype(jnp.float32) for v in args]
    with jax.default_matmul_precision("highest"):
        expected = products(turned)["separate"](*wide)
    error = jnp.max(jnp.abs(ways["fused"](*args) - expected))
    row = {"rows x in x out": f"{ROWS} x {depth} x {columns}", "rank": rank}
    row |= {"kernel": "turned" if turned else "as it lies"}
    row |= {f"{n} us": 1e6 * each["median"] / REPEATS for n, each in times.items()}
    return row | {"error": f"{float(error / jnp.max(jnp.abs(expected))):.1e}"}


def fused_step(model: Any, params: Any, batch: jax.Array) -> Contender:
    """Returns jlora's step with the fused form."""
    lora = lora_of(model, contraction="fused")
    loss = lambda adapter, params, batch: lora.apply(params, adapter, batch)
    adapter = adapter_of(lora, params, batch)
    return contender(FUSED, loss, adapter, params, batch)


def difference(model: Any, params: Any, batch: jax.Array) -> float:
    """Returns how far the fused form's gradient is from the default's, relatively."""
    adapter = adapter_of(lora_of(model), params, batch)

    def gradient(contraction: str) -> list[jax.Array]:
        lora = lora_of(model, contraction=contraction)
        loss = lambda adapter, params: lora.apply(params, adapter, batch)
        return jax.tree.leaves(jax.jit(jax.grad(loss))(adapter, params))

    pairs = list(zip(gradient("fused"), gradient("factored"), strict=True))
    norm = lambda values: jnp.sqrt(sum(jnp.sum(v**2) for v in values))
    return float(norm([f - g for f, g in pairs]) / norm([g for _, g in pairs]))


def step_times(size: str, rounds: int) -> tuple[dict[str, Any], float]:
    """Returns the times of the steps of a decoder, and `difference`."""
    model = sized(size)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = model.data(jax.random.key(1))
    made = makers(model, params, batch)
    steps = [made[FROZEN](), made[JLORA](), fused_step(model, params, batch)]
    times = summarize(interleave(steps, rounds=rounds))
    return times, difference(model, params, batch)


def main() -> None:
    """Times products and steps, and writes what came out."""
    made = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--out", type=Path, default=RESULTS)
    flags = made.parse_args()
    if found := fault():
        print(f"there is nothing to time: {found}")
        return
    rows = []
    for depth, columns in SHAPES:
        for turned in (False, True):
            rows.append(product_row(depth, columns, RANK, turned, flags.rounds))
            print(rows[-1], flush=True)
    for rank in OTHER_RANKS:
        rows.append(product_row(*SHAPES[0], rank, False, flags.rounds))
        print(rows[-1], flush=True)
    seconds, ratios = {}, {}
    for size in ("d2048", "d4096"):
        seconds[size], apart = step_times(size, flags.rounds)
        times = {name: each["median"] for name, each in seconds[size].items()}
        ratios |= {f"{n} / {FROZEN}, {size}": times[n] / times[FROZEN] for n in STEPS}
        ratios[f"gradients, {FUSED} - {JLORA}, {size}"] = apart
        print(seconds[size], apart, flush=True)
    result = {"rows": rows, "seconds": seconds, "ratios": ratios}
    path = write("fused", result, flags.out)
    drawn = {n: v for n, v in ratios.items() if FROZEN in n}
    bars(path.with_suffix(".png"), "A step / the frozen limit", drawn, "ratio")
    print(ratio_lines(ratios, TARGETS))


if __name__ == "__main__":
    main()

"""The peak bytes of a training step, as the compiler and the device count them.

`python benchmarks/memory.py`. The compiler's count needs no weights: arguments, outputs
and temporaries, less what aliases. On a GPU each step also runs, and the device says
what its peak was. Every contender has a process of its own.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Two processes share a device, and the one that only waits should leave room.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from models import Decoder
from programs import (
    CONTENDERS,
    FACTORED,
    FULL,
    JLORA,
    MERGED,
    in_child,
    ratio_lines,
    serve,
    shapes_of,
    state_of,
    step_of,
)
from timing import bars, table, write

SIZES = ("d", "ffn", "layers", "heads", "kv_heads", "vocab", "batch", "seq")
ON_CPU = {"d": 512, "dtype": "float32"}
ON_GPU = {
    "d": 2048,
    "ffn": 5632,
    "layers": 16,
    "heads": 16,
    "kv_heads": 16,
    "vocab": 32000,
    "batch": 8,
    "seq": 1024,
    "dtype": "bfloat16",
}
PARTS = ("argument", "output", "temp", "alias")
HEAD = (*PARTS, "peak", "device, made", "device, peak")
NOTES = (
    "MB of 10^6 bytes; peak = argument + output + temp - alias, as compiled",
    "device: what it had in use at most, when the state was made and after the steps;",
    "more after the steps means that the peak is theirs",
    "QLoRA: `variants.py`",
)
Row = dict[str, Any]


def flags_of() -> argparse.Namespace:
    """Returns the flags."""
    cpu = jax.default_backend() == "cpu"
    sizes = ON_CPU if cpu else ON_GPU
    made = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for size in SIZES:
        default = sizes.get(size, getattr(Decoder, size))
        made.add_argument(f"--{size.replace('_', '-')}", type=int, default=default)
    made.add_argument("--dtype", default=sizes["dtype"])
    remat = ["no", "yes"] if cpu else ["yes"]
    made.add_argument("--remat", nargs="+", choices=("no", "yes"), default=remat)
    made.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    made.add_argument("--steps", type=int, default=0 if cpu else 2, help="that run")
    made.add_argument("--out", type=Path, help="the folder of the results")
    return made.parse_args()


def measured(name: str, sizes: Mapping[str, Any], steps: int) -> Row:
    """Returns a contender's row, measured in this process.

    Args:
        name: the contender.
        sizes: the fields of the decoder, its dtype by name.
        steps: how many steps run; with none, nothing is allocated.
    """
    model = Decoder(**{**sizes, "dtype": jnp.dtype(sizes["dtype"])})
    compiled = step_of(name, model).lower(*shapes_of(name, model)).compile()
    row = counted(compiled.memory_analysis())
    if not steps or peak_of_device() is None:
        return row
    make = jax.jit(functools.partial(state_of, name, model))
    state = jax.block_until_ready(make(jax.random.key(0)))
    row["device, made"] = peak_of_device()
    for _ in range(steps):
        new = jax.block_until_ready(compiled(*state))
        state = (*new, *state[len(new) :])
    return row | {"device, peak": peak_of_device()}


def counted(stats: Any) -> Row:
    """Returns the bytes that the compiler counts."""
    row = {part: getattr(stats, f"{part}_size_in_bytes") for part in PARTS}
    row["peak"] = row["argument"] + row["output"] + row["temp"] - row["alias"]
    return row


def peak_of_device() -> int | None:
    """Returns the most bytes that were in use, None of a device that does not count."""
    stats = jax.devices()[0].memory_stats()
    return stats and stats.get("peak_bytes_in_use")


def ratios_of(rows: Mapping[str, Row], case: str, on_gpu: bool) -> list[tuple]:
    """Returns name, value and target of each ratio of a case."""
    wanted = [(JLORA, FULL, "peak", "<= 0.35" if on_gpu else None)]
    wanted.append((JLORA, FULL, "device, peak", "<= 0.35" if on_gpu else None))
    wanted.append((MERGED, JLORA, "temp", ">= 1"))
    wanted.append((FACTORED, JLORA, "temp", None))
    return [
        (f"{a} / {b}, {what}, {case}", rows[a][what] / rows[b][what], target)
        for a, b, what, target in wanted
        if all(name in rows and rows[name].get(what) for name in (a, b))
    ]


def in_words(rows: Mapping[str, Row]) -> str:
    """Returns the table of a case, in MB."""
    keys = [key for key in HEAD if any(key in row for row in rows.values())]
    cell = lambda value: "-" if value is None else f"{value / 1e6:,.1f}"
    lines = [(name, *(cell(row.get(k)) for k in keys)) for name, row in rows.items()]
    return table(("", *keys), lines)


def case_of(model: Decoder, flags: argparse.Namespace) -> dict[str, Row]:
    """Returns the rows of every contender on one model."""
    sizes = dataclasses.asdict(model)
    rows = {}
    for name in flags.contenders:
        print(f"\r{name:<30}", end="", flush=True)
        case = {"name": name, "sizes": sizes, "steps": flags.steps}
        rows[name] = in_child(__file__, case)
    print("\r" + " " * 30, end="\r")
    return rows


def report(
    cases: Mapping[str, dict[str, Row]],
    models: Sequence[Decoder],
    flags: argparse.Namespace,
) -> None:
    """Writes everything and prints the ratios."""
    on_gpu = jax.default_backend() != "cpu"
    found = [r for case, rows in cases.items() for r in ratios_of(rows, case, on_gpu)]
    ratios = {name: value for name, value, _ in found}
    given = {key: str(value) for key, value in vars(flags).items()}
    result = {"models": list(map(str, models)), "flags": given, "bytes": cases}
    path = write("memory", result | {"ratios": ratios, "notes": NOTES}, flags.out)
    drawn = {
        f"{name}, {case}": (row.get("device, peak") or row["peak"]) / 1e6
        for case, rows in cases.items()
        for name, row in rows.items()
    }
    bars(path.with_suffix(".png"), "Peak memory of a training step", drawn, "MB")
    print(ratio_lines(ratios, {name: t for name, _, t in found if t}))


def main() -> None:
    """Measures each contender, with layers kept or computed again, and reports."""
    flags = flags_of()
    sizes = {size: getattr(flags, size) for size in SIZES}
    cases, models = {}, []
    for remat in flags.remat:
        model = Decoder(**sizes, dtype=flags.dtype, remat=remat == "yes")
        label = "remat" if model.remat else "no remat"
        print(f"{label}: {model}")
        models.append(model)
        cases[label] = case_of(model, flags)
        print(in_words(cases[label]) + "\n")
    print("\n".join(NOTES) + "\n")
    report(cases, models, flags)


if __name__ == "__main__":
    if not serve(measured):
        main()

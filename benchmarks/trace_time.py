"""What a step costs before it runs: seconds of trace, lowering and compilation.

`python benchmarks/trace_time.py`. The plain model is stepped as full fine-tuning does;
beside it is LoRA written by hand. The widths are small, since only the size of the
program matters. Every measurement starts with cleared caches.
"""

import argparse
import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from models import Decoder
from programs import (
    FACTORED,
    FROZEN,
    FULL,
    JLORA,
    cells,
    equations,
    ratio_lines,
    shapes_of,
    step_of,
)
from timing import drawing, table, write

NAMES = {"plain": FULL, FROZEN: FROZEN, FACTORED: FACTORED, JLORA: JLORA}
PHASES = ("trace", "lower", "compile")
MODES = ("scanned", "unrolled")
Row = dict[str, Any]


def flags_of() -> argparse.Namespace:
    """Returns the flags."""
    cpu = jax.default_backend() == "cpu"
    made = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    made.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32, 64, 96])
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    made.add_argument("--d", type=int, default=64)
    made.add_argument("--rounds", type=int, default=3, help="the least of them counts")
    made.add_argument(
        "--budget",
        type=float,
        default=10 if cpu else 20,
        help="seconds of a size, after which no round starts",
    )
    made.add_argument(
        "--compile-up-to",
        type=int,
        default=16,
        metavar="LAYERS",
        help="of unrolled programs; scanned ones are all compiled",
    )
    made.add_argument("--out", type=Path, help="the folder of the results")
    return made.parse_args()


def decoder(d: int, layers: int, mode: str) -> Decoder:
    """Returns a narrow decoder."""
    return Decoder(
        d=d,
        ffn=2 * d,
        layers=layers,
        heads=4,
        kv_heads=4,
        vocab=256,
        batch=2,
        seq=16,
        scan=mode == "scanned",
    )


def measured(
    model: Decoder, compiles: bool, rounds: int = 1, budget: float = 0
) -> dict[str, Row]:
    """Returns the least seconds of each phase of each contender, in turns."""
    state = {name: shapes_of(NAMES[name], model) for name in NAMES}
    rows: dict[str, Row] = {name: {} for name in NAMES}
    end = time.perf_counter() + budget
    for turn in range(rounds):
        if turn and time.perf_counter() > end:
            break
        for name, row in rows.items():
            new = once(NAMES[name], model, state[name], compiles)
            row |= {key: min(row.get(key, value), value) for key, value in new.items()}
    for row in rows.values():
        row["trace + lower"] = row["trace"] + row["lower"]
        row["total"] = row["trace + lower"] + row["compile"] if compiles else None
    return rows


def once(
    name: str, model: Decoder, state: tuple[Any, ...], compiles: bool
) -> dict[str, float]:
    """Returns the seconds of each phase, and the equations of the traced program."""
    jax.clear_caches()
    gc.collect()
    step = step_of(name, model)
    start = time.perf_counter()
    traced = step.trace(*state)
    ends = [time.perf_counter()]
    lowered = traced.lower()
    ends.append(time.perf_counter())
    if compiles:
        lowered.compile()
        ends.append(time.perf_counter())
    seconds = np.diff([start, *ends]).tolist()
    count = equations(traced.jaxpr)
    return {"equations": count} | dict(zip(PHASES, seconds, strict=False))


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float] | None:
    """Returns a, b and R² of `y = a + b·x`; None of one x, as of scanned programs."""
    if len(set(x)) < 2:
        return None
    b, a = np.polyfit(x, y, 1)
    left = np.var(np.asarray(y) - a - b * np.asarray(x))
    return float(a), float(b), float(1 - left / max(float(np.var(y)), 1e-30))


def growth(rows: Sequence[Row], what: str) -> tuple[float, float, float] | None:
    """Returns the fit of seconds over equations."""
    return fit([row["equations"] for row in rows], [row[what] for row in rows])


def fits_of(rows: Sequence[Row]) -> list[Row]:
    """Returns `growth` of each mode, sum and contender."""
    made = []
    for mode in MODES:
        for what in ("trace + lower", "total"):
            for name in NAMES:
                chosen = pick(rows, mode, name, what)
                if found := growth(chosen, what):
                    keys = ("constant", "slope", "r_squared")
                    labels = {"mode": mode, "seconds": what, "contender": name}
                    made.append(labels | dict(zip(keys, found, strict=True)))
    return made


def pick(rows: Sequence[Row], mode: str, name: str, what: str) -> list[Row]:
    """Returns the rows of a contender that have a value, by number of layers."""
    return [
        r
        for r in rows
        if (r["mode"], r["contender"]) == (mode, name) and r.get(what) is not None
    ]


def ratios_of(rows: Sequence[Row]) -> dict[str, float]:
    """Returns jlora's seconds over the others': medians over sizes, and growth."""
    ratios = {}
    modes = [mode for mode in MODES if any(r["mode"] == mode for r in rows)]
    for mode in modes:
        for other in (FROZEN, FACTORED, "plain"):
            for what in (*PHASES, "total") if other == "plain" else ("total",):
                own, base = (pick(rows, mode, n, what) for n in (JLORA, other))
                each = [a[what] / b[what] for a, b in zip(own, base, strict=True)]
                if each:
                    ratios[f"jlora / {other}, {what}, {mode}"] = float(np.median(each))
    for what in ("trace + lower", "total"):
        own, base = (pick(rows, "unrolled", n, what) for n in (JLORA, "plain"))
        if found := fit([r[what] for r in base], [r[what] for r in own]):
            ratios[f"jlora / plain, slope of {what}, unrolled"] = found[1]
        each = [growth(part, what) for part in (own, base)]
        if all(each):
            name = f"jlora / plain, {what} per equation, unrolled"
            ratios[name] = each[0][1] / each[1][1]
    return ratios


def targets_of(ratios: Mapping[str, float]) -> dict[str, str]:
    """Returns what is expected: jlora within 1.3 of plain, and a constant."""
    ours = [n for n in ratios if "/ plain" in n and "total" in n]
    return dict.fromkeys(ours, "<= 1.3")


def lines(path: Path, rows: Sequence[Row]) -> None:
    """Draws seconds over layers: dashed with the compilation, where it is known."""
    colors = {"plain": "tab:gray", FROZEN: "black"}
    colors |= {FACTORED: "tab:blue", JLORA: "tab:orange"}
    with drawing(path, 2, figsize=(11, 3.6)) as panels:
        for axes, mode in zip(panels, MODES, strict=True):
            for name, color in colors.items():
                for what, style in (("trace + lower", "o-"), ("total", "o--")):
                    chosen = pick(rows, mode, name, what)
                    x, y = [r["layers"] for r in chosen], [r[what] for r in chosen]
                    axes.plot(x, y, style, color=color, ms=3, label=f"{name}, {what}")
            axes.set(title=f"Before the first step, {mode}", xlabel="layers")
            axes.set_ylim(bottom=0)
        panels[0].set_ylabel("seconds")
        beside = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
        panels[1].legend(frameon=False, fontsize="small", **beside)


def report(rows: Sequence[Row], flags: argparse.Namespace) -> None:
    """Prints and writes everything, ratios last."""
    head = ("mode", "layers", "contender", "equations", *PHASES, "total")
    print(table(head, [cells([row.get(key) for key in head]) for row in rows]))
    print("\nseconds; least of rounds; plain is full fine-tuning\n")
    fits = fits_of(rows)
    print(table(("seconds = a + b·equations", "a", "b in µs", "R²"), worded(fits)))
    ratios, given = ratios_of(rows), {k: str(v) for k, v in vars(flags).items()}
    result = {"flags": given, "rows": rows, "fits": fits, "ratios": ratios}
    path = write("trace_time", result, flags.out)
    lines(path.with_suffix(".png"), rows)
    print(ratio_lines(ratios, targets_of(ratios)))


def worded(fits: Sequence[Row]) -> list[tuple[str, ...]]:
    """Returns the rows of the table of fits."""
    label = lambda f: f"{f['contender']}, {f['seconds']}, {f['mode']}"
    return [
        cells((label(f), f["constant"], f["slope"] * 1e6, f["r_squared"])) for f in fits
    ]


def main() -> None:
    """Measures each size and reports."""
    flags = flags_of()
    # A compiled program that a disk remembers would cost nothing.
    jax.config.update("jax_enable_compilation_cache", False)
    measured(decoder(flags.d, 1, "scanned"), True)  # The first use imports things.
    rows: list[Row] = []
    for mode in flags.modes:
        for layers in flags.layers:
            compiles = mode == "scanned" or layers <= flags.compile_up_to
            print(f"\r{mode}, {layers} layers ", end="", flush=True)
            model = decoder(flags.d, layers, mode)
            labels = {"mode": mode, "layers": layers}
            new = measured(model, compiles, flags.rounds, flags.budget)
            for name, row in new.items():
                rows.append(labels | {"contender": name} | row)
    print("\r" + " " * 30, end="\r")
    report(rows, flags)


if __name__ == "__main__":
    main()

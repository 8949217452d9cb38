"""What the TPU's own compiler says of training steps; no TPU is needed.

`python benchmarks/tpu_compile.py`, with libtpu installed (`pip install "jax[tpu]"`,
Linux on x86-64). Cycles are the compiler's estimates for its fusions, not times;
memory and collectives are those of the programs that a TPU would run. A step that does
not fit into the memory of a chip is refused by the compiler, which says what it takes.
Rows are kept as they come: a run that is stopped is taken up by the same command.
"""

import argparse
import dataclasses
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Before JAX is: it compiles for chips that are not there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from cases import preset
from memory import counted
from models import Decoder
from plan_scale import LLAMA, SIZES
from programs import FROZEN, FULL, JLORA, cells, ratio_lines
from timing import RESULTS, bars, machine, table, write
from tpu_hlo import KINDS, Program, read
from tpu_programs import (
    OF_A_LAYER,
    OF_A_MODEL,
    Experts,
    layer_of,
    layer_step,
    model_step,
)

NAME = "tpu_compile"
GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
        topology: the chips, such as "v5e:4x4".
        mesh: the sizes of the axes; none for one layer on the first chip.
        model: what is stepped; None for one layer.
        width, tokens: those of one layer.
        contenders: the steps.
    """

    topology: str
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    model: Any = None
    width: int = 2048
    tokens: int = 8192
    contenders: tuple[str, ...] = OF_A_LAYER


def llama(size: str, batch: int) -> Decoder:
    """Returns a Llama of a size, one of the rows of `plan_scale.py`."""
    fields: dict[str, Any] = LLAMA | SIZES[size] | {"batch": batch}
    return Decoder(**fields, scan=True, remat=True)


def large(topology: str, model: Decoder, **mesh: int) -> Case:
    """Returns the case of a whole model."""
    return Case(topology, mesh, model, contenders=OF_A_MODEL)


def on_one(topology: str, model: Any) -> Case:
    """Returns the case of a whole model on the first chip."""
    return Case(topology, {"fsdp": 1}, model, contenders=(FROZEN, JLORA, FULL))


EXPERTS = Experts(
    d=2048,
    ffn=2816,
    layers=4,
    heads=16,
    kv_heads=16,
    experts=8,
    vocab=32000,
    batch=4,
    seq=1024,
    dtype=jnp.bfloat16,
    remat=True,
)
# The shapes of Gemma 3 4B, whose attention is causal over all tokens here.
GEMMA = Decoder(
    d=2560,
    ffn=10240,
    layers=34,
    heads=8,
    kv_heads=4,
    head_dim=256,
    vocab=262144,
    batch=4,
    seq=1024,
    dtype=jnp.bfloat16,
    remat=True,
    loss_chunks=8,
)
VIT = preset("vit", "b")
SMALL = Decoder(d=512, layers=4, batch=8, dtype=jnp.bfloat16, remat=True)
CASES = {
    "layer, d = 2048, v5e": Case("v5e:2x2"),
    "layer, d = 4096, v5e": Case("v5e:2x2", width=4096),
    "layer, d = 2048, v6e": Case("v6e:2x2"),
    "layer, d = 4096, v6e": Case("v6e:2x2", width=4096),
    "8 experts, one v5e": on_one("v5e:2x2", EXPERTS),
    "8B, v5e 4x4, fsdp 16": large("v5e:4x4", llama("8B", 16), fsdp=16),
    "8B, v5e 4x4, fsdp 4 x tensor 4": large(
        "v5e:4x4", llama("8B", 16), fsdp=4, tensor=4
    ),
    "70B, v5p 4x4x4, fsdp 16 x tensor 4": large(
        "v5p:4x4x4", llama("70B", 64), fsdp=16, tensor=4
    ),
    "405B, v5p 8x8x8, fsdp 64 x tensor 8": large(
        "v5p:8x8x8", llama("405B", 512), fsdp=64, tensor=8
    ),
    "4B as Gemma 3, one v5e": on_one("v5e:2x2", GEMMA),
    "ViT-B, one v5e": on_one("v5e:2x2", VIT),
}
QUICK = {
    "layer, d = 1024, v5e": Case(
        "v5e:2x2", width=1024, tokens=2048, contenders=(FROZEN, JLORA, FULL)
    ),
    "small decoder, v5e 2x2, fsdp 4": large("v5e:2x2", SMALL, fsdp=4),
}
NOTES = (
    "cycles: estimated by the compiler for its fusions, in millions; no times, and",
    "without collectives, kernels and fusions of which there is `no estimate`. A loop",
    "counts as often as it runs.",
    "HBM: GiB of a chip; `peak` is what the program takes, `of` what a program may",
    "take, where one did not fit; collectives: how many in a step, and MB of results",
)
MEMORY = ("arguments", "temporaries", "peak", "of")
Row = dict[str, Any]


def flags_of() -> argparse.Namespace:
    """Returns the flags."""
    made = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = made.add_argument
    add("--quick", action="store_true", help="two small cases, in a few minutes")
    add("--cases", nargs="+", metavar="WORD", help="those with one of these words")
    add("--contenders", nargs="+", metavar="NAME", help="these steps alone")
    add("--again", action="store_true", help="compile what is in the results, too")
    add("--topology", help="one layer on a chip of this topology, such as v4:2x2x1")
    add("--out", type=Path, default=RESULTS, help="the folder of the results")
    return made.parse_args()


def cases_of(flags: argparse.Namespace) -> dict[str, Case]:
    """Returns what is compiled, by its label."""
    if flags.topology:
        return {f"layer, d = 2048, {flags.topology}": Case(flags.topology)}
    cases, words = QUICK if flags.quick else CASES, flags.cases
    if not words:
        return cases
    return {n: c for n, c in cases.items() if any(word in n for word in words)}


def compiled(label: str, case: Case, name: str) -> Row:
    """Returns the row of one step."""
    if case.model is None:
        model = layer_of(case.width, case.tokens)
        step, args = layer_step(name, model, case.topology)
    else:
        step, args = model_step(name, case.model, case.topology, dict(case.mesh))
    lowered, start = step.lower(*args), time.time()
    row: Row = {"case": label, "step": name}
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        row |= does_not_fit(error)
    else:
        row |= fits(program.memory_analysis()) | described(read(program.as_text()))
    return row | {"compile s": round(time.time() - start, 1)}


def fits(stats: Any) -> Row:
    """Returns what a program takes of the memory of a chip."""
    held = counted(stats)
    parts = {"arguments": "argument", "temporaries": "temp", "peak": "peak"}
    return {"fits": "yes"} | {name: held[key] / GIB for name, key in parts.items()}


def does_not_fit(error: Exception) -> Row:
    """Returns what the compiler says that a program would take, if that is why."""
    found = re.findall(r"([\d.]+)([KMGT])\b", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or len(found) < 2:
        raise error
    units = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}
    taken, most = (float(number) * units[unit] for number, unit in found[:2])
    return {"fits": "no", "peak": taken, "of": most}


def described(program: Program) -> Row:
    """Returns what the text of a program says, without what there is none of."""
    row: Row = {"M cycles": program.cycles / 1e6}
    if program.unestimated:
        row["no estimate"] = program.unestimated
    if program.kernels:
        row["kernels"] = program.kernels
    if program.unknown:
        row["loops counted once"] = program.unknown
    for kind in KINDS:
        moves = program.moves[kind]
        if moves.count:
            row[kind] = f"{moves.count:,}, {moves.bytes / 1e6:,.1f} MB"
    return row


def ratios_of(rows: list[Row]) -> dict[str, float]:
    """Returns the cycles of each step over those of the frozen limit of its case."""
    limits = {r["case"]: r["M cycles"] for r in rows if r["step"] == FROZEN}
    return {
        f"{row['step']} / {FROZEN}, {row['case']}": row["M cycles"]
        / limits[row["case"]]
        for row in rows
        if row["step"] != FROZEN and "M cycles" in row and row["case"] in limits
    }


def kept(rows: list[Row], out: Path, name: str) -> Path:
    """Writes all rows, in the order of the cases."""
    labels = list(dict.fromkeys([*CASES, *QUICK, *(row["case"] for row in rows)]))
    steps = [*OF_A_LAYER, *OF_A_MODEL]
    order = lambda row: (labels.index(row["case"]), steps.index(row["step"]))
    rows = sorted(rows, key=order)
    return write(name, {"rows": rows, "ratios": ratios_of(rows)}, out)


def in_words(rows: list[Row]) -> str:
    """Returns the table of rows."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    return table(head, [cells([row.get(key) for key in head]) for row in rows])


def main() -> None:
    """Compiles each step that the results do not have, and reports."""
    flags = flags_of()
    name = f"{NAME}_quick" if flags.quick else NAME
    path = flags.out / f"{name}-{machine()['platform']}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for label, case in cases_of(flags).items():
        for step in flags.contenders or case.contenders:
            same = lambda row, key=(label, step): (row["case"], row["step"]) == key
            if any(map(same, rows)) and not flags.again:
                continue
            print(f"{label}: {step}", flush=True)
            row = compiled(label, case, step)
            rows = [other for other in rows if not same(other)] + [row]
            kept(rows, flags.out, name)
    print(in_words(rows), *NOTES, sep="\n")
    ratios = ratios_of(rows)
    plotted = {key.replace(f" / {FROZEN}", ""): value for key, value in ratios.items()}
    title = "Cycles of the frozen limit, as the TPU's compiler estimates them"
    bars(path.with_suffix(".png"), title, plotted, "estimated cycles / frozen limit")
    print(ratio_lines(ratios, {}))


if __name__ == "__main__":
    main()

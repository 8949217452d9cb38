"""What a plan costs on the host, from one to a thousand billion parameters.

`python benchmarks/plan_scale.py`. Params are shapes, so that no weight is allocated.
Every case runs in a fresh process: the seconds are those of a first call, and the
bytes are the growth of the peak of the resident memory.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from models import Decoder, Params
from programs import abstract_key, cells, host_peak, in_child, ratio_lines, serve
from steps import RANK, lora_of
from timing import bars, table, write

MODES = ("scanned", "unrolled")
LLAMA = {"vocab": 128256, "batch": 8, "seq": 2048, "dtype": jnp.bfloat16}
# The widths of TinyLlama, Llama 3 and GPT-3, and what comes after; gated MLPs in all.
SIZES = {
    "1B": {"d": 2048, "ffn": 5632, "layers": 22, "heads": 32, "kv_heads": 4},
    "8B": {"d": 4096, "ffn": 14336, "layers": 32, "heads": 32, "kv_heads": 8},
    "70B": {"d": 8192, "ffn": 28672, "layers": 80, "heads": 64, "kv_heads": 8},
    "175B": {"d": 12288, "ffn": 32768, "layers": 96, "heads": 96, "kv_heads": 96},
    "405B": {"d": 16384, "ffn": 53248, "layers": 126, "heads": 128, "kv_heads": 8},
    "1T": {"d": 25600, "ffn": 68352, "layers": 128, "heads": 200, "kv_heads": 200},
}
VOCABULARIES = {"1B": 32000, "175B": 50257}
LARGEST_UNROLLED = "70B"
HEAD = ("model", "mode", "parameters", "layers", "targets", "trainable")
MEASURED = ("seconds plan", "seconds init", "host MB", "allocated")


def flags_of() -> argparse.Namespace:
    """Returns the flags."""
    made = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    made.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    made.add_argument("--largest-unrolled", choices=SIZES, default=LARGEST_UNROLLED)
    made.add_argument("--rank", type=int, default=RANK)
    made.add_argument("--out", type=Path, help="the folder of the results")
    return made.parse_args()


def decoder(size: str, mode: str) -> Decoder:
    """Returns the decoder of a size."""
    fields: dict[str, Any] = LLAMA | SIZES[size]
    fields["vocab"] = VOCABULARIES.get(size, fields["vocab"])
    return Decoder(**fields, scan=mode == "scanned")


def shapes_of(model: Decoder) -> Params:
    """Returns the params as shapes.

    All layers are like the first, whose shapes alone are traced: the memory of tracing
    many would hide what a plan takes.
    """
    one = dataclasses.replace(model, layers=1, scan=False)
    params = jax.eval_shape(one.init, abstract_key())
    (layer,) = params["layers"]
    stacked = lambda x: jax.ShapeDtypeStruct((model.layers, *x.shape), x.dtype)
    layers = [dict(layer) for _ in range(model.layers)]
    params["layers"] = jax.tree.map(stacked, layer) if model.scan else layers
    return params


def measured(size: str, mode: str, rank: int) -> dict[str, Any]:
    """Returns a case's row, measured in this process."""
    model = decoder(size, mode)
    key, params = abstract_key(), shapes_of(model)
    tokens = jax.eval_shape(model.data, key)
    lora = lora_of(model, rank)
    before = host_peak()
    plan, planning = timed(lambda: lora.plan(params, tokens))
    # Without the traces of the plan, as where there was none.
    jax.clear_caches()
    adapter, starting = timed(lambda: jax.eval_shape(lora.init, key, params, tokens))
    grown = host_peak() - before
    assert count(adapter) == plan.trainable and count(params) == plan.total
    sizes = (plan.total, model.layers, len(plan.targets), plan.trainable)
    allocated = sum(array.nbytes for array in jax.live_arrays())
    row = dict(zip(HEAD, (size, mode, *sizes), strict=True))
    return row | dict(
        zip(MEASURED, (planning, starting, grown / 1e6, allocated), strict=True)
    )


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Returns what a call returns, and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def count(tree: Any) -> int:
    """Returns the number of values in a tree of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def cases_of(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns what is measured, by mode and size."""
    names = list(SIZES)
    last = names.index(flags.largest_unrolled)
    return [
        {"size": size, "mode": mode, "rank": flags.rank}
        for mode in flags.modes
        for size in flags.sizes
        if mode == "scanned" or names.index(size) <= last
    ]


def ratios_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the largest case over the smallest of each mode."""
    ratios = {}
    for mode in MODES:
        own = [row for row in rows if row["mode"] == mode]
        if len(own) < 2:
            continue
        small, large = own[0], own[-1]
        pair = f"{large['model']} / {small['model']}"
        ratios |= {
            f"{pair}, {what}, {mode}": large[what] / small[what]
            for what in ("parameters", "layers", *MEASURED[:3])
            if small[what]
        }
    return ratios


def main() -> None:
    """Measures each case in a process of its own and reports."""
    flags = flags_of()
    rows = []
    for case in cases_of(flags):
        print(f"\r{case['size']}, {case['mode']}     ", end="", flush=True)
        rows.append(in_child(__file__, case))
    print("\r" + " " * 30, end="\r")
    head = (*HEAD, *MEASURED)
    print(table(head, [cells([row[key] for key in head]) for row in rows]))
    print("\nhost MB: growth of the peak of resident memory over plan and init;")
    print("allocated: bytes of all arrays that live in JAX at the end\n")
    given = {key: str(value) for key, value in vars(flags).items()}
    ratios = ratios_of(rows)
    result = {"flags": given, "rows": rows, "ratios": ratios}
    path = write("plan_scale", result, flags.out)
    seconds = {f"{row['model']}, {row['mode']}": row["seconds plan"] for row in rows}
    bars(path.with_suffix(".png"), "A plan, nothing allocated", seconds, "seconds")
    print(ratio_lines(ratios, {}))


if __name__ == "__main__":
    if not serve(measured):
        main()

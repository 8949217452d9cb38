"""What variants, dropout and a quantised base cost beside plain LoRA, interleaved.

`python benchmarks/variants.py`. All steps are of the same decoder with all linears
adapted, AdamW included; peak bytes are what XLA says that each step needs. On a GPU
the decoder has d = 2048, and `--size 8b` is Llama-3's: of that only LoRA and QLoRA.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
from cases import decoder as sized
from forwards import decoder, parser
from models import Decoder, Params
from programs import ratio_lines
from steps import OPTIMIZER, adapter_of, compiled, lora_of, trained_step
from timing import Contender, bars, interleave, summarize, table, write

import jlora

LORA, DORA, DROPOUT = "jlora LoRA", "jlora DoRA", "jlora LoRA, dropout 0.1"
RELATIVES: dict[str, dict[str, Any]] = {
    "jlora VeRA": {"variant": "vera"},
    "jlora LoKr": {"variant": "lokr"},
    "jlora LoKr, 8 blocks": {"variant": "lokr", "decompose_factor": 8},
}
QUANTIZED = {"jlora QLoRA nf4": "nf4", "jlora QLoRA int8": "int8"}
TARGETS = {
    f"{DORA} / LoRA": "<= 1.08",
    f"{DROPOUT} / LoRA": "<= 1.12",
    "jlora VeRA / LoRA": "<= 1.02",
    "jlora LoKr / LoRA": "<= 1.10",
    "jlora LoKr, 8 blocks / LoRA": "<= 1.10",
}
QLORA_TARGETS = {
    "jlora QLoRA nf4 / LoRA": "<= 1.10",
    "jlora QLoRA nf4 / LoRA, peak bytes": "<= 0.6",
}


def varied(model: Decoder, **changes: Any) -> jlora.Lora:
    """Returns the adapted loss with other fields in its config."""
    lora = lora_of(model)
    configs = tuple(dataclasses.replace(c, **changes) for c in lora.configs)
    return dataclasses.replace(lora, configs=configs)


def step_of(name: str, lora: Any, params: Params, batch: jax.Array) -> Contender:
    """Returns the compiled step of a variant."""
    adapter = adapter_of(lora, params, batch)
    key = {"lora_dropout_key": jax.random.key(7)} if name == DROPOUT else {}
    loss = lambda adapter, params, batch: lora.apply(params, adapter, batch, **key)
    state = (adapter, OPTIMIZER.init(adapter), params, batch)
    return Contender(name, compiled(trained_step(loss), state, 2), state)


def contenders(model: Decoder, large: bool) -> list[Contender]:
    """Returns all variants; those with a quantised base where Qwix is installed."""
    keys = jax.random.split(jax.random.key(0))
    params, batch = jax.jit(model.init)(keys[0]), model.data(keys[1])
    made = [step_of(LORA, varied(model), params, batch)]
    if not large:
        made.append(step_of(DORA, varied(model, dora=True), params, batch))
        made.append(step_of(DROPOUT, varied(model, dropout=0.1), params, batch))
        for name, changes in RELATIVES.items():
            made.append(step_of(name, varied(model, **changes), params, batch))
    if importlib.util.find_spec("qwix") is None:
        print("skipped QLoRA: qwix is not installed")
        return made
    lora = varied(model)
    plan = lora.plan(params, batch)
    for name, qtype in list(QUANTIZED.items())[: 1 if large else None]:
        base = jlora.quantize(params, plan, qtype)
        made.append(step_of(name, lora, base, batch))
    return made


def peak(contender: Contender) -> int:
    """Returns the bytes of arguments, results and temporaries of a step."""
    program: Any = contender.step
    found = program.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes
    return held + found.temp_size_in_bytes - found.alias_size_in_bytes


def ratios_of(times: Mapping[str, float], peaks: Mapping[str, int]) -> dict[str, float]:
    """Returns the ratios to plain LoRA, of times and of peak bytes."""
    others = [name for name in times if name != LORA]
    ratios = {f"{name} / LoRA": times[name] / times[LORA] for name in others}
    return ratios | {
        f"{name} / LoRA, peak bytes": peaks[name] / peaks[LORA] for name in others
    }


def main() -> None:
    """Times the variants and writes what came out."""
    cpu = jax.default_backend() == "cpu"
    made = parser(str(__doc__).splitlines()[0], rounds=15)
    made.add_argument("--batch", type=int, default=4 if cpu else 8)
    made.add_argument("--seq", type=int, default=256 if cpu else 1024)
    made.add_argument("--size", choices=("8b",), help="in place of all other sizes")
    flags = made.parse_args()
    large = flags.size is not None
    small = {"batch": flags.batch, "seq": flags.seq}
    model = sized(flags.size) if large else decoder(flags, **small)
    several = contenders(model, large)
    peaks = {each.name: peak(each) for each in several}
    seconds = summarize(interleave(several, rounds=flags.rounds))
    times = {name: each["median"] for name, each in seconds.items()}
    rows = [
        [n, f"{1e3 * t:.2f}", f"{t / times[LORA]:.3f}", f"{peaks[n] / 1e6:,.1f}"]
        for n, t in times.items()
    ]
    print(table(["", "median ms", "ratio", "peak MB"], rows))
    ratios = ratios_of(times, peaks)
    result = {
        "model": str(model),
        "seconds": {"a training step": seconds},
        "bytes": {"peak": {n: {"bytes": b} for n, b in peaks.items()}},
        "ratios": ratios,
    }
    path = write("variants_8b" if large else "variants", result, flags.out)
    drawn = {name: 1e3 * time for name, time in times.items()}
    bars(path.with_suffix(".png"), "Variants of LoRA: a training step", drawn, "ms")
    print(ratio_lines(ratios, QLORA_TARGETS if large else TARGETS))


if __name__ == "__main__":
    main()

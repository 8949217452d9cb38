"""What DoRA, dropout and a quantised base cost beside plain LoRA, interleaved.

`python benchmarks/variants.py`. All steps are of the same decoder with all linears
adapted, AdamW included; peak bytes are what XLA says that each step needs.
"""

import dataclasses
import importlib.util
from typing import Any

import jax
from forwards import decoder, parser
from models import Decoder, Params
from steps import OPTIMIZER, adapter_of, compiled, lora_of, trained_step
from timing import Contender, bars, interleave, summarize, table, write

import jlora

LORA, DORA, DROPOUT = "jlora LoRA", "jlora DoRA", "jlora LoRA, dropout 0.1"
QUANTIZED = {"jlora QLoRA nf4": "nf4", "jlora QLoRA int8": "int8"}
TARGETS = {DORA: "<= 1.15", "jlora QLoRA nf4": "<= 1.10"}


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


def contenders(model: Decoder) -> list[Contender]:
    """Returns all variants; those with a quantised base where Qwix is installed."""
    keys = jax.random.split(jax.random.key(0))
    params, batch = model.init(keys[0]), model.data(keys[1])
    made = [
        step_of(LORA, varied(model), params, batch),
        step_of(DORA, varied(model, dora=True), params, batch),
        step_of(DROPOUT, varied(model, dropout=0.1), params, batch),
    ]
    if importlib.util.find_spec("qwix") is None:
        print("skipped QLoRA: qwix is not installed")
        return made
    lora = varied(model)
    plan = lora.plan(params, batch)
    for name, qtype in QUANTIZED.items():
        base = jlora.quantize(params, plan, qtype)
        made.append(step_of(name, lora, base, batch))
    return made


def peak(contender: Contender) -> int:
    """Returns the bytes of arguments, results and temporaries of a step."""
    program: Any = contender.step
    found = program.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes
    return held + found.temp_size_in_bytes - found.alias_size_in_bytes


def main() -> None:
    """Times the variants and writes what came out."""
    cpu = jax.default_backend() == "cpu"
    made = parser(str(__doc__).splitlines()[0], rounds=15)
    made.add_argument("--batch", type=int, default=4 if cpu else 8)
    made.add_argument("--seq", type=int, default=256 if cpu else 1024)
    flags = made.parse_args()
    model = decoder(flags, batch=flags.batch, seq=flags.seq)
    several = contenders(model)
    bytes_of = {each.name: peak(each) for each in several}
    seconds = summarize(interleave(several, rounds=flags.rounds))
    base = seconds[LORA]["median"]
    ratios = {
        f"{name} / LoRA{f' (target {TARGETS[name]})' if name in TARGETS else ''}": (
            each["median"] / base
        )
        for name, each in seconds.items()
        if name != LORA
    }
    rows = [
        [n, f"{1e3 * s['median']:.2f}", f"{s['median'] / base:.3f}", f"{b / 1e6:,.1f}"]
        for (n, s), b in zip(seconds.items(), bytes_of.values(), strict=True)
    ]
    print(table(["", "median ms", "ratio", "peak MB"], rows))
    result = {
        "seconds": {"a training step": seconds},
        "bytes": {"peak": {n: {"bytes": b} for n, b in bytes_of.items()}},
        "ratios": ratios,
    }
    path = write("variants", result, flags.out)
    times = {name: 1e3 * each["median"] for name, each in seconds.items()}
    bars(path.with_suffix(".png"), "Variants of LoRA: a training step", times, "ms")
    for name, ratio in ratios.items():
        print(f"ratio {name}: {ratio:.3f}")


if __name__ == "__main__":
    main()

"""Which form of a product is fastest here: a table, and a file for `jlora.lora`.

`python benchmarks/tune.py --kernels 2048x2048 2048x5632 --tokens 8192`. Each form that
can be taken is timed forward and backward (the gradients of the operand and of both
factors), in turns. `jlora.lora(..., contraction="forms.json")` takes the fastest ones
on devices of this kind.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from timing import Contender, interleave, machine, summarize, table

import jlora
from jlora._product.measured import TIMED

RATE = 1e-6
# A form is taken where it needs less than this share of the plain one's time.
NEAR = 0.98


@dataclasses.dataclass(frozen=True)
class Size:
    """A product `x·W` that is timed: `(tokens, features)·(features, outputs)`."""

    tokens: int
    features: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.tokens:,} × {self.features:,} × {self.outputs:,}"


def flags_of(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the flags."""
    cpu = jax.default_backend() == "cpu"
    made = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    made.add_argument(
        "--kernels",
        nargs="+",
        type=kernel,
        metavar="FEATURESxOUTPUTS",
        default=[(256, 256), (256, 704)] if cpu else [(2048, 2048), (2048, 5632)],
    )
    made.add_argument("--tokens", nargs="+", type=int, default=[512 if cpu else 8192])
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--dtype", default="float32" if cpu else "bfloat16")
    made.add_argument("--rounds", type=int, default=30)
    made.add_argument("--out", type=Path, default=Path("forms.json"))
    return made.parse_args(args)


def kernel(text: str) -> tuple[int, int]:
    """Returns the two sizes in `2048x5632`."""
    features, outputs = text.split("x")
    return int(features), int(outputs)


def file_text(device: str, rows: Sequence[dict[str, Any]]) -> str:
    """Returns what `jlora.lora(contraction=...)` reads."""
    versions = machine()["versions"]
    return json.dumps({"device": device, "versions": versions, "forms": rows}, indent=1)


def row_of(size: Size, dtype: str, form: str) -> dict[str, Any]:
    """Returns a row of the file."""
    return {"dtype": dtype, **dataclasses.asdict(size), "form": form}


def contenders(
    size: Size, rank: int, dtype: str, folder: Path, device: str
) -> Iterator[Contender]:
    """Yields a step for each form that is taken when it is asked for."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (size.tokens, size.features), dtype)
    w = jax.random.normal(keys[1], (size.features, size.outputs), dtype)
    params = {"w": w / size.features**0.5}
    for form in TIMED:
        path = folder / f"{form}.json"
        path.write_text(file_text(device, [row_of(size, dtype, form)]), "utf-8")
        lora = jlora.lora(
            lambda params, x: x @ params["w"],
            jlora.LoraConfig("w", rank=rank),
            contraction=path,
        )
        (target,) = lora.plan(params, x).targets
        if target.uses[0].form != form:
            continue  # it is not for such a device, dtype or size
        adapter = lora.init(keys[2], params, x)
        state = (x, adapter, params)
        run = jax.jit(step_of(lora)).lower(*state).compile()
        yield Contender(form, run, state)


def step_of(lora: jlora.Lora) -> Callable[..., tuple[Any, Any]]:
    """Returns a step that moves the operand and the factors a little downhill."""

    def step(x: jax.Array, adapter: Any, params: Any) -> tuple[Any, Any]:
        run = lambda x, adapter: lora.apply(params, adapter, x)
        y, pull = jax.vjp(run, x, adapter)
        down = lambda value, grad: value - (RATE * grad).astype(value.dtype)
        return jax.tree.map(down, (x, adapter), pull(y))

    return step


def fastest(times: Mapping[str, float]) -> str:
    """Returns the fastest form; the plain one where it is near."""
    best = min(times, key=lambda name: times[name])
    return best if times[best] < NEAR * times["separate"] else "separate"


def main(args: Sequence[str] | None = None) -> None:
    """Times the forms, prints a table, and writes the file."""
    flags = flags_of(args)
    device = jax.devices()[0].device_kind
    dtype = str(jnp.dtype(flags.dtype))
    rows, lines = [], []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in flags.tokens:
            for features, outputs in flags.kernels:
                size = Size(tokens, features, outputs)
                several = list(
                    contenders(size, flags.rank, dtype, Path(folder), device)
                )
                seconds = summarize(interleave(several, rounds=flags.rounds))
                times = {name: each["median"] for name, each in seconds.items()}
                best = fastest(times)
                rows.append(row_of(size, dtype, best))
                told = [f"{1e3 * times[f]:.3f}" if f in times else "" for f in TIMED]
                lines.append([str(size), *told, best])
    print(f"{device}, {dtype}, rank {flags.rank}, milliseconds forward and backward\n")
    print(table(["tokens × features × outputs", *TIMED, "fastest"], lines))
    flags.out.write_text(file_text(device, rows) + "\n", encoding="utf-8")
    print(f'\nwrote {flags.out}: jlora.lora(..., contraction="{flags.out}")')


if __name__ == "__main__":
    main()

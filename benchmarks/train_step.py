"""How long a LoRA training step takes, beside every rival, in interleaved rounds.

`python benchmarks/train_step.py`, with `--check` to see that all compute the same. The
limit that LoRA cannot beat is the frozen model's forward and backward pass to its
inputs; full fine-tuning is what LoRA should be faster than. PyTorch with PEFT runs in
a process of its own (`--torch-python`), its steps between those of JAX.

`--mesh fsdp=4,tensor=2` runs all on a mesh of devices, Auto axes, each case with as
many times the rows as there are devices: the work of each device is that of one alone.
With `--inside` each device computes its loss in a `shard_map`, with kernels that are
whole there. PyTorch is not there then.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# PyTorch needs room on the same device. JAX reads this when it starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from cases import FROZEN, MODELS, SIZES, Case, Times, cases, ratios, utilization
from jax.sharding import Mesh
from models import Decoder, Params
from placing import add_mesh, drawn, mesh_named, on_mesh
from programs import ratio_lines
from rivals import RIVALS, Maker
from same_loss import check
from steps import adapter_of, contender, lora_of, makers
from timing import (
    RESULTS,
    Contender,
    bars,
    interleave,
    machine,
    run_plot,
    summarize,
    table,
    write,
)
from torch_client import NAMES, TorchError, TorchProcess

Make = Callable[[], Contender]
FEWEST, WARMUP = 3, 2


def flags_of() -> argparse.Namespace:
    """Returns the flags."""
    made = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    made.add_argument("--model", nargs="+", choices=(*MODELS, "all"))
    made.add_argument("--size", nargs="+", choices=SIZES)
    made.add_argument("--dtype", help="float32 or bfloat16, in place of the size's")
    made.add_argument("--scan", action="store_true", default=None)
    made.add_argument("--unrolled", action="store_false", dest="scan", default=None)
    made.add_argument("--remat", action=argparse.BooleanOptionalAction, default=None)
    made.add_argument("--rounds", type=int, default=15, help="at most")
    made.add_argument(
        "--budget", type=float, default=150, help="seconds for each model"
    )
    add_mesh(made)
    made.add_argument("--inside", action="store_true", help="of a shard_map")
    made.add_argument("--without", nargs="+", default=[], help="parts of names")
    made.add_argument("--torch-python", default=sys.executable, metavar="PATH")
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument(
        "--check", action="store_true", help="compare values, time nothing"
    )
    flags = made.parse_args()
    flags.mesh = mesh_named(made, flags)
    if flags.inside and (not flags.mesh or set(flags.mesh.shape) != {"data"}):
        made.error("--inside is for --mesh data, on which kernels are whole")
    cpu = jax.default_backend() == "cpu"
    alone = not cpu or flags.mesh
    models = flags.model or (["decoder"] if alone else ["decoder", "chain"])
    flags.model = MODELS if "all" in models else tuple(models)
    flags.size = tuple(flags.size or (["cpu"] if cpu else ["d2048", "d4096"]))
    if "8b" in flags.size and set(flags.model) != {"decoder"}:
        made.error("size 8b is that of the decoder only")
    if flags.mesh and set(flags.model) != {"decoder"}:
        made.error("on a mesh there is the decoder only")
    return flags


def changes_of(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of models that flags change."""
    dtype = jnp.dtype(flags.dtype) if flags.dtype else None
    changes = {"dtype": dtype, "scan": flags.scan, "remat": flags.remat}
    return {name: value for name, value in changes.items() if value is not None}


def all_makers(
    model: Any,
    params: Params,
    batch: Any,
    torch: TorchProcess | None,
    mesh: Mesh | None,
) -> dict[str, Make]:
    """Returns what makes each contender, of this process and of PyTorch's.

    With a mesh, their losses are computed inside of a `shard_map` over it.
    """
    made = makers(model, params, batch, mesh)
    if type(model) is not Decoder:
        return made
    for name, maker in RIVALS.items():
        if name.startswith("Qwix") and importlib.util.find_spec("qwix") is None:
            print(f"skipped {name}: qwix is not installed")
            continue
        made[name] = functools.partial(rival, name, maker, model, params, batch, mesh)
    for name in NAMES if torch else ():
        step = functools.partial(torch.step, name)
        made[name] = functools.partial(Contender, name, step, ())
    return made


def rival(
    name: str,
    maker: Maker,
    model: Decoder,
    params: Params,
    tokens: jax.Array,
    mesh: Mesh | None,
) -> Contender:
    """Returns another library's step, on factors of its own."""
    adapter = adapter_of(lora_of(model), params, tokens)
    made = maker(model, params, adapter, tokens)
    return contender(name, made.loss, made.trained, made.frozen, tokens, mesh)


def laid_out(case: Case, mesh: Mesh, within: bool) -> Case:
    """Returns a case on a mesh, with as much work for each device; no targets."""
    parts = [f"{name}={size}" for name, size in mesh.shape.items()]
    model = dataclasses.replace(case.model, batch=case.model.batch * mesh.size)
    model = model if within else on_mesh(model, mesh)
    label = ", ".join([case.label, *parts, *["inside shard_map"] * within])
    return dataclasses.replace(
        case, label=label, model=model, devices=mesh.size, targets={}
    )


def prepared(
    makes: Mapping[str, Make],
) -> tuple[list[Contender], dict[str, str], float]:
    """Returns contenders that have run, why others can't, and seconds of a round."""
    ready, skipped, seconds = [], {}, 0.0
    for name, make in makes.items():
        print(f"\r{'compiling ' + name:<60}", end="", flush=True)
        try:
            made = make()
            made.run()
            start = time.perf_counter()
            made.run()
        except (jax.errors.JaxRuntimeError, TorchError) as error:
            skipped[name] = reason(error)
            print(f"\r{f'skipped {name}: {skipped[name]}':<60}")
            made = None  # It may hold the memory that the next one needs.
            continue
        seconds += time.perf_counter() - start
        ready.append(made)
    print("\r" + " " * 60, end="\r")
    return ready, skipped, seconds


def reason(error: Exception) -> str:
    """Returns why a contender does not run; errors of JAX but one are raised again."""
    if isinstance(error, TorchError):
        return str(error)
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return "out of memory"


@contextlib.contextmanager
def torch_of(case: Case, flags: argparse.Namespace) -> Iterator[TorchProcess | None]:
    """Gives PyTorch's process where the case has use for one."""
    wanted = any(chosen(name, case, flags.without) for name in NAMES) and not flags.mesh
    if type(case.model) is not Decoder or not wanted:
        yield None
        return
    try:
        process = TorchProcess(flags.torch_python, case.model)
    except (TorchError, OSError) as error:
        print(f"skipped PyTorch: {error}")
        yield None
        return
    try:
        yield process
    finally:
        process.close()


def chosen(name: str, case: Case, without: list[str]) -> bool:
    """Returns whether a contender is to run."""
    left_out = any(part.lower() in name.lower() for part in without)
    return not left_out and (not case.only or name in case.only)


def run(case: Case, flags: argparse.Namespace) -> dict[str, Any]:
    """Times one case, prints it and returns what is written."""
    print(f"\n{case.label}: {case.model}")
    params, batch = drawn(case.model, flags.mesh)
    trained = jax.eval_shape(lora_of(case.model).init, jax.random.key(2), params, batch)
    size = sum(leaf.size for leaf in jax.tree.leaves(trained))
    with torch_of(case, flags) as torch:
        mesh = flags.mesh if flags.inside else None
        makes = all_makers(case.model, params, batch, torch, mesh)
        makes = {n: m for n, m in makes.items() if chosen(n, case, flags.without)}
        ready, skipped, seconds = prepared(makes)
        fitting = int(flags.budget / max(seconds, 1e-9)) - WARMUP
        rounds = min(flags.rounds, max(fitting, FEWEST))
        times = interleave(ready, rounds=rounds, warmup=WARMUP)
        versions = torch.versions if torch else {}
    summary = summarize(times)
    print(f"{rounds} rounds\n{described(case, summary, size)}")
    result = {"label": case.label, "model": repr(case.model), "machine": machine()}
    result["machine"]["versions"] |= versions
    result |= {"rounds": rounds, "trained": size, "skipped": skipped}
    result |= {"devices": case.devices}
    return result | {"seconds": summary, "tokens": case.model.tokens, "times": times}


def described(case: Case, summary: Times, adapter_params: int) -> str:
    """Returns the table of a case."""
    head = ("contender", "median ms", "min ms", "of frozen", "tokens/s each", "MFU")
    limit, rows = summary.get(FROZEN), []
    for name, each in summary.items():
        of_frozen = f"{each['median'] / limit['median']:.2f}" if limit else "-"
        whole = each["median"] * case.devices
        mfu = utilization(name, case.model, adapter_params, whole)
        rows.append(
            (
                name,
                f"{each['median'] * 1e3:.2f}",
                f"{each['min'] * 1e3:.2f}",
                of_frozen,
                f"{case.model.tokens / whole:,.0f}",
                "-" if mfu is None or "merged" in name else f"{mfu:.1%}",
            )
        )
    return table(head, rows)


def keep(run: Mapping[str, Any], out: Path) -> None:
    """Writes a run in the place of an earlier one of the same label, or after all."""
    path = out / f"train_step-{jax.default_backend()}.json"
    earlier = json.loads(path.read_text())["runs"] if path.exists() else []
    others = [each for each in earlier if each["label"] != run["label"]]
    path = write("train_step", {"runs": [*others, run]}, out)
    values = {name: each["median"] * 1e3 for name, each in run["seconds"].items()}
    title = f"A training step: {run['label']}, {run['machine']['device']}"
    bars(run_plot(path, run["label"]), title, values, "ms")


def main() -> None:
    """Runs all cases."""
    flags = flags_of()
    if flags.check:
        check(flags.torch_python, flags.without, flags.mesh, flags.inside)
        return
    lines = []
    for case in cases(flags.model, flags.size, changes_of(flags)):
        case = laid_out(case, flags.mesh, flags.inside) if flags.mesh else case
        result = run(case, flags)
        result |= {"ratios": ratios(result["seconds"]), "targets": dict(case.targets)}
        keep(result, flags.out)
        lines.append(f"\n{case.label}")
        lines.append(ratio_lines(result["ratios"], case.targets))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

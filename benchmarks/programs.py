"""Training steps as programs: built from shapes alone, one contender at a time.

Also what runs a measurement in a process of its own, so that its peak is its own.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from models import plain
from steps import OPTIMIZER, frozen_step, jitted, lora_of, low_rank_losses, trained_step

FROZEN, JLORA, FULL = "frozen limit", "jlora", "full fine-tuning"
FACTORED, MERGED = "factored, autodiff", "merged at apply"
CONTENDERS = (FROZEN, JLORA, FACTORED, MERGED, FULL)


def state_of(name: str, model: Any, key: jax.Array) -> tuple[Any, ...]:
    """Returns what the step of a contender takes; adapters are new, `b` zero."""
    params, batch = model.init(key), model.data(key)
    if name == FROZEN:
        inputs = jnp.zeros_like(model.embed(params, batch))
        return (jnp.zeros(()), inputs), params, batch
    if name == FULL:
        return params, OPTIMIZER.init(params), None, batch
    adapter = lora_of(model).init(key, params, batch)
    return adapter, OPTIMIZER.init(adapter), params, batch


def shapes_of(name: str, model: Any) -> tuple[Any, ...]:
    """Returns `state_of` as `jax.ShapeDtypeStruct`s: no array is made."""
    return jax.eval_shape(functools.partial(state_of, name, model), abstract_key())


def abstract_key() -> Any:
    """Returns the shape of a PRNG key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def step_of(name: str, model: Any) -> Any:
    """Returns the jitted step, what changes donated and nothing else returned."""
    if name == FROZEN:
        step, donated = frozen_step(model), 1
    elif name == FULL:
        full = lambda trained, _, batch: model.loss(trained, batch, linears=plain)
        step, donated = trained_step(full), 2
    else:
        step, donated = trained_step(low_rank_losses(model)[name]), 2
    return jitted(step, donated)


def equations(jaxpr: Any) -> int:
    """Returns the number of equations, those of inner programs at each use."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    parts = (part for eqn in inner.eqns for part in programs_in(eqn.params.values()))
    return len(inner.eqns) + sum(map(equations, parts))


def programs_in(values: Any) -> Iterator[Any]:
    """Yields the programs among the parameters of an equation."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from programs_in(value)
        elif hasattr(getattr(value, "jaxpr", value), "eqns"):
            yield value


def in_child(script: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `script --case CASE` answers, run as a process of its own."""
    command = [sys.executable, script, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def serve(measure: Callable[..., Mapping[str, Any]]) -> bool:
    """Answers `in_child`, where this process is one; returns whether it is."""
    if len(sys.argv) != 3 or sys.argv[1] != "--case":
        return False
    print(json.dumps(measure(**json.loads(sys.argv[2]))))
    return True


def host_peak() -> int:
    """Returns the peak of the resident memory of this process, in bytes.

    `getrusage` on Linux counts what the process that started this one had, too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(x.split(":", 1) for x in status.read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def ratio_lines(ratios: Mapping[str, float], targets: Mapping[str, str]) -> str:
    """Returns a line for each ratio, with its target where it has one."""
    lines = []
    for name, value in ratios.items():
        target = f" (target {targets[name]})" if name in targets else ""
        lines.append(f"ratio {name}: {value:.{3 if value < 2 else 2}f}{target}")
    return "\n".join(lines)


def cells(values: Sequence[Any]) -> tuple[str, ...]:
    """Returns the cells of a table's row; None is a dash."""
    worded: list[str] = []
    for value in values:
        if value is None:
            worded.append("-")
        elif isinstance(value, float):
            worded.append(f"{value:.3f}")
        else:
            worded.append(f"{value:,}" if isinstance(value, int) else str(value))
    return tuple(worded)

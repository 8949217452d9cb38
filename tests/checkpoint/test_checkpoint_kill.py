"""Runs that are killed at any moment go on as if they had not been.

This file is also the script of the processes that are killed: each resumes from what it
finds, and goes on until it is killed or done.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from paths import PYTHONPATH

import jlora
from jlora.checkpoint import items, restore, save

DEADLINE = 120  # seconds for one process; a few are usual
CONFIG = jlora.LoraConfig("w1|w2", rank=2, alpha=6.0)
SHAPES = {"w1": (5, 7), "w2": (7, 3)}
FOREVER = 1_000_000


# the killed


def note(out: Path, *words: Any) -> None:
    """Appends a line to the log, in one piece."""
    with (out / "log").open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def train(out: Path, steps: int, *, background: bool) -> None:
    """Trains up to a number of steps and saves after each of them."""
    rng = np.random.default_rng(1)
    base = {k: rng.normal(size=s).astype("f") for k, s in SHAPES.items()}
    lora = jlora.lora(lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"], CONFIG)
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, 1000))
    adapter = jax.jit(lora.init)(jax.random.key(0), base, np.ones((2, 5), "f"))
    opt_state, data, begin = jax.jit(tx.init)(adapter), np.random.default_rng(0), 0

    @jax.jit
    def update(adapter: Any, opt_state: Any, x: Any) -> Any:
        loss = lambda adapter: jnp.mean((lora.apply(base, adapter, x) - x[:, :3]) ** 2)
        value, grads = jax.value_and_grad(loss)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return value, optax.apply_updates(adapter, updates), opt_state

    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=background,
    )
    with ocp.CheckpointManager(out / "run", options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            begin = latest
            adapter = restore(out / "run", step=begin, like=adapter, base=base)
            like = jax.eval_shape(tx.init, adapter)
            args = ocp.args.Composite(
                opt_state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
            )
            rest = manager.restore(begin, args=args)
            opt_state, data.bit_generator.state = rest.opt_state, rest.data
        note(out, "begins", begin)
        for step in range(begin, steps):
            x = data.normal(size=(4, 5)).astype("f")
            loss, adapter, opt_state = update(adapter, opt_state, x)
            note(out, "loss", step, float(loss).hex())
            args = ocp.args.Composite(
                **items(adapter, config=CONFIG, base=base),
                opt_state=ocp.args.StandardSave(opt_state),
                data=ocp.args.JsonSave(dict(data.bit_generator.state)),
            )
            manager.save(step + 1, args=args)
            # In the background, what is known to be complete is the save before.
            note(out, "saved", step if background else step + 1)


def replace(out: Path) -> None:
    """Saves one adapter over another, until it is killed."""
    axes = jlora.KernelAxes((), (0,), (1,))
    config = jlora.LoraConfig("w", rank=2, alpha=1.0)
    begin = 0
    if (out / "one").exists():
        begin = int(restore(out / "one")["w"].a[0, 0])
    note(out, "begins", begin)
    for value in range(begin + 1, FOREVER):
        a, b = jnp.full((5, 2), float(value)), jnp.full((2, 7), float(value))
        adapter = {"w": jlora.LoraFactors(a, b, axes, 0.5)}
        save(out / "one", adapter, config=config, overwrite=True)
        note(out, "saved", value)


# the killers


def start(out: Path, mode: str, steps: int) -> subprocess.Popen[bytes]:
    out.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    # Anything that is printed is shown when a process fails.
    with (out / "output").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, __file__, str(out), mode, str(steps)],
            env={**kept, "PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "cpu"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def lines(out: Path) -> list[list[str]]:
    """The lines of the log that are complete."""
    log = out / "log"
    text = log.read_text() if log.exists() else ""
    return [line.split() for line in text.splitlines(keepends=True) if line[-1] == "\n"]


def until(what: Callable[[], bool], child: subprocess.Popen[bytes], out: Path) -> None:
    end = time.monotonic() + DEADLINE
    while not what():
        said = (out / "output").read_text(errors="replace")
        assert child.poll() is None and time.monotonic() < end, said
        time.sleep(0.001)


def torn(folder: Path) -> bool:
    """Whether a save to the folder has begun and not ended."""
    return any("tmp" in p.name for p in folder.iterdir()) if folder.exists() else False


def kill(out: Path, mode: str, *, delay: float, in_save: bool) -> bool:
    """Lets a process save once or more, and kills it; whether it left a torn save."""
    folder = out / ("one" if mode == "replace" else "run")
    before = len(lines(out))
    child = start(out, mode, FOREVER)
    try:
        until(lambda: len(lines(out)) > before + 3, child, out)
        time.sleep(delay)
        if in_save:
            until(lambda: torn(folder), child, out)
            time.sleep(delay / 10)
    finally:
        os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    return torn(folder)


def kills(out: Path, mode: str, times: int, seed: int) -> int:
    """Kills that many processes, one after the other; how many saves were torn."""
    rng = np.random.default_rng(seed)
    return sum(
        kill(out, mode, delay=rng.uniform(0, 0.2), in_save=i % 2 == 1)
        for i in range(times)
    )


def assert_nothing_saved_was_lost(out: Path) -> None:
    """Each process begins with the last complete save of the one before, or a later."""
    saved = 0
    for what, number, *_ in lines(out):
        if what == "begins":
            assert int(number) >= saved
        saved = int(number) if what == "saved" else saved


def finish(out: Path, steps: int) -> None:
    child = start(out, "sync", steps)
    assert child.wait(DEADLINE) == 0, (out / "output").read_text(errors="replace")


@pytest.mark.slow
def test_a_run_that_is_killed_a_dozen_times_is_the_run_that_is_not(
    tmp_path: Path,
) -> None:
    modes = ["sync", "background"]
    with ThreadPoolExecutor(2) as pool:
        one_each = lambda mode: kills(tmp_path / mode, mode, 6, seed=len(mode))
        torn_saves = sum(pool.map(one_each, modes))
    done = {mode: max(int(n) for _, n, *_ in lines(tmp_path / mode)) for mode in modes}
    steps = max(done.values()) + 2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda out: finish(tmp_path / out, steps), [*modes, "whole"]))
    losses = lambda out: [line[1:] for line in lines(out) if line[0] == "loss"]
    wanted = dict(losses(tmp_path / "whole"))
    assert list(wanted) == [str(step) for step in range(steps)]
    assert len(set(wanted.values())) == steps
    for mode in modes:
        assert_nothing_saved_was_lost(tmp_path / mode)
        # Each loss, also of a step that was done twice, to the last bit.
        assert all(wanted[step] == loss for step, loss in losses(tmp_path / mode))
        assert dict(losses(tmp_path / mode)) == wanted
    assert torn_saves > 0


@pytest.mark.slow
def test_a_save_over_another_that_is_killed_leaves_one_of_them(tmp_path: Path) -> None:
    for seed in range(4):
        kills(tmp_path, "replace", 1, seed)
        found = restore(tmp_path / "one")["w"]
        assert isinstance(found, jlora.LoraFactors)
        values = {float(x) for x in np.ravel(found.a)} | {float(found.b[0, 0])}
        saved = [int(n) for what, n in lines(tmp_path) if what == "saved"]
        assert len(values) == 1 and values.pop() in (saved[-1], saved[-1] + 1)
    assert_nothing_saved_was_lost(tmp_path)


if __name__ == "__main__":
    where, how, last = sys.argv[1:]
    # Most of a short life is spent compiling.
    jax.config.update("jax_disable_most_optimizations", True)
    if how == "replace":
        replace(Path(where))
    else:
        train(Path(where), int(last), background=how == "background")

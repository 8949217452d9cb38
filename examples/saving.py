"""Checkpoints of a sharded run: what is trained, and the history so far."""

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

Checkpoints = ocp.CheckpointManager
History = dict[str, Any]  # the "options", "losses" and "evals" of a run


def open_checkpoints(out: Path, *, resume: bool) -> Checkpoints:
    """Returns the checkpoints in `out`, without those of earlier runs unless resumed.

    Raises:
        ValueError: If `out` isn't one folder for all processes.
    """
    folder = out.absolute() / "checkpoints"
    if jax.process_index() == 0:
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    multihost_utils.sync_global_devices("the folder of checkpoints is there")
    if jax.process_count() > 1:
        _check_shared(folder)
    # The next step donates what was trained, so it has to be written by then.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(folder, options=options)


def _check_shared(folder: Path) -> None:
    """Refuses a folder in which others don't see what the first process writes.

    Each process writes the parts that it holds, and waits for those of the others:
    with a folder of its own on each machine, all would wait forever.
    """
    number = multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31)))
    marker = folder / f"seen-by-all-{number}"
    if jax.process_index() == 0:
        marker.touch()
    multihost_utils.sync_global_devices("the marker is there")
    seen = multihost_utils.process_allgather(np.asarray(marker.exists()))
    if jax.process_index() == 0:
        marker.unlink()
    if not seen.all():
        blind = ", ".join(map(str, np.flatnonzero(~seen)))
        raise ValueError(
            f"`--out` must be one folder for all processes; process {blind} does not "
            f"see what process 0 writes in {folder}: give one on a disk that all share"
        )


def save(checkpoints: Checkpoints, step: int, trained: Any, history: History) -> None:
    """Writes what is known after `step` steps."""
    items = ocp.args.Composite(
        trained=ocp.args.StandardSave(trained), history=ocp.args.JsonSave(history)
    )
    checkpoints.save(step, args=items)


def restore(
    checkpoints: Checkpoints, like: Any, options: dict[str, Any]
) -> tuple[int, Any, History]:
    """Returns the last step saved, what was trained by then, and the history.

    What was trained is laid out as `like` is, on whatever mesh it was saved. Where
    nothing was saved, that is step 0, `like` itself and a new history.

    Raises:
        ValueError: If the options aren't those that the run began with.
    """
    step = checkpoints.latest_step()
    if step is None:
        return 0, like, {"options": options, "losses": [], "evals": []}
    items = ocp.args.Composite(history=ocp.args.JsonRestore())
    history = checkpoints.restore(step, args=items).history
    _check_same(options, history["options"], checkpoints.directory)
    items = ocp.args.Composite(trained=ocp.args.StandardRestore(like))
    return step, checkpoints.restore(step, args=items).trained, history


def _check_same(options: dict[str, Any], before: dict[str, Any], folder: Any) -> None:
    name = lambda key: "--" + key.replace("_", "-")
    changed = [
        f"`{name(key)}` is {value}, and was {before[key]}"
        for key, value in options.items()
        if value != before[key]
    ]
    if changed:
        raise ValueError(
            f"`--resume` goes on with the run in {folder} as it began, but "
            f"{'; '.join(changed)}; give the same, or another `--out`"
        )


def write_losses(out: Path, history: History, speed: float | None) -> None:
    """Writes history and mean speed to losses.json, from the first process."""
    if jax.process_index() == 0:
        text = json.dumps(history | {"tokens_per_second": speed}, indent=2)
        (out / "losses.json").write_text(text + "\n")

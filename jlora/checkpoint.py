"""The orbax door: an adapter on disk, by itself or with all that training resumes from.

`save` writes an adapter with a record of everything else that it takes to use it, and
`restore` reads it again, onto any devices. A folder that `save` wrote is a folder of a
`CheckpointManager` with one step, so `restore` and `describe` also read the folder of a
training run.

Example:
    To resume a run, save the items of the adapter beside those of the optimizer, and of
    whatever else has a state. A step is written as a whole or not at all:

    >>> import tempfile, jax, jax.numpy as jnp, jlora, jlora.checkpoint, optax
    >>> import orbax.checkpoint as ocp
    >>> config = jlora.LoraConfig("w", rank=2)
    >>> lora = jlora.lora(lambda params, x: x @ params["w"], config)
    >>> base, x = {"w": jnp.ones((5, 7))}, jnp.ones((3, 5))
    >>> adapter = lora.init(jax.random.key(0), base, x)
    >>> tx = optax.adam(1e-3)
    >>> opt_state = tx.init(adapter)
    >>> run = tempfile.TemporaryDirectory()
    >>> with ocp.CheckpointManager(run.name) as manager:
    ...     adapter_items = jlora.checkpoint.items(adapter, config=config, base=base)
    ...     args = ocp.args.Composite(
    ...         **adapter_items,
    ...         opt_state=ocp.args.StandardSave(opt_state),
    ...         data=ocp.args.JsonSave({"position": 17}),
    ...     )
    ...     saved = manager.save(20, args=args)

    The number of the step is the manager's. The state of the optimizer is restored
    against a new one; on a mesh its shapes will do, with the shardings of
    `jlora.state_shardings`:

    >>> with ocp.CheckpointManager(run.name) as manager:
    ...     step = manager.latest_step()
    ...     adapter = jlora.checkpoint.restore(run.name, step=step, base=base)
    ...     like = tx.init(adapter)
    ...     args = ocp.args.Composite(
    ...         opt_state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
    ...     )
    ...     rest = manager.restore(step, args=args)
    >>> step, rest.data, jax.tree.structure(rest.opt_state) == jax.tree.structure(like)
    (20, {'position': 17}, True)
    >>> run.cleanup()
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ._adapter.config import LoraConfig
from ._adapter.entries import arrays_of, entry_with
from ._adapter.factors import Adapter
from ._checkpoint.arrays import (
    check_base,
    check_contents,
    check_shapes,
    on_default_device,
    writable,
)
from ._checkpoint.record import Entry as Entry
from ._checkpoint.record import Record as Record
from ._checkpoint.restoring import Arrays, targets
from ._checkpoint.saving import record_of
from ._checkpoint.steps import ADAPTER, RECORD, absolute, format_of, read_record
from ._errors import CorruptFileError
from ._files.processes import on_first
from ._params.given import check_path
from ._params.paths import PyTree

PathLike = str | os.PathLike[str]

_NAMES = ocp.path.step.standard_name_format()


def save(
    path: PathLike,
    adapter: Mapping[str, Any],
    *,
    config: LoraConfig | Sequence[LoraConfig],
    base: PyTree | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter, and a record of its configs, shapes and base, to a folder.

    Of several processes all call it, with one folder that all of them see: Orbax waits
    until each has written its parts. What is written is complete when it returns; if it
    is interrupted, what was there before can still be read.

    Args:
        path: the folder, which is made if there is none; local, or a URL of a store
            that Orbax can write to.
        adapter: the factors and whole arrays by path, sharded or not; boxes around the
            arrays are left out.
        config: the config or configs that the adapter was made with.
        base: the frozen params. If given, `restore` can tell whether it is given the
            same: of arrays it compares shapes, dtypes and some values, of
            `jax.ShapeDtypeStruct`s shapes and dtypes.
        overwrite: whether to replace an adapter that `save` wrote to the folder. The
            old one is removed when the new one is complete.

    Raises:
        AdapterError: if an entry fits none of the configs or not the base, or cannot be
            saved. All offenders are collected.
        NonFiniteError: if there are NaNs or infinities in the adapter.
        FileExistsError: if there is something at `path` that may not be replaced.
        OSError: if the folder cannot be made. Of several processes all raise these two.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, jlora, jlora.checkpoint
        >>> config = jlora.LoraConfig("w", rank=2)
        >>> lora = jlora.lora(lambda params, x: x @ params["w"], config)
        >>> params, x = {"w": jnp.ones((5, 7))}, jnp.ones((3, 5))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     jlora.checkpoint.save(folder, adapter, config=config, base=params)
        ...     found = jlora.checkpoint.restore(folder, base=params)
        >>> found["w"].a.shape, found["w"].b.shape, found["w"].scaling
        ((5, 2), (2, 7), 8.0)
    """
    check_path(path, "jlora.checkpoint.save(path, adapter, config=..., base=...)")
    folder = absolute(path)
    args = items(adapter, config=config, base=base)
    step = _next_step(folder, overwrite)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, cleanup_tmp_directories=True, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        manager.save(step, args=ocp.args.Composite(**args))


def items(
    adapter: Mapping[str, Any],
    *,
    config: LoraConfig | Sequence[LoraConfig],
    base: PyTree | None = None,
) -> dict[str, ocp.args.CheckpointArgs]:
    """Returns the items of a checkpoint that hold an adapter and its record.

    For `CheckpointManager.save`, beside the items of a training run: see the example of
    this module. `restore` and `describe` find them there.

    Args:
        adapter: as for `save`.
        config: as for `save`.
        base: as for `save`.

    Returns:
        The arguments for `orbax.checkpoint.args.Composite`, by name: "adapter" and
        "record".

    Raises:
        AdapterError: as from `save`.
        NonFiniteError: as from `save`.
    """
    record, plain = record_of(adapter, config, base)
    arrays = {str(i): arrays_of(entry) for i, entry in enumerate(plain.values())}
    return {
        ADAPTER: ocp.args.StandardSave(jax.tree.map(writable, arrays)),
        RECORD: ocp.args.JsonSave(record.to_dict()),
    }


def describe(path: PathLike, *, step: int | None = None) -> Record:
    """Returns what a checkpoint says of the adapter in it; no array is read.

    Args:
        path: the folder that `save` wrote, or that of a training run.
        step: the step of the run; by default the last.

    Returns:
        The record: `config` as it was given to `save`; `entries` with path, rank,
        alpha, scaling, shapes and dtypes; `adapter`, the shapes for `jlora.shardings`.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        CorruptFileError: if the record is damaged or missing.
        FormatVersionError: if a newer jlora wrote it.
    """
    return read_record(_place(path, step))


def restore(
    path: PathLike,
    *,
    step: int | None = None,
    like: Mapping[str, Any] | None = None,
    shardings: Any = None,
    base: PyTree | None = None,
    base_mismatch: str = "error",
) -> Adapter:
    """Returns the adapter of a checkpoint, on any devices.

    Every array is compared with the record before and after it is read: shapes, dtypes
    and a checksum of all its bits. Of several processes all call it.

    Args:
        path: the folder that `save` wrote, or that of a training run.
        step: the step of the run; by default the last.
        like: an adapter, or its shapes, that the result must be like: paths, roles of
            axes, scaling, shapes, dtypes. Its shardings are taken over.
        shardings: where the arrays go: a tree like the adapter, as
            `jlora.shardings(params, describe(path).adapter)` gives it, or one sharding
            for all. Without it and `like`, arrays are where `jnp.array` puts them.
        base: the frozen params, or their shapes, to compare with those that the adapter
            was saved with: all that is known of both.
        base_mismatch: "error", or "allow" to restore beside another base.

    Returns:
        The adapter, as it was saved.

    Raises:
        BaseMismatchError: if `base` is another one. All differences are collected.
        AdapterError: if the adapter is not like `like`, or does not fit `shardings`.
            All differences are collected.
        CorruptFileError: if a file is damaged or missing.
        FormatVersionError: if a newer jlora wrote it.
        FileNotFoundError: if there is no such checkpoint.
    """
    if base_mismatch not in ("error", "allow"):
        raise ValueError(
            f"`base_mismatch` must be 'error' or 'allow', got {base_mismatch!r}"
        )
    place = _place(path, step)
    record = read_record(place)
    if base is not None and base_mismatch == "error":
        check_base(record, base, place)
    arrays = _read_arrays(place, targets(record, like, shardings, str(place)))
    check_contents(record, arrays, place)
    placed = jax.tree.map(on_default_device, arrays)
    entries = enumerate(record.entries)
    return {e.path: entry_with(e.value, placed[str(i)]) for i, e in entries}


FORMAT = format_of(save, describe, restore)
"""How `python -m jlora` finds, reads and writes checkpoints."""


# --- where it is ---


def _next_step(folder: str, overwrite: bool) -> int:
    """Returns the step to write to a folder.

    Raises:
        FileExistsError: if something is there that may not be replaced.
    """
    # One process looks, before any begins to write.
    seen = on_first(lambda: _free_step(folder))
    step = int(multihost_utils.broadcast_one_to_all(np.int32(seen or 0)))
    if step < 0:
        raise FileExistsError(
            f"{folder} holds something else than an adapter that `save` wrote, which "
            "it does not replace; give another path"
        )
    if step > 0 and not overwrite:
        raise FileExistsError(
            f"{folder} holds an adapter already; give another path, or `overwrite=True`"
        )
    return step


def _free_step(folder: str) -> int:
    """Returns the step after those of a folder, or -1 if they are not all adapters.

    A folder that is not there is made: where Orbax cannot, other processes wait for it.
    """
    root = ocp.path.step.build_step_path(folder, _NAMES, 0).parent
    if not root.exists():
        root.mkdir(parents=True, exist_ok=True)
        return 0
    if not root.is_dir():
        return -1
    # What an interrupted save has left is removed by the manager.
    names = [p.name for p in root.iterdir() if ocp.utils.TMP_DIR_SUFFIX not in p.name]
    if not all(name.isdecimal() for name in names):
        return -1
    inside = {p.name for name in names for p in (root / name).iterdir() if p.is_dir()}
    if not inside <= {ADAPTER, RECORD}:
        return -1
    return max(map(int, names), default=-1) + 1


def _place(path: PathLike, step: int | None) -> Any:
    """Returns the folder of one step, which is known to be finished."""
    check_path(path, "jlora.checkpoint.restore(path, base=...)")
    folder = absolute(path)
    found = {m.step: m.path for m in _NAMES.find_all(folder)}
    if not found:
        raise FileNotFoundError(f"there is no finished checkpoint in {folder}")
    if step is not None and step not in found:
        raise FileNotFoundError(
            f"{folder} has no finished step {step}, but {sorted(found)}"
        )
    return found[max(found) if step is None else step]


# --- what is read ---


def _read_arrays(place: Any, wanted: Arrays) -> Arrays:
    """Returns the arrays of a checkpoint if it has exactly those of its record."""
    # The item alone: of others beside it, Orbax warns that it cannot restore them.
    item, handler = place / ADAPTER, ocp.StandardCheckpointHandler()
    try:
        # Before, for Orbax casts to the dtypes that are asked for; and after.
        check_shapes(handler.metadata(item).tree, wanted, place)
        empty = lambda t: t if t.sharding else np.empty(t.shape, t.dtype)
        args = ocp.args.StandardRestore(jax.tree.map(empty, wanted))
        with ocp.Checkpointer(handler) as checkpointer:
            arrays = checkpointer.restore(item, args=args)
        check_shapes(arrays, wanted, place)
    except (CorruptFileError, jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds, and bare ones
        raise CorruptFileError(f"{place} cannot be read: {error}") from error
    return arrays

"""Folders of checkpoints as they look without Orbax, and their format by its door."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import CorruptFileError
from .._files.format import Format
from .record import LIMIT, Record

# The two items of a step. The keys of arrays are numbers: paths may be any text.
ADAPTER = "adapter"
RECORD = "record"
CHECKPOINT = "a checkpoint"  # the name of the format
Restore = Callable[..., dict[str, Any]]


def holds_steps(folder: Path) -> bool:
    """Returns whether a folder is that of a checkpoint, whoever wrote it."""
    marks = [*folder.glob("*/_CHECKPOINT_METADATA"), *folder.glob("*/record/metadata")]
    return any(p.relative_to(folder).parts[0].isdecimal() for p in marks)


def is_step(path: Path) -> bool:
    """Returns whether a path is the folder of one step of a checkpoint."""
    return path.name.isdecimal() and holds_steps(path.parent)


def absolute(path: str | os.PathLike[str]) -> str:
    """Returns a path that Orbax takes; the URL of a store is one."""
    text = os.fspath(path)
    return text if "://" in text else str(Path(text).absolute())


def read_record(place: Any) -> Record:
    """Returns the record in the folder of one step.

    Raises:
        CorruptFileError: if it is damaged or missing.
    """
    file = place / RECORD / "metadata"
    try:
        with file.open("rb") as opened:
            # One byte more than is allowed is enough to be refused.
            data = opened.read(LIMIT + 1)
    except OSError as error:
        raise CorruptFileError(
            f"{place} has no record of an adapter that can be read: {error}"
        ) from error
    return Record.from_json(data, str(file))


def format_of(
    save: Callable[..., None], describe: Callable[..., Any], restore: Restore
) -> Format:
    """Returns the format of checkpoints, from the functions of the door to Orbax."""

    def read(path: Path, *, ignore: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
        """Returns those of the last step of a folder, or of the step that it is."""
        place, step = (path.parent, int(path.name)) if is_step(path) else (path, None)
        config = describe(place, step=step).config
        return config, restore(place, step=step)

    def write(
        path: Path,
        adapter: Mapping[str, Any],
        configs: Any,
        *,
        overwrite: bool = False,
    ) -> None:
        save(path, adapter, config=configs, overwrite=overwrite)

    holds = lambda path: is_step(path) or holds_steps(path)
    return Format(CHECKPOINT, holds, read, write)

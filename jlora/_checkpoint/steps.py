"""Folders of checkpoints, as they look without Orbax: what `python -m jlora` finds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._files.format import Format

CHECKPOINT = "a checkpoint"
Restore = Callable[..., dict[str, Any]]


def holds_steps(folder: Path) -> bool:
    """Returns whether a folder is that of a checkpoint, whoever wrote it."""
    marks = [*folder.glob("*/_CHECKPOINT_METADATA"), *folder.glob("*/record/metadata")]
    return any(p.relative_to(folder).parts[0].isdecimal() for p in marks)


def is_step(path: Path) -> bool:
    """Returns whether a path is the folder of one step of a checkpoint."""
    return path.name.isdecimal() and holds_steps(path.parent)


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
        **_: Any,
    ) -> None:
        save(path, adapter, config=configs, overwrite=overwrite)

    holds = lambda path: is_step(path) or holds_steps(path)
    return Format(CHECKPOINT, holds, read, write)

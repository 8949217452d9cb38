"""Writing files: a reader finds old ones or new ones, never half of one or of both."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .._errors import AdapterError, UnsafeFormatError


def write_files(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Writes files into a folder, each by a rename of one that is complete and checked.

    Where they replace others, those after the first are taken away before the first is
    replaced: whoever needs all of them finds old ones, new ones or not all, never some
    of each.

    Args:
        folder: where to; it is made if there is none.
        files: their bytes by name, in the order in which they appear.
        overwrite: whether files of these names may be replaced.

    Raises:
        FileExistsError: if one is there and may not be replaced.
        UnsafeFormatError: if the folder or one of the files is a link.
        AdapterError: if what was written reads back differently.
    """
    for place in (folder, *(folder / name for name in files)):
        if place.is_symlink():
            raise UnsafeFormatError(
                f"{place} is a link; jlora does not write through it"
            )
    there = [name for name in files if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} has {there} already; give another folder or `overwrite=True`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, str] = {}
    try:
        for name, data in files.items():
            written[name] = _write_beside(folder, data)
        _replace_first(folder, written)
        for name, temporary in list(written.items()):
            os.replace(temporary, folder / name)
            del written[name]
    finally:
        for temporary in written.values():
            Path(temporary).unlink(missing_ok=True)
    _sync_folder(folder)


def _replace_first(folder: Path, written: dict[str, str]) -> None:
    """Renames the first of the files, while there are none of the others."""
    first, *rest = written
    away = {n: f"{written[n]}-old" for n in reversed(rest) if (folder / n).exists()}
    moved: dict[str, str] = {}
    try:
        for name, beside in away.items():
            os.rename(folder / name, beside)
            moved[name] = beside
        if moved:
            _sync_folder(folder)
        os.replace(written[first], folder / first)
        del written[first]
    except BaseException:
        if os.path.lexists(written.get(first, "")):  # it is not replaced yet
            for name, beside in moved.items():
                os.rename(beside, folder / name)
        raise
    for beside in moved.values():
        os.unlink(beside)


def _write_beside(folder: Path, data: bytes) -> str:
    """Returns the name of a new file in the folder that holds the data on disk."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".jlora-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        if Path(name).read_bytes() != data:
            raise AdapterError(f"what was written to {folder} reads back differently")
    except BaseException:
        os.unlink(name)
        raise
    return name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened, and a rename needs no more
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

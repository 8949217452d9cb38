"""Writing files: a reader finds an old one or a new one, never half of one."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ._errors import AdapterError, UnsafeFormatError


def write_files(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Writes files into a folder, each by a rename of one that is complete and checked.

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
        for name, temporary in list(written.items()):
            os.replace(temporary, folder / name)
            del written[name]
    finally:
        for temporary in written.values():
            os.unlink(temporary)
    _sync_folder(folder)


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

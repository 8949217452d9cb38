"""A copy of the sources and of the tests, to which a page's patch is applied."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from paths import ROOT


def run(folder: Path, *command: str, **options: str) -> Any:
    """Runs a command in a folder, whose `jlora` is the one that is imported."""
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONUTF8": "1", **options}
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8"
    )


def copy_sources(copy: Path) -> Path:
    """Copies the package, its tests and what both read besides."""
    ignored = shutil.ignore_patterns("__py*", "data")
    for name in ("jlora", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)
    return copy


def apply(copy: Path, patch: str, files: dict[str, str] | None = None) -> Path:
    """Writes a page's files into a copy, and applies its patch."""
    for name, text in (files or {}).items():
        (copy / name).write_text(text, encoding="utf-8")
    (copy / "page.diff").write_text(patch, encoding="utf-8")
    # Whatever repository the folder may lie in is none of its business.
    alone = {"GIT_CEILING_DIRECTORIES": str(copy.parent)}
    done = run(copy, "git", "apply", "--verbose", "page.diff", **alone)
    assert done.returncode == 0, done.stderr
    return copy

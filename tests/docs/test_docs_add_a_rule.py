"""The example of docs/add_a_rule.md: its patch applies, and what it adds works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fenced import blocks
from paths import ROOT

PAGE = blocks((ROOT / "docs" / "add_a_rule.md").read_text(encoding="utf-8"))
(SCRIPT,) = (one.text for one in PAGE if one.language == "python")
(PATCH,) = (one.text for one in PAGE if one.language == "diff")
(PLAN,) = (one.text for one in PAGE if one.title == "with the rule")

pytestmark = pytest.mark.docs


def run(folder: Path, *command: str, **options: str) -> Any:
    """Runs a command in a folder, whose `jlora` is the one that is imported."""
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONUTF8": "1", **options}
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources and of the tests, with the page's patch."""
    copy = tmp_path_factory.mktemp("patched")
    for name in ("jlora", "tests"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__py*")
        )
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / "rule.diff").write_text(PATCH, encoding="utf-8")
    # Whatever repository the folder may lie in is none of its business.
    alone = {"GIT_CEILING_DIRECTORIES": str(copy.parent)}
    done = run(copy, "git", "apply", "--verbose", "rule.diff", **alone)
    assert done.returncode == 0, done.stderr
    return copy


def test_the_rule_is_one_file_of_a_dozen_lines_and_one_entry() -> None:
    _, *pieces = re.split(r"^\+\+\+ b/(.*)\n", PATCH, flags=re.MULTILINE)
    added = {
        file: re.findall(r"^\+(?!\+\+).", lines, re.MULTILINE)
        for file, lines in zip(pieces[::2], pieces[1::2], strict=True)
    }
    assert set(added) == {
        "tests/uses/uses_carried.py",
        "jlora/_rules/cumsum.py",
        "jlora/_rules/__init__.py",
    }
    assert len(added["jlora/_rules/cumsum.py"]) <= 12
    assert len(added["jlora/_rules/__init__.py"]) == 2  # imported, and entered


def test_the_script_prints_a_plan(patched: Path) -> None:
    (patched / "quickstart.py").write_text(SCRIPT, encoding="utf-8")
    done = run(patched, sys.executable, "quickstart.py", JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == PLAN


def test_the_use_stays_factored(patched: Path) -> None:
    """Outputs, gradients, and no value of the kernel's shape, as for all uses."""
    command = ("-m", "pytest", "-p", "no:cacheprovider", "-k", "cumsum_in")
    done = run(
        patched, sys.executable, *command, "tests/rules/test_uses.py", PYTEST_ADDOPTS=""
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b[4-9] passed", done.stdout), done.stdout

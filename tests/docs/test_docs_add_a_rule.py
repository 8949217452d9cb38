"""The example of docs/add_a_rule.md: its patch applies, and what it adds works."""

import re
import sys
from pathlib import Path

import pytest
from fenced import blocks
from patched import apply, copy_sources, run
from paths import ROOT

PAGE = blocks((ROOT / "docs" / "add_a_rule.md").read_text(encoding="utf-8"))
(SCRIPT,) = (one.text for one in PAGE if one.language == "python")
(PATCH,) = (one.text for one in PAGE if one.language == "diff")
(PLAN,) = (one.text for one in PAGE if one.title == "with the rule")

pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources and of the tests, with the page's patch."""
    return apply(copy_sources(tmp_path_factory.mktemp("patched")), PATCH)


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

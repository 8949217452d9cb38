"""The example of docs/add_a_variant.md: a file and a line, and all that follows."""

import re
import sys
from pathlib import Path

import pytest
from fenced import blocks
from patched import apply, copy_sources, run
from paths import ROOT

PAGE = blocks((ROOT / "docs" / "add_a_variant.md").read_text(encoding="utf-8"))
FILES = {one.title: one.text for one in PAGE if one.language == "python"}
(PATCH,) = (one.text for one in PAGE if one.language == "diff")
(PRINTED,) = (one.text for one in PAGE if one.title == "with the variant")
(PRINTED_OUTSIDE,) = (one.text for one in PAGE if one.title == "in your own code")

pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources and of the tests, with what the page adds."""
    return apply(copy_sources(tmp_path_factory.mktemp("patched")), PATCH, FILES)


@pytest.fixture(scope="module")
def printed(patched: Path) -> str:
    """What the script of the page prints; it leaves an adapter in the folder."""
    done = run(patched, sys.executable, "quickstart.py", JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_ones_own_code_it_is_a_class(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FILES["own.py"], encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import own"
    done = run(ROOT, sys.executable, "-c", code, JAX_PLATFORMS="cpu")
    assert done.stdout == PRINTED_OUTSIDE, done.stderr


def test_it_is_a_file_and_an_entry_of_the_table() -> None:
    files = [name for name in FILES if name.startswith("jlora/")]
    assert files == ["jlora/_adapter/variants/symmetric.py"]
    added = re.findall(r"^\+(?!\+\+)(.*)", PATCH, re.MULTILINE)
    assert added == ["from .symmetric import SYMMETRIC", "    SYMMETRIC,"]


def test_it_trains_merges_and_is_stored(patched: Path, printed: str) -> None:
    assert printed == PRINTED
    read = (sys.executable, "-m", "jlora")
    shown = run(patched, *read, "inspect", "adapter", JAX_PLATFORMS="cpu")
    assert "2 targets, 200 values" in shown.stdout, shown.stderr
    done = run(patched, *read, "convert", "adapter", "peft", JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("printed")
def test_a_jlora_without_it_refuses_its_files_by_name(patched: Path) -> None:
    code = "import sys, jlora.checkpoint as c; c.restore(sys.argv[1])"
    folder = str(patched / "adapter")
    done = run(ROOT, sys.executable, "-c", code, folder, JAX_PLATFORMS="cpu")
    assert "FormatVersionError" in done.stderr
    assert "the variant 'symmetric', which this jlora does not know" in done.stderr


def test_it_keeps_what_holds_for_every_variant(patched: Path) -> None:
    """That of the table, and the shape of the package: imports, docstrings."""
    command = ("-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow")
    names = ("adapter/test_variant_table.py", "test_structure.py")
    chosen = ("-k", "symmetric or variant_is or circle or docstring or annotated")
    tests = [f"tests/{name}" for name in names]
    done = run(patched, sys.executable, *command, *chosen, *tests, PYTEST_ADDOPTS="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "symmetric" in (patched / "jlora/_adapter/variants/__init__.py").read_text()

"""The README: its code runs and prints what it says, its commands are those of CI."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fenced import blocks, run_blocks
from paths import PYTHONPATH, ROOT
from public import imported_names

import jlora

README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
FLOORS = dict(
    line.split("==")
    for line in (ROOT / ".ci" / "floors.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
BLOCKS = blocks(README)
SHELL = [one.text for one in BLOCKS if one.language not in ("python", "text")]


def test_the_code_runs_and_prints_what_the_readme_says() -> None:
    run_blocks(BLOCKS)


def test_the_first_block_is_a_script_of_its_own(tmp_path: Path) -> None:
    code, plan = (block.text for block in BLOCKS[:2])
    (tmp_path / "quickstart.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "quickstart.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "cpu", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == plan
    assert plan.startswith("path ") and "trainable 3,072 of" in plan


def test_it_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 250


def test_there_are_two_commands() -> None:
    assert {block.language for block in BLOCKS} == {"python", "text", "bash"}
    assert len(SHELL) == 2
    assert SHELL[0].splitlines()[-1] == "python examples/finetune_chat.py"
    assert SHELL[1].splitlines()[-1].startswith("python -m pytest")


def test_ci_runs_the_second_command_and_nothing_else_installs() -> None:
    assert CI.count(SHELL[1]) == 1
    assert CI.count("pip install") == SHELL[1].count("pip install")
    assert CI.count("pytest -n") == 1


def test_ci_runs_in_a_folder_named_like_the_package() -> None:
    """As `git clone` makes one: frames must not be judged by the words in paths."""
    assert 'checkout="$place/jlora"' in CI


def test_ci_pins_the_floor_of_each_package() -> None:
    """Of those that jlora needs and the examples use: `numpy>=2.0` is 2.0.2 there."""
    extras = PROJECT["optional-dependencies"]
    asked = PROJECT["dependencies"] + extras["quant"] + extras["examples"]
    floors = dict(one.split(">=") for one in asked)
    assert set(floors) <= set(FLOORS)
    wrong = {n: FLOORS[n] for n, f in floors.items() if not is_of(FLOORS[n], f)}
    assert not wrong
    assert ".ci/floors.txt" in CI


def is_of(pinned: str, floor: str) -> bool:
    """Whether a release is the floor, or a patch of it."""
    return f"{pinned}.".startswith(f"{floor}.")


def test_the_guide_names_the_floors() -> None:
    page = (ROOT / "docs" / "guide" / "installing.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if "|" in line]
    told = {row[0].lower(): row[3] for row in rows if len(row) == 4}
    names = {"orbax": "orbax-checkpoint"}
    packages = ("jax", "numpy", "flax", "optax", "orbax", "safetensors", "qwix")
    for package in packages:
        assert told[package] == FLOORS[names.get(package, package)], package


@pytest.mark.parametrize("command", SHELL, ids=["example", "tests"])
def test_the_commands_name_what_exists(command: str) -> None:
    """They differ in extras and in the last line; both begin on a fresh machine."""
    lines = command.splitlines()
    assert lines[0] == "python3 -m venv .venv && . .venv/bin/activate &&"
    found = re.fullmatch(r'pip install -e "\.\[([\w,]+)\]" &&', lines[1])
    assert found and set(found[1].split(",")) <= set(PROJECT["optional-dependencies"])
    assert lines[2].startswith("pip install --no-deps --require-hashes -r ")
    files = [w for w in shlex.split(command.replace("&", "")) if "/" in w]
    for name in [f for f in files if not f.startswith(".venv")]:
        assert (ROOT / name).is_file(), name
    assert len(lines) == 4


def test_the_data_of_the_example_is_pinned() -> None:
    text = (ROOT / "examples" / "requirements-finetune.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    packages = " ".join(lines).replace("\\", "").split()
    names = [word for word in packages if not word.startswith("--hash")]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", name) for name in names)
    hashes = [word for word in packages if word.startswith("--hash=sha256:")]
    assert len(hashes) == len(names) == 3


def test_public_names_are_those_of_the_module() -> None:
    modules = {f.stem for f in (ROOT / "jlora").glob("*.py")}
    visible = {n for n in vars(jlora) if not n.startswith("_")}
    assert visible - modules == set(imported_names())


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_every_page_of_the_guide_is_linked() -> None:
    pages = {f"docs/guide/{f.name}" for f in (ROOT / "docs" / "guide").glob("*.md")}
    assert pages <= set(re.findall(r"\]\(([^)#]+)", README))

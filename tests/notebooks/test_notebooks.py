"""The notebooks: as they are kept, and executed from top to bottom in a kernel.

Their first cells are compared with those of notebooks/opening.md. One that trains reads
its number of steps from JLORA_NOTEBOOK_STEPS, so that a slow machine may ask for fewer.
"""

import base64
import getpass
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from example_runs import needs_data
from paths import ROOT

nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = ROOT / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
REPOSITORY = "jlora/jlora"
MAX_BYTES = 300_000
MAY_FAIL = "raises-exception"
# Those that train longest, and learn enough in fewer steps.
SHORTENED = ("01_quickstart", "07_many_adapters", "08_qlora")
# One that trains nothing: what it prints follows from shapes, and is what is kept.
EXACT = ("02_what_gets_adapted",)

OPENING = (NOTEBOOKS / "opening.md").read_text(encoding="utf-8")
BADGE, INSTALL, DEVICES = re.findall(r"^```\w+\n(.*?)\n```$", OPENING, re.M | re.S)
# Places on a disk, not the parts of a URL or of a path in params.
ABSOLUTE = re.compile(r"(?<![\w./])(/(tmp|home|root|usr|opt|work|Users|var)/|[A-Z]:\\)")

over_notebooks = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def words(output: Any) -> str:
    """What a reader sees of an output as text; a picture is none."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return "\n".join([*output.traceback, output.ename, output.evalue])
    parts = sorted(output.data.items())
    kept = {k: v for k, v in parts if not k.startswith("image/")}
    return "\n".join(v if isinstance(v, str) else json.dumps(v) for v in kept.values())


def said(notebook: Any) -> list[str]:
    """What all cells print; a kernel gives the files of its cells numbers for names."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [re.sub(r"\b\d+\.py", "cell.py", words(output)) for output in outputs]


def check_outputs(notebook: Any) -> None:
    """Checks that nothing failed by accident, warned, or tells of the machine."""
    for cell in code_cells(notebook):
        failed = any(out.output_type == "error" for out in cell.outputs)
        assert failed == (MAY_FAIL in tags(cell)), cell.source
        for output in cell.outputs:
            assert output.get("name") != "stderr", output.text
            text = words(output)
            assert not ABSOLUTE.search(text), text
            assert not re.search(r"\w*Warning:", text), text
            user = getpass.getuser()
            assert user == "root" or not re.search(rf"\b{re.escape(user)}\b", text)


def notebook_of(source: str, tag: str | None = None, *outputs: Any) -> Any:
    """A notebook of one code cell."""
    metadata = {"tags": [tag]} if tag else {}
    cell = nbformat.v4.new_code_cell(source, metadata=metadata, outputs=[*outputs])
    return nbformat.v4.new_notebook(cells=[cell])


def test_there_are_notebooks() -> None:
    numbers = [path.name[:2] for path in PATHS]
    assert numbers
    assert len(set(numbers)) == len(numbers)


@over_notebooks
def test_the_first_cell_opens_it_in_colab(path: Path) -> None:
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    lines = first.source.splitlines()
    assert lines[0].startswith("# ")
    assert f"/github/{REPOSITORY}/blob/main/notebooks/NAME" in BADGE
    assert BADGE.replace("NAME", path.name) in lines


@over_notebooks
def test_it_opens_as_the_others_do(path: Path) -> None:
    """It installs what is missing, picks TPU, GPU or CPU, and builds the mesh."""
    install, device = code_cells(read(path))[:2]
    assert install.source == INSTALL
    assert device.source == DEVICES


@over_notebooks
def test_its_cells_were_executed_in_order(path: Path) -> None:
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)


@over_notebooks
def test_its_outputs_are_clean_and_small(path: Path) -> None:
    notebook = read(path)
    check_outputs(notebook)
    assert path.stat().st_size < MAX_BYTES
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if picture := output.get("data", {}).get("image/png"):
                assert base64.b64decode(picture).startswith(b"\x89PNG")


@over_notebooks
def test_its_parts_are_explained(path: Path) -> None:
    """No more than three code cells in a row, of no more than 40 lines."""
    notebook = read(path)
    kinds = "".join(cell.cell_type[0] for cell in notebook.cells)
    assert "cccc" not in kinds
    assert max(c.source.count("\n") for c in code_cells(notebook)) < 40


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[list[str]]:
    """Executes the first code cell and returns the commands that it would run."""
    ran: list[list[str]] = []
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(subprocess, "run", lambda words, **_: ran.append(words))
    exec(INSTALL, {})
    return ran


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("saved to /home/someone/runs", "stdout"),
        ("cell.py:3: UserWarning: beware", "stdout"),
        ("anything", "stderr"),
    ],
)
def test_outputs_that_are_not_clean_are_found(text: str, name: str) -> None:
    output = nbformat.v4.new_output("stream", name=name, text=text)
    with pytest.raises(AssertionError):
        check_outputs(notebook_of("...", None, output))
    clean = nbformat.v4.new_output("stream", text="params/home/kernel of 1/2")
    check_outputs(notebook_of("...", None, clean))


def test_the_installation_does_nothing_where_jlora_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert install(monkeypatch, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


class Distribution(NamedTuple):
    """A package that is installed."""

    name: str
    version: str


@pytest.mark.parametrize(
    ("plugin", "wanted"),
    [
        (None, "jax"),
        ("jax-cuda12-plugin", "jax[cuda12]"),
        ("jax-cuda13-plugin", "jax[cuda13]"),
        ("libtpu", "jax[tpu]"),
    ],
)
def test_the_installation_takes_the_plugin_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    plugin: str | None,
    wanted: str,
) -> None:
    """pip leaves a JAX alone that is new enough: none is named by its version."""
    there = [Distribution(name, "0.7.2") for name in ("jax", "jaxlib", plugin) if name]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: there)
    clone, package, data = install(monkeypatch, tmp_path)
    assert clone[:2] == ["git", "clone"]
    assert f"https://github.com/{REPOSITORY}" in clone
    assert "--no-deps" in data
    assert package[-2:] == [wanted, "./jlora-source[examples,quant]"]
    for command in (package, data):
        assert not {"-U", "--upgrade", "--force-reinstall"} & set(command)
    assert "JAX 0.7.2 is too old" in capsys.readouterr().out


def test_a_clone_installs_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ("jlora", "notebooks"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    package, _ = install(monkeypatch, tmp_path / "notebooks")
    assert package[-1] == "./..[examples,quant]"


def executed(notebook: Any, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Any:
    """The notebook with the outputs of a new kernel."""
    pytest.importorskip("nbclient")
    monkeypatch.syspath_prepend(str(NOTEBOOKS))
    from execute import execute

    return execute(notebook, cell_timeout=300, **environment)


@pytest.mark.notebooks
def test_a_cell_fails_only_where_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import os\nraise KeyError(os.environ['JAX_PLATFORMS'])"
    with pytest.raises(Exception, match="KeyError"):
        executed(notebook_of(source), monkeypatch)
    done = executed(notebook_of(source, MAY_FAIL), monkeypatch)
    assert done.cells[0].outputs[0].evalue == "'cpu'"
    with pytest.raises(AssertionError):
        check_outputs(executed(notebook_of("1 + 1", MAY_FAIL), monkeypatch))


@pytest.mark.notebooks
@needs_data("THE NOTEBOOKS ARE")
@pytest.mark.timeout(900)
@over_notebooks
def test_it_runs_from_top_to_bottom(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = {"JLORA_NOTEBOOK_STEPS": "8"} if path.stem in SHORTENED else {}
    found = executed(read(path), monkeypatch, **fewer)
    check_outputs(found)
    if path.stem in EXACT:
        assert said(found) == said(read(path))

"""The tables of the documentation say what is there: names, fields, doors, findings."""

import dataclasses
import inspect
import re

import jax.numpy as jnp
import pytest
from families import FAMILIES, TOLD
from paths import ROOT
from public import DOORS, imported_names

import jlora

pytestmark = pytest.mark.docs


def table(page: str, head: str) -> dict[str, list[str]]:
    """The rows of the table whose first column is called `head`, by first cell.

    Of a cell that is a link the text counts.
    """
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[c.strip() for c in line.strip("| ").split(" | ")] for line in lines]
    return {re.sub(r"^\[(.*)\]\(.*\)$", r"\1", r[0]).strip("`"): r[1:] for r in rows}


NAMES = table("api/index.md", "name")


def test_every_public_name_has_a_row() -> None:
    assert set(NAMES) == {f"jlora.{name}" for name in imported_names()}
    assert all(len(row) == 1 and row[0] for row in NAMES.values())


def test_the_row_of_lora_has_its_signature() -> None:
    told = re.search(r"`lora\((.*?)\)`", NAMES["jlora.lora"][0])
    given = inspect.signature(jlora.lora).parameters.values()
    keywords = [f'{p.name}="{p.default}"' for p in given if isinstance(p.default, str)]
    assert told
    assert told[1] == ", ".join(["fn, config, *, argnum=0", *keywords])
    assert len(given) == 3 + len(keywords)


def test_the_row_of_the_result_has_its_methods() -> None:
    told = re.findall(r"`(\w+)`", NAMES["jlora.Lora"][0])
    methods = [n for n, v in vars(jlora.Lora).items() if inspect.isfunction(v)]
    assert sorted(told) == sorted(n for n in methods if not n.startswith("_"))


def test_every_family_has_a_row_that_says_what_the_tests_do() -> None:
    steps = ("load", "merge", "save", "convert")
    expected = {n: [TOLD.get(n, {}).get(s, "yes") for s in steps] for n in FAMILIES}
    rows = table("guide/families.md", "family")
    assert list(rows) == list(FAMILIES)
    assert {name: cells[1:] for name, cells in rows.items()} == expected


def test_every_module_has_a_row() -> None:
    assert set(table("api/index.md", "module")) == {f"jlora.{name}" for name in DOORS}


def test_the_fields_are_those_of_the_config() -> None:
    fields = table("guide/targets.md", "`LoraConfig`")
    expected = {f.name: f.default for f in dataclasses.fields(jlora.LoraConfig)}
    assert list(fields) == list(expected)
    for name, default in expected.items():
        told = default.__name__ if default is jnp.float32 else repr(default)
        assert fields[name][0] == f"`{told}`", name


def test_every_finding_has_a_row() -> None:
    folder = ROOT / "findings"
    table = (folder / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([\w.-]+\.sh)\)", table)
    assert sorted(linked) == sorted(file.name for file in folder.glob("*.sh"))


def test_every_notebook_is_a_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"notebooks/(\w+)\.md", nav)
    assert pages == sorted(file.stem for file in (ROOT / "notebooks").glob("*.ipynb"))

"""Hooks of the build: what pages take from elsewhere in the repository.

`<!-- rooms: _axes _init -->` in a page becomes a table of these modules, each with the
first line of its docstring; `benchmarks.md` gets the pictures of `benchmarks/results`.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOMS = re.compile(r"^<!-- rooms: (.*?) -->$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pictures of the benchmarks, where their page looks for them."""
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        place = f"results/{picture.name}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Writes the tables of modules."""
    return ROOMS.sub(lambda found: _table(found[1].split()), markdown)


def _table(modules: list[str]) -> str:
    rows = [f"| `{name}` | {_first_line(name)} |" for name in modules]
    return "\n".join(["| room | what lives there |", "|---|---|", *rows])


def _first_line(module: str) -> str:
    text = (ROOT / "jlora" / f"{module}.py").read_text(encoding="utf-8")
    told = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    return " ".join(told.split()).replace("|", r"\|")

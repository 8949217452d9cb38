"""Hooks of the build: what pages take from elsewhere in the repository.

`<!-- rooms: _params _adapter -->` in a page becomes a table of the modules in these
rooms, each with the first line of its docstring; `benchmarks.md` gets the pictures of
`benchmarks/results`.
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


def _table(rooms: list[str]) -> str:
    rows = [
        f"| `{name}` | {_first_line(file)} |"
        for room in rooms
        for name, file in _modules(room).items()
    ]
    return "\n".join(["| module | what lives there |", "|---|---|", *rows])


def _modules(room: str) -> dict[str, Path]:
    """The files of a room by name; a door is a file by itself."""
    folder = ROOT / "jlora" / room
    if not folder.is_dir():
        return {room: folder.with_suffix(".py")}
    files = sorted(folder.rglob("*.py"))
    name = lambda file: ".".join(
        [room, *file.relative_to(folder).with_suffix("").parts]
    )
    return {name(file): file for file in files if file != folder / "__init__.py"}


def _first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", r"\|")

"""Hooks of the build: what the site takes from elsewhere in the repository.

`<!-- rooms: _params _adapter -->` in a page becomes a table of the modules in these
rooms, each with the first line of its docstring; `benchmarks.md` gets the pictures of
`benchmarks/results`; the notebooks and the table of `findings/` become pages.
"""

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
ROOMS = re.compile(r"^<!-- rooms: (.*?) -->$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pictures of the benchmarks, the notebooks and the findings."""
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        place = f"results/{picture.name}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    pages: dict[str, str | bytes] = {"findings.md": _findings(config.repo_url)}
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        pages |= _rendered(notebook, config.repo_url)
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    return files


def _findings(repository: str) -> str:
    """The table of findings, with links that lead to the scripts in the repository."""
    text = (ROOT / "findings" / "README.md").read_text(encoding="utf-8")
    text = text.replace("](../docs/", "](")
    return re.sub(
        r"\]\(([\w.-]+\.sh)\)", rf"]({repository}/blob/main/findings/\1)", text
    )


def _rendered(notebook: Path, repository: str) -> dict[str, str | bytes]:
    """A notebook as a page, and its pictures, by their places on the site."""
    body, resources = MarkdownExporter().from_filename(
        str(notebook), {"output_files_dir": f"{notebook.stem}_files"}
    )
    body = body.replace("](../examples/", f"]({repository}/blob/main/examples/")
    body = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", body)
    pictures = {
        f"notebooks/{name}": data for name, data in resources["outputs"].items()
    }
    return {f"notebooks/{notebook.stem}.md": body, **pictures}


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

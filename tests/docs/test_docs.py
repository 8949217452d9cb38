"""The documentation: it builds without warnings, names all that is public, and runs."""

import html.parser
import os
import re
import subprocess
import sys
import tomllib
import types
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from fenced import blocks, run_blocks
from paths import ROOT
from public import DOORS, PACKAGE, imported_names, public_names

import jlora

FILES = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guide").glob("*.md")]
PAGES = {f.stem: f.read_text(encoding="utf-8") for f in FILES}
CODE = [name for name, page in PAGES.items() if "```python\n" in page]

pytestmark = pytest.mark.docs


class Page(html.parser.HTMLParser):
    """The anchors of a built page, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes the attributes that are of use."""
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The built pages by file; mkdocs takes any warning for an error."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    files = out.resolve().rglob("*.html")
    return {file: Page(file.read_text(encoding="utf-8")) for file in files}


def test_every_public_name_is_documented_once(site: dict[Path, Page]) -> None:
    public = [f"jlora.{name}" for name in [*imported_names(), *DOORS]]
    public += [f"jlora.{door}.{n}" for door in DOORS for n in public_names(door)]
    count = Counter(anchor for page in site.values() for anchor in page.anchors)
    assert len(public) > 90
    assert {name: count[name] for name in public} == dict.fromkeys(public, 1)


def test_every_method_is_documented(site: dict[Path, Page]) -> None:
    anchors = set().union(*(page.anchors for page in site.values()))
    kinds = (types.FunctionType, classmethod, staticmethod, property)
    methods = {
        f"jlora.{name}.{method}"
        for name in imported_names()
        if isinstance(thing := getattr(jlora, name), type)
        for method, value in vars(thing).items()
        if not method.startswith("_") and isinstance(value, kinds)
    }
    assert len(methods) > 10
    assert methods <= anchors


def test_links_lead_to_pages_and_anchors(site: dict[Path, Page]) -> None:
    root = min(site, key=lambda file: len(file.parts)).parent
    broken, checked = [], 0
    for file, page in site.items():
        # The page of errors is served at any address; its links begin at the root.
        for link in page.links if file.name != "404.html" else ():
            path, anchor = urldefrag(link)
            if urlsplit(link).scheme or urlsplit(link).netloc:
                continue
            place = (file.parent / unquote(path)).resolve() if path else file
            place = place / "index.html" if place.is_dir() else place
            known = place in site and unquote(anchor) in site[place].anchors
            inside = place.is_relative_to(root) and place.is_file()
            checked += 1
            if not inside or (anchor and place in site and not known):
                broken.append(f"{file.relative_to(root)}: {link}")
    assert checked > 100
    assert not broken


@pytest.mark.parametrize("name", CODE)
@pytest.mark.filterwarnings("ignore:'VariableState' was removed")  # asked for by Qwix
@pytest.mark.usefixtures("fast_compile")
def test_the_code_of_a_page_runs_and_prints_what_it_says(name: str) -> None:
    run_blocks(blocks(PAGES[name]))


def test_just_two_blocks_are_not_run() -> None:
    """They need what the tests do not install; their syntax is that of Python.

    Those of a page that adds a variant are files, and have a test of their own.
    """
    pages = [page for name, page in PAGES.items() if name != "add_a_variant"]
    found = [b for page in pages for b in blocks(page) if b.title]
    code = {b.title: b.text for b in found if b.language == "python"}
    assert set(code) == {"before: lorax", "before: PEFT"}
    for title, text in code.items():
        compile(text, title, "exec")


def test_the_first_page_begins_as_the_readme_does() -> None:
    """All that is above its second heading, and nothing else."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r'"README\.md:(\d+):(\d+)"', PAGES["index"])
    assert found
    part = readme.splitlines()[int(found[1]) - 1 : int(found[2])]
    above = readme[: readme.index("\n## ")]
    assert above == "# jlora\n\n" + "\n".join(part) + "\n"


def test_the_rooms_are_all_there() -> None:
    page = PAGES["how_it_works"]
    told = [part.split("-->")[0].split() for part in page.split("<!-- rooms:")[1:]]
    rooms = [room for group in told for room in group]
    folders = [f.parent.name for f in PACKAGE.glob("_*/__init__.py")]
    doors = [f.stem for f in PACKAGE.glob("*.py") if f.stem != "_errors"]
    assert sorted(rooms) == sorted([*folders, *doors])


def modules() -> set[str]:
    """The rooms, and what is in them: `_rules`, `_rules.conv`."""
    files = (f.relative_to(PACKAGE) for f in PACKAGE.glob("_*/**/*.py"))
    names = (".".join(file.with_suffix("").parts) for file in files)
    return {name.removesuffix(".__init__") for name in names} | {"_errors"}


def test_the_table_of_rooms_has_each_once() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page[page.index("| room |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[c.strip() for c in row.strip("|").split(" | ")] for row in table]
    rooms = [room.strip("`") for room, _, _ in cells]
    assert set(rooms) == {name for name in modules() - {"_errors"} if "." not in name}
    assert len(rooms) == len(set(rooms))
    begin = {r: re.findall(r"`(\w+)`", c[2]) for r, c in zip(rooms, cells, strict=True)}
    named = {f"{room}.{name}" for room, names in begin.items() for name in names}
    assert named <= modules()


@pytest.mark.parametrize("page", ["docs/how_it_works.md", "CONTRIBUTING.md"])
def test_modules_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`(_[a-z]+(?:\.[a-z_0-9]+)?)[`.(]", text))
    # In a diagram they stand without backticks.
    bare = r"(?<![\w.`/{])(_[a-z]+(?:_[a-z]+)*(?:\.[a-z_]+)?)(?=[\s:,])"
    named |= set(re.findall(bare, text))
    assert named
    assert named <= modules()


# A file that is named by its place, and those that a page adds: the title of a block,
# or the head of a patch.
FOLDERS = "jlora|tests|docs|examples|benchmarks|notebooks|findings"
PLACE = re.compile(
    rf"(?<![\w/.:-])((?:{FOLDERS})/[\w/.-]+\.(?:py|md|ipynb|json|txt))\b"
)
ADDED = re.compile(r'(?:title="|^\+\+\+ b/)([\w/.]+)', re.MULTILINE)
NAMING = [
    f
    for where in (".", "docs", "docs/guide", "notebooks")
    for f in (ROOT / where).glob("*.md")
]
NAMING += [*(ROOT / "benchmarks").glob("*.md"), *PACKAGE.rglob("*.py")]


def test_files_that_pages_and_sources_name_are_there() -> None:
    named = {}
    for file in NAMING:
        text = file.read_text(encoding="utf-8")
        named[file] = set(PLACE.findall(text)) - set(ADDED.findall(text))
    assert len(set().union(*named.values())) > 30
    lost = {
        f.name: {p for p in places if not (ROOT / p).is_file()}
        for f, places in named.items()
    }
    assert not {name: places for name, places in lost.items() if places}


def test_the_tests_install_what_builds_the_site() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(extras["docs"]) <= set(extras["test"])


PAGES_AND_FILES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / ".ci/run"]


@pytest.mark.parametrize("page", PAGES_AND_FILES, ids=lambda page: page.name)
def test_tests_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])tests/[\w/]*\.py", text)
    missing = [name for name in named if not (ROOT / name).is_file()]
    assert not missing

"""The fenced blocks of a page in Markdown: found, and run as the page says."""

import contextlib
import io
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

_FENCE = re.compile(r"^```(\w*)(?: (.*?))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        language: of its text; "" for none.
        title: what `title="..."` says; "" for none.
        text: what it holds.
    """

    language: str
    title: str
    text: str


def blocks(page: str) -> list[Block]:
    """Returns the fenced blocks of a page, in order."""
    found = _FENCE.findall(page)
    title = lambda info: info.removeprefix('title="').removesuffix('"')
    return [Block(language, title(info), text) for language, info, text in found]


def execute(code: str, namespace: dict[str, Any]) -> str:
    """Runs a block as if it were a file of its own, and returns what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "quickstart.py", "exec"), namespace)
    return output.getvalue()


def run_blocks(page: Iterable[Block]) -> None:
    """Runs the Python blocks of a page, which print what the text behind them says.

    They share one namespace. A block with a title is none of them.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for language, title, text in page:
        if language == "python" and not title:
            assert not printed, f"the page leaves out what a block prints: {printed}"
            printed = execute(text, namespace)
        elif language == "text" and not title:
            assert printed == text
            printed = ""
    assert not printed

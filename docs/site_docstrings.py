"""An extension of griffe: doctests in docstrings are shown as code."""

import re
from typing import Any

import griffe

SECTION = re.compile(r"^( *)Example:$", re.MULTILINE)
DOCTEST = re.compile(r"^>>> .*(?:\n(?!\n).+)*", re.MULTILINE)


class DoctestExamples(griffe.Extension):
    """Reads `Example:` as griffe reads `Examples:`, and fences bare doctests."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of one object."""
        if obj.docstring is not None:
            text = SECTION.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", text)

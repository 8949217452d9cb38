"""An extension of griffe: the doctests below `Example:` are shown as code."""

import re
from typing import Any

import griffe


class DoctestExamples(griffe.Extension):
    """Reads `Example:` as griffe reads `Examples:`."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section in the docstring of one object."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", text)

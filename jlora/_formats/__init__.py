"""The file formats of adapters that `python -m jlora` reads and writes.

Each is a module with a `FORMAT`, such as `_formats/peft.py`; docs/add_a_format.md shows
how to add one. The first that holds a path reads it.
"""

FORMATS = (
    "_formats.peft",
    "_formats.diffusers",
    "_formats.kohya",
    "_formats.gguf",
    "tunix",  # before `checkpoint`, whose are all other runs of Orbax
    "checkpoint",
    "_formats.mlx",
)

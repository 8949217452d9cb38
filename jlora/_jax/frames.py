"""Whose a line of code is: the model's, a library's, or JAX's.

Files are judged by where the installed packages themselves lie, and never by words in
their paths: `~/jax/train.py` is its owner's, and so is all that lies beside the package
in a clone named `jlora`.
"""

import enum
import functools
import os
import sys
from collections.abc import Iterable, Iterator


class Owner(enum.IntEnum):
    """Who owns a file, the one who knows most about a line of the program first."""

    MODEL = 0
    MADE = 1  # by `exec`: a program that is a string, but also a wrapper
    LIBRARY = 2  # of layers, or one that calls the model's functions
    JAX = 3  # and what stands between it and all others


class Unsure(str):
    """A line that is not the model's: that of a caller says more, if it is known."""

    __slots__ = ()


# Packages whose lines say less of a model than those that call them.
_LAYERS = (
    *("flax", "equinox", "haiku", "penzai", "keras", "qwix", "optax", "chex"),
    *("einops", "opt_einsum", "jaxtyping", "beartype", "typeguard"),
    *("diffrax", "lineax", "optimistix", "quax"),
)
_BELOW = ("jax", "jaxlib", "numpy", "jlora")
_STDLIB = os.path.dirname(os.path.realpath(functools.__file__))
# In an interpreter without an environment packages lie within the standard library.
_INSTALLED = ("site-packages", "dist-packages")
# What interpreters call the lines that are typed into them.
_TYPED = ("<stdin", "<ipython-input", "<doctest", "<input", "<console", "<python-input")


def place(frames: Iterable[tuple[str, int]]) -> tuple[Owner, str] | None:
    """Returns the owner of the line that says most, and the line as `file.py:line`.

    Args:
        frames: the file and the line of each call, the innermost first.

    Returns:
        The innermost line of the model, or else that of the next best owner. None if
        there are no frames but those of Python itself.

    Example:
        >>> place([(functools.__file__, 7), ("/home/me/jax/train.py", 3)])
        (<Owner.MODEL: 0>, 'train.py:3')
        >>> place([(functools.__file__, 7)])
        (<Owner.JAX: 3>, 'functools.py:7')
    """
    best: tuple[Owner, str] | None = None
    for name, line in frames:
        if name.startswith("<frozen"):
            continue
        owner = owner_of(name)
        if best is None or owner < best[0]:
            best = owner, f"{os.path.basename(name)}:{line}"
        if owner is Owner.MODEL:
            break
    return best


@functools.cache
def owner_of(file_name: str) -> Owner:
    """Returns who owns a file, such as a frame names it."""
    if file_name.startswith("<"):
        return Owner.MODEL if file_name.startswith(_TYPED) else Owner.MADE
    path = os.path.realpath(file_name)
    # A file that has a frame is of a package that is imported by now.
    if any(_within(path, home) for home in _homes(_BELOW)) or _is_stdlib(path):
        return Owner.JAX
    if any(_within(path, home) for home in _homes(_LAYERS)):
        return Owner.LIBRARY
    return Owner.MODEL


def _homes(packages: Iterable[str]) -> Iterator[str]:
    """Yields the folders of the imported ones among packages, links resolved."""
    for name in packages:
        # A namespace is no package of that name, but some folder of the user's.
        if origin := getattr(sys.modules.get(name), "__file__", None):
            if os.path.basename(origin).startswith("__init__."):
                yield os.path.dirname(os.path.realpath(origin))
            else:
                yield os.path.realpath(origin)


def _within(path: str, home: str) -> bool:
    return path == home or path.startswith(home + os.sep)


def _is_stdlib(path: str) -> bool:
    if not _within(path, _STDLIB):
        return False
    return os.path.relpath(path, _STDLIB).split(os.sep)[0] not in _INSTALLED

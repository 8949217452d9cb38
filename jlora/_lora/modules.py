"""Mistakes with the arguments of `jlora.linen` and `jlora.nnx`, each named as such.

Flax is imported by its doors alone; here its classes are known by their names.
"""

from collections.abc import Mapping
from typing import Any

from .._params.given import described

_WRAPPED_BY = {"linen": "jlora.linen.wrap", "nnx": "jlora.nnx.wrap"}


def no_module(value: Any, wanted: str) -> TypeError:
    """Returns the error for what is no instance of a kind of Flax's modules.

    Args:
        value: what was given.
        wanted: "linen" or "nnx".
    """
    takes = "a Linen module" if wanted == "linen" else "an NNX module"
    told = f"`{_WRAPPED_BY[wanted]}` takes {takes} first, got {described(value)}"
    kinds = (value if isinstance(value, type) else type(value)).__mro__
    named = [f"{kind.__module__}.".split(".")[:2] for kind in kinds]
    other = next((o for o in _WRAPPED_BY if o != wanted and ["flax", o] in named), None)
    if other:
        return TypeError(f"{told}; for this one there is `{_WRAPPED_BY[other]}`")
    if isinstance(value, type):
        return TypeError(f"{told}; make an instance of it")
    if callable(value):
        return TypeError(f"{told}; for a function there is `jlora.lora`")
    return TypeError(told)


def check_variables(variables: Any) -> None:
    """Raises unless a thing may be the variables of a Linen module.

    Raises:
        TypeError: if it is no mapping, or the params alone.
    """
    wants = '`variables` must be a dict with the collection "params"'
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"{wants}, got {described(variables)}. They come before the arguments of "
            "the module, as in `model.apply(variables, x)`"
        )
    if variables and not any(isinstance(v, Mapping) for v in variables.values()):
        raise TypeError(f"{wants}, got {described(variables)}")

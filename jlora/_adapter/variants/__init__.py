"""The variants of LoRA, and the one table of them.

A variant is what is trained of a leaf, and how it becomes two factors of the kernel:
begin with `variant.Variant`, which says all that jlora knows of one. Nothing elsewhere
asks which variant it has; how to add one is told in docs/add_a_variant.md.
"""

import functools
from typing import Any

from ..config import LoraConfig
from ..factors import exportable
from .core import CORE
from .factors import FACTORS
from .fixed import FIXED
from .hadamard import HADAMARD
from .kronecker import KRONECKER
from .layers import LAYERS
from .rows import ROWS
from .scale import SCALE
from .sliced import SLICED
from .variant import Variant
from .vectors import VECTORS
from .whole import WHOLE_LEAF

# The first one that a config asks for, or whose class an entry has, is taken; anything
# is an object, so that the leaf that is trained whole comes last.
VARIANTS: tuple[Variant, ...] = (
    ROWS,
    SLICED,
    LAYERS,
    HADAMARD,
    FIXED,
    CORE,
    VECTORS,
    KRONECKER,
    SCALE,
    FACTORS,
    WHOLE_LEAF,
)

# Those that were defined outside of jlora, the newest first.
_OWN: list[Variant] = []

for _variant in VARIANTS:
    if _variant.has_roles:
        exportable(_variant.entry, f"jlora.{_variant.entry.__name__}")


def variants() -> tuple[Variant, ...]:
    """Returns the table with those defined outside of jlora, whole leaves last."""
    *table, whole = VARIANTS
    return (*table, *_OWN, whole)


def register(variant: Variant) -> None:
    """Adds a variant that was defined outside of jlora."""
    _OWN.insert(0, variant)
    _of_class.cache_clear()  # its class was that of any object


def variant_of_config(config: LoraConfig, *, has_roles: bool = True) -> Variant:
    """Returns the variant of a leaf that a config chose.

    Args:
        config: the config.
        has_roles: whether the axes of the leaf have roles; if not, as those of a bias
            beside a kernel, it is trained whole.

    Raises:
        ValueError: if `LoraConfig.variant` is the name of none, or a setting is given
            that is another variant's.
    """
    if not has_roles:
        return next(v for v in VARIANTS if not v.has_roles)
    for variant in variants():
        if variant.is_chosen(config):
            _check_settings(config, variant)
            return variant
    known = ["lora", *(v.name for v in variants() if v.is_named)]
    raise ValueError(f"`LoraConfig.variant` is one of {known}, got {config.variant!r}")


def _check_settings(config: LoraConfig, variant: Variant) -> None:
    for other in VARIANTS:
        given = [
            n for n in other.settings if getattr(config, n) != getattr(LoraConfig, n)
        ]
        if other.is_named and given and not {*given} <= {*variant.settings}:
            raise ValueError(
                f"`LoraConfig.{given[0]}` goes with `variant={other.name!r}`, and the "
                f"config has {config.variant!r}"
            )


def variant_of_peft(name: str) -> Variant:
    """Returns the variant that has this name of PEFT's, `Variant.peft`."""
    return next(variant for variant in VARIANTS if variant.peft == name)


def variant_of_entry(entry: Any) -> Variant:
    """Returns the variant of an entry of an adapter."""
    return _of_class(type(entry))


@functools.cache
def _of_class(kind: type) -> Variant:
    return next(v for v in variants() if issubclass(kind, v.entry))

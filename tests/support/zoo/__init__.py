"""Small but complete models, each with the roles of its kernels' axes."""

from . import (
    linen_signal,
    linen_text,
    linen_vision,
    moe,
    nnx_models,
    plain_models,
    recurrent,
)
from .case import Axes, Built, Case

FAMILIES = [
    linen_text,
    linen_vision,
    linen_signal,
    moe,
    recurrent,
    nnx_models,
    plain_models,
]
CASES = [case for family in FAMILIES for case in family.CASES]

__all__ = ["CASES", "Axes", "Built", "Case"]

"""Forms of products that were timed on a device, to be taken on others of its kind."""

import dataclasses
import math
from typing import Any, NamedTuple

from .group import Form

# Forms that may be timed: those of one device that form no kernel.
TIMED: tuple[Form, ...] = (
    "separate",
    "extended",
    "joined",
    "copied",
    "tiled",
    "fused",
    "few",
)
# A form holds for numbers of tokens up to this factor away from those it was timed for.
_NEAR = 2


class Timed(NamedTuple):
    """The fastest form of a product of one size.

    Attributes:
        dtype: the name of the operands' dtype.
        tokens, features, outputs: the sizes of `x·W: (tokens, features)·(features,
            outputs)`.
        form: one of `TIMED`.
    """

    dtype: str
    tokens: int
    features: int
    outputs: int
    form: Form


FIELDS = Timed._fields


class OfSize(NamedTuple):
    """What was timed of kernels of one size.

    Attributes:
        kind: the kind of device, as JAX calls it.
        forms: numbers of tokens, and the form for each.
    """

    kind: str
    forms: tuple[tuple[int, Form], ...]

    def at(self, tokens: int) -> Form | None:
        """Returns the form for the nearest number of tokens, if that is near."""
        distance = lambda timed: abs(math.log(max(tokens, 1) / timed[0]))
        nearest = min(self.forms, key=distance)
        return nearest[1] if distance(nearest) <= math.log(_NEAR) else None


@dataclasses.dataclass(frozen=True)
class Measurements:
    """What `benchmarks/tune.py` found.

    Attributes:
        kind: the kind of device, as JAX calls it.
        rows: one for each size.
    """

    kind: str
    rows: tuple[Timed, ...] = dataclasses.field(repr=False)

    def of_size(self, dtype: Any, features: int, outputs: int) -> OfSize | None:
        """Returns what was timed of kernels of a size, if anything was."""
        size = (str(dtype), features, outputs)
        rows = (r for r in self.rows if (r.dtype, r.features, r.outputs) == size)
        found: tuple[tuple[int, Form], ...] = tuple((r.tokens, r.form) for r in rows)
        return OfSize(self.kind, found) if found else None

"""Kernels that one side keeps together and the other apart: q, k and v; gate and up.

Both directions are exact. Together, parts that share `a` have their `b` side by side;
others have their `a` side by side and a block-diagonal `b`.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from .._errors import NonFiniteError, UnsupportedFeatureError

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    """The factors of one kernel as matrices: `a (in, rank)`, `b (rank, out)`.

    With DoRA it has a magnitude `(out,)` besides.
    """

    a: Array
    b: Array
    scaling: float
    magnitude: Array | None = None

    @property
    def rank(self) -> int:
        """The size of the axis that `a` and `b` share."""
        return self.a.shape[1]

    def scaled_to(self, scaling: float) -> "Pair":
        """Returns the same delta with another scaling; `b` takes the difference.

        Raises:
            NonFiniteError: if it is too large for the dtype.
        """
        if scaling == self.scaling:
            return self
        with np.errstate(over="ignore"):
            exact = self.b.astype(np.float64) * (self.scaling / scaling)
            b = exact.astype(self.b.dtype)
        if (np.isfinite(exact) & ~np.isfinite(b)).any():
            raise NonFiniteError(
                f"the scalings {self.scaling} and {scaling} of one kernel are too far "
                f"apart for factors in {b.dtype}"
            )
        return dataclasses.replace(self, b=b, scaling=scaling)

    def padded_to(self, rank: int) -> "Pair":
        """Returns the same delta with a larger rank; what is added stays zero."""
        more = rank - self.rank
        a = np.pad(self.a, ((0, 0), (0, more)))
        return dataclasses.replace(self, a=a, b=np.pad(self.b, ((0, more), (0, 0))))

    def trimmed(self) -> "Pair":
        """Returns the same delta without what `padded_to` adds; a rank is left."""
        used = self.a.any(axis=0) | self.b.any(axis=1)
        rank = max(int(np.flatnonzero(used).max(initial=0)) + 1, 1)
        return dataclasses.replace(self, a=self.a[:, :rank], b=self.b[:rank])


def alike(arrays: Sequence[Array]) -> list[Array]:
    """Returns arrays in a dtype that holds the values of all of them."""
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) < 2:
        return [*arrays]
    # NumPy knows nothing that holds bfloat16 and float16.
    common = functools.reduce(jnp.promote_types, dtypes)
    return [array.astype(common) for array in arrays]


def promoted(pairs: Sequence[Pair]) -> list[Pair]:
    """Returns the same factors in one dtype, and their magnitudes in one."""
    a, b = [pair.a for pair in pairs], [pair.b for pair in pairs]
    both = alike([*a, *b])
    norms = iter(alike([p.magnitude for p in pairs if p.magnitude is not None]))
    return [
        dataclasses.replace(
            pair, a=a, b=b, magnitude=None if pair.magnitude is None else next(norms)
        )
        for pair, a, b in zip(pairs, both[: len(a)], both[len(a) :], strict=True)
    ]


def join(parts: Sequence[Pair | None], widths: Sequence[int]) -> Pair:
    """Returns the factors of a kernel made of parts along its output axis.

    Args:
        parts: the factors of each; None for one that is not adapted.
        widths: the number of outputs of each.

    Example:
        >>> one = Pair(np.ones((5, 2)), np.ones((2, 3)), 0.5)
        >>> two = Pair(np.zeros((5, 1)), np.ones((1, 4)), 0.5)
        >>> whole = join([one, None, two], [3, 2, 4])
        >>> whole.a.shape, whole.b.shape
        ((5, 3), (3, 9))
    """
    known = promoted([part for part in parts if part is not None])
    magnitude = _joined_magnitude(known, len(parts))
    first = known[0]
    known = [part.scaled_to(first.scaling) for part in known]
    shared = all(np.array_equal(part.a, first.a) for part in known)
    ranks = [first.rank] if shared else [part.rank for part in known]
    b = np.zeros((sum(ranks), sum(widths)), first.b.dtype)
    row, remaining = 0, iter(known)
    for part, end, width in zip(parts, np.cumsum(widths), widths, strict=True):
        if part is not None:
            block = next(remaining).b
            b[row : row + block.shape[0], end - width : end] = block
            row += 0 if shared else block.shape[0]
    a = first.a if shared else np.concatenate([part.a for part in known], axis=1)
    return Pair(a, b, first.scaling, magnitude)


def _joined_magnitude(pairs: Sequence[Pair], n_parts: int) -> Array | None:
    known = [pair.magnitude for pair in pairs if pair.magnitude is not None]
    if known and len(known) < n_parts:
        raise UnsupportedFeatureError(
            f"{len(known)} of the {n_parts} parts of one kernel have a magnitude of "
            "DoRA; the kernel needs one for all of its outputs"
        )
    return np.concatenate(known) if known else None


def split(whole: Pair, widths: Sequence[int]) -> list[Pair | None]:
    """Returns the factors of each part of a kernel: what `join` would make it of.

    None is a part whose `b` is zero beside others that are not.
    """
    ends = np.cumsum(widths)[:-1]
    blocks = np.split(whole.b, ends, axis=1)
    rows: list[Array] = [(block != 0).any(axis=1) for block in blocks]
    magnitudes: list[Array | None] = [None] * len(blocks)
    if whole.magnitude is not None:
        magnitudes = [*np.split(whole.magnitude, ends)]
    adapted = [
        row.any() or m is not None for row, m in zip(rows, magnitudes, strict=True)
    ]
    if not any(adapted):
        return [Pair(whole.a, block, whole.scaling) for block in blocks]
    if _is_block_diagonal(rows) and (whole.magnitude is None or all(map(any, rows))):
        spans = [_span(row) for row in rows]
    else:
        spans = [slice(None)] * len(rows)
    return [
        Pair(whole.a[:, span], block[span], whole.scaling, m) if used else None
        for span, block, m, used in zip(spans, blocks, magnitudes, adapted, strict=True)
    ]


def _is_block_diagonal(rows: Sequence[Array]) -> bool:
    """Whether each row belongs to one block, and those of a block follow each other."""
    owners = np.stack(rows).sum(axis=0)
    order = [i for row in rows for i in np.flatnonzero(row)]
    return bool((owners == 1).all()) and order == sorted(order)


def _span(row: Array) -> slice:
    used = np.flatnonzero(row)
    return slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)

"""Kernels that one side keeps together and the other apart: q, k and v; gate and up.

Both directions are exact. Together, parts that share `a` have their `b` side by side;
others have their `a` side by side and a block-diagonal `b`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .._errors import UnsupportedFeatureError
from .._jax.dtypes import common
from .modules import TorchModule

Array = np.ndarray


def alike(arrays: Sequence[Array]) -> list[Array]:
    """Returns arrays in a dtype that holds the values of all of them."""
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) < 2:
        return [*arrays]
    # NumPy knows nothing that holds bfloat16 and float16.
    wide = common(*dtypes)
    return [array.astype(wide) for array in arrays]


def promoted(modules: Sequence[TorchModule]) -> list[TorchModule]:
    """Returns the same factors in one dtype, and their magnitudes in one."""
    a, b = [one.a for one in modules], [one.b for one in modules]
    both = alike([*a, *b])
    norms = iter(alike([m.magnitude for m in modules if m.magnitude is not None]))
    return [
        dataclasses.replace(
            one, a=a, b=b, magnitude=None if one.magnitude is None else next(norms)
        )
        for one, a, b in zip(modules, both[: len(a)], both[len(a) :], strict=True)
    ]


def join(parts: Sequence[TorchModule | None], widths: Sequence[int]) -> TorchModule:
    """Returns the factors of a kernel made of parts along its output axis.

    Args:
        parts: the factors of each; None for one that is not adapted.
        widths: the number of outputs of each.

    Example:
        >>> one = TorchModule("qkv", np.ones((5, 2)), np.ones((2, 3)), 0.5)
        >>> two = TorchModule("qkv", np.zeros((5, 1)), np.ones((1, 4)), 0.5)
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
    return dataclasses.replace(first, a=a, b=b, magnitude=magnitude)


def _joined_magnitude(modules: Sequence[TorchModule], n_parts: int) -> Array | None:
    known = [one.magnitude for one in modules if one.magnitude is not None]
    if known and len(known) < n_parts:
        raise UnsupportedFeatureError(
            f"{len(known)} of the {n_parts} parts of one kernel have a magnitude of "
            "DoRA; the kernel needs one for all of its outputs"
        )
    return np.concatenate(known) if known else None


def split(whole: TorchModule, widths: Sequence[int]) -> list[TorchModule | None]:
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
        return [dataclasses.replace(whole, b=block, magnitude=None) for block in blocks]
    if _is_block_diagonal(rows) and (whole.magnitude is None or all(map(any, rows))):
        spans = [_span(row) for row in rows]
    else:
        spans = [slice(None)] * len(rows)
    return [
        dataclasses.replace(whole, a=whole.a[:, span], b=block[span], magnitude=m)
        if used
        else None
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

"""Which axes of a kernel are inputs and outputs, from the shapes of Qwix's factors."""

import itertools
from collections.abc import Iterator

import numpy as np

from .._errors import AdapterError
from .._params.axes import KernelAxes

Shape = tuple[int, ...]
MAX_AXES = 6


def axes_of_factors(
    path: str, a: Shape, b: Shape, shape: Shape, known: KernelAxes | None
) -> KernelAxes:
    """Returns the roles of the axes of a kernel.

    Those of a plan, if they fit. Else those that shapes leave, and of a Flax `kernel`,
    whose inputs come before its outputs, those of that order.

    Args:
        path: that of the kernel.
        a: the shape of `lora_a`.
        b: the shape of `lora_b`.
        shape: that of the kernel.
        known: the roles that a plan tells.

    Raises:
        AdapterError: if none fit, or several.

    Example:
        >>> axes_of_factors("w", (5, 2), (2, 12), (3, 5, 4), None)
        KernelAxes(batch=(), in_=(1,), out=(0, 2))
    """
    told = f"{path!r} {shape} with factors of the shapes {a} and {b}"
    if known is not None:
        if known.ndim == len(shape) and fits(a, b, shape, known):
            return known
        raise AdapterError(f"{told}: they are none for the roles of the plan, {known}")
    if len(shape) > MAX_AXES:
        raise AdapterError(f"{told}: a kernel of more than {MAX_AXES} axes")
    found = list(_fitting(a, b, shape))
    if not found:
        raise AdapterError(f"{told}: no roles of its axes give such factors")
    # The delta is the same, whatever the role of an axis of size 1.
    apart: dict[Shape, KernelAxes] = {}
    for axes in found:
        apart.setdefault(_roles(axes, shape), axes)
    if len(apart) > 1 and path.rpartition("/")[2] == "kernel":
        ordered = {r: axes for r, axes in apart.items() if list(r) == sorted(r)}
        apart = ordered or apart
    if len(apart) > 1:
        raise AdapterError(
            f"{told}: its inputs may be the axes "
            f"{' or '.join(str(axes.in_) for axes in apart.values())}; a plan tells, "
            "`jlora.lora(fn, config).plan(params, ...)` in place of the params"
        )
    return next(iter(apart.values()))


def fits(a: Shape, b: Shape, shape: Shape, axes: KernelAxes) -> bool:
    """Returns whether factors have the shapes that Qwix gives them for some roles."""
    return (a, b) in (_flat(a[-1], shape, axes), _apart(a[-1], shape, axes))


def _flat(rank: int, shape: Shape, axes: KernelAxes) -> tuple[Shape, Shape]:
    """Returns the shapes of the factors of a `dot_general`."""
    batch = tuple(shape[i] for i in axes.batch)
    fan_in, fan_out = axes.fans(shape)
    return (*batch, fan_in, rank), (*batch, rank, fan_out)


def _apart(rank: int, shape: Shape, axes: KernelAxes) -> tuple[Shape, Shape]:
    """Returns the shapes of the factors of an einsum: `a` has its batch axes alone."""
    shared = (shape[i] for i in sorted((*axes.batch, *axes.in_)))
    return (*shared, rank), (rank, *(shape[i] for i in axes.out))


def laid_out(
    a: np.ndarray, b: np.ndarray, shape: Shape, axes: KernelAxes
) -> tuple[np.ndarray, np.ndarray]:
    """Returns factors as jlora has them: `(*batch, *in, rank)`, `(*batch, rank, *out)`.

    Those of an einsum share `b` along its batch axes: it is repeated.
    """
    of_a, of_b = axes.factor_shapes(shape, a.shape[-1])
    if axes.batch and b.shape == _apart(a.shape[-1], shape, axes)[1]:
        both = sorted((*axes.batch, *axes.in_))
        order = [both.index(i) for i in (*axes.batch, *axes.in_)]
        a = a.transpose(*order, len(order))
        b = np.broadcast_to(b, (*(shape[i] for i in axes.batch), *b.shape))
    return a.reshape(of_a), b.reshape(of_b)


def shape_alone(name: str, a: Shape, b: Shape) -> tuple[Shape, KernelAxes]:
    """Returns a shape and roles for a kernel of which nothing else is known.

    Inputs and outputs are as flat as the factors have them, inputs first.

    Raises:
        AdapterError: if there is none, or more than one.

    Example:
        >>> shape_alone("w", (5, 2), (2, 3, 4))
        ((5, 3, 4), KernelAxes(batch=(), in_=(0,), out=(1, 2)))
    """
    rank, n = a[-1], len(a) - 1
    apart = b[0] == rank
    stacked = len(a) == len(b) > 2 and a[:-2] == b[:-2] and b[-2] == rank
    if apart == stacked or max(len(a), len(b)) > MAX_AXES:
        raise AdapterError(
            f"{name!r} has factors of the shapes {a} and {b}, of "
            f"{'more than one kernel' if apart and stacked else 'no kernel'} that can "
            "be told without it; give the params"
        )
    if apart:
        shape = (*a[:-1], *b[1:])
        return shape, KernelAxes((), tuple(range(n)), tuple(range(n, len(shape))))
    batch = tuple(range(len(a) - 2))
    return (*a[:-1], b[-1]), KernelAxes(batch, (len(batch),), (len(batch) + 1,))


def _fitting(a: Shape, b: Shape, shape: Shape) -> Iterator[KernelAxes]:
    """Yields roles that fit: batch axes first, then inputs, as far as may be."""
    number = range(len(shape))
    for roles in itertools.product(range(3), repeat=len(shape)):
        sides = [tuple(i for i in number if roles[i] == side) for side in range(3)]
        if sides[1] and sides[2]:
            axes = KernelAxes(*sides)
            # Those of an einsum count as inputs: `b` knows nothing of either.
            apart = not axes.batch and (a, b) == _apart(a[-1], shape, axes)
            if apart or (a, b) == _flat(a[-1], shape, axes):
                yield axes


def _roles(axes: KernelAxes, shape: Shape) -> Shape:
    """Returns the side of each axis that has more than one index."""
    sides = {
        i: n for n, own in enumerate((axes.batch, axes.in_, axes.out)) for i in own
    }
    return tuple(sides[i] for i, size in enumerate(shape) if size > 1)

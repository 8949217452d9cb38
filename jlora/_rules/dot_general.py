"""Products with an adapted kernel: which axes they contract, and what they say of it.

With activations a product is the use of its kernel, and is evaluated with those that
share its other operand, see `products.py`. With a frozen operand it may only mix the
kernel, see `mix.py`.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax import lax

from .._jax.dots import dot
from .._params.axes import Shape, free_axes
from .._product.dropout import Dropout
from .._product.group import GroupDims, KernelDims
from .adapted import Part, complete
from .mix import Mix, mixing
from .rule import Axes, ConsumeRule, LinearUse
from .view import View


def dot_dims(eqn: Any, operand: int) -> tuple[tuple, tuple, tuple, tuple]:
    """Returns the contracting and batch axes of the kernel and of the other operand."""
    contract, batch = eqn.params["dimension_numbers"]
    other = 1 - operand
    return contract[operand], batch[operand], contract[other], batch[other]


def _roles(eqn: Any, operand: int) -> list[str]:
    """Returns the role that a product gives each axis of an operand."""
    contract, batch, _, _ = dot_dims(eqn, operand)
    roles = ["out"] * eqn.invars[operand].aval.ndim
    for axes, role in ((contract, "in"), (batch, "batch")):
        for axis in axes:
            roles[axis] = role
    return roles


def group_dims(
    eqn: Any, operand: int, scaling: float = 1.0, dropout: Dropout | None = None
) -> GroupDims:
    """Returns one product as a group, given which operand is the kernel."""
    contract, batch, x_contract, x_batch = dot_dims(eqn, operand)
    params = {k: v for k, v in eqn.params.items() if k != "dimension_numbers"}
    every = tuple(sorted(params.items()))
    one = KernelDims(contract, batch, operand == 0, scaling, every, dropout)
    return GroupDims(x_contract, x_batch, (one,))


def _flops(eqn: Any) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contract)


def _scale_fits(eqn: Any, operand: int, varies: Axes) -> bool:
    """Whether a scale can be applied before or after: not to a part of each."""
    contract, batch, _, _ = dot_dims(eqn, operand)
    free = free_axes(eqn.invars[operand].aval.ndim, contract, batch)
    return not varies & set(contract) or not varies & set(free)


def _holds_features(eqn: Any, operand: int) -> bool:
    """Returns whether the other operand is contracted along its last axes.

    As features are (`x @ w`), frozen ones too: learned queries, encoded positions. A
    matrix that a kernel is multiplied by (`w @ m`) is contracted along its first axes.
    """
    _, _, contract, _ = dot_dims(eqn, operand)
    ndim = eqn.invars[1 - operand].aval.ndim
    last = set(range(ndim - len(contract), ndim))
    return bool(contract) and set(contract) == last


def _by_heads(eqn: Any, operand: int, view: View) -> bool:
    """Whether a kernel's outputs are contracted, with frozen features as a free axis.

    As the keys of attention whose queries are learned are, head by head.
    """
    contract, batch, _, _ = dot_dims(eqn, operand)
    free = free_axes(len(view.origins), contract, batch)
    own = lambda axes: any(view.origins[i] - view.mixed for i in axes)
    of_features = any(view.origins[i] & view.mixed for i in free)
    return own(batch) and own(contract) and not own(free) and of_features


def _mix(eqn: Any, operand: int) -> Mix:
    ndim, other = eqn.invars[operand].aval.ndim, eqn.invars[1 - operand].aval.ndim
    contract, batch, other_contract, other_batch = map(tuple, dot_dims(eqn, operand))
    return Mix(
        contract,
        batch,
        free_axes(ndim, contract, batch),
        other_contract,
        other_batch,
        new=other - len(other_contract) - len(other_batch),
        own_first=operand == 0,
    )


# --- with a probe in the place of the kernel, see `linear_use.py` ---


def _on_probe(
    eqn: Any,
    operand: int,
    others: Sequence[Any],
    probe: jax.Array,
    shape: Shape,
    own: Collection[int],
) -> jax.Array:
    """The product; the columns of the probe are one more free axis.

    It sums over no axis of `own`: these are batch axes here.
    """
    x = others[0]
    contract, batch, x_contract, x_batch = dot_dims(eqn, operand)
    pairs = list(zip(contract, x_contract, strict=True))
    shared = [*zip(batch, x_batch, strict=True), *(p for p in pairs if p[0] in own)]
    pairs = [pair for pair in pairs if pair[0] not in own]
    probe = complete(probe, [*contract, *batch], shape)
    sides = lambda pairs: ([j for _, j in pairs], [i for i, _ in pairs])
    return dot(x, probe, sides(pairs), sides(shared), x.dtype, lax.Precision.HIGHEST)


def _inputs(eqn: Any, operand: int, values: Sequence[Any]) -> int:
    _, _, contract, batch = dot_dims(eqn, operand)
    shape = values[1 - operand].shape
    return math.prod(shape[i] for i in free_axes(len(shape), contract, batch))


def _own(eqn: Any, operand: int, part: Part) -> set[int]:
    """The batch axes of a kernel that it sums over: each index has its own inputs."""
    contract = dot_dims(eqn, operand)[0]
    return {i for i in contract if part.a.shape[i] != 1 and part.b.shape[i] != 1}


CARRY = {
    "dot_general": mixing(_mix, features=_holds_features, operands=(0, 1), frozen=True)
}
CONSUME = {
    "dot_general": ConsumeRule(
        "dot_general",
        (0, 1),
        _roles,
        _flops,
        linear=LinearUse(
            summed=lambda eqn, operand: dot_dims(eqn, operand)[0],
            shared=lambda eqn, operand: dot_dims(eqn, operand)[1],
            apply=_on_probe,
            rows=_inputs,
            own=_own,
        ),
        scale_fits=_scale_fits,
        features=_holds_features,
        by_heads=_by_heads,
    )
}

"""How important each triplet is, and which of them a budget keeps.

References:
    Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
    Fine-Tuning, <https://arxiv.org/abs/2303.10512>, 2023, sections 3.2 and 3.3.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .matrices import replicated
from .triplets import SvdFactors, is_svd


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Importance:
    """What is known of the importance of each entry of each triplet: a pytree.

    Attributes:
        sensitivity: by path, a moving average of |w·∂loss/∂w|.
        uncertainty: by path, a moving average of how far that is from its average.
    """

    sensitivity: dict[str, SvdFactors]
    uncertainty: dict[str, SvdFactors]


def start(svd: Mapping[str, Any]) -> Importance:
    """Returns the importance before the first step: zero.

    Args:
        svd: the triplets by path; leaves that are trained whole have no importance.
    """
    own = {path: entry for path, entry in svd.items() if is_svd(entry)}
    # No buffer twice, so that a training step can be given the state to reuse.
    zeros = [jax.tree.map(jnp.zeros_like, own) for _ in range(2)]
    return Importance(*zeros)


def update(
    state: Importance,
    svd: Mapping[str, Any],
    grads: Mapping[str, Any],
    *,
    sensitivity_decay: float = 0.85,
    uncertainty_decay: float = 0.85,
) -> Importance:
    """Returns the importance after a step, from the gradients of that step.

    With I = |w·∂loss/∂w| of each entry w, the sensitivity is Ī ← β₁·Ī + (1 − β₁)·I and
    the uncertainty Ū ← β₂·Ū + (1 − β₂)·|I − Ī|, with the new Ī.

    Args:
        state: the importance before.
        svd: the triplets at which the gradients were taken.
        grads: the gradients of the loss, in the structure of `svd`.
        sensitivity_decay: β₁, between 0 and 1.
        uncertainty_decay: β₂, between 0 and 1.

    Raises:
        ValueError: if a decay is not between 0 and 1.

    References:
        Zhang et al., AdaLoRA, <https://arxiv.org/abs/2303.10512>, 2023, equations 8 to
        10.
    """
    for name, decay in (
        ("sensitivity_decay", sensitivity_decay),
        ("uncertainty_decay", uncertainty_decay),
    ):
        if not 0 <= decay < 1:
            raise ValueError(
                f"`jlora.adalora.update({name}=...)` must be at least 0 and below 1; "
                f"got {decay!r}"
            )
    paths = list(state.sensitivity)
    products = {p: jax.tree.map(_product, svd[p], grads[p]) for p in paths}
    mean = lambda decay: lambda old, new: decay * old + (1 - decay) * new
    sensitivity = jax.tree.map(mean(sensitivity_decay), state.sensitivity, products)
    apart = jax.tree.map(lambda i, average: abs(i - average), products, sensitivity)
    uncertainty = jax.tree.map(mean(uncertainty_decay), state.uncertainty, apart)
    return Importance(sensitivity, uncertainty)


def scores(state: Importance) -> dict[str, jax.Array]:
    """Returns the importance of each triplet, `(*batch, rank)` by path.

    With s = Ī·Ū for each entry, that of a triplet is s of its singular value, plus the
    mean of s over its column of `p` and the mean over its row of `q`.

    Args:
        state: what `update` returns.

    References:
        Zhang et al., AdaLoRA, <https://arxiv.org/abs/2303.10512>, 2023, equations 7 and
        11.
    """
    times = lambda sensitivity, uncertainty: sensitivity * uncertainty
    products = jax.tree.map(times, state.sensitivity, state.uncertainty)
    return {path: _of_triplets(entry) for path, entry in products.items()}


def allocate(
    scores: Mapping[str, jax.Array], budget: int | jax.Array
) -> dict[str, jax.Array]:
    """Returns which triplets to keep: the `budget` highest scores over all targets.

    Exactly as many, whatever ties there are, so that a budget may also be traced.

    Args:
        scores: what `scores` returns.
        budget: how many triplets are kept, over all targets, layers and experts.

    Returns:
        A dict from path to booleans `(*batch, rank)`, True for a triplet that is kept.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> scores = {"v": jnp.array([3.0, 1.0]), "w": jnp.array([2.0, 0.0, 4.0])}
        >>> kept = jlora.adalora.allocate(scores, 3)
        >>> kept["v"].tolist(), kept["w"].tolist()
        ([True, False], [True, False, True])

    References:
        Zhang et al., AdaLoRA, <https://arxiv.org/abs/2303.10512>, 2023, equation 6.
    """
    if not scores:
        return {}
    flat = jnp.concatenate([replicated(s).reshape(-1) for s in scores.values()])
    place = jnp.argsort(jnp.argsort(-flat, stable=True))
    kept, found, start = place < budget, {}, 0
    for path, own in scores.items():
        found[path] = kept[start : start + own.size].reshape(own.shape)
        start += own.size
    return found


def budget(
    step: int | jax.Array,
    *,
    first: int,
    last: int,
    warmup: int,
    cooldown: int,
    steps: int,
) -> int | jax.Array:
    """Returns how many triplets are kept at a step: a cubic fall from first to last.

    `first` up to step `warmup`, `last` for the last `cooldown` steps, and between them
    last + (first − last)·(1 − t)³, rounded down, with t from 0 to 1. (The paper prints
    t with its two bounds mixed up, which jumps; this is what its code and PEFT do.)

    Args:
        step: the number of the step, which may be traced.
        first: the budget at first: all triplets.
        last: the budget at last.
        warmup: for how many steps nothing is cut.
        cooldown: for how many steps the last budget is trained.
        steps: how many steps there are.

    Returns:
        An int for an int, and an integer array for an array.

    Raises:
        ValueError: if the steps do not fit, or the budget does not fall.

    Example:
        >>> import jlora
        >>> plan = dict(first=16, last=8, warmup=10, cooldown=10, steps=40)
        >>> [jlora.adalora.budget(step, **plan) for step in (0, 10, 20, 30, 40)]
        [16, 16, 9, 8, 8]

    References:
        Zhang et al., AdaLoRA, <https://arxiv.org/abs/2303.10512>, 2023, equation 12.
    """
    span = steps - warmup - cooldown
    if min(warmup, cooldown) < 0 or span <= 0:
        raise ValueError(
            "`jlora.adalora.budget` needs warmup + cooldown below steps; got "
            f"warmup={warmup}, cooldown={cooldown}, steps={steps}"
        )
    if not 0 <= last <= first:
        raise ValueError(
            f"`jlora.adalora.budget` falls from first to last; got first={first}, "
            f"last={last}"
        )
    left = 1 - (step - warmup) / span
    if isinstance(left, float):
        return int((first - last) * min(max(left, 0.0), 1.0) ** 3 + last)
    size = (first - last) * jnp.clip(left, 0, 1) ** 3 + last
    return jnp.floor(size).astype(jnp.int32)


def _product(w: jax.Array, grad: jax.Array) -> jax.Array:
    return abs(w * grad)


def _of_triplets(entry: SvdFactors) -> jax.Array:
    n = len(entry.axes.batch)
    columns = entry.p.mean(axis=tuple(range(n, entry.p.ndim - 1)))
    rows = entry.q.mean(axis=tuple(range(n + 1, entry.q.ndim)))
    return entry.values + columns + rows

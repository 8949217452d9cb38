"""AdaLoRA: one budget of ranks, given to the targets that need it, as pure functions.

Known as `jlora.adalora`. Each ΔW is held as P·Λ·Q, a sum of triplets: a singular value
with a column of P and a row of Q. While training, each triplet is scored by how much
the loss depends on it; the values of the least important ones, over all targets
together, are set to zero.

    adalora = jlora.adalora
    svd = adalora.init(key, lora.init(key, params, x))  # what is trained
    state = adalora.start(svd)                          # its importance

    def loss(svd, x, y):
        out = lora.apply(params, adalora.to_factors(svd), x)
        return error(out, y) + 0.1 * adalora.orthogonality_penalty(svd)

    # a step
    grads = jax.grad(loss)(svd, x, y)
    state = adalora.update(state, svd, grads)           # not while cooling down
    svd = optax.apply_updates(svd, updates)             # of any optimizer
    size = adalora.budget(i, first=96, last=48, warmup=100, cooldown=400, steps=1000)
    kept = adalora.allocate(adalora.scores(state), size)
    svd = adalora.masked(svd, kept)                     # or at every tenth step

    # at the end
    adapter = adalora.prune(svd)                        # factors of unequal ranks

References:
    Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
    Fine-Tuning, <https://arxiv.org/abs/2303.10512>, 2023.
"""

from ._algebra.allocation import Importance as Importance
from ._algebra.allocation import allocate as allocate
from ._algebra.allocation import budget as budget
from ._algebra.allocation import scores as scores
from ._algebra.allocation import start as start
from ._algebra.allocation import update as update
from ._algebra.triplets import SvdAdapter as SvdAdapter
from ._algebra.triplets import SvdFactors as SvdFactors
from ._algebra.triplets import from_factors as from_factors
from ._algebra.triplets import init as init
from ._algebra.triplets import masked as masked
from ._algebra.triplets import orthogonality_penalty as orthogonality_penalty
from ._algebra.triplets import prune as prune
from ._algebra.triplets import to_factors as to_factors

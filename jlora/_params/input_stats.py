"""What is known of the inputs of a kernel: their second moments."""

import dataclasses

import jax
import jax.numpy as jnp

from .._jax.keys import key_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputStats:
    """The second moments of what goes into one kernel.

    Sums over all rows and all uses: add those of several batches by
    `jax.tree.map(jnp.add, stats, more)`.

    Attributes:
        moment: `Σ xᵀ·x`, of shape `(*batch, in, in)` with the input axes as one, in
            float32; or with a sketch of `k` columns `Σ xᵀ·(x·Ω)`, `(*batch, in, k)`.
        rows: the number of rows, `(*batch,)`.
    """

    moment: jax.Array
    rows: jax.Array


def projection(path: str, size: int, sketch: int | None) -> jax.Array:
    """Returns `Ω (size, k)`: the identity, or random orthonormal columns of a sketch.

    It is always the same for a path and its sizes, so that batches can be added.
    """
    if sketch is None or sketch >= size:
        return jnp.eye(size)
    key = key_of(jax.random.key(0), path)
    return jnp.linalg.qr(jax.random.normal(key, (size, sketch))).Q

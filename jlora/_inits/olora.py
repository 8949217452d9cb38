"""OLoRA: the factors begin orthonormal, by a QR decomposition of the kernel."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._adapter.factors import Adapter, LoraFactors
from .._jax.linalg import transposed
from .._params.paths import PyTree
from .from_kernel import Matrices, check_entries, move


def olora(params: PyTree, adapter: Mapping[str, Any]) -> tuple[PyTree, Adapter]:
    """Returns params and an adapter with an orthonormal `b`, from a QR decomposition.

    With `Wᵀ = Q·R`, `b = Q_rᵀ` and `a = R_rᵀ`, the first `rank` columns of `Q` and rows
    of `R`; the new kernel is `W − scaling·a·b`, as in PEFT, where the scaling does not
    enter the factors.

    Args:
        params: the frozen params, as arrays.
        adapter: a new adapter, as `lora.init` gives it: its values are replaced.

    Returns:
        The moved params and the adapter, as `pissa` does.

    Raises:
        AdapterError: if the adapter does not fit `params`, or a rank is too large.
        UnsupportedFeatureError: for an entry that is more than two factors.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=2))
        >>> params = {"w": jax.random.normal(jax.random.key(0), (5, 7))}
        >>> adapter = lora.init(jax.random.key(1), params, jnp.ones((2, 5)))
        >>> rest, adapter = jlora.olora(params, adapter)
        >>> b = adapter["w"].b
        >>> bool(jnp.allclose(b @ b.T, jnp.eye(2), atol=1e-6))
        True

    References:
        Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models,
        <https://arxiv.org/abs/2406.01775>, 2024, algorithm 1.
    """
    check_entries("olora", params, adapter)
    return move(params, adapter, _orthonormal, {})


def _orthonormal(matrix: jax.Array, entry: LoraFactors) -> Matrices:
    q, r = jnp.linalg.qr(transposed(matrix))
    rank = entry.rank
    return transposed(r[..., :rank, :]), transposed(q[..., :, :rank])

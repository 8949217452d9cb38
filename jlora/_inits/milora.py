"""MiLoRA: the factors hold the minor part of a kernel."""

from collections.abc import Mapping
from typing import Any

import jax

from .._adapter.factors import Adapter, LoraFactors
from .._jax.linalg import balanced, svd
from .._params.paths import PyTree
from .from_kernel import Matrices, check_entries, matrix_of_a, move


def milora(params: PyTree, adapter: Mapping[str, Any]) -> tuple[PyTree, Adapter]:
    """Returns params and an adapter that holds the minor part of each kernel.

    As `pissa`, with the `rank` smallest singular values of `W` in place of the largest:
    what is trained is what the kernel uses least. Where a kernel has a lower rank than
    its size, those are zero; there the factors begin like those of `adapter`, with
    `b = 0`.

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
        >>> lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=1))
        >>> params = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
        >>> adapter = lora.init(jax.random.key(1), params, jnp.ones((2, 3)))
        >>> rest, adapter = jlora.milora(params, adapter)
        >>> jnp.diag(rest["w"]).round().astype(int).tolist()
        [3, 2, 0]

    References:
        Wang et al., MiLoRA: Harnessing Minor Singular Components for
        Parameter-Efficient LLM Finetuning, <https://arxiv.org/abs/2406.09044>,
        2024, section 3.
    """
    check_entries("milora", params, adapter)
    return move(params, adapter, _minor, {})


def _minor(matrix: jax.Array, entry: LoraFactors) -> Matrices:
    found = svd(matrix)
    last = found.cut(slice(found.s.shape[-1] - entry.rank, None))
    return balanced(last, entry.scaling, found.s[..., 0], matrix_of_a(entry))

"""PiSSA: the factors hold the principal part of a kernel."""

from collections.abc import Mapping
from typing import Any, Literal

import jax

from .._adapter.factors import Adapter, LoraFactors
from .._jax.keys import key_of
from .._jax.linalg import balanced, randomized_svd, svd
from .._params.given import check_key
from .._params.paths import PyTree
from .from_kernel import Matrices, check_count, check_entries, matrix_of_a, move


def pissa(
    params: PyTree,
    adapter: Mapping[str, Any],
    *,
    method: Literal["exact", "fast"] = "exact",
    n_iter: int = 4,
    key: jax.Array | None = None,
) -> tuple[PyTree, Adapter]:
    """Returns params and an adapter that holds the principal part of each kernel.

    With `W = U·S·Vᵀ`, `a = U_r·√(S_r/scaling)`, `b = √(S_r/scaling)·V_rᵀ`, and the new
    kernel is `W − scaling·a·b`; stacks, experts and heads by the roles of their axes.
    So `merge` gives the old params back, and training begins at the old outputs.

    The residual is formed in float32 and rounded once to the kernel's dtype. In a
    bfloat16 base that rounding (2⁻⁸ of the residual's values) is the distance from the
    old outputs: as much as merging an adapter costs. Cast the params to float32 first,
    or quantise the residual as QPiSSA does, if that matters.

    Args:
        params: the frozen params, as arrays.
        adapter: a new adapter, as `lora.init` gives it: its values are replaced.
            Leaves that are trained whole stay as they are.
        method: "exact" for a singular value decomposition; "fast" for a randomized
            one, which is much faster for large kernels.
        n_iter: the power iterations of "fast".
        key: a PRNG key, for "fast".

    Returns:
        The moved params, of the same structure, dtypes and shardings, and the adapter.
        Save both, or their difference: the adapter alone fits no other base.

    Raises:
        AdapterError: if the adapter does not fit `params`, or a rank is too large.
        UnsupportedFeatureError: for an entry that is more than two factors.
        ValueError: if `method` is unknown, or has no key.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> fn = lambda params, x: x @ params["w"]
        >>> params = {"w": jax.random.normal(jax.random.key(0), (5, 7))}
        >>> lora = jlora.lora(fn, jlora.LoraConfig("w", rank=2))
        >>> adapter = lora.init(jax.random.key(1), params, jnp.ones((2, 5)))
        >>> rest, adapter = jlora.pissa(params, adapter)
        >>> bool(jnp.allclose(jlora.merge(rest, adapter)["w"], params["w"], atol=1e-5))
        True
        >>> bool(jnp.linalg.norm(rest["w"]) < jnp.linalg.norm(params["w"]))
        True

    References:
        Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation of
        Large Language Models, <https://arxiv.org/abs/2404.02948>, 2024, equations 2–4.
        Halko et al., Finding Structure with Randomness,
        <https://arxiv.org/abs/0909.4061>, 2011.
    """
    if method not in ("exact", "fast"):
        raise ValueError(f'`method` must be "exact" or "fast", got {method!r}')
    if method == "fast" and key is None:
        raise ValueError(
            '`jlora.pissa(method="fast")` draws a projection: give a `key`'
        )
    if key is not None:
        check_key(key, "key")
    check_count("n_iter", n_iter, 0)
    check_entries("pissa", params, adapter)
    if key is None or method == "exact":
        return move(params, adapter, _principal, {})
    own = lambda path: (key_of(key, path),)
    return move(params, adapter, _principal_fast, {"n_iter": n_iter}, own)


def _principal(matrix: jax.Array, entry: LoraFactors) -> Matrices:
    found = svd(matrix)
    top = found.cut(slice(0, entry.rank))
    return balanced(top, entry.scaling, found.s[..., 0], matrix_of_a(entry))


def _principal_fast(
    matrix: jax.Array, entry: LoraFactors, key: jax.Array, *, n_iter: int
) -> Matrices:
    top = randomized_svd(key, matrix, entry.rank, n_iter)
    return balanced(top, entry.scaling, top.s[..., 0], matrix_of_a(entry))

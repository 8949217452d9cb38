"""CorDA: a kernel is decomposed as its inputs see it."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._adapter.factors import Adapter, LoraFactors
from .._jax.linalg import Svd, balanced, matmul, svd, transposed
from .._params.input_stats import InputStats
from .._params.paths import PyTree
from .from_kernel import Matrices, check_entries, matrix_of_a, move
from .moments import check_stats


def corda(
    params: PyTree,
    adapter: Mapping[str, Any],
    stats: Mapping[str, InputStats],
    *,
    mode: Literal["knowledge", "instruction"] = "knowledge",
    damping: float = 0.01,
) -> tuple[PyTree, Adapter]:
    """Returns params and an adapter from a decomposition oriented by the inputs.

    With `C` the second moment of the inputs, `U·S·Vᵀ = svd(C·W)` and so
    `W = C⁻¹·U·S·Vᵀ`. In the mode "instruction" the adapter holds the `rank` largest
    parts (the inputs are those of the new task); in the mode "knowledge" the smallest
    ones (the inputs are those of what is to be kept). The rest stays in the kernel, so
    that the outputs are the old ones at the start.

    Args:
        params: the frozen params, as arrays.
        adapter: a new adapter, as `lora.init` gives it: its values are replaced.
        stats: what `lora.inputs` gives, without a sketch.
        mode: which part is trained.
        damping: what is added to the diagonal of `C`, as a share of its mean, so that
            it can be inverted. PEFT begins with 0.01 and doubles it until the inverse
            is good; here it is fixed, and solved rather than inverted.

    Returns:
        The moved params and the adapter, as `jlora.pissa` does.

    Raises:
        AdapterError: if the adapter or `stats` do not fit the params.
        UnsupportedFeatureError: for an entry that is more than two factors.
        ValueError: if `mode` is unknown or `damping` is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig(rank=1))
        >>> params = {"w": jax.random.normal(jax.random.key(0), (3, 4))}
        >>> x = jax.random.normal(jax.random.key(1), (9, 3))
        >>> adapter = lora.init(jax.random.key(2), params, x)
        >>> rest, adapter = jlora.corda(params, adapter, lora.inputs(params, x))
        >>> bool(jnp.allclose(lora.apply(rest, adapter, x), x @ params["w"], atol=1e-5))
        True

    References:
        Yang et al., CorDA: Context-Oriented Decomposition Adaptation of Large Language
        Models, <https://arxiv.org/abs/2406.05223>, 2024, equations 2–5.
    """
    if mode not in ("knowledge", "instruction"):
        raise ValueError(f'`mode` must be "knowledge" or "instruction", got {mode!r}')
    if not damping > 0:
        raise ValueError(f"`damping` must be positive, got {damping!r}")
    check_entries("corda", params, adapter)
    check_stats("corda", adapter, stats, whole=True)
    settings = {"minor": mode == "knowledge", "damping": float(damping)}
    extra = lambda path: (stats[path].moment,)
    return move(params, adapter, _oriented, settings, extra)


def _oriented(
    matrix: jax.Array,
    entry: LoraFactors,
    moment: jax.Array,
    *,
    minor: bool,
    damping: float,
) -> Matrices:
    moment = moment.astype(matrix.dtype)
    size = moment.shape[-1]
    mean = jnp.maximum(jnp.trace(moment, axis1=-2, axis2=-1) / size, 1e-30)
    # Of the order of one, whatever the number of rows; singular vectors do not care.
    scaled = moment / mean[..., None, None]
    scaled = (scaled + transposed(scaled)) / 2 + damping * jnp.eye(
        size, dtype=matrix.dtype
    ).reshape((1,) * (moment.ndim - 2) + (size, size))
    found = svd(matmul(scaled, matrix))
    first = found.s.shape[-1] - entry.rank if minor else 0
    part = found.cut(slice(first, first + entry.rank))
    u = jnp.linalg.solve(scaled, part.u)
    part = Svd(u, part.s, part.vt)
    return balanced(part, entry.scaling, found.s[..., 0], matrix_of_a(entry))

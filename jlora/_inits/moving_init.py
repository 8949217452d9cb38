"""PiSSA, MiLoRA, OLoRA and LoftQ: adapters that begin with a part of the kernel.

Each takes params with a new adapter (whose paths, axes, ranks, scalings and dtypes are
kept) and returns both anew, so that the adapted function begins where `fn` is. PEFT's
initialisers of the same names give the same ΔW.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._adapter.factors import Adapter, LoraFactors, delta
from .._algebra.matrices import with_matrices
from .._jax.dtypes import summed_in
from .._jax.keys import key_of
from .._jax.linalg import balanced, randomized_svd, svd, transposed
from .._params.paths import FlatParams, PyTree, is_array
from .from_kernel import check_entries, in_place, matrix_of_a, move

Matrices = tuple[jax.Array, jax.Array]


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
    _check_count("n_iter", n_iter, 0)
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


def loftq(
    params: PyTree,
    adapter: Mapping[str, Any],
    *,
    quantize: Callable[[jax.Array], Any],
    dequantize: Callable[[Any], jax.Array] | None = None,
    steps: int = 5,
) -> tuple[PyTree, Adapter]:
    """Returns quantised params and an adapter that makes up for the rounding.

    Each step quantises `Q = q(W − scaling·a·b)` and takes the factors from the singular
    value decomposition of `W − Q`. Unlike the other initialisers it keeps the old
    outputs only nearly: `Q + ΔW` is nearer to `W` than `q(W)` is. PEFT does not divide
    by the scaling, and so fits `W` only with alpha = rank; here it is divided.

    Args:
        params: the params before quantisation, as arrays.
        adapter: a new adapter, as `lora.init` gives it: its values are replaced.
        quantize: from a kernel in float32 to the values that its quantised form stands
            for, an array of its shape; or to a quantised array, with `dequantize`.
        dequantize: from what `quantize` gives to an array of the kernel's shape.
        steps: how often both are alternated; one is enough to gain most.

    Returns:
        Params with what `quantize` gave at the last step in place of each adapted
        kernel (arrays in the kernel's dtype), and the adapter.

    Raises:
        AdapterError: if the adapter does not fit `params`, or a rank is too large.
        UnsupportedFeatureError: for an entry that is more than two factors.
        TypeError: if what is quantised (and dequantised) is no array.
        ValueError: if it has another shape than the kernel, or `steps` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=2))
        >>> params = {"w": jax.random.normal(jax.random.key(0), (5, 7))}
        >>> adapter = lora.init(jax.random.key(1), params, jnp.ones((2, 5)))
        >>> halves = lambda w: jnp.round(2 * w) / 2
        >>> quantised, adapter = jlora.loftq(params, adapter, quantize=halves)
        >>> plain = jnp.linalg.norm(params["w"] - halves(params["w"]))
        >>> merged = jlora.merge(quantised, adapter)
        >>> bool(jnp.linalg.norm(params["w"] - merged["w"]) < plain)
        True

    References:
        Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models,
        <https://arxiv.org/abs/2310.08659>, 2023, algorithm 1.
    """
    _check_count("steps", steps, 1)
    check_entries("loftq", params, adapter)
    flat = FlatParams.of(params)
    leaves, moved, entries = flat.by_path(), {}, dict(adapter)
    read = dequantize or (lambda quantised: quantised)
    for path, entry in entries.items():
        if isinstance(entry, LoraFactors):
            kernel = leaves[path]
            given = values = rest = _wide(kernel)
            for _ in range(steps):
                given = quantize(rest)
                values = _values(path, kernel, given, read)
                rest, entry = in_place(_made_up, None, kernel, entry, values)
            moved[path] = values if dequantize is None else given
            entries[path] = entry
    return flat.replace(moved), entries


def _wide(kernel: Any) -> jax.Array:
    kernel = jnp.asarray(kernel)
    return kernel.astype(summed_in(kernel.dtype))


def _values(path: str, kernel: Any, given: Any, read: Callable[[Any], Any]) -> Any:
    """Returns what a quantised kernel stands for, in the dtype of the kernel."""
    values = read(given)
    if not is_array(values):
        raise TypeError(
            f"`jlora.loftq`: the quantised {path!r} is a {type(values).__name__}, not "
            "an array; give `dequantize`, from it to an array of the kernel's shape"
        )
    if tuple(values.shape) != tuple(kernel.shape):
        raise ValueError(
            f"`jlora.loftq`: the quantised {path!r} stands for an array of shape "
            f"{tuple(values.shape)}; the kernel's is {tuple(kernel.shape)}"
        )
    return values.astype(kernel.dtype)


def _made_up(
    static: None, kernel: jax.Array, entry: LoraFactors, values: jax.Array
) -> tuple[jax.Array, LoraFactors]:
    """Returns `W − ΔW`, with a ΔW fitted to `W − Q`, and its factors."""
    wide = _wide(kernel)
    error = entry.axes.to_matrix(wide - values.astype(wide.dtype))
    new = with_matrices(entry, *_principal(error, entry))
    return wide - delta(new, dtype=wide.dtype), new


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an int of at least {least}, got {value!r}")

"""`SvdFactors`, a change held as P·Λ·Q: to and from the factors of an adapter.

References:
    Zhang et al., AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
    Fine-Tuning, <https://arxiv.org/abs/2303.10512>, 2023, section 3.1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._adapter.factors import Adapter, LoraFactors, exportable
from .._errors import AdapterError
from .._jax.keys import key_of
from .._params.axes import KernelAxes
from .._params.given import check_key
from .._params.paths import PyTree, is_array
from .changes import check_plain, factored
from .matrices import batch_placed, matrices, with_matrices
from .norms import gram
from .spectrum import product_svd


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SvdFactors:
    """The triplets of one kernel: `ΔW = scaling · p · diag(values) · q`.

    A pytree with the leaves `p`, `values` and `q`; `axes` and `scaling` are static.
    Nothing keeps `p` and `q` orthogonal but `orthogonality_penalty`, and values may be
    negative.

    Attributes:
        p: the input side, of the shape of `a`, `(*batch, *in, rank)`.
        values: the singular values, `(*batch, rank)`, in no order.
        q: the output side, of the shape of `b`, `(*batch, rank, *out)`.
        axes: which axes of the kernel are batch, input and output axes.
        scaling: alpha/rank (or alpha/√rank), a Python float.

    References:
        Zhang et al., AdaLoRA, <https://arxiv.org/abs/2303.10512>, 2023, equation 3.
    """

    p: jax.Array
    values: jax.Array
    q: jax.Array
    axes: KernelAxes = dataclasses.field(metadata={"static": True})
    scaling: float = dataclasses.field(metadata={"static": True})


exportable(SvdFactors, "jlora.adalora.SvdFactors")

SvdAdapter: TypeAlias = dict[str, SvdFactors | jax.Array]


# --- from and to factors ---


def init(key: jax.Array, adapter: Mapping[str, Any]) -> SvdAdapter:
    """Returns triplets for the kernels of a new adapter, with values of zero: ΔW = 0.

    `p` and `q` are random and orthonormal, so that the penalty starts at zero; the
    paper starts from Gaussians. Of the adapter's factors only shapes and dtypes count.

    Args:
        key: a PRNG key. Each target folds a hash of its path in.
        adapter: the factors by path; leaves that are trained whole stay as they are.

    Returns:
        A dict from path to `SvdFactors`, or to an array for a leaf trained whole.

    Raises:
        AdapterError: with every path whose rank is larger than a side of its kernel.
        UnsupportedFeatureError: for other entries, such as those with a magnitude.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = jlora.LoraFactors(jnp.ones((5, 2)), jnp.zeros((2, 3)), axes, 1.0)
        >>> svd = jlora.adalora.init(jax.random.key(0), {"w": factors})["w"]
        >>> svd.p.shape, svd.values.shape, svd.q.shape
        ((5, 2), (2,), (2, 3))
    """
    check_plain("jlora.adalora.init", adapter)
    _check_ranks(adapter)
    check_key(key, "key", ". The order is `jlora.adalora.init(key, adapter)`")
    return {
        path: _random(key_of(key, path), entry) if _factored(entry) else entry
        for path, entry in adapter.items()
    }


def from_factors(adapter: Mapping[str, Any], *, params: PyTree = None) -> SvdAdapter:
    """Returns the triplets of a trained adapter: the SVD of each ΔW, which stays.

    As many triplets as the smallest of rank, inputs and outputs. Of a new adapter,
    whose ΔW is zero, the singular vectors are arbitrary: use `init`.

    Args:
        adapter: the entries by path, of any variant that is lowered to two factors;
            leaves that are trained whole stay as they are.
        params: the frozen params, for rows that are trained.

    Returns:
        A dict from path to `SvdFactors`, or to an array for a leaf trained whole.

    Raises:
        UnsupportedFeatureError: for other entries, such as those with a magnitude.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> factors = jlora.LoraFactors(jnp.ones((4, 2)), jnp.ones((2, 1)), axes, 1.0)
        >>> jlora.adalora.from_factors({"w": factors})["w"].values.round(3).tolist()
        [4.0]
    """
    lower = {p: e for p, e in adapter.items() if not is_array(e)}
    changes = factored("jlora.adalora.from_factors", [lower], params, whole=True)
    svd = {p: _decomposed(change.parts[0][0]) for p, change in changes.items()}
    return {path: svd[path] if path in svd else adapter[path] for path in adapter}


def to_factors(svd: Mapping[str, Any]) -> Adapter:
    """Returns the adapter of the same ΔW, with `a = p·diag(values)` and `b = q`.

    To be called inside of the loss, so that gradients are those of the triplets.

    Args:
        svd: the triplets by path; leaves that are trained whole stay as they are.

    Returns:
        An adapter, as `lora.apply` takes it.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> p, values, q = jnp.eye(5, 2), jnp.array([3.0, 1.0]), jnp.eye(2, 3)
        >>> svd = jlora.adalora.SvdFactors(p, values, q, axes, 0.5)
        >>> adapter = jlora.adalora.to_factors({"w": svd})
        >>> float(jlora.delta(adapter["w"])[0, 0])
        1.5
    """
    return {p: _recomposed(e) if is_svd(e) else e for p, e in svd.items()}


def is_svd(entry: Any) -> bool:
    """Returns whether an entry is of triplets, and not a leaf that is trained whole."""
    return isinstance(entry, SvdFactors)


def _factored(entry: Any) -> bool:
    return isinstance(entry, LoraFactors)


def _check_ranks(adapter: Mapping[str, Any]) -> None:
    found = []
    for path, entry in adapter.items():
        if _factored(entry):
            fans = entry.axes.fans(entry.kernel_shape)
            if entry.rank > min(fans):
                found.append(f"{path!r} has rank {entry.rank} and sides of {fans}")
    if found:
        raise AdapterError(
            "`jlora.adalora.init` makes orthonormal columns, no more than a side of "
            "the kernel has; give `LoraConfig` a smaller rank:\n" + "\n".join(found)
        )


def _random(key: jax.Array, factors: LoraFactors) -> SvdFactors:
    a, b = map(jnp.zeros_like, matrices(factors))  # zeros that are on the mesh
    p, q = (
        jnp.linalg.qr(zero + jax.random.normal(k, zero.shape, zero.dtype)).Q
        for k, zero in zip(jax.random.split(key), (a, b.mT), strict=True)
    )
    return _svd(factors, p, a.sum(axis=-2), q.mT)


def _decomposed(factors: LoraFactors) -> SvdFactors:
    return _svd(factors, *product_svd(*matrices(factors)))


def _svd(like: LoraFactors, u: Any, s: Any, v: Any) -> SvdFactors:
    """Returns triplets in the layout, the dtypes and the shardings of factors."""
    laid = with_matrices(like, u, v)
    values = batch_placed(s.astype(like.a.dtype), like)
    return SvdFactors(laid.a, values, laid.b, like.axes, like.scaling)


def _recomposed(entry: SvdFactors) -> LoraFactors:
    n_batch = len(entry.axes.batch)
    batch, rank = entry.values.shape[:n_batch], entry.values.shape[-1]
    ones = [1] * (entry.p.ndim - n_batch - 1)
    a = entry.p * entry.values.reshape(*batch, *ones, rank)
    return LoraFactors(a, entry.q, entry.axes, entry.scaling)


# --- the triplets themselves ---


def orthogonality_penalty(svd: Mapping[str, Any]) -> jax.Array:
    """Returns Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖² over all kernels, by the Frobenius norm.

    To be added to the loss with a factor such as 0.1. (PEFT adds the mean of the norms,
    not squared.)

    Args:
        svd: the triplets by path; leaves that are trained whole do not count.

    Returns:
        A scalar, in float32 at least.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> p, values, q = 2 * jnp.eye(5, 2), jnp.ones(2), jnp.eye(2, 3)
        >>> svd = jlora.adalora.SvdFactors(p, values, q, axes, 1.0)
        >>> float(jlora.adalora.orthogonality_penalty({"w": svd}))
        18.0

    References:
        Zhang et al., AdaLoRA, <https://arxiv.org/abs/2303.10512>, 2023, equation 4.
    """
    total = jnp.float32(0.0)
    for entry in filter(is_svd, svd.values()):
        n = len(entry.axes.batch)
        grams = (
            gram(entry.p, range(n, entry.p.ndim - 1), range(n)),
            gram(entry.q, range(n + 1, entry.q.ndim), range(n)),
        )
        eye = jnp.eye(entry.values.shape[-1], dtype=grams[0].dtype)
        eye = eye.reshape(*[1] * n, *eye.shape)
        total = total + sum(((found - eye) ** 2).sum() for found in grams)
    return total


def masked(svd: Mapping[str, Any], kept: Mapping[str, Any]) -> SvdAdapter:
    """Returns triplets with the values of those that are not kept set to zero.

    Their `p` and `q` stay, so that a triplet that becomes important can come back.

    Args:
        svd: the triplets by path.
        kept: what `allocate` returns: True for a triplet that is kept.

    Returns:
        New triplets, of the same shapes.

    Raises:
        AdapterError: if `kept` does not have the paths of `svd`.

    References:
        Zhang et al., AdaLoRA, <https://arxiv.org/abs/2303.10512>, 2023, equation 6.
    """
    _check_kept("masked", svd, kept)
    return {
        path: _with_values(e, jnp.where(kept[path], e.values, 0)) if is_svd(e) else e
        for path, e in svd.items()
    }


def prune(svd: Mapping[str, Any], kept: Mapping[str, Any] | None = None) -> Adapter:
    """Returns a plain adapter of the triplets that are kept, with a rank per target.

    Both factors hold the root of each value. Layers of a stack and experts share a
    rank, the largest that one of them keeps, and the others are filled with zeros. A
    target that keeps none has a ΔW of zero, and is left out.

    Args:
        svd: the triplets by path; leaves that are trained whole stay as they are.
        kept: what `allocate` returned; by default the triplets whose value is not zero.

    Returns:
        An adapter, as `lora.apply` takes it.

    Raises:
        AdapterError: if `kept` does not have the paths of `svd`.
        TypeError: under `jax.jit`, where a rank cannot depend on values.

    Example:
        >>> import jax.numpy as jnp, jlora
        >>> axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
        >>> p, values, q = jnp.eye(5, 3), jnp.array([3.0, 0.0, -1.0]), jnp.eye(3)
        >>> svd = jlora.adalora.SvdFactors(p, values, q, axes, 1.0)
        >>> jlora.adalora.prune({"w": svd})["w"].rank
        2
    """
    if kept is not None:
        _check_kept("prune", svd, kept)
    found = {}
    for path, entry in svd.items():
        if not is_svd(entry):
            found[path] = entry
            continue
        _check_known(path, entry.values, kept and kept[path])
        values = np.asarray(entry.values)
        own = values != 0 if kept is None else np.asarray(kept[path])
        if own.any():
            found[path] = _pruned(entry, np.where(own, values, 0), own)
    return found


def _with_values(entry: SvdFactors, values: jax.Array) -> SvdFactors:
    return dataclasses.replace(entry, values=values)


def _check_kept(name: str, svd: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    paths = {path for path, entry in svd.items() if is_svd(entry)}
    if paths != set(kept):
        raise AdapterError(
            f"`jlora.adalora.{name}` got triplets and masks of different paths: "
            f"{sorted(paths ^ set(kept))} is in one of them alone"
        )


def _check_known(path: str, *arrays: Any) -> None:
    if any(isinstance(array, Tracer) for array in arrays):
        raise TypeError(
            f"the rank of {path!r} would depend on its values, which are not known "
            "under `jax.jit`; call `jlora.adalora.prune` outside"
        )


def _pruned(entry: SvdFactors, values: np.ndarray, kept: np.ndarray) -> LoraFactors:
    rank = kept.sum(axis=-1).max()
    order = np.argsort(~kept, axis=-1, kind="stable")[..., :rank]  # kept ones first
    values = np.take_along_axis(values, order, -1)
    root = np.sqrt(np.abs(values))
    factors = LoraFactors(entry.p, entry.q, entry.axes, entry.scaling)
    p, q = matrices(factors)
    a = jnp.take_along_axis(p, order[..., None, :], axis=-1) * root[..., None, :]
    signed = np.sign(values) * root
    b = jnp.take_along_axis(q, order[..., None], axis=-2) * signed[..., None]
    return with_matrices(factors, a, b)

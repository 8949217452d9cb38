"""From the entries of an adapter to what the program is evaluated with."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._adapter.dora import output_scale
from .._adapter.factors import LoraFactors
from .._adapter.variants import variant_of_entry
from .._errors import UnsupportedFeatureError
from .._jax.versions import manual_axes, vary
from .._params.axes import KernelAxes, expand
from .._params.lazy import Lazy, check_frozen, dense
from .._params.quantized import Quantized
from .._product.dropout import key_words
from .._program.interpret import outputs_of
from .._program.trace import Traced
from .._rules.adapted import Adapted, Held, laid_out
from .._rules.view import Log


class Given(NamedTuple):
    """An adapter, of which it may still depend on its uses what is evaluated.

    Attributes:
        shapes: the adapter, or one of the same shapes.
        arrays: by path what varies, along axes of a `shard_map`, as the entries do.
        entries: the entries to evaluate with, from what the analysis has seen.
        mixed: whether it is that of one example, over which the call is mapped.
    """

    shapes: Mapping[str, Any]
    arrays: Mapping[str, Any]
    entries: Callable[[Log], Mapping[str, Any]]
    mixed: bool = False


class Gated(NamedTuple):
    """Factors of several adapters side by side along the rank, and a gate on it.

    Attributes:
        factors: the factors.
        gate: what `x·a` goes through, of shape (rank,), see `_product.gate`.
    """

    factors: LoraFactors
    gate: jax.Array


def adapted(
    leaf: Any,
    entry: Any,
    key: jax.Array | None,
    rate: float,
    cut: tuple[str, ...] = (),
) -> Any:
    """Returns a leaf with its entry: adapted by factors, or what is trained whole.

    Args:
        leaf: the frozen leaf.
        entry: what the adapter holds of it, or `Gated` factors.
        key: a PRNG key of its own for dropout, or None for none.
        rate: the share of inputs that dropout sets to zero.
        cut: the axes of a shard_map that the input axes of a DoRA kernel are cut along.
    """
    if isinstance(entry, Gated):
        value = laid_out(adapted(leaf, entry.factors, key, rate))
        gate = entry.gate.reshape(*[1] * value.base.ndim, -1)
        parts = [dataclasses.replace(part, gate=gate) for part in value.parts]
        return dataclasses.replace(value, parts=tuple(parts))
    variant = variant_of_entry(entry)
    if side := variant.scaled_side(entry):
        return with_scale(_as_base(leaf), entry.axes, side, entry.scale)
    entry = variant.lowered(entry, dense(leaf) if variant.reads(entry) else leaf)
    if isinstance(entry, LoraFactors):
        return with_factors(_as_base(leaf), entry, key, rate, cut)
    return vary(entry.astype(leaf.dtype), manual_axes(leaf))


def with_factors(
    kernel: jax.Array | Lazy,
    factors: LoraFactors,
    key: jax.Array | None,
    rate: float,
    cut: tuple[str, ...] = (),
) -> Adapted | Held:
    """Returns a kernel with its factors, DoRA's scale and a key for dropout."""
    axes, key = factors.axes, key if rate else None
    held = Held(kernel, axes, factors.a, factors.b, factors.scaling)
    if key is None and factors.magnitude is None:
        return held
    value = held.laid_out
    if key is not None:
        batch = tuple(kernel.shape[i] for i in axes.batch)
        words, dropout = key_words(key, batch, rate)
        aligned = expand(words, axes.batch, axes.ndim)
        (part,) = value.parts
        part = dataclasses.replace(part, key=aligned, dropout=dropout)
        value = dataclasses.replace(value, parts=(part,))
    if factors.magnitude is None:
        return value
    scale: Any = output_scale(dense(kernel), factors, cut)
    scale = expand(scale[..., None], axes.batch + axes.out, axes.ndim)
    return dataclasses.replace(value, scale=scale)


def frozen(leaf: Any) -> Adapted:
    """Returns a kernel that all examples of a mixed batch share, with nothing added."""
    return Adapted(_as_base(leaf), ())


def _as_base(leaf: Any) -> jax.Array | Lazy:
    return leaf if isinstance(leaf, Lazy) else jnp.asarray(leaf)


def with_scale(
    kernel: jax.Array | Lazy, axes: KernelAxes, side: str, scale: jax.Array
) -> Adapted:
    """Returns a kernel with a scale of its inputs or outputs, and nothing to add."""
    along = axes.batch + (axes.in_ if side == "in" else axes.out)
    return Adapted(kernel, (), expand(scale[..., None], along, axes.ndim))


def lazily(traced: Traced) -> list[Any]:
    """Returns the inputs, quantised kernels as lazy values."""
    inputs = list(traced.inputs)
    for path, place in traced.positions.items():
        if isinstance(inputs[place], Quantized):
            check_frozen(path, inputs[place])
            inputs[place] = Lazy.of(inputs[place])
    return inputs


def evaluated(
    program: Any, inputs: list[Any], backward: str, *, mixed: bool = False
) -> list[Any]:
    """Returns the outputs of a program; `mixed` if it is mapped over examples.

    Raises:
        UnsupportedFeatureError: if JAX has no map of one of its operations.
        TypeError: under `jax.jvp` of a product whose derivative is one of reverse mode.
            JAX raises it here where nothing is compiled, and elsewhere without a name.
    """
    try:
        return outputs_of(program, inputs, derive=backward)
    except NotImplementedError as error:
        if not mixed:
            raise
        raise UnsupportedFeatureError(
            f"JAX cannot map an operation of the function over examples ({error}): "
            "one of a kernel that is computed from others, or any under a `jax.vmap` "
            "around the mixed batch. Without that, call `lora.apply(params, "
            "jlora.take(stacked, i), ...)` with the examples of adapter i"
        ) from error
    except TypeError as error:
        if backward != "custom" or "custom_vjp" not in str(error):
            raise
        raise TypeError(
            f"{error} The products of jlora have a backward pass of their own: for "
            "forward mode (`jax.jvp`, `jax.linearize`, `jax.jacfwd`) give `jlora.lora("
            '..., backward="autodiff")`; `jax.grad` and `jax.hessian` do without it'
        ) from error

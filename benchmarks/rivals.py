"""The same decoder under the other LoRAs of JAX, by hand and by Qwix.

Each maker returns a `Rival`: its loss and, made of the same arrays, what it trains and
what it leaves. None of them copies the frozen params.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from linen_decoder import (
    LinenDecoder,
    LoraDense,
    linen_factors,
    linen_params,
    plain_dense,
)
from models import Decoder, Params
from nnx_decoder import NnxDecoder, nnx_values
from steps import RANK, SCALING

import jlora

QWIX_NAMES = ("kernel_lora_a", "kernel_lora_b")


@dataclasses.dataclass(frozen=True)
class Rival:
    """Another way to the same loss.

    Attributes:
        loss: `loss(trained, frozen, tokens)`.
        trained: its factors.
        frozen: everything else.
    """

    loss: Callable[..., jax.Array]
    trained: Any
    frozen: Any


Maker = Callable[[Decoder, Params, jlora.Adapter, jax.Array], Rival]


def hand_written(
    model: Decoder, params: Params, adapter: jlora.Adapter, tokens: jax.Array
) -> Rival:
    """`LoraDense` in place of `nn.Dense`; only its factors are differentiated."""

    def dense(features: int, name: str) -> LoraDense:
        return LoraDense(features, RANK, SCALING, model.dtype, name=name)

    module = LinenDecoder(model, dense)

    def loss(factors: Any, frozen: Params, tokens: jax.Array) -> jax.Array:
        return module.apply({"params": frozen, "lora": factors}, tokens)

    trained = linen_factors(adapter, ("a", "b"))
    return Rival(loss, trained, linen_params(model, params))


def qwix_linen(
    model: Decoder, params: Params, adapter: jlora.Adapter, tokens: jax.Array
) -> Rival:
    """Qwix on the Linen module."""
    import qwix

    module = LinenDecoder(model, plain_dense(model))
    module = qwix.apply_lora_to_model(module, qwix_provider())

    def loss(factors: Any, frozen: Params, tokens: jax.Array) -> jax.Array:
        return module.apply({"params": joined(frozen, factors)}, tokens)

    # Qwix makes its factors in the dtype of the kernel, and does not cast them.
    cast = jax.tree.map(lambda leaf: leaf.astype(model.dtype), adapter)
    trained = linen_factors(cast, QWIX_NAMES)
    return Rival(loss, trained, linen_params(model, params))


def qwix_nnx(
    model: Decoder, params: Params, adapter: jlora.Adapter, tokens: jax.Array
) -> Rival:
    """Qwix on the NNX module, which is split into factors and the rest."""
    import qwix

    def adapted(layer: nnx.Module, rngs: nnx.Rngs) -> nnx.Module:
        x = jnp.zeros((model.batch, model.seq, model.d), model.dtype)
        return qwix.apply_lora_to_model(layer, qwix_provider(), x, rngs=rngs)

    # Abstract: what it would draw is replaced by the common arrays.
    module = nnx.eval_shape(lambda: NnxDecoder(model, nnx.Rngs(0), adapted))
    graphdef, trained, frozen = nnx.split(module, nnx.LoRAParam, ...)

    def loss(factors: Any, frozen: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, factors, frozen, copy=True)(tokens)

    factors = {}
    for path, pair in adapter.items():
        place = tuple(int(p) if p.isdigit() else p for p in path.split("/"))
        for name, leaf in zip(QWIX_NAMES, (pair.a, pair.b), strict=True):
            factors[(*place, name)] = leaf.astype(model.dtype)
    return Rival(
        loss, filled(trained, factors), filled(frozen, nnx_values(model, params))
    )


def qwix_provider() -> Any:
    """Returns Qwix's LoRA for every linear of the layers."""
    import qwix

    target = rf"(.*/)?({'|'.join(Decoder.kernels)})"
    return qwix.LoraProvider(module_path=target, rank=RANK, alpha=RANK * SCALING)


def filled(state: Any, values: dict[tuple[str | int, ...], jax.Array]) -> Any:
    """Returns the NNX state with its variables' values replaced by path."""
    flat = dict(nnx.to_flat_state(state))
    if missing := flat.keys() ^ values.keys():
        raise ValueError(
            f"paths that only one of the two has: {sorted(missing, key=str)}"
        )
    new = {path: variable.replace(values[path]) for path, variable in flat.items()}
    return nnx.from_flat_state(new)


def joined(left: Any, right: Any) -> Any:
    """Returns the union of two nested dicts."""
    both = left.keys() & right.keys()
    return {**left, **right, **{name: joined(left[name], right[name]) for name in both}}


RIVALS: dict[str, Maker] = {
    "hand-written nn.Module": hand_written,
    "Qwix, Linen": qwix_linen,
    "Qwix, NNX": qwix_nnx,
}

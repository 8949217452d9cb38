"""The deltas of LoRA's relatives by the equations of their papers, without jlora.

Each is written down for one matrix, whole, and mapped over batch axes; the letters of
the use (`Kernel.delta`) bring a kernel to matrices and back, not jlora's roles.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from use import ALPHA, RANK, Kernel, Use

SCALING = ALPHA / RANK
Delta = Callable[[Any, int, int], jax.Array]


def _fixed(entry: Any, inputs: int, outputs: int) -> jax.Array:
    a = jax.lax.stop_gradient(entry.frozen_a)
    return a.reshape(inputs, -1) @ entry.b.reshape(-1, outputs)


def _core(entry: Any, inputs: int, outputs: int) -> jax.Array:
    a, b = jax.lax.stop_gradient((entry.frozen_a, entry.frozen_b))
    return a.reshape(inputs, -1) @ entry.core @ b.reshape(-1, outputs)


def _vectors(entry: Any, inputs: int, outputs: int) -> jax.Array:
    rank = entry.d.shape[-1]
    grid = lambda rows, columns: np.indices((rows, columns), np.uint32)
    a = uniform(0, *grid(inputs, rank)) * np.sqrt(6 / inputs)
    b = uniform(0x9E3779B9, *grid(outputs, rank)).T * np.sqrt(6 / rank)
    a, b = (jnp.asarray(side, jnp.float32) for side in (a, b))
    return a @ jnp.diag(entry.d) @ b @ jnp.diag(entry.b.reshape(-1))


def mixed(bits: np.ndarray) -> np.ndarray:
    """Wellons' `lowbias32`, by Python's numbers of 64 bits."""
    bits = bits.astype(np.uint64)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D % 2**32
    bits = (bits ^ (bits >> 15)) * 0x846CA68B % 2**32
    return bits ^ (bits >> 16)


def uniform(seed: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """What a seed gives for some places of a matrix, within -1 and 1."""
    start = np.full(rows.shape, seed % 2**32 ^ 0x5BD1E995)
    bits = mixed((mixed((mixed(start) + rows) % 2**32) + columns) % 2**32)
    return (bits >> 8) / 2**23 - 1


def _kronecker(entry: Any, inputs: int, outputs: int) -> jax.Array:
    return jnp.kron(entry.c, entry.a @ entry.b)


RELATIVES: dict[str, Delta] = {
    "lora_fa": _fixed,
    "lora_xs": _core,
    "vera": _vectors,
    "lokr": _kronecker,
}


def delta(name: str, kernel: Kernel, entry: Any) -> jax.Array:
    """Returns what a variant adds to a kernel, in the kernel's layout."""
    batch, in_, out = kernel.axes
    size = lambda axes: tuple(kernel.shape[i] for i in axes)
    fans = [math.prod(size(axes)) for axes in (in_, out)]
    one = lambda own: RELATIVES[name](own, *fans)
    for _ in batch:
        one = jax.vmap(one)
    with jax.default_matmul_precision("highest"):
        whole = one(entry).reshape(size(batch) + size(in_) + size(out))
    order = [*batch, *in_, *out]
    return SCALING * jnp.transpose(whole, [order.index(i) for i in range(len(order))])


def reference(name: str, use: Use) -> Callable[..., Any]:
    """Returns `(params, adapter, *inputs) -> use.model(W + ΔW, *inputs)`."""

    def model(params: Any, adapter: Mapping[str, Any], *inputs: Any) -> Any:
        layer = dict(params["layer"])
        for kernel in use.kernels:
            change = delta(name, use.kernels[kernel], adapter[f"layer/{kernel}"])
            layer[kernel] = layer[kernel] + change
        return use.model({**params, "layer": layer}, *inputs)

    return model


def filled(adapter: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """Returns an adapter of random values; what is frozen stays as it was made."""
    found = {}
    for path, entry in adapter.items():
        fields = [f.name for f in dataclasses.fields(entry) if not f.metadata]
        own = [name for name in fields if not name.startswith("frozen")]
        keys = jax.random.split(jax.random.fold_in(key, len(found)), len(own))
        values = {
            name: 0.5 * jax.random.normal(k, getattr(entry, name).shape)
            for name, k in zip(own, keys, strict=True)
        }
        found[path] = dataclasses.replace(entry, **values)
    return found

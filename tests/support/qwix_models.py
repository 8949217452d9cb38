"""Small NNX models with low-rank params of Qwix's, all values at random."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx
from releases import is_before

RANK, ALPHA = 2, 6.0


class Block(nnx.Module):
    """Kernels of all the layouts that Qwix adapts, no two sizes alike."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.value = nnx.Linear(6, 5, rngs=rngs)
        self.heads = nnx.LinearGeneral(6, (4, 3), rngs=rngs)
        self.out = nnx.LinearGeneral((4, 3), 6, axis=(-2, -1), rngs=rngs)
        self.proj = nnx.Einsum("btd,ndh->btnh", (2, 6, 7), rngs=rngs)
        self.experts = nnx.Einsum("btd,bdf->btf", (3, 6, 5), rngs=rngs)
        self.conv = nnx.Conv(6, 4, (3,), rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        mixed = self.out(self.heads(x))
        return mixed, self.value(x), self.proj(x), self.experts(x), self.conv(x)


class Model(nnx.Module):
    """Two blocks in a list."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> list[Any]:
        outs = []
        for layer in self.layers:
            x, *rest = layer(x)
            outs.append(rest)
        return [x, outs]


def outputs(model: Any) -> list[jax.Array]:
    """What a model that Qwix has adapted computes."""
    with _quiet():
        return jax.tree.leaves(model(inputs()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Qwix calls what Flax deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def inputs() -> jax.Array:
    """What the model is called with."""
    rng = np.random.default_rng(7)
    return jnp.asarray(rng.normal(size=(3, 8, 6)), jnp.float32)


def plain() -> Model:
    """The model without LoRA, the same at each call."""
    return Model(nnx.Rngs(0))


def adapted(model: Any = None, x: Any = None, **rule: Any) -> Any:
    """A model that Qwix has adapted, with all its factors off zero."""
    if is_before("qwix", "0.1.5"):
        pytest.skip("Qwix before 0.1.5 hands its `rngs` on to the model's own call")
    model = plain() if model is None else model
    rule = {"module_path": ".*", "rank": RANK, "alpha": ALPHA, **rule}
    provider = qwix.LoraProvider(**rule)
    x = inputs() if x is None else x
    with _quiet():
        found = qwix.apply_lora_to_model(model, provider, x, rngs=nnx.Rngs(1))
    state = nnx.state(found, nnx.LoRAParam)
    rng = np.random.default_rng(3)
    new = lambda array: jnp.asarray(0.3 * rng.normal(size=array.shape), array.dtype)
    nnx.update(found, jax.tree.map(new, state))
    return found

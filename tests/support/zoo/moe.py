"""Mixtures of experts and ensembles: one kernel per expert in one array."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from .case import DENSE, Axes, Built, Case, normal, stacked, variables

EXPERTS, TOKENS, CAPACITY, WIDTH, HIDDEN = 5, 12, 9, 7, 11
EXPERT_DENSE = stacked(DENSE)


class EinsumMoe(nn.Module):
    """Top-2 routing into slots, experts by a batched einsum."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        up = self.param("up", init, (EXPERTS, WIDTH, HIDDEN))
        down = self.param("down", init, (EXPERTS, HIDDEN, WIDTH))
        logits = nn.Dense(EXPERTS, use_bias=False, name="router")(x)
        weights, chosen = lax.top_k(nn.softmax(logits), 2)
        mask = jax.nn.one_hot(chosen, EXPERTS).sum(axis=1)
        slot = (jnp.cumsum(mask, axis=0) - 1).astype(jnp.int32)
        dispatch = mask[..., None] * jax.nn.one_hot(slot, CAPACITY)
        gates = (jax.nn.one_hot(chosen, EXPERTS) * weights[..., None]).sum(axis=1)
        inputs = jnp.einsum("tec,td->ecd", dispatch, x)
        hidden = nn.gelu(jnp.einsum("ecd,edf->ecf", inputs, up))
        outputs = jnp.einsum("ecf,efd->ecd", hidden, down)
        y = jnp.einsum("tec,te,ecd->td", dispatch, gates, outputs)
        return x + y


def ragged_moe(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Every token sorted to one expert, experts by `ragged_dot`."""
    logits = x @ params["router"]
    chosen = jnp.argmax(logits, axis=-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=EXPERTS)
    inputs = x[order]
    gate = nn.silu(lax.ragged_dot(inputs, params["experts"]["gate"], sizes))
    up = lax.ragged_dot(inputs, params["experts"]["up"], sizes)
    down = lax.ragged_dot(gate * up, params["experts"]["down"], sizes)
    y = jnp.zeros_like(x).at[order].set(down)
    return x + y * jax.nn.softmax(logits).max(axis=-1, keepdims=True)


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(HIDDEN, name="up")(x)))


def members(in_axes: int | None) -> nn.Module:
    vmapped: Callable[..., nn.Module] = nn.vmap(
        Expert,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        axis_size=EXPERTS,
    )
    return vmapped()


class DenseMoe(nn.Module):
    """Every expert on every token.

    The first product has the expert among its free axes and the second sums over
    it, so to the program both are plain axes of output and input.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal()
        up = self.param("up", init, (EXPERTS, WIDTH, HIDDEN))
        down = self.param("down", init, (EXPERTS, HIDDEN, WIDTH))
        gates = nn.softmax(nn.Dense(EXPERTS, name="router")(x))
        hidden = nn.gelu(jnp.einsum("td,edf->tef", x, up)) * gates[..., None]
        return jnp.einsum("tef,efd->td", hidden, down)


def einsum_moe() -> Built:
    model, x = EinsumMoe(), normal(2, TOKENS, WIDTH)
    expected = {"params/up": EXPERT_DENSE, "params/down": EXPERT_DENSE}
    expected["params/router/kernel"] = DENSE
    return Built(model.apply, variables(model, x), (x,), expected)


def ragged() -> Built:
    up = (EXPERTS, WIDTH, HIDDEN)
    experts = {
        "gate": normal(3, *up) / 3,
        "up": normal(4, *up) / 3,
        "down": normal(5, EXPERTS, HIDDEN, WIDTH) / 3,
    }
    params = {"router": normal(6, WIDTH, EXPERTS), "experts": experts}
    expected = {f"experts/{name}": EXPERT_DENSE for name in experts}
    x = normal(2, TOKENS, WIDTH)
    return Built(ragged_moe, params, (x,), expected, target="experts")


def ensemble(shared: bool) -> Built:
    model = members(None if shared else 0)
    x = normal(2, TOKENS, WIDTH) if shared else normal(2, EXPERTS, TOKENS, WIDTH)
    # A shared input makes the member an axis of the output of the first product.
    up = Axes((), (1,), (0, 2)) if shared else EXPERT_DENSE
    expected = {"params/up/kernel": up, "params/down/kernel": EXPERT_DENSE}
    return Built(model.apply, variables(model, x), (x,), expected)


def dense_moe() -> Built:
    model, x = DenseMoe(), normal(2, TOKENS, WIDTH)
    expected = {
        "params/up": Axes((), (1,), (0, 2)),
        "params/down": Axes((), (0, 1), (2,)),
        "params/router/kernel": DENSE,
    }
    return Built(model.apply, variables(model, x), (x,), expected)


CASES = [
    Case("linen-moe-einsum", einsum_moe),
    Case("plain-moe-ragged-dot", ragged),
    Case("linen-moe-every-expert", dense_moe),
    Case("linen-vmap-ensemble", partial(ensemble, False)),
    Case("linen-vmap-ensemble-shared-input", partial(ensemble, True)),
]

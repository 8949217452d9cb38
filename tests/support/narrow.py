"""A model with kernels that map fewer features than a rank, of every kind."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from oracle import delta
from use import Kernel

import jlora

Tree = dict[str, Any]

WORDS, WIDTH, LAYERS, LABELS = 11, 12, 3, 2


NARROW = {
    "types": (Kernel((2, WIDTH)), P(None, "model")),
    "lift": (Kernel((2, WIDTH)), P(None, "model")),
    "blocks/up": (Kernel((LAYERS, WIDTH, 16), "lir,lro->lio"), P(None, None, "model")),
    "blocks/gate": (Kernel((LAYERS, WIDTH, 1), "lir,lro->lio"), P()),
    "blocks/down": (Kernel((LAYERS, 16, WIDTH), "lir,lro->lio"), P(None, "model")),
    "head": (Kernel((WIDTH, LABELS)), P("model")),
    "value": (Kernel((WIDTH, 1)), P("model", None)),
}


RANKS = dict(zip(NARROW, (2, 2, 8, 1, 8, 2, 1), strict=True))


def leaf(tree: Tree, path: str) -> Any:
    """The value at a path of a tree."""
    for name in path.split("/"):
        tree = tree[name]
    return tree


def encoder(params: Tree, x: jax.Array, kinds: jax.Array, out: Any = None) -> Any:
    """Token types, a lifting layer, a scan of gated blocks, and two heads."""
    rows = params["types"].at[kinds].get(out_sharding=out)
    h = jnp.einsum("bti,io->bto", x, params["lift"], out_sharding=out) + rows

    def block(h: jax.Array, layer: Tree) -> tuple[jax.Array, None]:
        up = jnp.einsum("bti,io->bto", h, layer["up"], out_sharding=out)
        gate = jnp.einsum("bti,io->bto", h, layer["gate"], out_sharding=out)
        mid = jnp.tanh(up) * jax.nn.sigmoid(gate)
        return jnp.einsum("bti,io->bto", mid, layer["down"], out_sharding=out), None

    h, _ = jax.lax.scan(block, h, params["blocks"])
    dense = lambda w: jnp.einsum("bti,io->bto", h, w, out_sharding=out)
    return dense(params["head"]), dense(params["value"])


def make_params(key: jax.Array) -> Tree:
    params: Tree = {"blocks": {}}
    for k, (path, (kernel, _)) in zip(
        jax.random.split(key, len(NARROW)), NARROW.items(), strict=True
    ):
        where, _, name = path.rpartition("/")
        tree = params[where] if where else params
        tree[name] = 0.4 * jax.random.normal(k, kernel.shape)
    return params


def formed(params: Tree, adapter: Tree, scaling: float) -> Tree:
    """Params with every kernel replaced by W + ΔW."""

    def change(path: Any, w: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in adapter:
            return w
        entry = adapter[name]
        return w + delta(NARROW[name][0], entry.a, entry.b, scaling)

    return jax.tree.map_with_path(change, params)


X = jax.random.normal(jax.random.key(3), (4, 6, 2))


KINDS = jax.random.randint(jax.random.key(4), (4, 6), 0, 2)


PARAMS = make_params(jax.random.key(5))


def make(target: Any = ".*", **settings: Any) -> tuple[jlora.Lora, Tree]:
    """The model adapted, and an adapter."""
    lora = jlora.lora(encoder, jlora.LoraConfig(target, **settings))
    adapter = lora.init(jax.random.key(6), PARAMS, X, KINDS)
    return lora, adapter

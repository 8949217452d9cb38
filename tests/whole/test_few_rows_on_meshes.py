"""What a few tokens move between devices, as in decoding: what the base does, no more.

A stack of gated layers of which kernels lie along two axes of a mesh, rows along one,
without gradients. The reference for values is the formed kernel on one device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import randomized
from hlo import collectives, cost
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora

LAYERS, HIDDEN, HEADS, HEAD, MLP, RANK = 2, 256, 8, 40, 704, 3
SHAPES = {
    "q": (HIDDEN, HEADS, HEAD),
    "o": (HEADS, HEAD, HIDDEN),
    "gate": (HIDDEN, MLP),
    "up": (HIDDEN, MLP),
    "down": (MLP, HIDDEN),
}
ROLES = {
    "q": ("fsdp", "tensor", None),
    "o": ("tensor", None, "fsdp"),
    "gate": ("fsdp", "tensor"),
    "up": ("fsdp", "tensor"),
    "down": ("tensor", "fsdp"),
}
MESHES = {"tensor": {"tensor": 4}, "fsdp": {"fsdp": 8}}
MESHES |= {"both": {"fsdp": 2, "tensor": 4}}


def model(params: Any, x: jax.Array) -> jax.Array:
    for p in params:
        norm = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        q = jnp.tanh(jnp.einsum("bd,dhk->bhk", norm, p["q"]))
        x = x + jnp.einsum("bhk,hkd->bd", q, p["o"])
        x = x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
    return x


def case(rows: int) -> tuple[Any, ...]:
    """The transform, params, a random adapter and an input, on one device."""
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape) / 16
    params = [
        {name: draw(7 * layer + i, shape) for i, (name, shape) in enumerate(each)}
        for layer, each in enumerate([SHAPES.items()] * LAYERS)
    ]
    x = draw(99, (rows, HIDDEN)) * 16
    lora = jlora.lora(model, jlora.LoraConfig(rank=RANK, alpha=7.0))
    fresh = lora.init(jax.random.key(0), params, x)
    return lora, params, randomized(fresh, jax.random.key(1)), x


def on_mesh(sizes: dict[str, int], params: Any, adapter: Any, x: jax.Array) -> Any:
    """The same arrays on a mesh."""
    count = int(np.prod(list(sizes.values())))
    axes, kinds = tuple(sizes), (AxisType.Auto,) * len(sizes)
    mesh = jax.make_mesh(
        tuple(sizes.values()), axes, kinds, devices=jax.devices()[:count]
    )
    spec = lambda roles: P(*(role if role in sizes else None for role in roles))
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    each = [{n: put(w, spec(ROLES[n])) for n, w in layer.items()} for layer in params]
    factors = jax.device_put(adapter, jlora.shardings(each, adapter, mesh=mesh))
    return each, factors, put(x, spec(("fsdp",)))


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_nothing_moves_but_what_the_base_moves(
    sizes: dict[str, int], rows: int, capfd: pytest.CaptureFixture[str]
) -> None:
    lora, params, adapter, x = case(rows)
    merged = model(jlora.merge(params, adapter), x)
    params, adapter, x = on_mesh(sizes, params, adapter, x)
    base = jax.jit(model).lower(params, x).compile()
    own = jax.jit(lora.apply).lower(params, adapter, x).compile()
    assert "rematerialization" not in capfd.readouterr().err
    moved = collectives(own)
    if "fsdp" not in sizes:
        assert moved == collectives(base)
    parts = rows, rows // sizes.get("fsdp", 1)
    of_x_a = {n * RANK * siblings for n in parts for siblings in (1, 2)}
    assert not of_x_a & {size for _, size in moved}, moved
    factors = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert cost(moved) <= cost(collectives(base)) + factors, moved
    assert_close(np.asarray(own(params, adapter, x)), merged, 1e-5)


def test_features_that_the_mesh_does_not_divide() -> None:
    """XLA pads the parts of a kernel; a device's part of `x` is then XLA's to cut."""
    mesh = jax.make_mesh((4,), ("j",), (AxisType.Auto,), devices=jax.devices()[:4])
    rows = NamedSharding(mesh, P("j"))
    cut = lambda w: jax.lax.with_sharding_constraint(w, rows)
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape)
    params, x = {"w": draw(0, (10, 22))}, draw(1, (6, 10))
    lora = jlora.lora(lambda p, x: x @ cut(p["w"]), jlora.LoraConfig(rank=3, alpha=7.0))
    fresh = jax.jit(lora.init)(jax.random.key(2), params, x)
    adapter = randomized(fresh, jax.random.key(3))
    found = jax.jit(lora.apply)(params, adapter, x)
    assert_close(np.asarray(found), x @ jlora.merge(params, adapter)["w"], 1e-5)


@pytest.mark.parametrize("rows", [4, 64])
def test_outputs_along_what_is_summed(rows: int) -> None:
    """Inputs and kernel are cut along one axis, and the output asked for along it."""
    mesh = jax.make_mesh((2, 4), ("i", "j"), (AxisType.Auto,) * 2)
    at = lambda *spec: NamedSharding(mesh, P(*spec))
    draw = lambda i, shape: jax.random.normal(jax.random.key(i), shape)
    params = {"v": jax.device_put(draw(0, (128, 64)), at("j"))}
    x = jax.device_put(draw(1, (16, rows, 128)), at("i", None, "j"))
    fn = lambda p, x: x @ p["v"]
    lora = jlora.lora(fn, jlora.LoraConfig(rank=3, alpha=7.0))
    adapter = randomized(lora.init(jax.random.key(2), params, x), jax.random.key(3))
    adapter = jax.device_put(adapter, jlora.shardings(params, adapter))
    jitted = lambda fn: jax.jit(fn, out_shardings=at("i", None, "j"))
    base = jitted(fn).lower(params, x).compile()
    own = jitted(lora.apply).lower(params, adapter, x).compile()
    assert collectives(own) == collectives(base)
    expected = x @ jlora.merge(params, adapter)["v"]
    assert_close(np.asarray(own(params, adapter, x)), np.asarray(expected), 1e-5)

"""Programs compiled by the TPU's own compiler, which runs without a TPU.

`.ci/tpu` installs it (libtpu). Cycles are its own estimates, not times; memory and
collectives are those of the programs that a TPU would run.
"""

import dataclasses
import math
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hlo import collectives
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from paths import EXAMPLES
from placed import at, compiled, placed
from tpu import MARKS, argument_bytes, chips, cycles

import jlora

sys.path.append(str(EXAMPLES))
import plan_large
import tpu_memory
from llama import Llama

pytestmark = MARKS
R = 16
D, FFN, LAYERS = 1024, 2816, 3
Kernels = dict[str, Any]


# --- one chip ---


def layer(p: Kernels, x: jax.Array) -> jax.Array:
    """A loss of one layer of a decoder, with a product in place of its softmax."""
    y = _normed(x)
    q, k, v = (y @ p[name] for name in "qkv")
    x = x + (jnp.tanh(q) * k + v) @ p["o"]
    y = _normed(x)
    x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
    return jnp.sum(x.astype(jnp.float32) ** 2)


def _normed(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


# With the delta apart: 1.32 and 1.63.
@pytest.mark.parametrize(("topology", "most"), [("v5e:2x2", 1.10), ("v6e:2x2", 1.43)])
def test_deltas_join_the_products_of_a_layer(topology: str, most: float) -> None:
    one = NamedSharding(Mesh(np.array(chips(topology)[:1]), "d"), P())
    d, ffn = 2048, 5632
    params = {n: placed((d, d), one) for n in "qkvo"}
    params |= {n: placed((d, ffn), one) for n in ("gate", "up")}
    params["down"], x = placed((ffn, d), one), placed((8192, d), one)
    lora = jlora.lora(layer, jlora.LoraConfig(rank=R))
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    adapter = at(shapes, jax.tree.map(lambda _: one, shapes))
    frozen = compiled(jax.value_and_grad(layer, 1), params, x)
    joined = compiled(jax.value_and_grad(lora.apply, (1, 2)), params, adapter, x)
    assert cycles(joined) <= most * cycles(frozen)


@pytest.mark.parametrize("rank", [1, 3, 100, 256])
@pytest.mark.parametrize("sizes", [(8195, 1027, 2049), (8192, 1024, 1024)])
def test_any_rank_and_size(sizes: tuple[int, int, int], rank: int) -> None:
    one = NamedSharding(Mesh(np.array(chips("v5e:2x2")[:1]), "d"), P())
    n, d, k = sizes
    params, x = {"w": placed((d, k), one)}, placed((n, d), one)
    lora = jlora.lora(lambda p, x: jnp.sum(x @ p["w"]), jlora.LoraConfig(rank=rank))
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    adapter = at(shapes, jax.tree.map(lambda _: one, shapes))
    compiled(jax.grad(lora.apply, (1, 2)), params, adapter, x)


# --- meshes ---

# How the kernels that map to FFN lie, and those that map from it.
LAYOUTS = {
    "fsdp": (P(None, "i"), P(None, "i")),
    "tp": (P(None, None, "j"), P(None, "j")),
    "both": (P(None, "i", "j"), P(None, "j", "i")),
}


def block(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
    """A gated MLP, its kernels gathered along "i" as Explicit types ask for."""
    explicit = jax.typeof(x).sharding.mesh.explicit_axes
    whole = lambda w: jax.sharding.reshard(w, P(*_without(w, "i"))) if explicit else w
    gate, up = (x @ whole(w[name]) for name in ("gate", "up"))
    down = whole(w["down"])
    y = jax.nn.silu(gate) * up
    y = jnp.dot(y, down, out_sharding=P("i") if explicit else None)
    return x + y, None


def _without(w: jax.Array, name: str) -> list[Any]:
    return [None if axis == name else axis for axis in jax.typeof(w).sharding.spec]


def model(params: Any, x: jax.Array) -> jax.Array:
    """Layers that are scanned, with remat."""
    x, _ = jax.lax.scan(jax.checkpoint(block), x, params)
    return jnp.mean(x.astype(jnp.float32) ** 2)


class Sharded:
    """A step of AdamW over factors on a mesh."""

    def __init__(self, topology: str, layout: str, kind: AxisType) -> None:
        devices = np.array(chips(topology)).reshape(-1, 2)
        self.mesh = Mesh(devices, ("i", "j"), axis_types=(kind,) * 2)
        place = lambda spec: NamedSharding(self.mesh, spec)
        to, back = map(place, LAYOUTS[layout])
        shape = lambda *sizes: (LAYERS, *sizes)
        self.params = {n: placed(shape(D, FFN), to) for n in ("gate", "up")}
        self.params["down"] = placed(shape(FFN, D), back)
        self.x = placed((4096, D), place(P("i")))
        self.tx = optax.adamw(1e-4)
        with jax.set_mesh(self.mesh):
            self.lora = jlora.lora(model, jlora.LoraConfig(rank=R, alpha=24.0))
            # The mesh that is set has no devices to make a key on.
            init = lambda p, x: self.lora.init(jax.random.key(0), p, x)
            shapes = jax.eval_shape(init, self.params, self.x)
            places = jlora.shardings(self.params, shapes)
            self.adapter = at(shapes, places)
            moments = jlora.state_shardings(self.tx, shapes, places)
            self.state = at(jax.eval_shape(self.tx.init, shapes), moments)

    def step(self, adapter: Any, state: Any, params: Any, x: jax.Array) -> Any:
        """A training step."""
        grads = jax.grad(self.lora.apply, 1)(params, adapter, x)
        updates, state = self.tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    def compiled(self) -> Any:
        """The step, and its frozen forward and backward."""
        args = self.adapter, self.state, self.params, self.x
        places = jax.tree.map(lambda v: v.sharding, args[:2])
        frozen = jax.grad(model, 1)
        with jax.set_mesh(self.mesh):
            own = compiled(self.step, *args, out_shardings=places)
            return own, compiled(frozen, *args[2:], out_shardings=self.x.sharding)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x4"])
def test_a_sharded_step(topology: str, layout: str, kind: AxisType) -> None:
    """It moves factors besides what the frozen one does, and holds what is planned."""
    sharded = Sharded(topology, layout, kind)
    own, frozen = sharded.compiled()
    more = collectives(own) - collectives(frozen)
    # A pair of stacked factors, or `x·a` and `dy·bᵀ` of a device's own rows.
    rows = sharded.x.shape[0] // sharded.mesh.shape["i"]
    largest = max(2 * LAYERS * FFN * R, 2 * rows * R)
    base = {size for _, size in collectives(frozen)}
    assert {size for _, size in more if size > largest} <= base, more
    with jax.set_mesh(sharded.mesh):
        plan = sharded.lora.plan(sharded.params, sharded.x)
        planned = plan.memory(optimizer=sharded.tx, mesh=sharded.mesh, batch=sharded.x)
    assert math.isclose(planned.arguments, argument_bytes(own), rel_tol=0.05)


# --- whether a step fits: examples/plan_large.py --tpu ---


def test_a_plan_is_proven_by_the_compiler() -> None:
    """A Llama of two narrow layers, whose activations the compiler counts as well."""
    topology = tpu_memory.parse_topology("v5e:2x2")
    sizes = {"vocab": 65536, "hidden": 256, "layers": 2, "heads": 2, "kv_heads": 2}
    config = plan_large.MODELS["llama70b"].config
    small = Llama(dataclasses.replace(config, mlp=512, **sizes))
    mesh = {"data": 1, "fsdp": 2, "tensor": 2}
    told = plan_large.fits_on(topology, small, mesh, 16)
    assert told.startswith("By the TPU's own compiler, without a TPU, so an estimate")
    taken, most = map(float, re.findall(r"([\d.]+) of ([\d.]+) GiB", told)[0])
    assert most == 15.8
    assert 0.1 < taken < 4.0 and "it fits" in told


def test_what_does_not_fit_is_told_by_the_compiler() -> None:
    topology = tpu_memory.parse_topology("v5e:2x2")
    mesh = tpu_memory.mesh_of(topology, {"i": 2, "j": 2})
    large = placed((1 << 19, 1 << 18), NamedSharding(mesh, P("i")))
    taken = tpu_memory.peak_of(jax.jit(jnp.sum), large)
    assert taken >= 1 << 37
    assert "it doesn't fit" in tpu_memory.verdict(topology, taken, "a sum takes")


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_memory_of_a_chip_is_that_of_the_compiler(name: str) -> None:
    topology = tpu_memory.parse_topology(name)
    mesh = tpu_memory.mesh_of(topology, {"i": topology.devices})
    large = placed((1 << 19, 1 << 20), NamedSharding(mesh, P("i")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="HBM") as error:
        compiled(jnp.sum, large)
    found = re.search(r"available HBM \(([\d.]+)G\)", str(error.value))
    assert found is not None
    assert float(found[1]) == tpu_memory.HBM[topology.kind]

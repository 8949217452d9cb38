"""Kernels of every kind on meshes of TPUs, compiled by the TPU's own compiler.

A step moves factors besides what the frozen one moves, makes no product of a kernel's
shape, and takes the bytes that are planned.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hlo import collectives
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from placed import at, compiled, placed
from tpu import MARKS, argument_bytes, chips, kernel_shapes, products_of

import jlora

pytestmark = MARKS
# Parts of 128 columns, which are not padded.
RANK, ROWS, D, FFN, OUT = 16, 1536, 512, 2560, 1792
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# What the input and the output axes of kernels lie along.
LAYOUTS = {"fsdp": ("i", None), "tp": (None, "j"), "both": ("i", "j")}
Params = dict[str, Any]


# How the kernels lie, and a function of them. Rows lie along "i".


def product(x: jax.Array, w: jax.Array, spec: str = "ni,io->no") -> jax.Array:
    """A product with a kernel; on an Explicit mesh it is gathered along "i" before."""
    if not jax.typeof(x).sharding.mesh.explicit_axes:
        return jnp.einsum(spec, x, w)
    places = [None if a == "i" else a for a in jax.typeof(w).sharding.spec]
    out = P("i", *[None] * (x.ndim - 2), places[-1])
    return jnp.einsum(spec, x, jax.sharding.reshard(w, P(*places)), out_sharding=out)


def mlp(params: Params, x: jax.Array) -> jax.Array:
    return product(jnp.tanh(product(x, params["up"])), params["down"])


def embedding(params: Params, x: jax.Array) -> jax.Array:
    ids = jnp.round(jax.lax.stop_gradient(x[:, 0])).astype(jnp.int32)
    if jax.typeof(x).sharding.mesh.explicit_axes:
        rows = params["up"].at[ids].get(out_sharding=P("i", None))
    else:
        rows = params["up"][ids]
    return product(jnp.tanh(rows + x), params["down"])


def convolution(params: Params, x: jax.Array) -> jax.Array:
    images = x.reshape(-1, 8, 8, D)
    layout = ("NHWC", "HWIO", "NHWC")
    conv = lambda y, w: jax.lax.conv_general_dilated(
        y, w, (1, 1), "SAME", dimension_numbers=layout
    )
    return conv(jnp.tanh(conv(images, params["up"])), params["down"])


def experts(params: Params, x: jax.Array) -> jax.Array:
    each = jnp.full(4, len(x) // 4, jnp.int32)
    y = jnp.tanh(jax.lax.ragged_dot(x, params["up"], each))
    return jax.lax.ragged_dot(y, params["down"], each)


def scanned(params: Params, x: jax.Array) -> jax.Array:
    """Layers with remat."""
    layer = lambda x, own: (x + mlp(own, x), None)
    return jax.lax.scan(jax.checkpoint(layer), x, params)[0]


class Linen(nn.Module):
    """The same MLP as a module."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = lambda size, name: nn.Dense(
            size, use_bias=False, dtype=x.dtype, param_dtype=x.dtype, name=name
        )
        return dense(D, "down")(jnp.tanh(dense(FFN, "up")(x)))


class Nnx(nnx.Module):
    """The same MLP as a module of NNX."""

    def __init__(self) -> None:
        kind = {"use_bias": False, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self.up = nnx.Linear(D, FFN, rngs=nnx.Rngs(0), **kind)
        self.down = nnx.Linear(FFN, D, rngs=nnx.Rngs(1), **kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.tanh(self.up(x)))


def linen(params: Params, x: jax.Array) -> jax.Array:
    tree = {name: {"kernel": w} for name, w in params.items()}
    return Linen().apply({"params": tree}, x)


def of_nnx(params: Params, x: jax.Array) -> jax.Array:
    graph, state = nnx.split(nnx.eval_shape(Nnx))
    own = {(name, "kernel"): w for name, w in params.items()}
    flat = nnx.to_flat_state(state)
    filled = [(path, v.replace(own[path])) for path, v in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))(x)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Two kernels, and how they are used.

    Attributes:
        fn: the function of the kernels and of rows (ROWS, D).
        before: the axes before their input axis.
        wide: the features between them.
        settings: those of the config.
        qtype: what the base is quantised to.
        explicit: whether it runs on Explicit meshes as it is written.
        table: whether the first kernel is a table of `wide` rows.
        moves: whether XLA moves activations of the frozen step too, of other sizes.
    """

    fn: Callable[[Params, jax.Array], jax.Array]
    before: tuple[int, ...] = ()
    wide: int = FFN
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    qtype: str | None = None
    explicit: bool = True
    table: bool = False
    moves: bool = False


KINDS = {
    "dense": Kind(mlp),
    "dora": Kind(mlp, settings={"dora": True}),
    "int8": Kind(mlp, qtype="int8"),
    "nf4": Kind(mlp, qtype="nf4"),
    "embedding": Kind(embedding, table=True),
    "convolution": Kind(
        convolution, before=(3, 3), wide=OUT, explicit=False, moves=True
    ),
    "scanned": Kind(scanned, before=(3,)),
    "linen": Kind(linen, explicit=False),
    "nnx": Kind(of_nnx, explicit=False),
}


class Step:
    """A step of AdamW over the factors of a kind on a mesh."""

    def __init__(
        self, kind: Kind, topology: str, layout: str, axes: AxisType, **policy: bool
    ) -> None:
        self.kind, self.policy = kind, policy
        self.tx = optax.adamw(1e-4)
        devices = np.array(chips(topology)).reshape(-1, 2)
        self.mesh = Mesh(devices, ("i", "j"), axis_types=(axes,) * 2)
        self.x = placed((ROWS, D), self.place("i"))
        self.kernels = self._kernels(LAYOUTS[layout])
        self.params = self._quantized(self.kernels)
        config = jlora.LoraConfig(
            "(.*/)?(up|down)(/kernel)?", rank=RANK, alpha=24.0, **kind.settings
        )
        with jax.set_mesh(self.mesh):
            self.lora = jlora.lora(kind.fn, config)
            # The mesh that is set has no devices to make a key on.
            init = lambda p, x: self.lora.init(jax.random.key(0), p, x)
            shapes = jax.eval_shape(init, self.params, self.x)
            self.at_use = jlora.shardings(self.kernels, shapes)
            places = jlora.shardings(self.kernels, shapes, **policy)
            moments = jlora.state_shardings(self.tx, shapes, places)
            state = jax.eval_shape(self.tx.init, shapes)
        self.adapter, self.state = at(shapes, places), at(state, moments)

    def place(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, P(*spec))

    def _kernels(self, layout: tuple[Any, Any]) -> Params:
        """Columns over "j", then rows over "j", as in Megatron-LM."""
        before, wide = self.kind.before, self.kind.wide
        to, back = layout, layout[::-1]
        if self.kind.table:
            shapes = {"up": (wide, D), "down": (D, OUT)}
            specs = {"up": back, "down": to}
        else:
            shapes = {"up": (D, wide), "down": (wide, D)}
            specs = {"up": to, "down": back}
        none = (None,) * len(before)
        return {
            name: placed((*before, *shape), self.place(*none, *specs[name]))
            for name, shape in shapes.items()
        }

    def _quantized(self, kernels: Params) -> Params:
        if self.kind.qtype is None:
            return kernels
        import jlora.quant

        qtype = self.kind.qtype
        make = lambda p: jlora.quantize(p, "up|down", qtype)
        codes = jax.eval_shape(make, kernels)
        return at(codes, jlora.quant.shardings(codes, kernels))

    def loss(self, fn: Any, *args: Any) -> jax.Array:
        return jnp.mean(fn(*args).astype(jnp.float32) ** 2)

    def step(self, adapter: Any, state: Any, params: Any, x: jax.Array) -> Any:
        """A training step; on Auto meshes spread factors are gathered on purpose."""
        explicit = jax.typeof(x).sharding.mesh.explicit_axes

        def loss(a: Any) -> jax.Array:
            if self.policy.get("spread") and not explicit:
                a = jax.lax.with_sharding_constraint(a, self.at_use)
            return self.loss(self.lora.apply, params, a, x)

        updates, state = self.tx.update(jax.grad(loss)(adapter), state, adapter)
        return optax.apply_updates(adapter, updates), state

    def frozen(self, params: Any, x: jax.Array) -> jax.Array:
        """The gradient of the inputs through the frozen base."""
        fn = jlora.lora(self.kind.fn, jlora.LoraConfig()).apply
        return jax.grad(lambda x: self.loss(fn, params, {}, x))(x)

    def programs(self) -> tuple[Any, Any]:
        """The step and its frozen forward and backward, compiled."""
        args = self.adapter, self.state, self.params, self.x
        places = jax.tree.map(lambda v: v.sharding, args[:2])
        with jax.set_mesh(self.mesh):
            own = compiled(self.step, *args, out_shardings=places)
            out = self.x.sharding
            return own, compiled(self.frozen, *args[2:], out_shardings=out)

    def largest(self) -> int:
        """The most values that travel for factors: those of two, or rows of `x·a`."""
        factors = max(leaf.size for leaf in jax.tree.leaves(self.adapter))
        rows = ROWS // self.mesh.shape["i"]
        return max(2 * factors, 2 * rows * RANK)

    def check(self) -> None:
        """Compares the step with the frozen one and with its plan."""
        own, frozen = self.programs()
        base = {size for _, size in collectives(frozen)}
        more = collectives(own) - collectives(frozen)
        found = {size for _, size in more if size > self.largest()}
        if self.kind.moves:
            assert max(found, default=0) <= max(base), (more, collectives(frozen))
        else:
            assert found <= base, (more, collectives(frozen))
        stacked = self.kind.fn is scanned
        shapes = [kernel_shapes(w, stacked) for w in self.kernels.values()]
        made = set(products_of(own))
        assert made and not made & set.union(*shapes), made
        with jax.set_mesh(self.mesh):
            plan = self.lora.plan(self.params, self.x)
            planned = plan.memory(
                optimizer=self.tx,
                mesh=self.mesh,
                batch=self.x,
                shardings=self.kernels,
                **self.policy,
            )
        held = argument_bytes(own)
        assert math.isclose(planned.arguments, held, rel_tol=0.05)
        added = held - argument_bytes(frozen)
        assert math.isclose(planned.factors + planned.optimizer, added, rel_tol=0.05)


def on_every_mesh() -> list[Any]:
    """Each kind in each layout; the two topologies and kinds of axes in turn."""
    cases = []
    for k, (name, kind) in enumerate(KINDS.items()):
        for n, layout in enumerate(LAYOUTS):
            topology = ("v5e:2x2", "v6e:2x4")[(k + n) % 2]
            axes = EXPLICIT if kind.explicit and (k + n // 2) % 2 else AUTO
            case = f"{name}-{layout}-{topology}-{axes.name}"
            cases.append(pytest.param(kind, topology, layout, axes, id=case))
    return cases


@pytest.mark.parametrize(("kind", "topology", "layout", "axes"), on_every_mesh())
def test_a_step(kind: Kind, topology: str, layout: str, axes: AxisType) -> None:
    Step(kind, topology, layout, axes).check()


def check_spread(kind: Kind, layout: str, axes: AxisType) -> None:
    """Each chip holds a part of each factor, by all axes that its kernel lies along."""
    step = Step(kind, "v5e:2x2", layout, axes, spread=True)
    parts = 4 if layout == "both" else 2
    for leaf in jax.tree.leaves(step.adapter):
        part = leaf.sharding.shard_shape(leaf.shape)
        assert math.prod(part) * parts == leaf.size
    step.check()


@pytest.mark.parametrize("axes", [AUTO, EXPLICIT])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["dense", "dora", "scanned"])
def test_a_step_of_spread_factors(name: str, layout: str, axes: AxisType) -> None:
    check_spread(KINDS[name], layout, axes)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("int8", "both"),
        ("embedding", "both"),
        ("convolution", "fsdp"),
        ("linen", "both"),
    ],
)
def test_a_step_of_other_spread_factors(name: str, layout: str) -> None:
    check_spread(KINDS[name], layout, AUTO)


def test_experts_on_one_chip() -> None:
    """Ragged products are kernels of the compiler's own."""
    one = NamedSharding(Mesh(np.array(chips("v5e:2x2")[:1]), "d"), P())
    shapes = {"up": (4, D, FFN), "down": (4, FFN, D)}
    params = {name: placed(shape, one) for name, shape in shapes.items()}
    x, tx = placed((ROWS, D), one), optax.adamw(1e-4)
    lora = jlora.lora(experts, jlora.LoraConfig(rank=RANK, alpha=24.0))
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    adapter = at(adapter, jax.tree.map(lambda _: one, adapter))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(adapter)} == {4}
    loss = lambda a, p, x: jnp.mean(lora.apply(p, a, x).astype(jnp.float32) ** 2)
    own = compiled(jax.grad(loss), adapter, params, x)
    text, wide = own.as_text(), [f"[4,{D},{FFN}]", f"[4,{FFN},{D}]"]
    assert "tpu_custom_call" in text
    made = [line for line in text.splitlines() if " parameter(" not in line]
    assert not [line for line in made if any(f"f32{w}" in line for w in wide)]
    held = lora.plan(params, x).memory(optimizer=tx, batch=x)
    assert math.isclose(held.base + held.factors + held.batch, argument_bytes(own))

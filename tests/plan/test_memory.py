"""`Plan.memory` against the compiled step, whose arguments XLA counts per device."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
import jlora.optim as jo
from jlora._plan.measure import abstract_adapter

pytestmark = pytest.mark.usefixtures("fast_compile")
Tree = Any
SHAPES = {
    "table": (64, 32),
    "layers": (2, 32, 32),
    "heads": (32, 8, 16),
    "bias": (8, 16),
    "out": (128, 32),
}
CONFIGS = [
    jlora.LoraConfig("layers|heads|out", rank=12),
    jlora.LoraConfig("bias", full=True),
]
OPTIMIZERS = {
    "adamw": optax.adamw(1e-3),
    "momentum": optax.sgd(1e-3, momentum=0.9),
}
# The sizes of the mesh, and the spec of each leaf; a leaf that isn't named is whole.
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, P]]] = {
    "fsdp": (
        {"fsdp": 8},
        {
            "table": P("fsdp"),
            "layers": P(None, "fsdp"),
            "heads": P("fsdp"),
            "out": P(None, "fsdp"),
        },
    ),
    "tensor": (
        {"tensor": 8},
        {
            "table": P(None, "tensor"),
            "layers": P(None, None, "tensor"),
            "heads": P(None, "tensor"),
            "bias": P("tensor"),
            "out": P("tensor"),
        },
    ),
    "both": (
        {"fsdp": 4, "tensor": 2},
        {
            "table": P(("fsdp", "tensor")),
            "layers": P(None, "fsdp", "tensor"),
            "heads": P("fsdp", "tensor"),
            "bias": P("tensor"),
            "out": P("tensor", "fsdp"),
        },
    ),
    "replicated": ({"fsdp": 8}, {}),
}
each_layout = pytest.mark.parametrize("layout", list(LAYOUTS))
each_optimizer = pytest.mark.parametrize("name", list(OPTIMIZERS))


def model(params: Tree, tokens: jax.Array) -> jax.Array:
    """A looked-up table, two scanned layers, a kernel of two output axes, a bias."""
    x = params["table"][tokens]
    x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
    heads = jnp.einsum("bd,dhk->bhk", x, params["heads"]) + params["bias"][None]
    return jnp.tanh(heads).reshape(x.shape[0], -1) @ params["out"]


LORA = jlora.lora(model, CONFIGS)


def abstract(dtype: Any = jnp.float32) -> Tree:
    return {n: jax.ShapeDtypeStruct(s, dtype) for n, s in SHAPES.items()}


def mesh_of(layout: str) -> Mesh:
    sizes, _ = LAYOUTS[layout]
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)


def specs_of(layout: str) -> dict[str, P]:
    return dict.fromkeys(SHAPES, P()) | LAYOUTS[layout][1]


def on_mesh(mesh: Any, specs: Tree) -> Tree:
    place = lambda spec: NamedSharding(mesh, spec)
    return jax.tree.map(place, specs, is_leaf=lambda node: isinstance(node, P))


def placed(tree: Tree, places: Tree) -> Tree:
    """The shapes of a tree with their shardings."""
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(put, tree, places)


def batch_on(mesh: Any) -> Tree:
    rows = NamedSharding(mesh, P(mesh.axis_names[0]))
    return {"tokens": jax.ShapeDtypeStruct((64,), jnp.int32, sharding=rows)}


def argument_bytes(f: Callable[..., Any], *args: Tree) -> int:
    """The bytes of the arguments of a compiled function, on one device.

    The base of a leaf that is trained whole is not used, and yet it is held.
    """
    compiled = jax.jit(f, keep_unused=True).lower(*args).compile()
    return compiled.memory_analysis().argument_size_in_bytes


def step_of(loss: Callable[..., jax.Array], tx: Any) -> Callable[..., Any]:
    """A step of training the first argument of a loss."""

    def step(trained: Tree, state: Tree, *args: Tree) -> Any:
        value, grads = jax.value_and_grad(loss)(trained, *args)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return step


def adapter_loss(adapter: Tree, params: Tree, batch: Tree) -> jax.Array:
    return jnp.mean(LORA.apply(params, adapter, batch["tokens"]) ** 2)


def state_on(tx: Any, trained: Tree, places: Tree) -> Tree:
    state = jax.eval_shape(tx.init, trained)
    return placed(state, jlora.state_shardings(tx, trained, places))


# Against XLA. On CPUs nothing is padded, so that the numbers are the same to the byte.


@each_layout
@each_optimizer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_arguments_are_those_of_the_compiled_step(
    layout: str, name: str, dtype: str
) -> None:
    mesh, specs, tx = mesh_of(layout), specs_of(layout), OPTIMIZERS[name]
    params, batch = abstract(jnp.dtype(dtype)), batch_on(mesh)
    adapter = abstract_adapter(LORA.plan(params, batch["tokens"]).targets)
    places = jlora.shardings(specs, adapter, mesh=mesh)
    found = argument_bytes(
        step_of(adapter_loss, tx),
        placed(adapter, places),
        state_on(tx, adapter, places),
        placed(params, on_mesh(mesh, specs)),
        batch,
    )
    plan = LORA.plan(params, batch["tokens"])
    memory = plan.memory(optimizer=tx, mesh=mesh, batch=batch, shardings=specs)
    assert memory.arguments == found
    assert memory.devices == 8
    # The parts that could be miscounted are no rounding errors of the sum.
    assert min(memory.factors, memory.optimizer) > 0.1 * memory.arguments


@pytest.mark.parametrize("policy", ["replicate", "spread"])
@each_layout
def test_factors_are_laid_out_as_shardings_does(layout: str, policy: str) -> None:
    """Spread, each of two axes divides what the other one leaves."""
    mesh, specs, tx = mesh_of(layout), specs_of(layout), OPTIMIZERS["adamw"]
    params, batch, how = abstract(jnp.bfloat16), batch_on(mesh), {policy: True}
    plan = LORA.plan(params, batch["tokens"])
    adapter = abstract_adapter(plan.targets)
    places = jlora.shardings(specs, adapter, mesh=mesh, **how)
    found = argument_bytes(
        step_of(adapter_loss, tx),
        placed(adapter, places),
        state_on(tx, adapter, places),
        placed(params, on_mesh(mesh, specs)),
        batch,
    )
    given = {"optimizer": tx, "mesh": mesh, "batch": batch, "shardings": specs}
    memory, plain = plan.memory(**given, **how), plan.memory(**given)
    assert memory.arguments == found
    assert memory.base == plain.base
    factors = [math.prod(v.shape) * 4 for v in jax.tree.leaves(adapter)]
    if policy == "spread" and layout != "replicated":
        bias = 8 * 16 * 4
        parts = mesh.shape.get("tensor", 1)
        assert memory.factors == (sum(factors) - bias) // 8 + bias // parts
        assert memory.factors < plain.factors
    elif layout in ("fsdp", "replicated"):
        assert memory.factors == sum(factors)


@each_layout
@each_optimizer
def test_full_arguments_are_those_of_the_compiled_step(layout: str, name: str) -> None:
    mesh, specs, tx = mesh_of(layout), specs_of(layout), OPTIMIZERS[name]
    params, batch = abstract(jnp.bfloat16), batch_on(mesh)
    places = on_mesh(mesh, specs)
    found = argument_bytes(
        step_of(lambda params, batch: jnp.mean(model(params, batch["tokens"])), tx),
        placed(params, places),
        state_on(tx, params, places),
        batch,
    )
    plan = LORA.plan(params, batch["tokens"])
    memory = plan.memory(optimizer=tx, mesh=mesh, batch=batch, shardings=specs)
    assert memory.full_arguments == found


ODD = {
    "int4": jnp.int4,
    "uint4": jnp.uint4,
    "int8": jnp.int8,
    "float8": jnp.float8_e4m3fn,
    "bool": jnp.bool,
    "int32": jnp.int32,
    "complex64": jnp.complex64,
}


@pytest.mark.parametrize("name", [*ODD, "key"])
def test_frozen_leaves_of_any_dtype(name: str) -> None:
    """A leaf of 33 values: of four bits, the last one takes a byte of its own."""
    w = jax.ShapeDtypeStruct((33, 33), jnp.float32)
    odd = jax.ShapeDtypeStruct((33,), ODD.get(name, jax.random.key(0).dtype))

    def fn(params: Tree, x: jax.Array) -> jax.Array:
        leaf = params["odd"]
        if name == "key":
            leaf = jax.vmap(jax.random.bits)(leaf)
        return x @ params["w"] + jnp.real(leaf).astype(jnp.float32)[None]

    x = jax.ShapeDtypeStruct((4, 33), jnp.float32)
    params, tx = {"odd": odd, "w": w}, optax.sgd(1.0)
    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=2))
    memory = lora.plan(params, x).memory(optimizer=tx, batch=x)
    assert memory.base + memory.batch == argument_bytes(fn, params, x)
    assert memory.full_gradients == 4 * 33**2 + 33 * (name == "float8")
    assert memory.devices == 1


def test_gradients_have_the_bytes_of_the_adapter() -> None:
    params, batch = abstract(jnp.bfloat16), {"tokens": jnp.zeros(8, jnp.int32)}
    plan = LORA.plan(params, batch["tokens"])
    adapter = abstract_adapter(plan.targets)
    grads = jax.eval_shape(jax.grad(adapter_loss), adapter, params, batch)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    memory = plan.memory(optimizer=optax.sgd(1.0))
    assert memory.gradients == memory.factors == size(grads)
    assert memory.full_gradients == memory.base == size(params)
    assert (memory.checkpoint, memory.full_checkpoint) == (size(adapter), size(params))
    assert memory.total == memory.base + 2 * memory.factors
    assert memory.full_total == 2 * memory.base


# What says the layout


def both_ways(layout: str, params: Tree, **settings: Any) -> list[jlora.Memory]:
    """The memory from specs on the mesh, and from `params` and other settings."""
    mesh, tx = mesh_of(layout), optax.adam(1.0)
    batch, specs = batch_on(mesh), specs_of(layout)
    plan = LORA.plan(abstract(), batch["tokens"])
    other = LORA.plan(params, batch["tokens"])
    return [
        plan.memory(optimizer=tx, batch=batch, mesh=mesh, shardings=specs),
        other.memory(optimizer=tx, batch=batch, **settings),
    ]


@each_layout
def test_params_with_shardings_of_their_own(layout: str) -> None:
    """As arrays and as shapes; a plan holds shapes, and no array."""
    shapes = placed(abstract(), on_mesh(mesh_of(layout), specs_of(layout)))
    arrays = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes
    )
    for params in (shapes, arrays):
        expected, found = both_ways(layout, params)
        assert found == expected
    plan = LORA.plan(arrays, jnp.zeros(8, jnp.int32))
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(plan.params))


@each_layout
def test_shardings_and_a_mesh_without_devices(layout: str) -> None:
    sizes, _ = LAYOUTS[layout]
    auto = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)
    shardings = on_mesh(mesh, specs_of(layout))
    expected, found = both_ways(layout, abstract(), shardings=shardings)
    assert found == expected
    expected, found = both_ways(
        layout, abstract(), shardings=specs_of(layout), mesh=mesh
    )
    assert found == expected


class Boxed(nn.Module):
    """A dense layer whose kernel says its mesh axes in a box."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.lecun_normal()
        boxed = nn.with_partitioning(init, ("fsdp", "tensor"))
        return nn.Dense(64, kernel_init=boxed, use_bias=False)(x)


def test_boxes_say_the_layout() -> None:
    net, x = Boxed(), jnp.ones((4, 32))
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    plan = jlora.lora(net.apply, jlora.LoraConfig(rank=4)).plan(variables, x)
    memory = plan.memory(optimizer=optax.sgd(1.0), mesh=mesh_of("both"))
    assert memory.base == 32 * 64 * 4 // 8
    assert memory.factors == 4 * (32 * 4 // 4 + 4 * 64 // 2)


def test_what_has_no_sharding_is_whole_on_every_device() -> None:
    params = abstract()
    plan = LORA.plan(params, jnp.zeros(8, jnp.int32))
    alone = plan.memory(optimizer=optax.adam(1.0))
    everywhere = plan.memory(optimizer=optax.adam(1.0), mesh=mesh_of("both"))
    assert dataclasses.replace(everywhere, devices=1) == alone
    assert alone.base == 4 * sum(map(math.prod, SHAPES.values()))
    assert (alone.devices, everywhere.devices) == (1, 8)


def test_a_batch_counts_as_the_step_takes_it() -> None:
    """Numbers of Python and of 64 bits are arguments of 32 bits."""
    batch = {"x": np.zeros((3, 5)), "ids": np.zeros(3, np.int64), "rate": 1.0, "n": 2}
    memory = LORA.plan(abstract(), jnp.zeros(8, jnp.int32)).memory(
        optimizer=optax.sgd(1.0), batch=batch
    )
    used = lambda batch: sum(map(jnp.sum, jax.tree.leaves(batch)))
    assert memory.batch == argument_bytes(used, batch) == 4 * (15 + 3 + 2)


# The adapter and the optimizer


def test_the_abstract_adapter_is_that_of_init() -> None:
    configs = [
        jlora.LoraConfig("layers", rank=3, rslora=True, dtype=jnp.bfloat16),
        jlora.LoraConfig("bias", full=True, dtype=jnp.float16),
        jlora.LoraConfig(".*", rank=5),
    ]
    lora, tokens = jlora.lora(model, configs), jnp.zeros(8, jnp.int32)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract())
    expected = jax.eval_shape(lora.init, jax.random.key(0), params, tokens)
    assert abstract_adapter(lora.plan(params, tokens).targets) == expected


@pytest.mark.parametrize("make", [optax.adam, optax.sgd])
def test_an_optimizer_of_adapters_alone_leaves_the_full_one_unknown(
    make: Callable[..., Any],
) -> None:
    plan = LORA.plan(abstract(), jnp.zeros(8, jnp.int32))
    plus = plan.memory(optimizer=jo.lora_plus(make, 1e-3), mesh=mesh_of("both"))
    plain = plan.memory(optimizer=make(1e-3), mesh=mesh_of("both"))
    assert abs(plus.optimizer - plain.optimizer) <= 4  # one count more
    assert plus.full_optimizer is plus.full_arguments is plus.full_total is None
    assert "unknown" in str(plus) and "unknown" not in str(plain)


def test_sgd_holds_nothing_and_clipping_adds_nothing() -> None:
    plan = LORA.plan(abstract(), jnp.zeros(8, jnp.int32))
    assert plan.memory(optimizer=optax.sgd(1.0)).optimizer == 0
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1.0))
    memory = plan.memory(optimizer=clipped)
    assert memory.optimizer == 2 * memory.factors + 4


# Errors


def test_errors_say_what_is_wrong() -> None:
    plan = LORA.plan(abstract(), jnp.zeros(8, jnp.int32))
    memory, mesh = partial(plan.memory, optimizer=optax.sgd(1.0)), mesh_of("fsdp")
    with pytest.raises(TypeError, match=r"such as `optax\.adam\(1e-4\)`, got float"):
        plan.memory(optimizer=1e-3)
    with pytest.raises(ValueError, match=r"no leaf at 'bias'(.|\n)*no leaf at 'table'"):
        memory(mesh=mesh, shardings={"layers": P(), "heads": P(), "out": P()})
    with pytest.raises(ValueError, match="pass `mesh=`"):
        memory(shardings=specs_of("fsdp"))
    with pytest.raises(ValueError, match=r"'heads' \(32, 8, 16\).*do not divide"):
        specs = dict.fromkeys(SHAPES, P()) | {"heads": P("fsdp")}
        memory(mesh=AbstractMesh((3,), ("fsdp",)), shardings=specs)
    with pytest.raises(ValueError, match=r"axes \('fsdp',\)"):
        memory(mesh=mesh, shardings=specs_of("tensor"))


# Printing, and the plan that holds the params


def test_the_table_says_everything() -> None:
    w = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=8))
    x = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16)
    memory = lora.plan({"w": w}, x).memory(optimizer=optax.adam(1.0), batch=x)
    text, page = str(memory), memory._repr_html_()
    for cell in ("33.6 MB", "262 kB", "524 kB", "67.1 MB", "65.5 kB", "101 MB"):
        assert cell in text and f"<td>{cell}</td>" in page
    for note in (
        "trainable 65,536 of 16,777,216 (0.391 %), 256× fewer",
        "checkpoint 262 kB, of all params 33.6 MB",
        "1 device; 1 kB is 1000 bytes; activations are not counted",
    ):
        assert note in text and note in page
    assert max(map(len, text.splitlines())) <= 88


def test_a_plan_is_compared_and_shown_without_its_params() -> None:
    tokens = jnp.zeros(8, jnp.int32)
    arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract())
    one, two = LORA.plan(abstract(), tokens), LORA.plan(arrays, tokens)
    assert one == two and hash(one) == hash(two)
    assert "ShapeDtypeStruct" not in repr(one)

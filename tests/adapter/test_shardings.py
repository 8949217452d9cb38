"""`jlora.shardings` and `jlora.state_shardings`: layouts that follow the params'.

The layouts are written down by hand; what compiled programs do with them is tested in
test_sharded_programs.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_flatten_with_path

import jlora
import jlora.linen
import jlora.optim
from jlora import KernelAxes, LoraFactors

RANK = 5
KINDS = [AxisType.Auto, AxisType.Explicit]


def mesh_of(kind: AxisType = AxisType.Auto) -> Mesh:
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (kind,) * 3)


def factors(shape: tuple[int, ...], batch: Any, in_: Any, out: Any) -> LoraFactors:
    """Abstract factors of a kernel."""
    axes = KernelAxes(batch, in_, out)
    shapes = axes.factor_shapes(shape, RANK)
    a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    return LoraFactors(a, b, axes, 2.0)


def specs(tree: Any) -> Any:
    """The specs of a tree of shardings, as tuples, by path."""
    flat = tree_flatten_with_path(tree)[0]
    return {keystr(p, simple=True, separator="/"): tuple(s.spec) for p, s in flat}


def short(spec: tuple[Any, ...]) -> tuple[Any, ...]:
    """A spec without the Nones at its end, as XLA names the shardings of results."""
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return spec


# kernel's shape, roles of its axes, its spec; then the specs of a and b
LAYOUTS = {
    "columns": ((6, 8), ((), (0,), (1,)), P("fsdp", "tensor"),
                ("fsdp", None), (None, "tensor")),
    "rows": ((8, 6), ((), (0,), (1,)), P("tensor", "fsdp"),
             ("tensor", None), (None, "fsdp")),
    "short_spec": ((6, 8), ((), (0,), (1,)), P("fsdp"), ("fsdp", None), (None, None)),
    "whole": ((6, 8), ((), (0,), (1,)), P(), (None, None), (None, None)),
    "heads": ((6, 4, 10), ((), (0,), (1, 2)), P("fsdp", "tensor", None),
              ("fsdp", None), (None, "tensor", None)),
    "out_first": ((8, 6), ((), (1,), (0,)), P("tensor", "fsdp"),
                  ("fsdp", None), (None, "tensor")),
    "tuple": ((8, 6), ((), (0,), (1,)), P(("data", "fsdp"), None),
              (("data", "fsdp"), None), (None, None)),
    "layers": ((3, 6, 8), ((0,), (1,), (2,)), P(None, "fsdp", "tensor"),
               (None, "fsdp", None), (None, None, "tensor")),
    "experts": ((4, 6, 8), ((0,), (1,), (2,)), P("tensor", None, "fsdp"),
                ("tensor", None, None), ("tensor", None, "fsdp")),
    "layers_of_experts": (
        (3, 4, 6, 8), ((0, 1), (2,), (3,)), P(None, "tensor", "fsdp", None),
        (None, "tensor", "fsdp", None), (None, "tensor", None, None)),
    "conv": ((3, 3, 4, 8), ((), (0, 1, 2), (3,)), P(None, None, "fsdp", "tensor"),
             (None, None, "fsdp", None), (None, "tensor")),
    "indivisible": ((9, 7), ((), (0,), (1,)), P("fsdp", "tensor"),
                    (None, None), (None, None)),
    "indivisible_tuple": ((6, 8), ((), (0,), (1,)), P(("data", "fsdp"), "tensor"),
                          (None, None), (None, "tensor")),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_factors_follow_their_kernel(name: str, kind: AxisType) -> None:
    shape, roles, spec, a, b = LAYOUTS[name]
    placed = jlora.shardings(
        {"w": spec}, {"w": factors(shape, *roles)}, mesh=mesh_of(kind)
    )
    assert specs(placed) == {"w/a": short(a), "w/b": short(b)}
    assert placed["w"].a.mesh == mesh_of(kind)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_placed_factors_are_as_jit_takes_them(name: str) -> None:
    """An axis that is not divided would be an error here."""
    shape, roles, spec, _, _ = LAYOUTS[name]
    abstract = {"w": factors(shape, *roles)}
    placed = jlora.shardings({"w": spec}, abstract, mesh=mesh_of())
    zeros = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape), abstract)
    made = jax.jit(zeros, out_shardings=placed)()
    assert jax.tree.map(lambda leaf: leaf.sharding, made) == placed


# kernel's shape, roles of its axes, its spec; then the specs of a and b when spread
SPREAD = {
    "fsdp": ((6, 8), ((), (0,), (1,)), P("fsdp"), ("fsdp",), (None, "fsdp")),
    "columns": ((8, 12), ((), (0,), (1,)), P("fsdp", "tensor"),
                (("fsdp", "tensor"),), (None, ("tensor", "fsdp"))),
    "out_first": ((12, 8), ((), (1,), (0,)), P("tensor", "fsdp"),
                  (("fsdp", "tensor"),), (None, ("tensor", "fsdp"))),
    "tuple": ((8, 12), ((), (0,), (1,)), P(("data", "fsdp"), None),
              (("data", "fsdp"),), (None, ("data", "fsdp"))),
    "one_of_a_tuple": ((8, 6), ((), (0,), (1,)), P(("data", "fsdp"), None),
                       (("data", "fsdp"),), (None, "data")),
    "whole": ((6, 8), ((), (0,), (1,)), P(), (), ()),
    "largest_part": ((6, 4, 10), ((), (0,), (1, 2)), P("fsdp", None, None),
                     ("fsdp",), (None, None, "fsdp")),
    "smaller_part": ((6, 4, 9), ((), (0,), (1, 2)), P("fsdp", None, None),
                     ("fsdp",), (None, "fsdp")),
    "conv": ((2, 2, 6, 8), ((), (0, 1, 2), (3,)), P(None, None, None, "tensor"),
             (None, None, "tensor"), (None, "tensor")),
    "layers": ((4, 6, 8), ((0,), (1,), (2,)), P(None, "fsdp", None),
               (None, "fsdp"), (None, None, "fsdp")),
    "experts": ((4, 6, 8), ((0,), (1,), (2,)), P("tensor", None, "fsdp"),
                ("tensor", "fsdp"), ("tensor", None, "fsdp")),
    "no_batch_axis_takes_more": ((4, 6, 7), ((0,), (1,), (2,)), P(None, "fsdp"),
                                 (None, "fsdp"), ()),
    "indivisible": ((9, 7), ((), (0,), (1,)), P("fsdp", "tensor"), (), ()),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(SPREAD))
def test_spread_factors_lie_along_all_axes_of_their_kernel(
    name: str, kind: AxisType
) -> None:
    shape, roles, spec, a, b = SPREAD[name]
    abstract, mesh = {"w": factors(shape, *roles)}, mesh_of(kind)
    placed = jlora.shardings({"w": spec}, abstract, mesh=mesh, spread=True)
    assert specs(placed) == {"w/a": a, "w/b": b}
    for place, leaf in zip(*map(jax.tree.leaves, (placed, abstract)), strict=True):
        place.shard_shape(leaf.shape)  # it raises where an axis is not divided


def test_spread_magnitudes_rows_slices_and_leaves_that_are_trained_whole() -> None:
    params = {n: jnp.ones((8, 12)) for n in ("dora", "rows", "cut")}
    params["bias"] = jnp.ones(12)
    configs = [
        jlora.LoraConfig("dora", rank=RANK, dora=True),
        jlora.LoraConfig("rows", rows=[1, 6, 7]),
        jlora.LoraConfig("cut", rank=RANK, slices=[(0, 4)]),
        jlora.LoraConfig("bias", full=True),
    ]

    def program(p: Any, ids: jax.Array) -> jax.Array:
        x = p["rows"][ids]
        return jnp.tanh(x @ p["dora"].T) @ p["cut"] + p["bias"][None]

    lora = jlora.lora(program, configs)
    abstract = jax.eval_shape(lora.init, jax.random.key(0), params, jnp.arange(5))
    layout = {**dict.fromkeys(params, P("fsdp", "tensor")), "bias": P("tensor")}
    placed = jlora.shardings(layout, abstract, mesh=mesh_of(), spread=True)
    found = specs(placed)
    assert found["dora/magnitude"] == (("fsdp", "tensor"),)
    assert found["rows/values"] == (None, ("tensor", "fsdp"))
    assert found["cut/a"] == (("fsdp", "tensor"),)
    assert found["cut/b"] == ()
    assert found["bias"] == ("tensor",)


def test_factors_are_replicated_or_spread() -> None:
    with pytest.raises(ValueError, match=r"`replicate=True` .* `spread=True` .*choose"):
        jlora.shardings(
            SPECS, adapter_of(), mesh=mesh_of(), replicate=True, spread=True
        )


def test_spread_needs_no_mesh_on_one_device() -> None:
    params = {n: jnp.zeros(s) for n, s in SHAPES.items()}
    placed = jlora.shardings(params, adapter_of(), spread=True)
    assert placed == jlora.shardings(params, adapter_of())


SHAPES = {"w": (6, 8), "v": (8, 6)}
SPECS = {"w": P("fsdp", "tensor"), "v": P("tensor", "fsdp")}
WANTED = {
    "w/a": ("fsdp",),
    "w/b": (None, "tensor"),
    "v/a": ("tensor",),
    "v/b": (None, "fsdp"),
}
RULES = (("embed", "fsdp"), ("mlp", "tensor"), ("nowhere", None))
NAMES = {"w": ("embed", "mlp"), "v": ("mlp", "embed")}


def adapter_of() -> dict[str, LoraFactors]:
    return {name: factors(shape, (), (0,), (1,)) for name, shape in SHAPES.items()}


def from_each(make: Callable[[str, Mesh], Any]) -> Callable[[Mesh], Any]:
    return lambda mesh: {name: make(name, mesh) for name in SHAPES}


def _array(name: str, mesh: Mesh) -> jax.Array:
    return jax.device_put(jnp.zeros(SHAPES[name]), NamedSharding(mesh, SPECS[name]))


def _abstract(name: str, mesh: Mesh) -> Any:
    placed = NamedSharding(mesh, SPECS[name])
    return jax.ShapeDtypeStruct(SHAPES[name], jnp.float32, sharding=placed)


def _boxed(kind: Any, names: Any, **kwargs: Any) -> Callable[[str, Mesh], Any]:
    return lambda name, mesh: kind(
        jax.ShapeDtypeStruct(SHAPES[name], jnp.float32), names[name], **kwargs
    )


def _variable(name: str, mesh: Mesh) -> Any:
    value = jax.ShapeDtypeStruct(SHAPES[name], jnp.float32)
    with nnx.use_eager_sharding(False):
        return nnx.Param(value, out_sharding=NAMES[name], sharding_rules=RULES)


SOURCES = {
    "arrays": (from_each(_array), {}),
    "abstract_arrays": (from_each(_abstract), {}),
    "shardings": (from_each(lambda n, mesh: NamedSharding(mesh, SPECS[n])), {}),
    "specs": (from_each(lambda n, mesh: SPECS[n]), {}),
    "boxed_arrays": (
        from_each(lambda n, mesh: nn.Partitioned(_array(n, mesh), (None, None))),
        {},
    ),
    "mesh_names": (from_each(_boxed(nn.Partitioned, SPECS)), {}),
    "logical_names": (
        from_each(_boxed(nn.LogicallyPartitioned, NAMES)),
        {"rules": RULES},
    ),
    "own_rules": (from_each(_boxed(nn.LogicallyPartitioned, NAMES, rules=RULES)), {}),
    "variables": (from_each(_variable), {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", list(SOURCES))
def test_layouts_are_read_from_whatever_says_them(source: str, kind: AxisType) -> None:
    make, kwargs = SOURCES[source]
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = jlora.shardings(make(mesh), adapter_of(), **kwargs)
    assert specs(placed) == WANTED
    assert placed["w"].a.mesh == mesh


def test_a_mesh_is_needed_where_the_params_name_none() -> None:
    mesh, (make, _) = mesh_of(), SOURCES["specs"]
    assert specs(jlora.shardings(make(mesh), adapter_of(), mesh=mesh)) == WANTED
    with pytest.raises(ValueError, match=r"'w' has no sharding(.|\n)*'v' has no shard"):
        jlora.shardings(make(mesh), adapter_of())


def test_a_mesh_without_devices_will_do() -> None:
    mesh = AbstractMesh((256, 8), ("fsdp", "tensor"))
    abstract = {"w": factors((12288, 49152), (), (0,), (1,))}
    placed = jlora.shardings({"w": P("fsdp", "tensor")}, abstract, mesh=mesh)
    assert placed["w"].a.shard_shape(abstract["w"].a.shape) == (48, RANK)
    assert placed["w"].b.shard_shape(abstract["w"].b.shape) == (RANK, 6144)


@pytest.mark.parametrize("top", [P("fsdp"), {"layer": P("fsdp")}])
def test_one_spec_stands_for_a_subtree(top: Any) -> None:
    adapter = {"layer/w": factors((6, 8), (), (0,), (1,))}
    placed = jlora.shardings(top, adapter, mesh=mesh_of())
    assert specs(placed) == {"layer/w/a": ("fsdp",), "layer/w/b": ()}


@pytest.mark.parametrize("nothing", [None, np.zeros((6, 8), np.float32)])
def test_what_says_nothing_is_replicated_on_the_mesh_of_the_others(nothing) -> None:
    adapter = {**adapter_of(), "u": factors((6, 8), (), (0,), (1,))}
    params = {"u": nothing, "w": _array("w", mesh_of()), "v": _array("v", mesh_of())}
    placed = jlora.shardings(params, adapter)
    assert specs(placed) == {**WANTED, "u/a": (), "u/b": ()}


def test_replicated_factors_and_leaves_that_are_trained_whole() -> None:
    """A whole leaf must be able to be as large as the base; it stays where that is."""
    adapter = {**adapter_of(), "c": jax.ShapeDtypeStruct((8,), jnp.float32)}
    params = {**SPECS, "c": P("tensor")}
    placed = jlora.shardings(params, adapter, mesh=mesh_of(), replicate=True)
    assert placed["c"].spec == P("tensor")
    assert all(placed[n].a.is_fully_replicated for n in SHAPES)
    assert all(placed[n].b.is_fully_replicated for n in SHAPES)


def test_one_device_needs_no_mesh() -> None:
    device = jax.devices()[3]
    params = {n: jax.device_put(jnp.zeros(s), device) for n, s in SHAPES.items()}
    placed = jlora.shardings(params, adapter_of())
    assert {leaf.device_set == {device} for leaf in jax.tree.leaves(placed)} == {True}
    state = jlora.state_shardings(optax.adam(1e-3), adapter_of(), placed)
    assert {leaf.device_set == {device} for leaf in jax.tree.leaves(state)} == {True}


def test_mesh_axes_that_are_taken() -> None:
    """As in Flax: the first rule wins, and no mesh axis is given away twice."""
    box = nn.LogicallyPartitioned(jnp.zeros((4, 6, 8)), ("embed", "mlp", "nowhere"))
    rules = (
        ("mlp", "tensor"),
        ("embed", "tensor"),
        ("embed", ("data", "fsdp")),
        ("nowhere", None),
    )
    adapter = {"w": factors((4, 6, 8), (0,), (1,), (2,))}
    placed = jlora.shardings({"w": box}, adapter, mesh=mesh_of(), rules=rules)
    flax = nn.logical_to_mesh_axes(("embed", "mlp", "nowhere"), rules)
    assert tuple(flax) == (("data", "fsdp"), "tensor", None)
    assert specs(placed) == {
        "w/a": (("data", "fsdp"), "tensor"),
        "w/b": (("data", "fsdp"),),
    }


def _nameless(name: str, mesh: Mesh) -> Any:
    """A variable with logical names and no rules of its own."""
    value = jax.ShapeDtypeStruct(SHAPES[name], jnp.float32)
    with nnx.use_eager_sharding(False):
        return nnx.Param(value, out_sharding=NAMES[name])


LOGICAL = {
    "linen": from_each(_boxed(nn.LogicallyPartitioned, NAMES)),
    "nnx": from_each(_nameless),
}
each_logical = pytest.mark.parametrize("make", LOGICAL.values(), ids=LOGICAL)


@pytest.mark.parametrize("kind", KINDS)
@each_logical
def test_the_rules_that_flax_has_in_force_are_the_default(make, kind: AxisType) -> None:
    mesh = mesh_of(kind)
    with nn.logical_axis_rules(RULES):
        assert specs(jlora.shardings(make(mesh), adapter_of(), mesh=mesh)) == WANTED
    swapped = (("embed", "tensor"), ("mlp", "fsdp"))
    with nn.logical_axis_rules(swapped):  # rules that are given come before them
        placed = jlora.shardings(make(mesh), adapter_of(), mesh=mesh, rules=RULES)
    assert specs(placed) == WANTED


def test_rules_of_a_box_come_before_those_in_force() -> None:
    mesh, swapped = mesh_of(), (("embed", "tensor"), ("mlp", "fsdp"))
    own = from_each(_boxed(nn.LogicallyPartitioned, NAMES, rules=RULES))
    with nn.logical_axis_rules(swapped):
        assert specs(jlora.shardings(own(mesh), adapter_of(), mesh=mesh)) == WANTED


@each_logical
def test_a_name_that_neither_rules_nor_mesh_know_is_an_error(make) -> None:
    mesh, message = mesh_of(), r"'w' has the axes(.|\n)*'mlp'(.|\n)*'v' has the axes"
    some = [("embed", "fsdp")]
    with pytest.raises(ValueError, match=message):
        jlora.shardings(make(mesh), adapter_of(), mesh=mesh, rules=some)
    with nn.logical_axis_rules(some), pytest.raises(ValueError, match=message):
        jlora.shardings(make(mesh), adapter_of(), mesh=mesh)
    with nn.logical_axis_rules(RULES), pytest.raises(ValueError, match=message):
        jlora.shardings(make(mesh), adapter_of(), mesh=mesh, rules=())


def test_memory_follows_the_rules_in_force_and_needs_none_without_a_mesh() -> None:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
    module, x = nn.Dense(8, kernel_init=init, use_bias=False), jnp.ones((4, 6))
    boxed = jax.eval_shape(module.init, jax.random.key(0), x)
    plan = jlora.lora(module.apply, jlora.LoraConfig(rank=RANK)).plan(boxed, x)
    sgd = optax.sgd(1.0)
    assert plan.memory(optimizer=sgd).base == 6 * 8 * 4
    with nn.logical_axis_rules(RULES):
        sharded = plan.memory(optimizer=sgd, mesh=mesh_of(), shardings=boxed)
    assert sharded.base == 6 * 8 * 4 // 4
    with pytest.raises(ValueError, match="'embed', 'mlp'"):
        plan.memory(optimizer=sgd, mesh=mesh_of(), shardings=boxed)


def test_wrong_layouts_are_named_all_at_once() -> None:
    adapter = {**adapter_of(), "u": factors((6, 8), (), (0,), (1,))}
    params = {"w": P("model", None), "v": P(None, None, "tensor")}
    with pytest.raises(ValueError) as error:
        jlora.shardings(params, adapter, mesh=mesh_of())
    told = str(error.value)
    assert "'w' of 2 axes has the spec" in told and "'model'" in told
    assert "'v' of 2 axes has the spec" in told and "('data', 'fsdp', 'tensor')" in told
    assert "`params` has no leaf at 'u'" in told


def test_traced_params_are_refused() -> None:
    with pytest.raises(TypeError, match=r"\['v', 'w'\] are not known .* `jax\.jit`"):
        jax.jit(lambda p: jlora.shardings(p, adapter_of()))(
            {n: jnp.zeros(s) for n, s in SHAPES.items()}
        )


# --- the state of optimizers ---

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "clip_adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "lora_plus": jlora.optim.lora_plus(optax.adam, 1e-3),
    "multi_steps": optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation(),
    "ema": optax.chain(optax.adam(1e-3), optax.ema(0.9)),
    "schedule": optax.adam(optax.cosine_decay_schedule(1e-3, 10)),
    "hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "adafactor": optax.adafactor(1e-3),
}


def placed_adapter() -> tuple[Any, Any]:
    """An adapter on the mesh and its shardings."""
    mesh = mesh_of()
    placed = jlora.shardings({**SPECS, "c": P("tensor")}, abstract_adapter(), mesh=mesh)
    zeros = lambda: jax.tree.map(lambda s: jnp.ones(s.shape), abstract_adapter())
    return jax.jit(zeros, out_shardings=placed)(), placed


def abstract_adapter() -> Any:
    return {**adapter_of(), "c": jax.ShapeDtypeStruct((8,), jnp.float32)}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_state_lives_where_its_adapter_does(name: str) -> None:
    """Every array of an array's shape is laid out like it, and all else is whole."""
    tx = OPTIMIZERS[name]
    adapter, placed = placed_adapter()
    wanted = jlora.state_shardings(tx, abstract_adapter(), placed)
    state = jax.jit(tx.init, out_shardings=wanted)(adapter)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == wanted
    flat = tree_flatten_with_path(adapter)[0]
    layouts = {keystr(p): (leaf.shape, leaf.sharding) for p, leaf in flat}
    for path, leaf in tree_flatten_with_path(state)[0]:
        ends = [v for key, v in layouts.items() if keystr(path).endswith(key)]
        if ends and ends[0][0] == leaf.shape:
            assert leaf.sharding == ends[0][1], keystr(path)
        else:
            assert leaf.sharding.is_fully_replicated, keystr(path)


def test_adam_keeps_two_moments_of_each_array_where_it_lives() -> None:
    _, placed = placed_adapter()
    state = jlora.state_shardings(optax.adam(1e-3), abstract_adapter(), placed)
    assert state[0].mu == placed and state[0].nu == placed
    assert state[0].count.is_fully_replicated


def test_state_of_a_tree_of_base_and_adapter() -> None:
    """The frozen half has no state; the other lives where the adapter does."""
    _, placed = placed_adapter()
    base = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in SHAPES.items()}
    tree = {"params": base, "lora": abstract_adapter()}
    on_mesh = {n: NamedSharding(mesh_of(), spec) for n, spec in SPECS.items()}
    tx = jlora.optim.freeze_base(optax.adam(1e-3))
    state = jlora.state_shardings(tx, tree, {"params": on_mesh, "lora": placed})
    moments = [s for s in jax.tree.leaves(state) if not s.is_fully_replicated]
    assert len(moments) == 2 * len(jax.tree.leaves(placed))


def test_boxed_factors_and_their_state() -> None:
    """The adapter of a Linen module with logical names, on the mesh by jit."""
    init = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
    model = jlora.linen.wrap(nn.Dense(8, kernel_init=init), jlora.LoraConfig(rank=RANK))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((4, 6)))
    adapter, tx = variables["lora"], optax.adam(1e-3)
    placed = jlora.shardings(variables, adapter, mesh=mesh_of(), rules=RULES)
    assert specs(placed) == {
        "params/kernel/a": ("fsdp",),
        "params/kernel/b": (None, "tensor"),
    }
    make = lambda key: model.init(key, jnp.ones((4, 6)))["lora"]
    made = jax.jit(make, out_shardings=placed)(jax.random.key(0))
    wanted = jlora.state_shardings(tx, adapter, placed)
    state = jax.jit(tx.init, out_shardings=wanted)(made)
    moment = state[0].mu["params/kernel"]
    assert moment.b.value.sharding.spec == P(None, "tensor")
    assert state[0].count.sharding.is_fully_replicated


def test_shardings_of_another_tree_are_refused() -> None:
    _, placed = placed_adapter()
    fewer = {path: entry for path, entry in placed.items() if path != "c"}
    with pytest.raises(ValueError, match="got 4 for 5"):
        jlora.state_shardings(optax.adam(1e-3), abstract_adapter(), fewer)
    with pytest.raises(ValueError, match="got 0 for 0"):
        jlora.state_shardings(optax.adam(1e-3), {}, {})

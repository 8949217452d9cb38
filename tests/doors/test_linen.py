"""The Linen door against the module itself, applied to kernels formed by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doors import (
    ALPHA,
    CONV,
    DENSE,
    JOIN,
    RANK,
    SPLIT,
    STACKED,
    config,
    values,
    with_random_b,
)
from flax.core import DenyList, FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, PartitionSpec
from oracle import assert_close, random_like, weighted_sum

import jlora
import jlora.linen

pytestmark = pytest.mark.usefixtures("fast_compile")


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(5, (3, 2), name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.4, deterministic=not train)(x.mean(axis=(1, 2)))
        x = nn.Dense(7, name="head")(x)
        self.sow("intermediates", "logits", x)
        return x


class Block(nn.Module):
    make: Callable[..., Any]  # from names to an initialiser

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        up = nn.Dense(9, name="up", kernel_init=self.make(("embed", "mlp")))(x)
        down = nn.Dense(6, name="down", kernel_init=self.make(("mlp", "embed")))
        return x + down(nn.gelu(up)), None


class Decoder(nn.Module):
    """Scanned and rematerialised blocks between two dense layers."""

    make: Callable[..., Any]  # from names to an initialiser

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        named = {nn.meta.PARTITION_NAME: "layers"}
        blocks = nn.scan(nn.remat(Block), length=3, metadata_params=named, **axes)
        x, _ = blocks(self.make, name="blocks")(x, None)
        heads = self.make(("embed", "heads", "dim"))
        x = nn.DenseGeneral((3, 4), name="split", kernel_init=heads)(x)
        back = self.make(("heads", "dim", "vocab"))
        return nn.DenseGeneral(5, (-2, -1), name="join", kernel_init=back)(x)


class AutoEncoder(nn.Module):
    def setup(self) -> None:
        self.encoder = nn.Dense(4)
        self.decoder = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(6)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decode(self.encode(x))

    def encode(self, x: jax.Array) -> jax.Array:
        return nn.tanh(self.encoder(x))

    def decode(self, z: jax.Array, *, scale: float = 1.0) -> jax.Array:
        return scale * self.decoder(z)


def boxed(box: Callable[..., Any] = lambda init, names: init) -> Decoder:
    return Decoder(lambda names: box(nn.initializers.lecun_normal(), names))


@dataclass(frozen=True, eq=False)
class Case:
    """A module, a call of it, and the einsum of each kernel's delta."""

    name: str
    module: nn.Module
    x: jax.Array
    einsums: dict[str, str]
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: str | None = None
    init: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], Any] = lambda variables: variables


DECODER = {
    "params/blocks/up/kernel": STACKED,
    "params/blocks/down/kernel": STACKED,
    "params/split/kernel": SPLIT,
    "params/join/kernel": JOIN,
}
ATTENTION = {
    **{f"params/{name}/kernel": SPLIT for name in ("query", "key", "value")},
    "params/out/kernel": JOIN,
}
GATES = [f"{kind}{gate}" for kind in "ih" for gate in "rzn"]
TRAIN = {"train": True, "rngs": {"dropout": jax.random.key(5)}}
CONVNET = {"params/conv/kernel": CONV, "params/head/kernel": DENSE}
ENCODER = {"params/encoder/kernel": DENSE}
with_names = nn.with_partitioning
with_logical_names = nn.with_logical_partitioning

CASES = [
    Case("evaluation", ConvNet(), values(2, 5, 6, 3), CONVNET),
    Case(
        "batchnorm-dropout",
        ConvNet(),
        values(2, 5, 6, 3),
        CONVNET,
        {**TRAIN, "mutable": ["batch_stats"]},
    ),
    Case(
        "intermediates",
        ConvNet(),
        values(2, 5, 6, 3),
        CONVNET,
        {"capture_intermediates": True, "mutable": ["intermediates"]},
    ),
    Case("scan-remat", boxed(), values(2, 6), DECODER),
    Case("partitioned", boxed(with_names), values(2, 6), DECODER),
    Case("logical", boxed(with_logical_names), values(2, 6), DECODER),
    Case("frozen-dict", boxed(), values(2, 6), DECODER, prepare=freeze),
    Case("setup", AutoEncoder(), values(2, 6), ENCODER, target="encoder"),
    Case(
        "method-name",
        AutoEncoder(),
        values(2, 6),
        ENCODER,
        {"method": "encode"},
        "encoder",
    ),
    Case(
        "method-function",
        AutoEncoder(),
        values(2, 4),
        {f"params/decoder/layers_{i}/kernel": DENSE for i in (0, 2)},
        {"method": AutoEncoder.decode, "scale": 0.5},
        init={"method": "decode"},
    ),
    Case(
        "rnn-carry",
        nn.RNN(nn.GRUCell(4), return_carry=True),
        values(2, 3, 6),
        {f"params/cell/{gate}/kernel": DENSE for gate in GATES},
    ),
    Case(
        "decode-cache",
        nn.MultiHeadDotProductAttention(3, qkv_features=12, decode=True),
        values(2, 1, 6),
        ATTENTION,
        {"mutable": ["cache"]},
    ),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cache
def built(case: Case) -> tuple[jlora.linen.LoraModule, Any]:
    model = jlora.linen.wrap(case.module, config(case.target))
    variables = jax.jit(partial(model.init, **case.init))(jax.random.key(0), case.x)
    variables = {**variables, "lora": with_random_b(variables["lora"])}
    return model, case.prepare(variables)


def formed(variables: Any, einsums: dict[str, str]) -> Any:
    """Plain variables with W + ΔW; nothing of jlora is called but dataclass fields."""
    plain = {k: v for k, v in nn.meta.unbox(variables).items() if k != "lora"}
    flat = flatten_dict(plain, sep="/")
    factors = nn.meta.unbox(variables["lora"])
    for path, einsum in einsums.items():
        a, b = factors[path].a, factors[path].b
        delta = jnp.einsum(einsum, a, b, precision="highest")
        flat[path] = flat[path] + ALPHA / RANK * delta
    return unflatten_dict(flat, sep="/")


@cases
def test_apply_and_gradients_are_those_of_the_module_with_formed_kernels(
    case: Case,
) -> None:
    model, variables = built(case)
    assert set(variables["lora"]) == set(case.einsums)

    def adapted(adapter: Any) -> Any:
        together = case.prepare({**variables, "lora": adapter})
        return model.apply(together, case.x, **case.kwargs)

    def reference(adapter: Any) -> Any:
        plain = formed({**variables, "lora": adapter}, case.einsums)
        return case.module.apply(plain, case.x, **case.kwargs)

    weights = random_like(jax.eval_shape(reference, variables["lora"]), 3)

    def with_gradients(fn: Callable[..., Any]) -> Any:
        def loss(adapter: Any) -> Any:
            out = fn(adapter)
            return weighted_sum(out, weights), out

        return jax.jit(jax.grad(loss, has_aux=True))(variables["lora"])

    (grads, out), (expected_grads, expected) = map(with_gradients, (adapted, reference))
    assert_close(out, expected, rtol=2e-5)
    assert_close(grads, expected_grads, rtol=1e-4)
    assert jax.tree.structure(grads) == jax.tree.structure(variables["lora"])


@cases
def test_merge_gives_plain_variables_of_the_module(case: Case) -> None:
    model, variables = built(case)
    merged = model.merge(variables)
    assert type(merged) is type(variables)
    assert "lora" not in merged
    plain = nn.meta.unbox(unfreeze(merged))
    assert_close(plain, formed(variables, case.einsums), rtol=1e-6)


def test_init_makes_the_params_of_the_module_and_a_delta_of_zero() -> None:
    case = CASES[0]
    model = jlora.linen.wrap(case.module, config())
    variables = model.init(jax.random.key(0), case.x)
    own = case.module.init(jax.random.key(0), case.x)
    assert list(variables) == [*own, "lora"]
    jax.tree.map(np.testing.assert_array_equal, own, model.merge(variables))
    expected = case.module.apply(own, case.x)
    assert_close(model.apply(variables, case.x), expected, rtol=1e-6)


def test_init_takes_a_key_for_each_stream() -> None:
    model, x = jlora.linen.wrap(AutoEncoder(), config("encoder")), values(2, 6)
    init, path = jax.jit(model.init), "params/encoder/kernel"

    def a_of(rngs: Any) -> jax.Array:
        return init(rngs, x)["lora"][path].a

    one, two = jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(a_of(one), a_of({"params": one}))
    np.testing.assert_array_equal(
        a_of({"params": one, "lora": two}), a_of({"params": two, "lora": two})
    )
    assert not np.allclose(a_of(one), a_of({"params": one, "lora": one}))
    assert not np.allclose(a_of(one), a_of(two))
    with pytest.raises(ValueError, match="needs a key 'params' or 'lora'"):
        model.init({"dropout": one}, x)


def test_init_of_a_decoder_makes_the_cache_of_the_whole_prompt() -> None:
    attention = nn.MultiHeadDotProductAttention(3, qkv_features=12, decode=True)
    model = jlora.linen.wrap(attention, config("query"))
    variables = jax.jit(model.init)(jax.random.key(0), values(2, 5, 6))
    assert variables["cache"]["cached_key"].shape == (2, 5, 3, 4)
    assert list(variables["lora"]) == ["params/query/kernel"]


MUTABLE = [
    False,
    True,
    [],
    "batch_stats",
    ["batch_stats", "intermediates"],
    ["params"],
    DenyList("intermediates"),
]


@pytest.mark.parametrize("mutable", MUTABLE, ids=str)
def test_mutable_means_what_it_means_to_the_module(mutable: Any) -> None:
    case = CASES[0]
    model, variables = built(case)
    # Without a stream of its own, dropout draws from "params", as in the module.
    call = {"train": False, "mutable": mutable, "rngs": jax.random.key(3)}
    out = jax.jit(lambda v: model.apply(v, case.x, **call))(variables)
    expected = case.module.apply(formed(variables, case.einsums), case.x, **call)
    if "params" in (expected[1] if mutable is not False else {}):
        frozen = jax.tree.map(np.asarray, variables["params"])
        jax.tree.map(np.testing.assert_array_equal, out[1]["params"], frozen)
        expected[1]["params"] = frozen
    assert_close(out, expected, rtol=2e-5)


@pytest.mark.parametrize("box", [with_names, with_logical_names])
def test_factors_are_boxed_with_the_names_of_their_axes(box: Any) -> None:
    model = jlora.linen.wrap(boxed(box), config())
    key, x = jax.random.key(0), values(2, 6)
    variables = jax.eval_shape(model.init, key, x)
    rank = "lora_rank" if box is with_logical_names else None
    expected = {
        "params/blocks/up/kernel": (("layers", "embed"), ("layers",), ("mlp",)),
        "params/blocks/down/kernel": (("layers", "mlp"), ("layers",), ("embed",)),
        "params/split/kernel": (("embed",), (), ("heads", "dim")),
        "params/join/kernel": (("heads", "dim"), (), ("vocab",)),
    }
    for path, (before, batch, after) in expected.items():
        factors = variables["lora"][path]
        kernel = flatten_dict(variables, sep="/")[path]
        assert type(factors.a) is type(factors.b) is type(kernel)
        assert factors.a.names == (*before, rank), path
        assert factors.b.names == (*batch, rank, *after), path
        assert factors.a.names == tuple(nn.get_partition_spec(factors).a), path


def test_names_are_padded_to_all_axes() -> None:
    class Short(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("data",))
            return nn.Dense(4, name="dense", kernel_init=init)(x)

    model = jlora.linen.wrap(Short(), config())
    variables = jax.eval_shape(model.init, jax.random.key(0), values(2, 6))
    factors = variables["lora"]["params/dense/kernel"]
    assert (factors.a.names, factors.b.names) == (("data", None), (None, None))


def test_logical_names_become_shardings_and_the_model_runs_on_a_mesh() -> None:
    # One block: under a mesh, Flax itself cannot run boxed kernels of `DenseGeneral`.
    make = lambda names: with_logical_names(nn.initializers.lecun_normal(), names)
    model, x = jlora.linen.wrap(Block(make), config()), values(2, 6)
    variables = jax.jit(model.init)(jax.random.key(0), x, None)
    variables["lora"] = with_random_b(variables["lora"])
    mesh = jax.make_mesh((2, 3), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rules = [("embed", "data"), ("mlp", "model")]
    specs = nn.get_partition_spec(variables)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
    up = shardings["lora"]["params/up/kernel"]
    spec_of = lambda sharding: tuple(entry for entry in sharding.spec if entry)
    assert (spec_of(up.a), spec_of(up.b)) == (("data",), ("model",))
    expected = jax.jit(model.apply)(variables, x, None)
    placed = jax.device_put(jlora.linen.unbox(variables), shardings)
    placed = nn.meta.replace_boxed(variables, placed)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        out = jax.jit(model.apply)(placed, x, None)
    assert_close(out, expected, rtol=2e-5)


def test_unboxing_factors_applies_no_constraint() -> None:
    model, variables = built(next(case for case in CASES if case.name == "partitioned"))
    mesh = jax.make_mesh((2,), ("other",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):  # which has none of the names
        adapter = model.adapter(variables)
    assert all(isinstance(leaf.a, jax.Array) for leaf in adapter.values())
    assert jlora.delta(adapter["params/join/kernel"]).shape == (3, 4, 5)


def test_a_leaf_trained_whole_keeps_its_box() -> None:
    configs = [config("blocks"), config("join/kernel", full=True)]
    model, x = jlora.linen.wrap(boxed(with_logical_names), configs), values(2, 6)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    head = variables["lora"]["params/join/kernel"]
    assert isinstance(head, nn.LogicallyPartitioned)
    assert head.names == ("heads", "dim", "vocab")
    zero = jax.tree.map(jnp.zeros_like, head)
    adapter = {**variables["lora"], "params/join/kernel": zero}
    assert not jax.jit(model.apply)({**variables, "lora": adapter}, x).any()


def test_abstract_variables_are_planned_and_get_real_factors() -> None:
    module, x = boxed(), jax.ShapeDtypeStruct((2, 6), jnp.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), x)
    model = jlora.linen.wrap(module, config())
    plan = model.plan(abstract, x)
    assert {target.path for target in plan.targets} == set(DECODER)
    adapter = model.init_adapter(jax.random.key(0), abstract, x)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(adapter))
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == plan.trainable


def test_variables_alone_are_enough_for_dense_kernels() -> None:
    model = jlora.linen.wrap(AutoEncoder(), config("encoder"))
    variables = jax.eval_shape(AutoEncoder().init, jax.random.key(0), values(2, 6))
    assert [t.path for t in model.plan(variables).targets] == ["params/encoder/kernel"]


def test_caches_and_statistics_are_never_targets() -> None:
    class Memory(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            keys = self.variable("cache", "keys", jnp.ones, (7, 6))
            return nn.Dense(3, name="dense")(
                nn.Dense(6, name="query")(x) @ keys.value.T
            )

    model, x = jlora.linen.wrap(Memory(), config(".*kernel")), values(2, 6)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert set(model.init_adapter(jax.random.key(0), variables, x)) == {
        "params/dense/kernel",
        "params/query/kernel",
    }
    with pytest.raises(jlora.TargetError):
        jlora.linen.wrap(Memory(), config("keys")).plan(variables, x)


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    case = next(case for case in CASES if case.name == "batchnorm-dropout")
    model = jlora.linen.wrap(case.module, config())
    variables = jax.jit(model.init)(jax.random.key(0), case.x)
    before = jax.tree.map(np.array, variables)
    goal = values(2, 7)

    def loss_of(adapter: Any, variables: Any) -> Any:
        together = {**variables, "lora": adapter}
        call = {"train": True, "mutable": ["batch_stats"]}
        rngs = {"dropout": jax.random.key(0)}
        out, changed = model.apply(together, case.x, rngs=rngs, **call)
        return ((out - goal) ** 2).mean(), changed

    @jax.jit
    def step(variables: Any) -> Any:
        adapter = variables["lora"]
        grads, changed = jax.grad(loss_of, has_aux=True)(adapter, variables)
        adapter = jax.tree.map(lambda p, g: p - 0.3 * g, adapter, grads)
        return {**variables, **changed, "lora": adapter}

    loss = jax.jit(lambda v: loss_of(v["lora"], v)[0])
    start = loss(variables)
    for _ in range(20):
        variables = step(variables)
    assert loss(variables) < 0.8 * start
    jax.tree.map(np.testing.assert_array_equal, variables["params"], before["params"])
    stats = variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert not np.allclose(stats, before["batch_stats"]["BatchNorm_0"]["mean"])


def test_variables_without_an_adapter_are_an_error() -> None:
    model, x = jlora.linen.wrap(AutoEncoder(), config("encoder")), values(2, 6)
    variables = AutoEncoder().init(jax.random.key(0), x)
    for call in (model.merge, partial(model.apply, x=x)):
        with pytest.raises(jlora.AdapterError, match=r"no collection 'lora'.*params"):
            call(variables)


def test_a_collection_of_the_same_name_is_an_error() -> None:
    class Taken(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3)(x) + self.variable("lora", "shift", jnp.zeros, ()).value

    model = jlora.linen.wrap(Taken(), config())
    with pytest.raises(ValueError, match="'lora' of its own"):
        model.init(jax.random.key(0), values(2, 6))


def test_what_is_no_module_is_an_error() -> None:
    with pytest.raises(TypeError, match="takes a Linen module first, got a function"):
        jlora.linen.wrap(lambda x: x, config())


def test_frozen_variables_stay_frozen() -> None:
    model, variables = built(next(case for case in CASES if case.name == "frozen-dict"))
    assert isinstance(variables["lora"], FrozenDict)
    assert PartitionSpec() == nn.get_partition_spec(variables)["params"]["join"]["bias"]
    assert isinstance(model.merge(variables), FrozenDict)

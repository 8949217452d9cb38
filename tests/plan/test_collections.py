"""Linen's variables: what is beside "params" is no target, and is counted apart."""

import dataclasses
import re
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import AbstractMesh
from oracle import assert_close

import jlora
import jlora.linen
import jlora.nnx


class Model(nn.Module):
    """A norm with statistics, a cache, and constants that are named like params."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(32, name="up")(x)
        x = nn.BatchNorm(not train, momentum=0.5, name="bn")(x)
        keys = self.variable("cache", "keys", jnp.ones, (100, 32))
        table = self.variable("consts", "kernel", jnp.ones, (32, 32))
        bias = self.variable("consts", "bias", jnp.ones, (32,))
        x = nn.relu(x @ table.value + bias.value[None]) + keys.value.mean()
        return nn.Dense(4, name="head")(x)


X = jax.random.normal(jax.random.key(0), (64, 16)) * 3 + 2
VARIABLES = Model().init(jax.random.key(1), X)
SIZE = sum(leaf.size for leaf in jax.tree.leaves(VARIABLES["params"]))
KINDS = {"dict": VARIABLES, "frozen": freeze(VARIABLES)}
each_kind = pytest.mark.parametrize("variables", KINDS.values(), ids=KINDS)


def lora_of(*configs: jlora.LoraConfig) -> jlora.Lora:
    return jlora.lora(Model().apply, configs)


def paths(variables: Any, *configs: jlora.LoraConfig) -> list[str]:
    return [t.path for t in lora_of(*configs).plan(variables, X).targets]


KERNELS = ["params/head/kernel", "params/up/kernel"]
BIASES = ["params/bn/bias", "params/head/bias", "params/up/bias"]
BN = ["params/bn/bias", "params/bn/scale"]


@each_kind
@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (jlora.LoraConfig(rank=2), KERNELS),
        (jlora.LoraConfig(".*", rank=2), KERNELS),
        (jlora.LoraConfig("kernel", rank=2), KERNELS),
        (jlora.LoraConfig("[a-z_]+/.*kernel", rank=2), KERNELS),
        (jlora.LoraConfig("kernel", rank=2, bias="adapted"), [*BIASES[1:], *KERNELS]),
        (jlora.LoraConfig("kernel", rank=2, bias="all"), [*BIASES, *KERNELS]),
        (jlora.LoraConfig("bn", full=True), BN),
        (jlora.LoraConfig(".*/bn/.*", full=True), BN),
        (jlora.LoraConfig("(?!params).*bias|bias", full=True), BIASES),
        (jlora.LoraConfig(".*", full=True), sorted({*BIASES, *KERNELS, *BN})),
    ],
)
def test_what_is_beside_params_is_no_target(
    variables: Any, config: jlora.LoraConfig, wanted: list[str]
) -> None:
    assert sorted(paths(variables, config)) == sorted(wanted)


@each_kind
@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("batch_stats/bn/mean", ["batch_stats/bn/mean"]),
        ("^batch_stats/bn/mean", ["batch_stats/bn/mean"]),
        ("batch_stats", ["batch_stats/bn/mean", "batch_stats/bn/var"]),
        ("(?i)BATCH_STATS/.*", ["batch_stats/bn/mean", "batch_stats/bn/var"]),
        ("(batch_stats|params)/bn/(mean|scale)", ["batch_stats/bn/mean", BN[1]]),
        ("scale|batch_stats/bn/mean", ["batch_stats/bn/mean", "params/bn/scale"]),
        ("mean|batch_stats/bn/mean", ["batch_stats/bn/mean"]),
        (["bn", "batch_stats/bn/mean"], ["batch_stats/bn/mean", *BN]),
    ],
)
def test_a_collection_that_is_named(
    variables: Any, pattern: Any, wanted: list[str]
) -> None:
    config = jlora.LoraConfig(pattern, full=True)
    assert sorted(paths(variables, config)) == wanted


def test_a_kernel_of_a_collection_that_is_named() -> None:
    config = jlora.LoraConfig("consts/kernel", rank=2, bias="adapted")
    plan = lora_of(config).plan(VARIABLES, X)
    assert [t.path for t in plan.targets] == ["consts/bias", "consts/kernel"]
    consts = 32 * 32 + 32
    assert plan.total == SIZE + consts
    assert dict(plan.apart) == {"batch_stats": 64, "cache": 3200}


@each_kind
@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (jlora.LoraConfig(".*", full=True), ["bias", "kernel"]),
        (jlora.LoraConfig(".*", rank=2), ["kernel"]),
        (jlora.LoraConfig(rank=2), []),
        (jlora.LoraConfig(".*", exclude="consts", full=True), []),
        (jlora.LoraConfig([".*", "consts/.*"], full=True), []),
    ],
)
def test_a_collection_of_the_users_own_is_warned_of(
    variables: Any, config: jlora.LoraConfig, wanted: list[str]
) -> None:
    """What Flax's layers keep is meant by nobody; a head beside the params may be."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora_of(config).init(jax.random.key(2), variables, X)
    told = "\n".join(str(w.message) for w in caught)
    assert [w.category for w in caught] == [jlora.LeftOutWarning] * bool(wanted)
    assert sorted(re.findall(r"'consts/(\w+)' ", told)) == wanted
    assert "batch_stats" not in told
    assert "cache" not in told


def test_the_plan_lists_what_a_pattern_matches_there() -> None:
    plan = lora_of(jlora.LoraConfig("bn", full=True)).plan(VARIABLES, X)
    assert [u.path for u in plan.unusable] == [
        "batch_stats/bn/mean",
        "batch_stats/bn/var",
    ]
    assert "is in the collection 'batch_stats'" in str(plan)
    # Nobody asked for them without a pattern.
    assert not [
        u.path
        for u in lora_of(jlora.LoraConfig(rank=2)).plan(VARIABLES, X).unusable
        if not u.path.startswith("params/")
    ]


def test_a_pattern_that_matches_there_alone_is_an_error() -> None:
    with pytest.raises(jlora.TargetError) as error:
        paths(VARIABLES, jlora.LoraConfig("bn/mean", full=True))
    assert "'batch_stats/bn/mean' (32,) is in the collection" in str(error.value)
    assert "names it, as 'batch_stats/...' does" in str(error.value)


def test_statistics_that_a_call_returns_are_those_that_are_used() -> None:
    configs = [
        jlora.LoraConfig("bn", full=True),
        jlora.LoraConfig("params/.*kernel", rank=4),
    ]
    lora, variables = lora_of(*configs), VARIABLES
    adapter = lora.init(jax.random.key(2), variables, X)
    for _ in range(10):
        _, new = lora.apply(variables, adapter, X, train=True, mutable=["batch_stats"])
        variables = {**variables, **new}
    wanted = Model().apply(jlora.merge(variables, adapter), X)
    assert_close(lora.apply(variables, adapter, X), wanted, 1e-5)
    off = Model().apply(
        jlora.merge({**variables, "batch_stats": VARIABLES["batch_stats"]}, adapter),
        X,
    )
    assert float(jnp.abs(wanted - off).max()) > 0.1


@each_kind
def test_a_plan_counts_params_and_says_what_is_beside(variables: Any) -> None:
    config = jlora.LoraConfig("kernel", rank=4)
    plan = lora_of(config).plan(variables, X)
    wrapped = jlora.linen.wrap(Model(), config).plan(variables, X)
    assert plan.total == wrapped.total == SIZE
    assert plan.cost() == wrapped.cost()
    assert plan.flops is not None and wrapped.flops is not None
    assert plan.flops == wrapped.flops
    assert dict(plan.apart) == {"batch_stats": 64, "cache": 3200, "consts": 1056}
    told = "; beside the params: batch_stats 64, cache 3,200, consts 1,056"
    assert plan.summary() == wrapped.summary() + told
    assert told in str(plan) and told in plan._repr_html_()


def test_full_fine_tuning_trains_params_alone() -> None:
    config, adam = jlora.LoraConfig("kernel", rank=4), optax.adam(1e-3)
    plan = lora_of(config).plan(VARIABLES, X)
    wrapped = jlora.linen.wrap(Model(), config).plan(VARIABLES, X)
    for mesh in (None, AbstractMesh((2,), ("data",))):
        found = plan.memory(optimizer=adam, mesh=mesh)
        wanted = wrapped.memory(optimizer=adam, mesh=mesh)
        held = 4 * (64 + 3200 + 1056)  # they are held all the same
        assert found == dataclasses.replace(wanted, base=wanted.base + held)


NO_VARIABLES = {
    "another dict": {"params": jnp.ones((5, 3)), "head": jnp.ones((5, 3))},
    "without params": {"model": {"w": jnp.ones((5, 3))}, "head": jnp.ones((5, 3))},
    "state": nnx.State(
        {"params": nnx.State({"w": jnp.ones((5, 3))}), "head": jnp.ones((5, 3))}
    ),
    "list": [jnp.ones((5, 3)), jnp.ones((5, 3))],
}


@pytest.mark.parametrize("params", NO_VARIABLES.values(), ids=NO_VARIABLES)
def test_any_other_tree_is_params_altogether(params: Any) -> None:
    fn = lambda p, x: sum(x @ w for w in jax.tree.leaves(p))
    plan = jlora.lora(fn, jlora.LoraConfig(rank=2)).plan(params, jnp.ones((2, 5)))
    assert len(plan.targets) == 2
    assert (plan.total, plan.apart) == (30, ())


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.params = nnx.Linear(5, 7, rngs=rngs)  # a name like another
        self.bn = nnx.BatchNorm(7, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.params(x))


def test_nnx_keeps_them_in_the_rest() -> None:
    config = [jlora.LoraConfig("bn", full=True), jlora.LoraConfig(rank=2)]
    lora, params, adapter, rest = jlora.nnx.wrap(Nnx(nnx.Rngs(0)), config, X[:, :5])
    assert sorted(adapter) == ["bn/bias", "bn/scale", "params/kernel"]
    plan = lora.plan(params, rest, X[:, :5])
    assert (plan.total, plan.apart) == (5 * 7 + 7 + 14, ())

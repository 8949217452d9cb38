"""The optax door: labels, masks and norms against optax and numpy on plain trees."""

import dataclasses
import zlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from doors import as_pure
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxpr_checks import materialized, slice_shapes

import jlora
import jlora.optim as jo

pytestmark = pytest.mark.usefixtures("fast_compile")

LR = 1e-2
RATIO = 8.0
Tree = Any
Problem = SimpleNamespace


def model(params: Tree, x: jax.Array) -> jax.Array:
    """Two scanned layers, a kernel of two output axes, and a bias."""
    x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
    heads = jnp.einsum("nd,hdk->nhk", x, params["heads"]) + params["bias"][None]
    return jnp.tanh(heads).reshape(x.shape[0], -1) @ params["out"]


def random_like(tree: Tree, rng: np.random.Generator) -> Tree:
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
    return jax.tree.map(draw, tree)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Numbers that other tests do not change; numpy's, which compile nothing."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def problem(rng: np.random.Generator) -> Problem:
    """Params, an adapter of random numbers, and data."""
    shapes = {"layers": (2, 5, 5), "heads": (3, 5, 4), "bias": (3, 4), "out": (12, 6)}
    arrays = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    params = jax.tree.map(lambda leaf: leaf / 2, random_like(arrays, rng))
    configs = [
        jlora.LoraConfig("layers|heads|out", rank=2),
        jlora.LoraConfig("bias", full=True),
    ]
    lora = jlora.lora(model, configs)
    x, y = random_like((jnp.ones((7, 5)), jnp.ones((7, 6))), rng)
    adapter = random_like(lora.init(jax.random.key(0), params, x), rng)
    return Problem(lora=lora, params=params, adapter=adapter, x=x, y=y)


def loss_of(problem: Problem, params: Tree, adapter: Tree) -> jax.Array:
    out = problem.lora.apply(params, adapter, problem.x)
    return jnp.mean((out - problem.y) ** 2)


def bits(tree: Tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def state_bytes(state: Tree) -> int:
    """The bytes of a state, its counters left out."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)


# Labels and LoRA+


def test_labels_name_the_role_of_each_array(problem: Problem) -> None:
    expected = {
        path: "full"
        if path == "bias"
        else dataclasses.replace(problem.adapter[path], a="a", b="b")
        for path in problem.adapter
    }
    assert jo.factor_labels(problem.adapter) == expected
    abstract = jax.eval_shape(lambda: problem.adapter)
    assert jo.factor_labels(abstract) == expected


def test_labels_of_an_nnx_state_are_those_of_its_adapter(problem: Problem) -> None:
    state = nnx.state(jax.tree.map(nnx.Param, problem.adapter), nnx.Param)
    labels = nnx.to_pure_dict(jo.factor_labels(as_pure(state)))
    sides = {"a": "a", "b": "b"}
    assert labels == {"layers": sides, "heads": sides, "out": sides, "bias": "full"}


def test_whole_leaves_that_are_called_a_and_b_are_no_factors() -> None:
    labels = jo.factor_labels({"a": jnp.ones(3), "b": jnp.ones(3)})
    assert labels == {"a": "full", "b": "full"}


def test_labels_partition_an_optimizer(problem: Problem) -> None:
    rates = {"a": 1.0, "b": 2.0, "full": 4.0}
    groups = {label: optax.sgd(rate) for label, rate in rates.items()}
    tx = optax.partition(groups, jo.factor_labels)
    updates, _ = tx.update(problem.adapter, tx.init(problem.adapter))
    assert bits(updates["out"].a) == bits(-1.0 * problem.adapter["out"].a)
    assert bits(updates["out"].b) == bits(-2.0 * problem.adapter["out"].b)
    assert bits(updates["bias"]) == bits(-4.0 * problem.adapter["bias"])


SCHEDULE = optax.linear_schedule(LR, LR / 4, transition_steps=5)


@pytest.mark.parametrize("rate", [LR, SCHEDULE], ids=["constant", "schedule"])
@pytest.mark.parametrize(
    "make",
    [optax.sgd, optax.adam, partial(optax.adamw, weight_decay=0.1)],
    ids=["sgd", "adam", "adamw"],
)
def test_lora_plus_is_two_optimizers(
    problem: Problem, rng: np.random.Generator, make: Callable, rate: Any
) -> None:
    faster = (lambda n: RATIO * rate(n)) if callable(rate) else RATIO * rate
    both, slow, fast = jo.lora_plus(make, rate, RATIO), make(rate), make(faster)
    b_of = lambda tree: [f.b for f in tree.values() if hasattr(f, "b")]
    rest_of = lambda tree: [getattr(f, "a", f) for f in tree.values()]
    adapter = problem.adapter
    states = both.init(adapter), slow.init(rest_of(adapter)), fast.init(b_of(adapter))
    for _ in range(3):
        grads = random_like(adapter, rng)
        updates, state = both.update(grads, states[0], adapter)
        rest, slow_state = slow.update(rest_of(grads), states[1], rest_of(adapter))
        b, fast_state = fast.update(b_of(grads), states[2], b_of(adapter))
        states = state, slow_state, fast_state
        assert bits(rest_of(updates)) == bits(rest)
        assert bits(b_of(updates)) == bits(b)


def test_sgd_moves_b_exactly_ratio_times_as_far(problem: Problem) -> None:
    ones = jax.tree.map(jnp.ones_like, problem.adapter)
    tx = jo.lora_plus(optax.sgd, SCHEDULE)
    step = jax.jit(tx.update)
    state = tx.init(ones)
    for _ in range(3):
        updates, state = step(ones, state, ones)
        for f in (updates["layers"], updates["heads"], updates["out"]):
            assert (f.b == 16 * f.a[(0,) * f.a.ndim]).all()


def test_lora_plus_takes_a_traced_rate_and_mapped_state(problem: Problem) -> None:
    wrap = optax.inject_hyperparams(jo.lora_plus, static_args="make_optimizer")
    tx = wrap(optax.adam, LR, RATIO)
    state = jax.jit(tx.init)(problem.adapter)
    doubled = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    moments = 2 * sum(x.size for x in jax.tree.leaves(problem.adapter))
    total = sum(x.sum() for x in jax.tree.leaves(doubled) if x.ndim)
    assert total == moments


def test_lora_plus_says_what_is_wrong(problem: Problem) -> None:
    with pytest.raises(TypeError, match=r"such as `optax\.adam`, got Gradient"):
        jo.lora_plus(optax.adam(LR), LR)  # type: ignore[arg-type]
    for ratio in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            jo.lora_plus(optax.adam, LR, ratio)
    with pytest.raises(ValueError, match="no factors among 4 leaves"):
        jo.lora_plus(optax.adam, LR).init(problem.params)


def test_decay_acts_on_factors_and_on_whole_kernels_alone() -> None:
    axes = jlora.KernelAxes((), (0,), (1,))
    factors = jlora.LoraFactors(jnp.ones((3, 2)), jnp.ones((2, 4)), axes, 1.0)
    adapter = {"w": factors, "head": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    tx = optax.adamw(1.0, weight_decay=0.25, mask=jo.decay_mask)
    zeros = jax.tree.map(jnp.zeros_like, adapter)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(adapter), adapter)
    for leaf in (updates["w"].a, updates["w"].b, updates["head"]):
        assert (leaf == -0.25).all()
    assert (updates["bias"] == 0).all()
    assert jo.decay_mask(jax.eval_shape(lambda: adapter))["bias"] is False


# One tree of base and adapter

STYLES = {
    "collections": lambda params, adapter: {"params": params, "lora": adapter},
    "nested": lambda params, adapter: ([params], {"x": {"lora": adapter}}),
    "beside": lambda params, adapter: {
        name: (leaf, adapter[name]) if name != "bias" else leaf
        for name, leaf in sorted(params.items())
    },
}
TRAINED = {
    "collections": lambda tree: tree["lora"],
    "nested": lambda tree: tree[1],
    "beside": lambda tree: [tree[name][1] for name in ("heads", "layers", "out")],
}
BASE = {
    "collections": lambda tree: tree["params"],
    "nested": lambda tree: tree[0],
    "beside": lambda tree: [
        tree["bias"],
        *(tree[name][0] for name in ("heads", "layers", "out")),
    ],
}
styles = pytest.mark.parametrize("style", list(STYLES))

# The optimizer, and the arrays that it keeps for each trained one.
OPTIMIZERS = {
    "sgd": (optax.sgd(LR), 0),
    "adamw": (optax.adamw(LR, weight_decay=0.1), 2),
    "clip_adam": (optax.chain(optax.clip_by_global_norm(0.1), optax.adam(LR)), 2),
    "schedule": (optax.sgd(SCHEDULE, momentum=0.9), 1),
    "multi_steps": (optax.MultiSteps(optax.adam(LR), 4), 3),
    "ema": (optax.chain(optax.adam(LR), optax.ema(0.9)), 3),
}


def one_tree(problem: Problem, style: str) -> Tree:
    return STYLES[style](problem.params, problem.adapter)


@styles
def test_masks_are_complementary_and_follow_the_rule(
    problem: Problem, style: str
) -> None:
    tree = one_tree(problem, style)
    trained, frozen = jo.trainable_mask(tree), jo.frozen_mask(tree)
    assert jax.tree.map(lambda t, f: t != f, trained, frozen) == jax.tree.map(
        lambda _: True, tree
    )
    assert all(jax.tree.leaves(TRAINED[style](trained)))
    assert not any(jax.tree.leaves(BASE[style](trained)))
    assert jo.trainable_mask(jax.eval_shape(lambda: tree)) == trained


def test_masks_compare_keys_whole_and_by_the_name_given() -> None:
    tree = {"my_lora": {"lora/w": 1.0}, "lora_w": 2.0, "delta": {"w": 3.0}}
    assert not any(jax.tree.leaves(jo.trainable_mask(tree)))
    mask = jo.trainable_mask(tree, collection="delta")
    assert mask == {"my_lora": {"lora/w": False}, "lora_w": False, "delta": {"w": True}}
    assert jo.frozen_mask(tree, collection="delta")["delta"] == {"w": False}


@styles
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_freeze_base_is_the_optimizer_of_the_trained_part(
    problem: Problem, rng: np.random.Generator, style: str, name: str
) -> None:
    """Random gradients everywhere, and those of the base are a thousand times larger.

    So a clip or an average that saw the base would move the trained part otherwise.
    """
    inner, moments = OPTIMIZERS[name]
    tx, tree = jo.freeze_base(inner), one_tree(problem, style)
    alone, before = TRAINED[style](tree), bits(BASE[style](tree))
    start = bits(alone)
    state, inner_state = tx.init(tree), inner.init(alone)
    trained_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(alone))
    assert state_bytes(state) == moments * trained_bytes
    scale = jax.tree.map(lambda t: 1.0 if t else 1e3, jo.trainable_mask(tree))

    @jax.jit
    def step(both: Tree, grads: Tree) -> Tree:
        (tree, state), (alone, inner_state) = both
        updates, state = tx.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
        updates, inner_state = inner.update(TRAINED[style](grads), inner_state, alone)
        return (tree, state), (optax.apply_updates(alone, updates), inner_state)

    both = (tree, state), (alone, inner_state)
    for _ in range(20):
        grads = jax.tree.map(jnp.multiply, random_like(tree, rng), scale)
        both = step(both, grads)
    (tree, state), (alone, _) = both
    assert bits(BASE[style](tree)) == before
    assert bits(TRAINED[style](tree)) != start
    for x, y in zip(
        jax.tree.leaves(TRAINED[style](tree)), jax.tree.leaves(alone), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert state_bytes(state) == moments * trained_bytes


@pytest.mark.parametrize("jit", [True, False])
def test_frozen_leaves_keep_every_bit(jit: bool) -> None:
    """Zeros of negative sign, NaN, and integers, which have no gradient."""
    base = {
        "zero": jnp.array([-0.0, 0.0, jnp.nan, jnp.inf]),
        "half": jnp.array([-0.0, 1e-7], jnp.bfloat16),
        "int": jnp.array([-128, 3, 127], jnp.int8),
    }
    tree = {"params": base, "lora": {"params/c": jnp.ones(3)}}
    grads = jax.tree.map(jnp.ones_like, tree)
    grads["params"]["int"] = np.zeros(3, jax.dtypes.float0)
    tx = jo.freeze_base(optax.adamw(LR, weight_decay=0.1))

    def step(tree: Tree, state: Tree) -> tuple[Tree, Tree]:
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    before = bits(base)
    new, _ = (jax.jit(step) if jit else step)(tree, tx.init(tree))
    assert bits(new["params"]) == before
    assert (new["lora"]["params/c"] < 1).all()


def test_clip_sees_trained_leaves_only() -> None:
    tree = {"params": jnp.full(4, 1e6), "lora": jnp.array([3.0, 4.0])}
    tx = jo.freeze_base(optax.clip_by_global_norm(1.0))
    updates, _ = tx.update(tree, tx.init(tree))
    np.testing.assert_allclose(updates["lora"], [0.6, 0.8], rtol=1e-6)
    assert (updates["params"] == 0).all()


def test_freeze_base_holds_lora_plus_and_decay_mask(problem: Problem) -> None:
    make = partial(optax.adamw, weight_decay=0.1, mask=jo.decay_mask)
    inner = jo.lora_plus(make, LR, RATIO)
    tx, tree = jo.freeze_base(inner), one_tree(problem, "collections")
    updates, _ = tx.update(tree, tx.init(tree), tree)
    adapter = problem.adapter
    expected, _ = inner.update(adapter, inner.init(adapter), adapter)
    assert bits(updates["lora"]) == bits(expected)


def test_freeze_base_with_nothing_to_train_is_an_error(problem: Problem) -> None:
    message = r"nothing to train among 4 leaves.*below a key 'lora'"
    with pytest.raises(ValueError, match=message):
        jo.freeze_base(optax.adam(LR)).init({"params": problem.params})


def test_state_of_freeze_base_is_mapped_and_abstract(problem: Problem) -> None:
    tx, tree = jo.freeze_base(optax.adam(LR)), one_tree(problem, "collections")
    state = jax.eval_shape(tx.init, jax.eval_shape(lambda: tree))
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(tree))
    mapped = optax.tree.map_params(tx, lambda _: "moment", state)
    assert jax.tree.leaves(mapped).count("moment") == 2 * 7


def test_gradients_of_frozen_leaves_are_never_computed(problem: Problem) -> None:
    tx = optax.sgd(LR)
    whole = jo.freeze_base(tx)
    tree = one_tree(problem, "collections")
    loss = partial(loss_of, problem)

    def step(tree: Tree) -> Tree:
        grads = jax.grad(lambda t: loss(t["params"], t["lora"]))(tree)
        updates, _ = whole.update(grads, whole.init(tree), tree)
        return optax.apply_updates(tree, updates)

    def step_alone(params: Tree, adapter: Tree) -> Tree:
        grads = jax.grad(loss, 1)(params, adapter)
        updates, _ = tx.update(grads, tx.init(adapter), adapter)
        return optax.apply_updates(adapter, updates)

    flops = lambda f, *a: jax.jit(f).lower(*a).compile().cost_analysis()["flops"]
    assert flops(step, tree) <= flops(step_alone, *tree.values())
    assert bits(jax.jit(step)(tree)["params"]) == bits(problem.params)


# Norms


def test_adapter_norms_are_those_of_numpy(problem: Problem) -> None:
    norms = jo.adapter_norms(problem.adapter, name="grad")
    expected = {}
    for path, entry in problem.adapter.items():
        if path == "bias":
            expected["grad/bias"] = np.linalg.norm(entry)
            continue
        for side in ("a", "b"):
            flat = np.asarray(getattr(entry, side), np.float64).ravel()
            expected[f"grad/{path}/{side}"] = np.linalg.norm(flat)
    expected["grad"] = np.sqrt(sum(value**2 for value in expected.values()))
    assert norms.keys() == expected.keys() and next(iter(norms)) == "grad"
    for key, value in expected.items():
        np.testing.assert_allclose(norms[key], value, rtol=1e-6)
    np.testing.assert_allclose(norms["grad"], optax.tree.norm(problem.adapter))


def test_norms_of_narrow_arrays_are_accumulated_in_float32() -> None:
    norms = jo.adapter_norms({"w": jnp.full((4096,), 0.1, jnp.bfloat16)})
    exact = 64 * float(jnp.bfloat16(0.1))
    assert norms["norm"].dtype == jnp.float32
    np.testing.assert_allclose(norms["norm"], exact, rtol=1e-6)


# Kernel shape, roles of its axes, and ΔW / scaling written out.
KERNELS = {
    "dense": ((7, 11), ((), (0,), (1,)), "ir,ro->io"),
    "layers": ((5, 7, 11), ((0,), (1,), (2,)), "lir,lro->lio"),
    "transposed": ((11, 7), ((), (1,), (0,)), "ir,ro->oi"),
    "heads": ((7, 3, 11), ((), (0,), (1, 2)), "ir,rhk->ihk"),
    "merge": ((3, 11, 7), ((), (0, 1), (2,)), "hkr,ro->hko"),
    "experts": ((2, 7, 5, 11), ((0, 2), (1,), (3,)), "leir,lero->lieo"),
    "conv": ((3, 5, 7, 11), ((), (0, 1, 2), (3,)), "xyir,ro->xyio"),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


def kernel_and_factors(
    rng: np.random.Generator, name: str, dtype: Any = jnp.float32
) -> tuple[jax.Array, jlora.LoraFactors]:
    shape, roles, _ = KERNELS[name]
    axes = jlora.KernelAxes(*roles)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    a, b = map(draw, axes.factor_shapes(shape, 2))
    kernel = (10 * draw(shape)).astype(dtype)
    return kernel, jlora.LoraFactors(a, b, axes, 1.5)


def squares(kernel: Any, factors: jlora.LoraFactors, name: str) -> tuple[float, float]:
    """Returns ‖ΔW‖² and ‖W‖² of the formed matrices in float64."""
    a, b = (np.asarray(x, np.float64) for x in (factors.a, factors.b))
    delta = factors.scaling * np.einsum(KERNELS[name][2], a, b)
    assert delta.shape == kernel.shape
    return (delta**2).sum(), (np.asarray(kernel).astype(np.float64) ** 2).sum()


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_delta_norms_are_those_of_the_formed_delta(
    rng: np.random.Generator, dtype: str
) -> None:
    made = {name: kernel_and_factors(rng, name, DTYPES[dtype]) for name in KERNELS}
    params = {"net": {name: kernel for name, (kernel, _) in made.items()}}
    params["net"]["other"] = jnp.ones(3)
    adapter = {f"net/{name}": factors for name, (_, factors) in made.items()}
    norms = jo.delta_norms(params, adapter)
    assert list(norms) == ["delta", *(f"delta/{path}" for path in adapter)]
    found = {name: squares(*made[name], name) for name in KERNELS}
    for name, (delta, base) in found.items():
        ratio = np.sqrt(delta / base)
        np.testing.assert_allclose(norms[f"delta/net/{name}"], ratio, rtol=1e-5)
    delta, base = np.sum(list(found.values()), axis=0)
    np.testing.assert_allclose(norms["delta"], np.sqrt(delta / base), rtol=1e-5)


@pytest.mark.parametrize("name", list(KERNELS))
def test_delta_norms_form_no_kernel(rng: np.random.Generator, name: str) -> None:
    """Nothing of the kernel's shape, not even a copy or a square of the base."""
    kernel, factors = kernel_and_factors(rng, name, jnp.bfloat16)
    args, (shape, (batch, _, _), _) = ({"w": kernel}, {"w": factors}), KERNELS[name]
    shapes = slice_shapes(shape, batch)
    program = jax.make_jaxpr(jo.delta_norms)(*args)
    assert len(program.eqns) == 1, "one jitted call"
    assert materialized(program, (), shapes) == []
    naive = lambda params, adapter: jnp.linalg.norm(jlora.delta(adapter["w"]).ravel())
    assert materialized(jax.make_jaxpr(naive)(*args), (), shapes)


def test_delta_of_a_whole_leaf_is_its_change() -> None:
    params = {"w": jnp.full((3, 4), 2.0), "c": jnp.full(5, 2.0, jnp.bfloat16)}
    adapter = {"w": jnp.full((3, 4), 2.5), "c": jnp.full(5, 1.0)}
    norms = jo.delta_norms(params, adapter)
    found = [norms["delta/w"], norms["delta/c"]]
    np.testing.assert_allclose(found, [0.25, 0.5], rtol=1e-6)


def test_zero_deltas_and_zero_kernels_do_not_spoil_the_log() -> None:
    axes = jlora.KernelAxes((), (0,), (1,))
    still = jlora.LoraFactors(jnp.ones((3, 2)), jnp.zeros((2, 4)), axes, 1.0)
    moved = dataclasses.replace(still, b=jnp.ones((2, 4)))
    params = {"w": jnp.ones((3, 4)), "zero": jnp.zeros((3, 4))}
    norms = jo.delta_norms(params, {"w": still, "zero": still})
    assert set(map(float, norms.values())) == {0.0}
    assert jo.delta_norms(params, {"zero": moved})["delta"] == jnp.inf
    assert list(jo.delta_norms(params, {})) == ["delta"]


def test_delta_norms_refuse_an_adapter_of_other_params(problem: Problem) -> None:
    with pytest.raises(jlora.AdapterError, match="'heads' is no path"):
        jo.delta_norms({"bias": problem.params["bias"]}, problem.adapter)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_norms_of_sharded_arrays(problem: Problem, kind: AxisType) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
    place = lambda leaf, *spec: jax.device_put(
        leaf, NamedSharding(mesh, PartitionSpec(*spec))
    )
    params = jax.tree.map(place, problem.params)
    adapter = jax.tree.map(place, problem.adapter)
    params["out"] = place(params["out"], "x", None)
    params["layers"] = place(params["layers"], "x")
    out, layers = adapter["out"], adapter["layers"]
    adapter["out"] = dataclasses.replace(out, a=place(out.a, "x"))
    adapter["layers"] = jax.tree.map(lambda leaf: place(leaf, "x"), layers)
    for norms in (jo.delta_norms, lambda _, adapter: jo.adapter_norms(adapter)):
        with jax.set_mesh(mesh):
            found = norms(params, adapter)
        expected = norms(problem.params, problem.adapter)
        assert found.keys() == expected.keys()
        for key in found:
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-5)


def test_norms_under_jit_and_of_abstract_trees(problem: Problem) -> None:
    args = problem.params, problem.adapter
    norms = jo.delta_norms(*args) | jo.adapter_norms(problem.adapter)
    both = lambda p, a: jo.delta_norms(p, a) | jo.adapter_norms(a)
    abstract = jax.eval_shape(both, *jax.eval_shape(lambda: args))
    assert abstract.keys() == norms.keys()
    assert {(s.shape, s.dtype.name) for s in abstract.values()} == {((), "float32")}
    for key, value in jax.jit(both)(*args).items():
        np.testing.assert_allclose(value, norms[key], rtol=1e-6)


# Training loops


def train_state_losses(problem: Problem, tx: Any, steps: int) -> list[float]:
    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, base: Tree) -> tuple[TrainState, jax.Array]:
        def loss(adapter: Tree) -> jax.Array:
            out = state.apply_fn(base, adapter, problem.x)
            return jnp.mean((out - problem.y) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    adapter = jax.tree.map(jnp.copy, problem.adapter)
    state = TrainState.create(apply_fn=problem.lora.apply, params=adapter, tx=tx)
    losses = []
    for _ in range(steps):
        state, value = step(state, problem.params)
        losses.append(float(value))
    assert step._cache_size() <= 2  # `create` starts with a Python int as its step
    assert jax.tree.structure(state.params) == jax.tree.structure(adapter)
    return losses


def nnx_losses(problem: Problem, tx: Any, steps: int) -> list[float]:
    trainable = jax.tree.map(nnx.Param, problem.adapter)
    optimizer = nnx.Optimizer(trainable, tx, wrt=nnx.Param)

    @nnx.jit
    def step(trainable: Tree, optimizer: nnx.Optimizer, base: Tree) -> jax.Array:
        loss = lambda trainable: loss_of(problem, base, as_pure(trainable))
        value, grads = nnx.value_and_grad(loss)(trainable)
        optimizer.update(trainable, grads)
        return value

    args = trainable, optimizer, problem.params
    losses = [float(step(*args)) for _ in range(steps)]
    kept = jax.tree.structure(as_pure(trainable))
    assert kept == jax.tree.structure(problem.adapter)
    return losses


def test_train_state_and_nnx_optimizer_take_the_same_steps(problem: Problem) -> None:
    before = bits(problem.params)
    clip = optax.clip_by_global_norm(1.0)
    make = partial(optax.adamw, weight_decay=0.01, mask=jo.decay_mask)
    tx = optax.chain(clip, jo.lora_plus(make, SCHEDULE, RATIO))
    linen = train_state_losses(problem, tx, 20)
    assert linen[-1] < 0.7 * linen[0]
    np.testing.assert_allclose(nnx_losses(problem, tx, 20), linen, rtol=1e-3)
    assert bits(problem.params) == before


def test_freeze_base_in_an_nnx_module(problem: Problem) -> None:
    class Both(nnx.Module):
        def __init__(self) -> None:
            self.base = nnx.data(jax.tree.map(nnx.Param, problem.params))
            self.lora = nnx.data(jax.tree.map(nnx.Param, problem.adapter))

    both = Both()
    optimizer = nnx.Optimizer(both, jo.freeze_base(optax.adam(LR)), wrt=nnx.Param)

    @nnx.jit
    def step(both: Both, optimizer: nnx.Optimizer) -> jax.Array:
        loss = lambda both: loss_of(problem, as_pure(both.base), as_pure(both.lora))
        value, grads = nnx.value_and_grad(loss)(both)
        optimizer.update(both, grads)
        return value

    losses = [float(step(both, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert bits(as_pure(both.base)) == bits(problem.params)
    trained = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.adapter))
    assert state_bytes(as_pure(optimizer.opt_state)) == 2 * trained


def test_donated_adapter_and_state_are_reused(problem: Problem) -> None:
    """A buffer that could not be donated would be a warning, which is an error here."""
    tx = jo.lora_plus(optax.adam, LR, RATIO)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        grads = jax.grad(partial(loss_of, problem), 1)(params, adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    adapter, state = problem.adapter, tx.init(problem.adapter)
    given = jax.tree.leaves((adapter, state))
    for _ in range(5):
        adapter, state = step(adapter, state, problem.params)
    assert all(leaf.is_deleted() for leaf in given)
    assert step._cache_size() == 1

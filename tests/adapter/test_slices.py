"""Slices of a fused kernel, as loralib's `MergedLinear(enable_lora=[...])` has them.

The reference is `MergedLinear`'s own formula in NumPy: each enabled part of the outputs
has an `a` and a `b`, and the rest of the delta is zero.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora
import jlora.checkpoint
import jlora.optim
import jlora.peft

pytestmark = pytest.mark.usefixtures("fast_compile")

RANK, ALPHA, IN = 2, 3.0, 5
# Grouped-query attention: q is wider than k and v; k is not adapted.
GQA = ((0, 8), (11, 14))
WIDTH = 14


def fused(params: Any, x: jax.Array) -> jax.Array:
    """Query, key and value in one product, put to different uses."""
    q, k, v = jnp.split(x @ params["qkv"], [8, 11], axis=-1)
    return jnp.concatenate([jnp.tanh(q), k * k, jnp.sin(v)], axis=-1)


def make(getkey: Any, model: Any, shape: tuple[int, ...], slices: Any) -> Any:
    """Params, an input, and an adapter whose `b` is not zero."""
    params = {"qkv": 0.3 * jax.random.normal(getkey(), shape)}
    x = jax.random.normal(getkey(), (4, IN))
    config = jlora.LoraConfig("qkv", rank=RANK, alpha=ALPHA, slices=slices)
    lora = jlora.lora(model, config)
    adapter = lora.init(getkey(), params, x)
    entry = adapter["qkv"]
    b = jax.random.normal(getkey(), entry.b.shape)
    return lora, params, {"qkv": dataclasses.replace(entry, b=b)}, x


def delta_of(a: jax.Array, b: jax.Array, slices: Any, width: int) -> jax.Array:
    """The delta (in, width), one slice after the other."""
    blocks, start = [], 0
    for i, (first, stop) in enumerate(slices):
        own = a[:, i * RANK : (i + 1) * RANK] @ b[:, start : start + stop - first]
        blocks.append(jnp.pad(own, ((0, 0), (first, width - stop))))
        start += stop - first
    return ALPHA / RANK * sum(blocks[1:], blocks[0])


def test_values_and_gradients(getkey):
    lora, params, adapter, x = make(getkey, fused, (IN, WIDTH), GQA)
    entry = adapter["qkv"]
    assert (entry.a.shape, entry.b.shape) == ((IN, 2 * RANK), (RANK, 11))
    assert entry.rank == RANK
    weights = jax.random.normal(getkey(), (4, WIDTH))

    def wanted(arrays: Any) -> jax.Array:
        kernel = params["qkv"] + delta_of(*arrays, GQA, WIDTH)
        return jnp.sum(weights * fused({"qkv": kernel}, x))

    def actual(adapter: Any) -> jax.Array:
        return jnp.sum(weights * lora.apply(params, adapter, x))

    value, grads = jax.value_and_grad(actual)(adapter)
    expected, gradients = jax.value_and_grad(wanted)((entry.a, entry.b))
    assert_close(value, expected, 1e-5)
    assert_close((grads["qkv"].a, grads["qkv"].b), gradients, 1e-4)
    merged = jlora.merge(params, adapter)
    assert_close(
        merged["qkv"] - params["qkv"], delta_of(entry.a, entry.b, GQA, WIDTH), 1e-5
    )
    untouched = np.asarray(merged["qkv"])[:, 8:11]
    assert np.array_equal(untouched, np.asarray(params["qkv"])[:, 8:11])


def test_the_delta_of_slices_is_that_of_their_factors(getkey):
    _, _, adapter, _ = make(getkey, fused, (IN, WIDTH), GQA)
    entry = adapter["qkv"]
    wanted = delta_of(entry.a, entry.b, GQA, WIDTH)
    assert_close(jlora.delta(entry.lowered()), wanted, 1e-5)
    with pytest.raises(TypeError, match=r"got SlicedFactors.*lowered\(\)"):
        jlora.delta(entry)


def test_slices_of_several_output_axes(getkey):
    """A kernel (in, 3, heads, features): the parts of q and v."""
    model = lambda params, x: jnp.tanh(jnp.einsum("bi,ithd->bthd", x, params["qkv"]))
    size, slices = 2 * 7, ((0, 14), (28, 42))
    lora, params, adapter, x = make(getkey, model, (IN, 3, 2, 7), slices)
    entry = adapter["qkv"]
    change = delta_of(entry.a, entry.b, slices, 3 * size).reshape(IN, 3, 2, 7)
    wanted = model({"qkv": params["qkv"] + change}, x)
    assert_close(lora.apply(params, adapter, x), wanted, 1e-5)
    assert np.array_equal(change[:, 1], np.zeros((IN, 2, 7)))


def test_slices_of_a_scanned_stack(getkey):
    def model(params: Any, x: jax.Array) -> jax.Array:
        step = lambda total, kernel: (total + jnp.tanh(x @ kernel), None)
        return jax.lax.scan(step, jnp.zeros((4, WIDTH)), params["qkv"])[0]

    lora, params, adapter, x = make(getkey, model, (3, IN, WIDTH), GQA)
    entry = adapter["qkv"]
    assert entry.a.shape == (3, IN, 2 * RANK)
    change = jnp.stack(
        [delta_of(a, b, GQA, WIDTH) for a, b in zip(entry.a, entry.b, strict=True)]
    )
    wanted = model({"qkv": params["qkv"] + change}, x)
    assert_close(lora.apply(params, adapter, x), wanted, 1e-5)


def test_the_plan_counts_what_is_trained(getkey):
    lora, params, adapter, x = make(getkey, fused, (IN, WIDTH), GQA)
    plan = lora.plan(params, x)
    assert plan.trainable == sum(v.size for v in jax.tree.leaves(adapter))
    assert "2 × 2 slices" in str(plan)
    assert plan.memory(optimizer=optax.sgd(0.1))
    shapes = jax.eval_shape(lora.init, getkey(), params, x)
    assert jax.tree.structure(shapes) == jax.tree.structure(adapter)


def test_a_fresh_adapter_changes_nothing_and_trains(getkey):
    lora, params, _, x = make(getkey, fused, (IN, WIDTH), GQA)
    adapter = lora.init(getkey(), params, x)
    assert_close(lora.apply(params, adapter, x), fused(params, x), 1e-6)
    tx = jlora.optim.lora_plus(optax.adam, 1e-2)
    loss = lambda adapter: jnp.mean((lora.apply(params, adapter, x) - 1) ** 2)
    state, before = tx.init(adapter), loss(adapter)
    for _ in range(5):
        updates, state = tx.update(jax.grad(loss)(adapter), state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    assert loss(adapter) < before


def test_checkpoint_and_peft(tmp_path, getkey):
    """PEFT gets a block-diagonal `b`, which is the same delta."""
    lora, params, adapter, x = make(getkey, fused, (IN, WIDTH), GQA)
    jlora.checkpoint.save(tmp_path / "a", adapter, config=lora.configs)
    restored = jlora.checkpoint.restore(tmp_path / "a")
    assert restored["qkv"].slices == GQA
    assert_close(restored, adapter, 0.0)
    plan = lora.plan(params, x)
    names = [("qkv", "attn.qkv")]
    jlora.peft.save(tmp_path / "p", plan, adapter, lora.configs, names)
    _, loaded = jlora.peft.load(tmp_path / "p", plan, names)
    wanted = jlora.merge(params, adapter)["qkv"]
    assert_close(jlora.merge(params, loaded)["qkv"], wanted, 1e-6)


def test_shardings(getkey):
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    lora, params, adapter, x = make(getkey, fused, (IN, WIDTH), GQA)
    placed = jlora.shardings({"qkv": P(None, "model")}, adapter, mesh=mesh)["qkv"]
    assert (placed.a, placed.b) == (NamedSharding(mesh, P()),) * 2
    sharded = {
        "qkv": jax.device_put(params["qkv"], NamedSharding(mesh, P(None, "model")))
    }
    own = jax.device_put(adapter, {"qkv": placed})
    actual = jax.jit(lora.apply)(sharded, own, x)
    assert_close(np.asarray(actual), np.asarray(lora.apply(params, adapter, x)), 1e-5)


def test_norms_and_labels(getkey):
    _lora, params, adapter, _x = make(getkey, fused, (IN, WIDTH), GQA)
    labels = jlora.optim.factor_labels(adapter)["qkv"]
    assert (labels.a, labels.b) == ("a", "b")
    change = delta_of(adapter["qkv"].a, adapter["qkv"].b, GQA, WIDTH)
    wanted = jnp.linalg.norm(change) / jnp.linalg.norm(params["qkv"])
    norms = jlora.optim.delta_norms(params, adapter)
    np.testing.assert_allclose(norms["delta"], wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "slices", [[], [(3, 3)], [(4, 8), (0, 2)], [(0, 5), (4, 8)], [(-1, 3)]]
)
def test_bad_slices(slices: Any):
    with pytest.raises(ValueError, match=r"LoraConfig.slices"):
        jlora.LoraConfig("qkv", slices=slices)


def test_slices_beyond_the_kernel(getkey):
    params, x = {"qkv": jnp.ones((IN, WIDTH))}, jnp.ones((4, IN))
    plan = lambda **kw: jlora.lora(fused, jlora.LoraConfig("qkv", **kw)).plan(params, x)
    with pytest.raises(jlora.TargetError, match="14 outputs, and `slices` end at 15"):
        plan(rank=2, slices=[(0, 15)])


def test_the_config_survives_json():
    config = jlora.LoraConfig("qkv", slices=[[0, 8], [11, 14]])
    assert config.slices == GQA
    assert jlora.LoraConfig.from_dict(config.to_dict()) == config


def test_an_adapter_of_another_kernel_is_refused(getkey):
    lora, _params, adapter, x = make(getkey, fused, (IN, WIDTH), GQA)
    wide = {"qkv": jnp.ones((IN, WIDTH + 1))}
    with pytest.raises(jlora.AdapterError, match=r"'qkv' \(5, 15\) has SlicedFactors"):
        lora.apply(wide, adapter, x)

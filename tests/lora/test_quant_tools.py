"""`jlora.quantize`, and what else of jlora sees a quantised base."""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora
import jlora.checkpoint
import jlora.linen
import jlora.nnx
import jlora.optim
import jlora.peft
from jlora._checkpoint.fingerprint import differences, fingerprint

qwix = pytest.importorskip("qwix")
import jlora.quant  # noqa: E402

pytestmark = pytest.mark.usefixtures("fast_compile")

Tree = Any
normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
dense = lambda leaf: qwix.dequantize(leaf)
QTYPES = ("nf4", "int8", "int4", "fp8", jnp.int8, "int3", jnp.float8_e5m2)


def model(params: Tree, ids: jax.Array) -> jax.Array:
    """A table, two layers of a stack, and a head."""
    body = lambda x, w: (jnp.tanh(x @ w), None)
    x, _ = jax.lax.scan(body, params["embedding"][ids], params["stack"])
    return x @ params["head"] + params["bias"][None]


def make_params(dtype: Any = jnp.float32) -> Tree:
    shapes = {
        "embedding": (11, 16),
        "stack": (2, 16, 16),
        "head": (16, 6),
        "bias": (6,),
    }
    made = {n: 0.3 * normal(i, *s) for i, (n, s) in enumerate(shapes.items())}
    return jax.tree.map(lambda v: v.astype(dtype), made)


IDS = jnp.array([3, 8, 0])
LORA = jlora.lora(model, jlora.LoraConfig("embedding|stack", rank=2, alpha=3.0))


def make_adapter(params: Tree, lora: jlora.Lora = LORA) -> Tree:
    adapter = lora.init(jax.random.key(5), params, IDS)
    moved = lambda f: dataclasses.replace(f, b=0.3 * normal(9, *f.b.shape))
    return {path: moved(factors) for path, factors in adapter.items()}


# quantize


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("qtype", QTYPES, ids=str)
def test_a_plan_chooses_targets_and_their_tiles(qtype: Any, dtype: Any):
    params = make_params(dtype)
    found = jlora.quantize(params, LORA.plan(params, IDS), qtype, tile=8)
    assert found["head"] is params["head"] and found["bias"] is params["bias"]
    # A row of the table has its own scales, and so has each layer and each column.
    assert found["embedding"].scale.shape == (11, 2)
    assert found["stack"].scale.shape == (2, 2, 16)
    for name in ("embedding", "stack"):
        assert found[name].dtype == dtype
        assert_close(LORA_dense(found[name]), dense(found[name]), 0.0)
        bound = {"int8": 0.02, jnp.int8: 0.02}.get(qtype, 0.4)
        assert_close(
            dense(found[name]).astype(jnp.float32),
            params[name].astype(jnp.float32),
            bound,
        )


def LORA_dense(leaf: Any) -> jax.Array:
    """What a function sees of a quantised leaf."""
    lora = jlora.lora(lambda p: p["w"], jlora.LoraConfig("w"))
    return lora.apply({"w": leaf}, {})


@pytest.mark.parametrize(
    "shape, name, scales",
    [
        ((128, 5), "kernel", (2, 5)),
        ((96, 5), "kernel", (2, 5)),  # tiles of 48
        ((13, 5), "kernel", (1, 5)),
        ((134, 5), "kernel", (67, 5)),  # 67 is larger than a tile, and prime
        ((11, 128), "embedding", (11, 2)),
        ((3, 3, 32, 5), "kernel", (3, 3, 1, 5)),
        ((4, 128, 5), "experts", (4, 2, 5)),
    ],
)
def test_tiles_divide_the_input_axes(shape, name, scales):
    params = {"conv": {name: normal(0, *shape)}}
    found = jlora.quantize(params, name, "int8")["conv"][name]
    assert found.scale.shape == scales


def test_a_tile_runs_on_into_the_next_input_axis():
    fn = lambda p, x: jnp.einsum("bhd,hdo->bo", x, p["w"])
    params, x = {"w": normal(0, 6, 8, 5)}, normal(1, 3, 6, 8)
    plan = jlora.lora(fn, jlora.LoraConfig("w", rank=2)).plan(params, x)
    shape = lambda tile: (
        jlora.quantize(params, plan, "int8", tile=tile)["w"].scale.shape
    )
    assert shape(16) == (3, 1, 5)
    assert shape(64) == (1, 1, 5)
    assert shape(None) == (1, 1, 5)
    assert shape(4) == (6, 2, 5)


def test_patterns_take_kernels_that_are_not_adapted():
    params = make_params()
    found = jlora.quantize(params, ["head", ".*"], "int8", dtype=jnp.bfloat16)
    assert not isinstance(found["bias"], qwix.QArray)
    assert {found[n].dtype for n in ("embedding", "stack", "head")} == {
        jnp.bfloat16.dtype
    }


def test_abstract_params_stay_abstract():
    params = jax.eval_shape(make_params)
    abstract = jlora.quantize(params, ".*", "nf4")
    real = jlora.quantize(make_params(), ".*", "nf4")
    traced = jax.eval_shape(lambda p: jlora.quantize(p, ".*", "nf4"), params)
    shapes = lambda tree: jax.tree.map(lambda v: (v.shape, v.dtype), tree)
    assert shapes(abstract) == shapes(real) == shapes(traced)
    assert str(LORA.plan(abstract, IDS)) == str(LORA.plan(real, IDS))


def test_numpy_params():
    params = jax.tree.map(np.asarray, make_params())
    found = jlora.quantize(params, ".*", "int8")
    expected = jlora.quantize(make_params(), ".*", "int8")
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))


@pytest.mark.parametrize(
    "args, error, match",
    [
        (("haed",), jlora.TargetError, "'haed' matches none .* Nearest: 'head'"),
        (("bias",), jlora.TargetError, "of two or more axes"),
        (("head", "nf5"), ValueError, "`qtype` must be one of fp8, nf4"),
        (("head", jnp.float32), ValueError, "got float32"),
    ],
)
def test_what_cannot_be_quantised(args, error, match):
    with pytest.raises(error, match=match):
        jlora.quantize(make_params(), *args)


@pytest.mark.parametrize("settings", [{"tile": 0}, {"tile": True}, {"dtype": "int8"}])
def test_settings_of_no_use(settings):
    with pytest.raises(ValueError, match=rf"`{next(iter(settings))}` must be"):
        jlora.quantize(make_params(), "head", **settings)


def test_twice_and_other_params_are_refused():
    params = make_params()
    plan = LORA.plan(params, IDS)
    once = jlora.quantize(params, plan)
    with pytest.raises(ValueError, match=r"'stack'.* are quantised already"):
        jlora.quantize(once, plan)
    with pytest.raises(
        jlora.TargetError, match=r"'embedding' \(11, 16\), the params none"
    ):
        jlora.quantize({"stack": params["stack"]}, plan)


# boxes


def test_linen_boxes():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            make = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return nn.Dense(6, kernel_init=make)(x)

    x = normal(1, 3, 16)
    variables = Block().init(jax.random.key(0), x)
    found = jlora.quantize(variables, "kernel", "int8", tile=8)
    kernel = found["params"]["Dense_0"]["kernel"]
    assert kernel.names == ("in", "out") and isinstance(kernel.value, qwix.QArray)
    lora = jlora.lora(Block().apply, jlora.LoraConfig("kernel", rank=2))
    adapter = lora.init(jax.random.key(1), found, x)
    assert list(adapter) == ["params/Dense_0/kernel"]
    merged = jlora.merge(found, adapter, dequantize=True)
    assert_close(lora.apply(found, adapter, x), Block().apply(merged, x), 1e-5)
    wrapped = jlora.linen.wrap(Block(), jlora.LoraConfig("kernel", rank=2))
    both = {**found, "lora": adapter}
    assert_close(wrapped.apply(both, x), Block().apply(merged, x), 1e-5)
    assert_close(wrapped.merge(both, dequantize=True), merged, 0.0)


def test_nnx_variables():
    net, x = nnx.Linear(16, 6, rngs=nnx.Rngs(0)), normal(1, 3, 16)
    config = jlora.LoraConfig("kernel", rank=2)
    lora, params, adapter, rest = jlora.nnx.wrap(net, config, x)
    found = jlora.quantize(params, "kernel", "int8", tile=8)
    assert isinstance(found["kernel"].get_raw_value(), qwix.QArray)
    actual, _ = lora.apply(found, adapter, rest, x)
    merged = jlora.merge(found, adapter, dequantize=True)
    assert_close(actual, x @ merged["kernel"][...] + params["bias"][...][None], 1e-5)


# initialisers that move the base


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "loftq", "corda"])
def test_what_moves_the_base_begins_before_it_is_quantised(name: str):
    """All offenders are named, with their codes."""
    params = make_params()
    adapter, base = make_adapter(params), jlora.quantize(params, ".*", "int8")
    stats = LORA.inputs(params, IDS)
    more = {"loftq": {"quantize": jnp.round}, "corda": {"stats": stats}}.get(name, {})
    told = r"'embedding' is quantised \(int8\).*\n.*'stack' is quantised.*before quant"
    with pytest.raises(jlora.AdapterError, match=told):
        getattr(jlora, name)(base, adapter, **more)
    with pytest.raises(jlora.AdapterError, match=told):
        jlora.lora_ga(base, adapter, params)


# merge


def test_merging_into_a_quantised_kernel_is_asked_for():
    params = jlora.quantize(make_params(), ".*", "nf4", tile=8)
    adapter = make_adapter(params)
    with pytest.raises(
        jlora.UnsupportedFeatureError, match=r"'embedding' \(nf4\), 'stack' \(nf4\) are"
    ):
        jlora.merge(params, adapter)
    merged = jlora.merge(params, adapter, dequantize=True)
    plain = {n: dense(v) if n != "bias" else v for n, v in params.items()}
    assert_close(merged, jlora.merge(plain, adapter), 1e-6)
    assert_close(LORA.apply(params, adapter, IDS), model(merged, IDS), 1e-5)
    abstract = jax.eval_shape(lambda p: p, params)
    shapes = jlora.merge(abstract, adapter, dequantize=True)
    assert shapes["embedding"].shape == (11, 16)


def test_a_quantised_kernel_that_is_not_adapted_is_no_obstacle_to_merging():
    params = jlora.quantize(make_params(), "head", "nf4", tile=8)
    adapter = make_adapter(params)
    merged = jlora.merge(params, adapter)
    assert merged["head"] is params["head"]
    assert_close(LORA.apply(merged, {}, IDS), LORA.apply(params, adapter, IDS), 1e-5)


# plan and memory


def test_the_plan_names_the_qtypes_and_counts_the_bytes():
    params = jlora.quantize(make_params(), "stack|head", "nf4", tile=8)
    plan = LORA.plan(params, IDS)
    text = str(plan)
    assert "2×16×16 nf4" in text and "11×16 " in text and "11×16 nf4" not in text
    codes, scales = (512 + 96) // 2, 4 * (2 * 2 * 16 + 2 * 6)
    assert f"quantised: 2 nf4, {codes + scales} B instead of 2.43 kB" in text
    assert "not adapted: head" in text
    assert "quantised: 2 nf4" in plan._repr_html_()
    rest = 4 * (11 * 16 + 6)
    memory = plan.memory(optimizer=optax.adam(1e-3))
    assert memory.base == memory.full_checkpoint == codes + scales + rest
    assert memory.full_gradients == 4 * (512 + 96 + 11 * 16 + 6)
    assert plan.total == 512 + 96 + 11 * 16 + 6


# errors


def test_a_quantised_leaf_is_not_trained_whole():
    params = jlora.quantize(make_params(), "head", "nf4")
    configs = [
        jlora.LoraConfig("stack", rank=2),
        jlora.LoraConfig("head|bias", full=True),
    ]
    with pytest.raises(jlora.TargetError, match=r"'head', which is quantised \(nf4\)"):
        jlora.lora(model, configs).plan(params, IDS)


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_derivative_of_a_quantised_kernel_is_refused(outer):
    params = jlora.quantize(make_params(), "head", "nf4")
    adapter = make_adapter(params)
    loss = outer(lambda params: LORA.apply(params, adapter, IDS).sum())
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"kernel 'head' \(nf4\)"):
        jax.grad(loss, allow_int=True)(params)
    # That of the others is not.
    jax.grad(lambda bias: loss({**params, "bias": bias}))(params["bias"])


def test_unknown_qtypes_and_tiles_are_refused():
    params = jlora.quantize(make_params(), "head", "int8", tile=8)
    head = params["head"]
    for change, match in [
        ({"qtype": "nf3"}, "'head' has the qtype 'nf3'; known are nf4"),
        (
            {"scale": jnp.ones((3, 6))},
            r"'head' \(16, 6\) has a scale of shape \(3, 6\)",
        ),
        ({"scale": jnp.ones((2, 6), int)}, "scales of int32"),
    ]:
        broken = {**params, "head": dataclasses.replace(head, **change)}
        with pytest.raises(jlora.UnsupportedFeatureError, match=match):
            LORA.plan(broken, IDS)


def test_zero_points():
    w = normal(0, 16, 6)
    q = qwix.quantize(
        w, "int8", tiled_axes={0: 8}, channelwise_axes=[1], calibration_method="minmax"
    )
    assert q.zero_point is not None
    assert_close(LORA_dense(q), dense(q), 0.0)
    lora = jlora.lora(lambda p, i: p["w"][i] @ p["w"].T, jlora.LoraConfig("w", rank=2))
    adapter = lora.init(jax.random.key(0), {"w": q}, IDS)
    expected = dense(q)[IDS] @ dense(q).T
    assert_close(lora.apply({"w": q}, adapter, IDS), expected, 1e-5)


# the rest of jlora


def test_fingerprints_tell_quantised_bases_apart():
    plain = make_params()
    prints = {
        name: fingerprint(params, ["head", "stack"])
        for name, params in {
            "plain": plain,
            "nf4": jlora.quantize(plain, "head", "nf4", tile=8),
            "tiles": jlora.quantize(plain, "head", "nf4", tile=16),
            "int8": jlora.quantize(plain, "head", "int8", tile=8),
        }.items()
    }
    told = lambda a, b: differences(prints[a], prints[b], ["head", "stack"])
    assert told("nf4", "nf4") == []
    assert told("plain", "nf4") == [
        "'head' has dtype nf4 of float32, and had float32",
    ]
    assert told("nf4", "int8") == [
        "'head' has dtype int8 of float32, and had nf4 of float32"
    ]
    assert "other values" in told("nf4", "tiles")[0]


def test_a_checkpoint_knows_how_its_base_was_quantised(tmp_path):
    plain = make_params()
    nf4, int8 = (jlora.quantize(plain, "stack", q, tile=8) for q in ("nf4", "int8"))
    adapter = make_adapter(nf4)
    jlora.checkpoint.save(tmp_path, adapter, config=LORA.configs, base=nf4)
    found = jlora.checkpoint.restore(tmp_path, base=nf4)
    assert_close(found, adapter, 0.0)
    for other, told in ((plain, "float32"), (int8, "int8 of float32")):
        match = f"'stack' has dtype {told}, and had nf4 of float32"
        with pytest.raises(jlora.BaseMismatchError, match=match):
            jlora.checkpoint.restore(tmp_path, base=other)


def test_torch_gets_dense_kernels():
    params = {"params": {"out": {"kernel": normal(0, 16, 6)}}}
    found = jlora.quantize(params, "kernel", "int8")
    (tensor,) = jlora.peft.params_to_torch(found).values()
    expected = dense(found["params"]["out"]["kernel"]).T
    assert_close(jnp.asarray(tensor), expected, 0.0)


def test_norms_of_a_quantised_kernel_are_those_of_the_dense_one():
    params = jlora.quantize(make_params(), ".*", "int8", tile=8)
    adapter = make_adapter(params)
    plain = jlora.merge(params, {}, dequantize=True)
    norms = jlora.optim.delta_norms
    assert_close(norms(params, adapter), norms(plain, adapter), 1e-6)


# meshes


@pytest.mark.parametrize("qtype", ["nf4", "int8"])
def test_sharded_params_keep_their_shardings(qtype: str):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    specs = {
        "embedding": P("tensor", "fsdp"),
        "stack": P(None, "fsdp", "tensor"),
        "head": P("fsdp", "tensor"),
        "bias": P(),
    }
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    single = make_params()
    single["embedding"] = normal(1, 12, 16)
    params = jax.device_put(single, places)
    found = jlora.quantize(params, ".*", qtype, tile=4)
    expected = jlora.quantize(single, ".*", qtype, tile=4)
    assert_close(jax.tree.map(as_float, found), jax.tree.map(as_float, expected), 0.0)
    for name in ("embedding", "stack", "head"):
        assert found[name].qvalue.sharding.is_equivalent_to(
            places[name], len(specs[name])
        )
        # Four tiles along what is divided by four.
        assert found[name].scale.sharding.is_equivalent_to(
            places[name], len(specs[name])
        )
    abstract = jax.eval_shape(lambda p: jlora.quantize(p, ".*", qtype, tile=4), params)
    placed = jlora.quant.shardings(abstract, places)
    again = jax.device_put(expected, placed)
    same = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert jax.tree.all(jax.tree.map(same, again, found))
    # And a step on them is that on one device.
    adapter = make_adapter(expected)
    sharded = jax.device_put(adapter, jlora.shardings(found, adapter))
    assert tuple(sharded["stack"].a.sharding.spec) == (None, "fsdp")
    loss = lambda a, p: (LORA.apply(p, a, IDS) ** 2).sum()
    step = jax.jit(jax.value_and_grad(loss))
    assert_close(step(sharded, found), step(adapter, expected), 1e-5)
    each = LORA.plan(found, IDS).memory(optimizer=optax.sgd(1.0))
    whole = LORA.plan(expected, IDS).memory(optimizer=optax.sgd(1.0))
    assert each.devices == 8 and each.base < whole.base / 7


def as_float(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32)


def test_scales_that_the_mesh_does_not_divide_are_whole():
    mesh = jax.make_mesh((8,), ("model",), (AxisType.Auto,))
    place = NamedSharding(mesh, P("model"))
    w = jax.device_put(normal(0, 16, 6), place)
    found = jlora.quantize({"w": w}, "w", "int8", tile=16)["w"]
    assert found.qvalue.sharding.is_equivalent_to(place, 2)
    assert found.scale.sharding.is_fully_replicated


def test_without_qwix_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    monkeypatch.delitem(sys.modules, "jlora.quant", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'jlora\[quant\]'"):
        jlora.quantize(make_params(), "head")

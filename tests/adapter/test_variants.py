"""What is trained beside factors: biases, and some rows of a table."""

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

# --- biases, as loralib's `mark_only_lora_as_trainable(bias=...)` has them ---


def layers(params: Any, x: jax.Array) -> jax.Array:
    """Two dense layers with a norm between them."""
    for name in ("one", "two"):
        layer = params[name]
        y = x @ layer["kernel"]
        x = jnp.tanh(y + layer["bias"][None])
        if name == "one":
            x = x * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    return x


def dense(i: int, o: int) -> dict[str, jax.Array]:
    """A layer of ones."""
    return {"kernel": jnp.full((i, o), 0.1), "bias": jnp.zeros(o)}


LAYERS = {
    "one": dense(5, 7),
    "norm": {"scale": jnp.ones(7), "bias": jnp.zeros(7)},
    "two": dense(7, 3),
}
X = jnp.linspace(-1.0, 1.0, 20).reshape(4, 5)


@pytest.mark.parametrize(
    ("bias", "wanted"),
    [
        ("none", []),
        ("adapted", ["one/bias"]),
        ("all", ["norm/bias", "one/bias", "two/bias"]),
    ],
)
def test_which_biases_are_trained(bias: str, wanted: list[str], tmp_path):
    config = jlora.LoraConfig("one/kernel", rank=2, bias=bias)
    lora = jlora.lora(layers, config)
    adapter = lora.init(jax.random.key(0), LAYERS, X)
    assert sorted(adapter) == sorted(["one/kernel", *wanted])
    assert all(isinstance(adapter[path], jax.Array) for path in wanted)
    grads = jax.grad(lambda a: jnp.sum(lora.apply(LAYERS, a, X)))(adapter)
    assert all(jnp.any(grads[path] != 0) for path in wanted)
    jlora.checkpoint.save(tmp_path / "a", adapter, config=config)
    assert_close(jlora.checkpoint.restore(tmp_path / "a"), adapter, 0.0)


def test_peft_calls_it_lora_only(tmp_path):
    config = jlora.LoraConfig("one/kernel", rank=2, bias="adapted")
    lora = jlora.lora(layers, config)
    adapter = lora.init(jax.random.key(0), LAYERS, X)
    jlora.peft.save(tmp_path / "p", LAYERS, adapter, config)
    assert '"bias": "lora_only"' in (tmp_path / "p" / "adapter_config.json").read_text()


def test_another_config_may_decide_for_a_bias():
    """A bias that is a target already is left to its own config."""
    own = jlora.LoraConfig("one/bias", full=True, dtype=jnp.bfloat16)
    adapts = jlora.LoraConfig("kernel", rank=2, bias="all")
    plan = jlora.lora(layers, [own, adapts]).plan(LAYERS, X)
    decided = {target.path: target.config for target in plan.targets}
    assert decided["one/bias"] == own
    assert decided["two/bias"] == adapts
    assert list(decided) == sorted(decided, key=list(decided).index)


@pytest.mark.parametrize(
    ("bias", "exclude", "wanted"),
    [
        ("adapted", "bias", []),
        ("adapted", "two", ["one/bias"]),
        ("all", "two", ["norm/bias", "one/bias"]),
        ("all", ["one/bias", "norm"], ["two/bias"]),
    ],
)
def test_excluded_biases_are_left_out(bias: str, exclude: Any, wanted: list[str]):
    config = jlora.LoraConfig("kernel", rank=2, bias=bias, exclude=exclude)
    plan = jlora.lora(layers, config).plan(LAYERS, X)
    assert sorted(t.path for t in plan.targets if t.axes is None) == wanted


@pytest.mark.parametrize(
    "settings", [{"bias": "some"}, {"bias": "all", "full": True}, {"bias": True}]
)
def test_bad_bias_modes(settings: Any):
    with pytest.raises(ValueError, match=r"LoraConfig.bias"):
        jlora.LoraConfig("kernel", **settings)


# --- rows of a table ---


def tied(params: Any, ids: jax.Array) -> jax.Array:
    """A lookup and a head that is the same table."""
    return jnp.tanh(params["embed"][ids]) @ params["embed"].T


IDS = jnp.array([[3, 0, 10], [7, 3, 3]])
ROWS = (3, 10)


def table_case(getkey: Any) -> Any:
    params = {"embed": jax.random.normal(getkey(), (11, 5))}
    lora = jlora.lora(tied, jlora.LoraConfig("embed", rows=ROWS))
    adapter = lora.init(getkey(), params, IDS)
    values = jax.random.normal(getkey(), (2, 5))
    return lora, params, {"embed": dataclasses.replace(adapter["embed"], values=values)}


def test_rows_start_as_they_are(getkey):
    lora, params, _ = table_case(getkey)
    fresh = lora.init(getkey(), params, IDS)
    wanted = params["embed"][jnp.array(ROWS)]
    assert_close(fresh["embed"].values, wanted, 0.0)
    assert_close(lora.apply(params, fresh, IDS), tied(params, IDS), 1e-6)


def test_rows_equal_a_table_with_them(getkey):
    lora, params, adapter = table_case(getkey)
    put = lambda v: {"embed": params["embed"].at[jnp.array(ROWS)].set(v)}
    weights = jax.random.normal(getkey(), (2, 3, 11))
    wanted = lambda v: jnp.sum(weights * tied(put(v), IDS))
    actual = lambda a: jnp.sum(weights * lora.apply(params, a, IDS))
    value, grads = jax.jit(jax.value_and_grad(actual))(adapter)
    expected, gradient = jax.value_and_grad(wanted)(adapter["embed"].values)
    assert_close(value, expected, 1e-5)
    assert_close(grads["embed"].values, gradient, 1e-4)
    merged = jlora.merge(params, adapter)["embed"]
    assert np.array_equal(merged, put(adapter["embed"].values)["embed"])


def test_rows_that_are_replaced_have_no_gradient_in_the_base(getkey):
    """Whoever trains the rest of the table, too, gets what the merged one gives."""
    lora, params, adapter = table_case(getkey)
    weights = jax.random.normal(getkey(), (2, 3, 11))
    ours = lambda p: jnp.sum(weights * lora.apply(p, adapter, IDS))
    merged = lambda p: jnp.sum(weights * tied(jlora.merge(p, adapter), IDS))
    found, wanted = jax.grad(ours)(params), jax.grad(merged)(params)
    assert_close(found, wanted, 1e-5)
    assert not jnp.any(wanted["embed"][jnp.array(ROWS)])
    assert jnp.abs(found["embed"][jnp.array(ROWS)]).max() < 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("kept", [jnp.float32, jnp.bfloat16])
def test_a_lookup_gives_small_rows_without_the_rounding_of_the_old(
    dtype: Any, kept: Any, getkey
):
    params = {"embed": jax.random.normal(getkey(), (11, 5)).astype(dtype)}
    config = jlora.LoraConfig("embed", rows=ROWS, dtype=kept)
    lora = jlora.lora(lambda p, i: p["embed"][i], config)
    entry = lora.init(getkey(), params, IDS)["embed"]
    values = (0.01 * jax.random.normal(getkey(), (2, 5))).astype(kept)
    adapter = {"embed": dataclasses.replace(entry, values=values)}
    found = lora.apply(params, adapter, IDS)
    merged = jlora.merge(params, adapter)["embed"][IDS]
    assert found.dtype == dtype
    wide = lambda x: np.asarray(x, np.float32)
    if dtype == jnp.float32:
        np.testing.assert_allclose(found, merged, rtol=0, atol=1e-6)
    else:
        np.testing.assert_array_equal(wide(found), wide(merged))


@pytest.mark.parametrize("variant", [{}, {"dora": True}])
def test_a_lookup_in_a_16_bit_table_is_rounded_once(variant: Any, getkey):
    """A delta that takes most of a row away, as a large update does."""
    params = {"embed": jax.random.normal(getkey(), (11, 5)).astype(jnp.bfloat16)}
    config = jlora.LoraConfig("embed", rank=5, alpha=5.0, **variant)
    lora = jlora.lora(lambda p, i: p["embed"][i], config)
    entry = lora.init(getkey(), params, IDS)["embed"]
    small = 0.01 * jax.random.normal(getkey(), (11, 5))
    change = small - params["embed"].astype(jnp.float32)
    entry = dataclasses.replace(entry, a=change, b=jnp.eye(5))
    found = lora.apply(params, {"embed": entry}, IDS)
    merged = jlora.merge(params, {"embed": entry})["embed"][IDS]
    assert found.dtype == jnp.bfloat16
    assert_close(found.astype(jnp.float32), merged.astype(jnp.float32), 4e-3)


def test_the_adapter_holds_just_the_rows(getkey):
    lora, params, adapter = table_case(getkey)
    plan = lora.plan(params, IDS)
    assert plan.trainable == 10 == sum(v.size for v in jax.tree.leaves(adapter))
    assert "2 rows" in str(plan)
    assert plan.memory(optimizer=optax.adam(0.1))
    labels = jlora.optim.factor_labels(adapter)
    assert jax.tree.leaves(labels) == ["full"]
    norms = jlora.optim.delta_norms(params, adapter)
    change = jlora.merge(params, adapter)["embed"] - params["embed"]
    wanted = jnp.linalg.norm(change) / jnp.linalg.norm(params["embed"])
    np.testing.assert_allclose(norms["delta"], wanted, rtol=1e-5)


def test_rows_survive_a_checkpoint(tmp_path, getkey):
    lora, params, adapter = table_case(getkey)
    path = tmp_path / "a"
    jlora.checkpoint.save(path, adapter, config=lora.configs, base=params)
    restored = jlora.checkpoint.restore(path, base=params)
    assert restored["embed"].rows == ROWS
    assert_close(restored, adapter, 0.0)


def test_rows_on_a_mesh(getkey):
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    lora, params, _adapter = table_case(getkey)
    even = {"embed": jnp.pad(params["embed"], ((0, 0), (0, 1)))}
    fresh = jlora.lora(tied, lora.configs).init(getkey(), even, IDS)
    placed = jlora.shardings({"embed": P(None, "model")}, fresh, mesh=mesh)
    assert placed["embed"].values == NamedSharding(mesh, P(None, "model"))


def test_peft_needs_the_name_of_a_table_whose_rows_are_trained(tmp_path, getkey):
    lora, params, adapter = table_case(getkey)
    with pytest.raises(jlora.AdapterError, match='"embedding"'):
        jlora.peft.save(tmp_path / "p", params, adapter, lora.configs)


@pytest.mark.parametrize("rows", [[], [1, 1], [-1], [True], 5, "1"])
def test_bad_rows(rows: Any):
    with pytest.raises(ValueError, match=r"LoraConfig.rows"):
        jlora.LoraConfig("embed", rows=rows)


def test_rows_that_a_table_has_not(getkey):
    lora = jlora.lora(tied, jlora.LoraConfig("embed", rows=[11]))
    with pytest.raises(jlora.TargetError, match="has 11 rows, and `rows` names row 11"):
        lora.plan({"embed": jnp.ones((11, 5))}, IDS)
    stack = lambda params, x: jnp.einsum("ebi,eio->ebo", x, params["w"])
    lora = jlora.lora(stack, jlora.LoraConfig("w", rows=[1]))
    with pytest.raises(jlora.TargetError, match="is no table"):
        lora.plan({"w": jnp.ones((2, 3, 4))}, jnp.ones((2, 5, 3)))


def test_rows_of_another_table_are_refused(getkey):
    lora, _params, adapter = table_case(getkey)
    larger = {"embed": jnp.ones((12, 5))}
    with pytest.raises(jlora.AdapterError, match=r"'embed' \(12, 5\) has TrainedRows"):
        lora.apply(larger, adapter, IDS)


@pytest.mark.parametrize(
    "settings",
    [
        {"dora": True, "full": True},
        {"rows": [1], "slices": [(0, 2)]},
        {"rows": [1], "dora": True},
    ],
)
def test_one_kind_at_a_time(settings: Any):
    with pytest.raises(ValueError, match="one of"):
        jlora.LoraConfig("w", **settings)


def test_rank_stabilised_scaling():
    """alpha/√rank, for which the forward pass keeps its size as the rank grows."""
    assert jlora.LoraConfig(rank=16, alpha=8.0, rslora=True).scaling == 2.0
    assert jlora.LoraConfig(rank=16, alpha=8.0).scaling == 0.5

"""DoRA: the adapted kernel is `magnitude · (W + ΔW) / ‖W + ΔW‖`, never formed."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from case import adapt, check_gradients, check_half, check_values, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close, reference
from use import Use
from uses import USES
from wrappers import WRAPPERS

import jlora
import jlora.checkpoint
import jlora.optim
import jlora.peft
from jlora._adapter.dora import adapted_norm, kernel_norm

pytestmark = pytest.mark.usefixtures("fast_compile")
DORA = {"dora": True}
by_name = lambda value: value.name
NAMED = {use.name: use for use in USES}
SCALED = [use for use in USES if use.dora]
REVERSIBLE = [use for use in SCALED if use.reverse]


@pytest.mark.parametrize("use", REVERSIBLE[::2], ids=by_name)
def test_gradients(use: Use, getkey):
    case = make_case(use, getkey, variant=DORA)
    check_gradients(case, case.lora.apply, reference(use))


@pytest.mark.slow
@pytest.mark.parametrize("use", REVERSIBLE[1::2], ids=by_name)
def test_gradients_of_the_other_uses(use: Use, getkey):
    case = make_case(use, getkey, variant=DORA)
    check_gradients(case, case.lora.apply, reference(use))


@pytest.mark.parametrize("use", [u for u in USES if not u.dora], ids=by_name)
def test_a_scale_that_cannot_follow_is_refused_by_the_plan(use: Use, getkey):
    params, inputs = (
        use.make_params(getkey(), jnp.float32),
        (use.make_inputs(getkey(), jnp.float32)),
    )
    lora = adapt(use, use.model, variant=DORA)
    with pytest.raises(jlora.MaterializationError, match="DoRA") as error:
        lora.plan(params, *inputs)
    assert re.search(r"layer/w.* at uses_(conv|mixed|stacks)\.py:", str(error.value))


@pytest.mark.parametrize("name", ["lookup_fill_nan", "lookup_fill_value"])
def test_rows_that_are_filled_in_are_not_scaled(name: str, getkey):
    case = make_case(NAMED[name], getkey, variant=DORA)
    check_values(case, case.lora.apply, reference(case.use))


CORE = ["dense_general_two_in_two_out", "tied", "scan_stack", "conv_2d_groups"]
CORE = [NAMED[name] for name in [*CORE, "experts_ragged"]]
# Which wrapper goes with which use changes from use to use; each meets several.
PAIRS = [
    pytest.param(use, wrapper, id=f"{use.name}-{wrapper.name}")
    for i, use in enumerate(CORE)
    for j, wrapper in enumerate(WRAPPERS)
    if wrapper.name in ("vmap", "checkpoint", "scan", "cond", "shard_map", "nested_jit")
    and not (use.name == "experts_ragged" and wrapper.name == "vmap")
]


@pytest.mark.parametrize("use, wrapper", PAIRS)
def test_inside_of_wrappers(use: Use, wrapper: Any, getkey):
    fn = wrapper.wrap(use.model, 1)
    case = make_case(use, getkey, fn=fn, variant=DORA)
    check_gradients(case, case.lora.apply, reference(use, fn))


@pytest.mark.parametrize("use", SCALED[::5], ids=by_name)
def test_bfloat16(use: Use, getkey):
    half = jnp.bfloat16
    case = make_case(use, getkey, variant=DORA, x_dtype=half, w_dtype=half)
    # The product and its scaled value are rounded one after the other.
    check_half(case, jax.jit(case.lora.apply), reference(use), least=2e-2)


@pytest.mark.parametrize("use", CORE, ids=by_name)
def test_a_fresh_adapter_changes_nothing(use: Use, getkey):
    case = make_case(use, getkey, variant=DORA)
    args = use.arguments(case.params, case.inputs)
    fresh = case.lora.init(getkey(), *args)
    assert_close(
        case.lora.apply(case.params, fresh, *case.inputs), use.model(*args), 1e-5
    )


def test_16_bit_factors_begin_at_the_base_too(getkey, tmp_path):
    """A magnitude of 8 bits would move each output by up to 0.4 %."""
    config = jlora.LoraConfig("w", rank=2, dtype=jnp.bfloat16, **DORA)
    lora = jlora.lora(lambda p, x: x @ p["w"], config)
    params = {"w": jax.random.normal(getkey(), (5, 7))}
    x = jax.random.normal(getkey(), (3, 5))
    fresh = lora.init(getkey(), params, x)
    dtypes = jax.tree.map(lambda v: v.dtype, fresh["w"])
    assert (dtypes.a, dtypes.b, dtypes.magnitude) == ("bfloat16",) * 2 + ("float32",)
    assert_close(lora.apply(params, fresh, x), x @ params["w"], 1e-6)
    plan = lora.plan(params, x)
    shapes = jax.eval_shape(lora.init, getkey(), params, x)
    assert plan.targets[0].abstract_arrays["magnitude"] == shapes["w"].magnitude
    jlora.checkpoint.save(tmp_path / "a", fresh, config=config, base=params)
    assert_close(jlora.checkpoint.restore(tmp_path / "a", base=params), fresh, 0.0)
    jlora.peft.save(tmp_path / "p", plan, fresh, config)
    found, loaded = jlora.peft.load(tmp_path / "p", plan)
    assert found.dtype == jnp.bfloat16
    assert_close(loaded, fresh, 0.0)


@pytest.mark.parametrize("use", CORE, ids=by_name)
def test_merge(use: Use, getkey):
    case = make_case(use, getkey, variant=DORA)
    merged = jlora.merge(case.params, case.adapter)
    wanted = reference(use)(*case.args)
    assert_close(use.model(merged, *case.inputs), wanted, 1e-5)


def test_vmap_over_adapters(getkey):
    case = make_case(NAMED["siblings"], getkey, variant=DORA)
    scaled = lambda c: jax.tree.map(lambda v: c * v, case.adapter)
    stacked = jax.tree.map(lambda *v: jnp.stack(v), scaled(0.5), scaled(2.0))
    apply = jax.vmap(case.lora.apply, (None, 0, *[None] * len(case.inputs)))
    together = apply(case.params, stacked, *case.inputs)
    for i, c in enumerate((0.5, 2.0)):
        wanted = reference(case.use)(case.params, scaled(c), *case.inputs)
        assert_close(jax.tree.map(lambda y, i=i: y[i], together), wanted, 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e3]))
def test_the_norm_is_that_of_the_sum(seed: int, size: float):
    """Against NumPy in double precision, for a stack of kernels with two out axes."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    kernel, a, b = draw(3, 7, 4, 5), size * draw(3, 7, 2), draw(3, 2, 4, 5)
    axes = jlora.KernelAxes((0,), (1,), (2, 3))
    factors = jlora.LoraFactors(jnp.asarray(a), jnp.asarray(b), axes, 0.75)
    change = 0.75 * np.einsum("lir,lrho->liho", *map(np.float64, (a, b)))
    wanted = np.linalg.norm(kernel + change, axis=1)
    np.testing.assert_allclose(adapted_norm(kernel, factors), wanted, rtol=1e-5)


def test_a_kernel_of_zeros_stays_finite(getkey):
    """An output whose kernel is zero is left as it is; its gradient is finite."""
    model = lambda params, x: x @ params["w"]
    params = {"w": jnp.ones((5, 7)).at[:, 2].set(0)}
    x = jax.random.normal(getkey(), (3, 5))
    lora = jlora.lora(model, jlora.LoraConfig("w", rank=2, **DORA))
    adapter = lora.init(getkey(), params, x)
    loss = lambda adapter: jnp.sum(lora.apply(params, adapter, x) ** 2)
    value, grads = jax.value_and_grad(loss)(adapter)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert_close(lora.apply(params, adapter, x), model(params, x), 1e-6)


def test_delta_norms(getkey):
    case = make_case(NAMED["scan_stack"], getkey, variant=DORA)
    merged = jlora.merge(case.params, case.adapter)
    norms = jlora.optim.delta_norms(case.params, case.adapter)
    old, new = case.params["layer"]["w"], merged["layer"]["w"]
    wanted = jnp.linalg.norm(new - old) / jnp.linalg.norm(old)
    np.testing.assert_allclose(norms["delta/layer/w"], wanted, rtol=1e-4)


def test_the_plan_counts_magnitudes(getkey):
    case = make_case(NAMED["dense_general_two_in_two_out"], getkey, variant=DORA)
    plan = case.lora.plan(*case.use.arguments(case.params, case.inputs))
    assert plan.trainable == sum(v.size for v in jax.tree.leaves(case.adapter))
    table = str(plan.memory(optimizer=optax.adam(1e-3)))
    assert f"trainable {plan.trainable} of" in table, table
    assert "dora" in str(plan)


def test_magnitudes_have_a_label_of_their_own(getkey):
    case = make_case(NAMED["matmul"], getkey, variant=DORA)
    labels = jlora.optim.factor_labels(case.adapter)["layer/w"]
    assert (labels.a, labels.b, labels.magnitude) == ("a", "b", "magnitude")
    assert not jlora.optim.decay_mask(case.adapter)["layer/w"].magnitude


def test_magnitudes_follow_the_kernel_on_a_mesh(getkey):
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    case = make_case(NAMED["scan_stack"], getkey, variant=DORA)
    specs = jax.tree.map(lambda _: P(), case.params)
    specs["layer"]["w"] = P(None, None, "model")
    factors = case.adapter["layer/w"]
    sized = dataclasses.replace(factors, magnitude=jnp.ones((3, 6)))
    placed = jlora.shardings(specs, {"layer/w": sized}, mesh=mesh)["layer/w"]
    assert placed.magnitude == NamedSharding(mesh, P(None, "model"))


def test_a_shard_is_refused(getkey):
    """Its norm would be that of a piece of the column."""
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=2, **DORA))
    params, x = {"w": jnp.ones((6, 8))}, jnp.ones((4, 6))
    adapter = lora.init(getkey(), params, x)
    rows = {"w": jlora.LoraFactors(P("model"), P(), adapter["w"].axes, 8.0, P())}
    mapped = jax.shard_map(
        lambda p, a, x: jax.lax.psum(lora.apply(p, a, x), "model"),
        mesh=mesh,
        in_specs=({"w": P("model")}, rows, P(None, "model")),
        out_specs=P(),
    )
    with pytest.raises(jlora.UnsupportedFeatureError, match="one of the shards"):
        mapped(params, adapter, x)


def test_init_needs_values(getkey):
    lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=2, **DORA))
    abstract = {"w": jax.ShapeDtypeStruct((5, 7), jnp.float32)}, jnp.ones((2, 5))
    with pytest.raises(jlora.TargetError, match="'w' has DoRA's magnitude"):
        lora.init(getkey(), *abstract)
    shapes = jax.eval_shape(lora.init, getkey(), *abstract)
    assert shapes["w"].magnitude.shape == (7,)


def test_a_magnitude_of_another_shape_is_refused(getkey):
    case = make_case(NAMED["matmul"], getkey, variant=DORA)
    wrong = dataclasses.replace(case.adapter["layer/w"], magnitude=jnp.ones(2))
    with pytest.raises(
        jlora.AdapterError, match=r"layer/w.*magnitude \(\d+,\).*\(2,\)"
    ):
        case.lora.apply(case.params, {"layer/w": wrong}, *case.inputs)


def test_magnitudes_survive_a_checkpoint(tmp_path, getkey):
    case = make_case(NAMED["scan_stack"], getkey, variant=DORA)
    config = case.lora.configs
    jlora.checkpoint.save(tmp_path / "adapter", case.adapter, config=config)
    restored = jlora.checkpoint.restore(tmp_path / "adapter")
    assert_close(restored, case.adapter, 0.0)


def test_the_norm_of_a_fresh_adapter_is_its_magnitude(getkey):
    case = make_case(NAMED["conv_2d"], getkey, variant=DORA)
    fresh = case.lora.init(getkey(), *case.use.arguments(case.params, case.inputs))
    factors = fresh["layer/w"]
    kernel = case.params["layer"]["w"]
    wanted = np.sqrt(np.sum(np.float64(kernel) ** 2, axis=(0, 1, 2)))
    np.testing.assert_allclose(factors.magnitude, wanted, rtol=1e-6)
    np.testing.assert_allclose(kernel_norm(kernel, factors.axes), wanted, rtol=1e-6)


# --- uses that a scale of the outputs cannot be taken out of ---


def twice(again: Any) -> Any:
    """The kernel in a product, and once more in another use."""

    def model(params: Any, x: jax.Array) -> Any:
        y = jnp.einsum("bi,iho->bho", x, params["w"])
        return y, again(params["w"], x, y)

    return model


ROWS = jnp.array([0, 2, 9])
FLAT = (6, 12)
UNFIT = {
    "part": lambda w, x, y: jnp.einsum("bo,iho->bih", y[:, 0], w),
    "reshaped": lambda w, x, y: jnp.einsum(
        "bho,ikho->bik", y[:, :2], w.reshape(6, 2, 2, 3)
    ),
    "padded": lambda w, x, y: x @ jnp.pad(w.reshape(FLAT), ((1, 0), (0, 0)))[:6],
    "joined": lambda w, x, y: (
        jnp.tile(x, 2) @ jnp.concatenate([w.reshape(FLAT), jnp.ones(FLAT)])
    ),
    "stacked": lambda w, x, y: jnp.einsum(
        "kbi,kiho->bho", jnp.stack([x, x]), jnp.stack([w, 2 * w])
    ),
    "filled": lambda w, x, y: jnp.einsum(
        "bik,iko->bo",
        x.reshape(5, 2, 3),
        jnp.take(w.reshape(2, 3, 12), ROWS, 1, mode="fill", fill_value=0),
    ),
    "conv": lambda w, x, y: jax.lax.conv_general_dilated(y, w, (1,), "SAME"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_uses_are_refused_by_the_plan(name: str, getkey):
    """As by `init` and `apply`; where it is allowed the sum is formed there alone."""
    params = {"w": jax.random.normal(getkey(), (6, 4, 3))}
    x, config = jax.random.normal(getkey(), (5, 6)), jlora.LoraConfig("w", rank=2)
    config = dataclasses.replace(config, **DORA)
    model = twice(UNFIT[name])
    lora = jlora.lora(model, config)
    allowed = jlora.lora(model, config, materialize="allow")
    adapter = allowed.init(getkey(), params, x)
    adapter = jax.tree.map(lambda v: v + jax.random.normal(getkey(), v.shape), adapter)
    for attempt in (
        lambda: lora.plan(params, x),
        lambda: lora.init(getkey(), params, x),
        lambda: lora.apply(params, adapter, x),
    ):
        with pytest.raises(jlora.MaterializationError) as error:
            attempt()
        for part in ("'w' (6, 4, 3)", "test_dora.py:", "DoRA's outputs", "leave DoRA"):
            assert part in str(error.value)
    assert "materialized" in str(allowed.plan(params, x))
    merged = jlora.merge(params, adapter)
    assert_close(allowed.apply(params, adapter, x), model(merged, x), 1e-4)
    plain = dataclasses.replace(config, dora=False)
    assert jlora.lora(model, plain).plan(params, x).targets

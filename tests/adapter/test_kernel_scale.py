"""IA3 beside its equation: a scale of one side, applied beside the frozen kernel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import Case, adapt, check_gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close
from use import Use
from uses import USES

import jlora
import jlora.peft

pytestmark = pytest.mark.usefixtures("fast_compile")
NAMED = {use.name: use for use in USES}
OUT = ("matmul_left", "dense_general_two_batch", "tied", "conv_2d_groups_nchw")
OUT += ("experts_ragged", "split_out")
IN = ("matmul_left", "dense_general_two_batch", "tied", "scan_stack", "slices_in")


def made(use_name: str, side: str, getkey: Callable[[], jax.Array]) -> Case:
    """A use with scales from 0.5 to 2."""
    use = NAMED[use_name]
    lora = adapt(use, use.model, variant={"variant": "ia3", "scale_side": side})
    params = use.make_params(getkey(), jnp.float32)
    inputs = use.make_inputs(getkey(), jnp.float32)
    adapter = lora.init(getkey(), *use.arguments(params, inputs))
    draw = lambda v: jax.random.uniform(getkey(), v.shape, minval=0.5, maxval=2.0)
    return Case(use, lora, params, jax.tree.map(draw, adapter), inputs)


def reference(use: Use, side: str) -> Callable[..., Any]:
    """The model with scaled kernels, by the axes that the use says."""

    def model(params: Any, adapter: Any, *inputs: Any) -> Any:
        layer = dict(params["layer"])
        for name, kernel in use.kernels.items():
            batch, in_, out = kernel.axes
            along = [*batch, *(in_ if side == "in" else out)]
            letters = "".join("abcdefg"[i] for i in along)
            whole = "abcdefg"[: len(kernel.shape)]
            told = f"{whole},{letters}->{whole}"
            scale = adapter[f"layer/{name}"].scale
            layer[name] = jnp.einsum(told, layer[name], scale)
        return use.model({**params, "layer": layer}, *inputs)

    return model


CASES = [("out", name) for name in OUT] + [("in", name) for name in IN]


@pytest.mark.parametrize("side, use_name", CASES)
def test_values_and_gradients(side: str, use_name: str, getkey: Any) -> None:
    case = made(use_name, side, getkey)
    check_gradients(case, case.lora.apply, reference(case.use, side))


@pytest.mark.parametrize("side", ["out", "in"])
def test_merged(side: str, getkey: Any) -> None:
    case = made("dense_general_two_batch", side, getkey)
    merged = jlora.merge(case.params, case.adapter)
    got = case.use.model(merged, *case.inputs)
    assert_close(got, reference(case.use, side)(*case.args), 1e-5)
    new = case.lora.init(getkey(), case.params, *case.inputs)
    same = jlora.merge(case.params, new)["layer"]["w"]
    assert np.array_equal(same, case.params["layer"]["w"])


@pytest.mark.parametrize("use_name", ["conv_2d", "concatenate_kernels", "mixed_in"])
def test_inputs_that_are_summed_over_before_are_refused(
    use_name: str, getkey: Any
) -> None:
    use = NAMED[use_name]
    lora = adapt(use, use.model, variant={"variant": "ia3", "scale_side": "in"})
    params = use.make_params(getkey(), jnp.float32)
    inputs = use.make_inputs(getkey(), jnp.float32)
    with pytest.raises(jlora.MaterializationError, match="fits neither side") as error:
        lora.plan(params, *inputs)
    assert "layer/w" in str(error.value) and "uses_" in str(error.value)


@pytest.mark.parametrize("use_name", ["conv_2d", "mixed_in"])
def test_inputs_that_are_summed_over_with_leave(use_name: str, getkey: Any) -> None:
    """`materialize="allow"` forms the scaled kernel there."""
    use = NAMED[use_name]
    settings = {"variant": "ia3", "scale_side": "in"}
    lora = adapt(use, use.model, variant=settings, materialize="allow")
    params = use.make_params(getkey(), jnp.float32)
    inputs = use.make_inputs(getkey(), jnp.float32)
    adapter = lora.init(getkey(), params, *inputs)
    draw = lambda v: jax.random.uniform(getkey(), v.shape, minval=0.5, maxval=2.0)
    adapter = jax.tree.map(draw, adapter)
    got = lora.apply(params, adapter, *inputs)
    assert_close(got, reference(use, "in")(params, adapter, *inputs), 1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("side", ["out", "in"])
def test_sharded(side: str, kind: AxisType, getkey: Any) -> None:
    params = {"w": jax.random.normal(getkey(), (8, 12))}
    x = jax.random.normal(getkey(), (6, 8))
    config = jlora.LoraConfig("w", variant="ia3", scale_side=side)
    lora = jlora.lora(lambda params, x: x @ params["w"], config)
    adapter = lora.init(getkey(), params, x)
    adapter = jax.tree.map(lambda v: v + jnp.arange(v.size) / 8, adapter)
    loss = lambda adapter, params, x: jnp.sin(lora.apply(params, adapter, x)).sum()
    expected = jax.value_and_grad(loss)(adapter, params, x)
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind, kind))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, P("data", "model")))
        own = jax.device_put(adapter, jlora.shardings(placed, adapter))
        rows = jax.device_put(x, NamedSharding(mesh, P("data")))
        actual = jax.jit(jax.value_and_grad(loss))(own, placed, rows)
        merged = jlora.merge(placed, own)["w"]
    assert_close(jax.device_get(actual), jax.device_get(expected), 1e-5)
    alone = jlora.merge(params, adapter)["w"]
    assert_close(jax.device_get(merged), jax.device_get(alone), 1e-6)


def test_a_quantised_kernel_stays_as_it_is(getkey: Any) -> None:
    pytest.importorskip("qwix")
    params = {"w": jax.random.normal(getkey(), (64, 32))}
    x = jax.random.normal(getkey(), (3, 64))
    lora = jlora.lora(
        lambda params, x: x @ params["w"],
        [jlora.LoraConfig("w", variant="ia3", scale_side="in")],
    )
    base = jlora.quantize(params, lora.plan(params, x), "int8")
    adapter = lora.init(getkey(), base, x)
    adapter = jax.tree.map(lambda v: v + jnp.arange(v.size) / 64, adapter)
    merged = jlora.merge(base, adapter, dequantize=True)["w"]
    assert_close(lora.apply(base, adapter, x), x @ merged, 1e-5)


def test_the_plan_and_others_tell_of_it(tmp_path: Any, getkey: Any) -> None:
    params = {"w": jnp.ones((8, 12))}
    config = jlora.LoraConfig("w", variant="ia3", dtype=jnp.bfloat16)
    lora = jlora.lora(lambda params, x: x @ params["w"], config)
    plan = lora.plan(params, jnp.ones((3, 8)))
    assert "ia3 out" in str(plan) and plan.trainable == 12
    adapter = lora.init(getkey(), params, jnp.ones((3, 8)))
    assert adapter["w"].scale.dtype == jnp.float32  # a rounded scale is no start
    with pytest.raises(jlora.UnsupportedFeatureError, match="scales of kernels"):
        jlora.peft.save(tmp_path / "peft", plan, adapter, lora.configs)
    with pytest.raises(ValueError, match=r'"in" or "out", got \'both\''):
        jlora.LoraConfig(variant="ia3", scale_side="both")

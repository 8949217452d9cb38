"""Convolutions in PEFT's files: of the right layout, or refused by name."""

import string
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doors import with_random_b
from hub_files import draw, factors, write_adapter

import jlora
import jlora.peft
import jlora.weights
from jlora.__main__ import FAILED, SAME, main

pytestmark = pytest.mark.usefixtures("fast_compile")

WINDOWS = {"conv1d": (3,), "conv2d": (3, 2), "conv3d": (2, 3, 4)}
IN, OUT, RANK = 5, 7, 2
CONFIG = jlora.LoraConfig("proj", rank=RANK, alpha=3.0)
PATH = "params/proj/kernel"
RULE = [(r"params/(?P<name>.*)", "{name}")]
CONV = [(r"params/(?P<name>.*)", "{name}", "conv")]
LINEAR = [(r"params/(?P<name>.*)", "{name}", "linear")]


class Patches(nn.Module):
    """Named as in Qwen2-VL, whose `patch_embed.proj` is a 3-D convolution."""

    window: tuple[int, ...]
    groups: int = 1
    out: int = OUT

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Conv(
            self.out, self.window, feature_group_count=self.groups, name="proj"
        )(x)


def adapted(module: Patches, channels: int = IN) -> tuple[Any, Any, Any]:
    """Its variables, a plan and an adapter."""
    x = jnp.ones((1, *(4 for _ in module.window), channels))
    variables = module.init(jax.random.key(0), x)
    lora = jlora.lora(module.apply, CONFIG)
    adapter = with_random_b(lora.init(jax.random.key(1), variables, x))
    return variables, lora.plan(variables, x), adapter


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = jlora.weights.open_weights(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): found[key] for key in found}


def flax_delta(a: np.ndarray, b: np.ndarray, scaling: float) -> np.ndarray:
    """What PEFT adds to torch's weight (out, in, *window), as Flax has it."""
    window = string.ascii_lowercase[: a.ndim - 2]
    b = b.reshape(b.shape[:2])
    return scaling * np.einsum(f"yr,rx{window}->{window}xy", b, a)


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("names", [None, RULE, CONV])
@pytest.mark.parametrize("known", ["params", "shapes", "plan"])
def test_a_convolution_is_saved_as_one_or_refused_by_name(
    kind: str, names: Any, known: str, tmp_path: Path
) -> None:
    window = WINDOWS[kind]
    variables, plan, adapter = adapted(Patches(window))
    shapes = jax.eval_shape(lambda: variables)
    base = {"params": variables, "shapes": shapes, "plan": plan}[known]
    save = lambda to: jlora.peft.save(to, base, adapter, CONFIG, names)
    if not (names is CONV or (known == "plan" and names is None)):
        with pytest.raises(jlora.AdapterError, match=rf'{PATH}.*"conv"'):
            save(tmp_path / "peft")
        assert not (tmp_path / "peft").exists()
        return
    save(tmp_path / "peft")
    found = tensors(tmp_path / "peft")
    a, b = found["proj.lora_A.weight"], found["proj.lora_B.weight"]
    assert a.shape == (RANK, IN, *window)
    assert b.shape == (OUT, RANK, *(1 for _ in window))
    delta = jlora.delta(adapter[PATH])
    np.testing.assert_allclose(flax_delta(a, b, 3.0 / RANK), delta, atol=1e-5)
    for also in (base, variables, plan):
        config, loaded = jlora.peft.load(
            tmp_path / "peft", also, names if also is base else CONV
        )
        assert (config.rank, config.alpha) == (RANK, 3.0)
        jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("names", [CONV, None])
def test_vllm_has_no_convolutions(kind: str, names: Any, tmp_path: Path) -> None:
    _, plan, adapter = adapted(Patches(WINDOWS[kind]))
    with pytest.raises(jlora.UnsupportedFeatureError, match="no adapters of conv"):
        jlora.peft.save(tmp_path / "p", plan, adapter, CONFIG, names, profile="vllm")


def test_vllm_has_none_of_torchs_own_layout_either(tmp_path: Path) -> None:
    rule = [("proj", "proj", "same")]
    kernel, fn = conv_of("OIHW")
    adapter = jlora.lora(fn, CONFIG).init(
        jax.random.key(0), kernel, jnp.ones((1, 4, 4, IN))
    )
    with pytest.raises(jlora.UnsupportedFeatureError, match="no adapters of conv"):
        jlora.peft.save(
            tmp_path / "p", kernel, with_random_b(adapter), CONFIG, rule, profile="vllm"
        )


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("groups", [3, 6])
def test_groups_are_refused_with_a_plan(kind: str, groups: int, tmp_path: Path) -> None:
    """Six groups of six channels are a depthwise convolution."""
    _, plan, adapter = adapted(Patches(WINDOWS[kind], groups, out=12), channels=6)
    with pytest.raises(jlora.UnsupportedFeatureError, match=f"{groups} groups"):
        jlora.peft.save(tmp_path / "p", plan, adapter, CONFIG)


@pytest.mark.parametrize("names", [None, RULE])
def test_groups_are_refused_without_one(names: Any, tmp_path: Path) -> None:
    variables, _, adapter = adapted(Patches((3, 2), 6, out=12), channels=6)
    with pytest.raises(jlora.AdapterError, match=PATH):
        jlora.peft.save(tmp_path / "p", variables, adapter, CONFIG, names)


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize(
    "names, known", [(None, "params"), (None, "plan"), (CONV, "params")]
)
def test_a_linear_layer_of_the_file_is_no_convolution(
    kind: str, names: Any, known: str, tmp_path: Path
) -> None:
    window = WINDOWS[kind]
    variables, plan, _ = adapted(Patches(window))
    fan_in, rand = int(np.prod(window)) * IN, draw()
    found = factors("proj", rand(RANK, fan_in), rand(OUT, RANK))
    write_adapter(tmp_path / "peft", found, target_modules=["proj"])
    base = plan if known == "plan" else variables
    with pytest.raises(jlora.AdapterError, match=f"{PATH}.*of {fan_in} inputs"):
        jlora.peft.load(tmp_path / "peft", base, names)
    config, loaded = jlora.peft.load(tmp_path / "peft", variables, LINEAR)
    a, b = (found[f"proj.lora_{side}.weight"] for side in "AB")
    wanted = config.alpha / RANK * (b @ a).T.reshape(*window, IN, OUT)
    np.testing.assert_allclose(jlora.delta(loaded[PATH]), wanted, atol=1e-5)


def test_a_convolution_of_the_file_is_no_linear_layer(tmp_path: Path) -> None:
    variables, plan, adapter = adapted(Patches((3, 2)))
    jlora.peft.save(tmp_path / "peft", plan, adapter, CONFIG)
    with pytest.raises(jlora.AdapterError, match=f"{PATH}.*by its rule, 'linear'"):
        jlora.peft.load(tmp_path / "peft", variables, LINEAR)


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_checkpoint_is_converted_where_its_kernels_are_said_to_be_convolutions(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plan, adapter = adapted(Patches(WINDOWS[kind]))
    peft, middle, back = (str(tmp_path / n) for n in ("peft", "checkpoint", "back"))
    jlora.peft.save(peft, plan, adapter, CONFIG)
    assert main(["convert", peft, middle]) == SAME
    assert main(["convert", middle, back]) == FAILED
    assert f"{PATH!r}" in capsys.readouterr().err
    told = ["--convolutions", "--names", "llama"]
    assert main(["convert", *told, middle, back]) == FAILED
    assert "leave --convolutions out" in capsys.readouterr().err
    assert main(["convert", told[0], middle, back]) == SAME
    wanted, found = tensors(tmp_path / "peft"), tensors(tmp_path / "back")
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)


# --- kernels of several input axes that are no convolutions ---


class Attention(nn.Module):
    query: str = "query"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.DenseGeneral((2, 3), name=self.query)(x)
        return nn.DenseGeneral(OUT, axis=(-2, -1), name="proj")(x)


@pytest.mark.parametrize("names", [None, RULE])
@pytest.mark.parametrize("query, known", [("query", "params"), ("mix", "plan")])
def test_the_query_beside_a_kernel_tells_that_it_is_linear(
    query: str, known: str, names: Any, tmp_path: Path
) -> None:
    module, x = Attention(query), jnp.ones((2, IN))
    variables = module.init(jax.random.key(0), x)
    lora = jlora.lora(module.apply, CONFIG)
    adapter = with_random_b(lora.init(jax.random.key(1), variables, x))
    base = variables if known == "params" else lora.plan(variables, x)
    jlora.peft.save(tmp_path / "peft", base, adapter, CONFIG, names)
    assert tensors(tmp_path / "peft")["proj.lora_A.weight"].shape == (RANK, 6)
    _, loaded = jlora.peft.load(tmp_path / "peft", base, names)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


@pytest.mark.parametrize("names", [None, RULE, LINEAR])
def test_other_kernels_of_several_inputs_need_a_word(
    names: Any, tmp_path: Path
) -> None:
    module, x = Attention("mix"), jnp.ones((2, IN))
    variables = module.init(jax.random.key(0), x)
    adapter = jlora.lora(module.apply, CONFIG).init(jax.random.key(1), variables, x)
    adapter = with_random_b(adapter)
    save = lambda: jlora.peft.save(tmp_path / "peft", variables, adapter, CONFIG, names)
    if names is not LINEAR:
        with pytest.raises(jlora.AdapterError, match=f'{PATH}.*"conv" or "linear"'):
            save()
        return
    save()
    assert tensors(tmp_path / "peft")["proj.lora_A.weight"].shape == (RANK, 6)


# --- other orders of the axes ---


def conv_of(layout: str) -> tuple[dict[str, jax.Array], Any]:
    sizes = dict(zip("HWIO", (3, 2, IN, OUT), strict=True))
    kernel = jnp.asarray(draw()(*(sizes[axis] for axis in layout)))

    def fn(params: Any, x: jax.Array) -> jax.Array:
        dims = ("NHWC", layout, "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["proj"], (1, 1), "SAME", dimension_numbers=dims
        )

    return {"proj": kernel}, fn


@pytest.mark.parametrize("layout", ["IHWO", "OHWI", "WHIO", "HIWO"])
@pytest.mark.parametrize("transform", [None, "conv", "same"])
def test_other_orders_of_the_axes_are_refused_with_a_plan(
    layout: str, transform: str | None, tmp_path: Path
) -> None:
    params, fn = conv_of(layout)
    x = jnp.ones((1, 4, 4, IN))
    lora = jlora.lora(fn, CONFIG)
    adapter, plan = lora.init(jax.random.key(0), params, x), lora.plan(params, x)
    rules = transform and [("proj", "proj", transform)]
    names = {"H": "0", "W": "1", "I": "in", "O": "out"}
    order = ", ".join(names[axis] for axis in layout)
    with pytest.raises(jlora.UnsupportedFeatureError, match=rf"\({order}\)"):
        jlora.peft.save(tmp_path / "p", plan, adapter, CONFIG, rules)


@pytest.mark.parametrize(
    "layout, transform, fits", [("OIHW", "conv", "same"), ("HWIO", "same", "conv")]
)
@pytest.mark.parametrize("known", ["params", "plan"])
def test_a_transform_for_another_order_is_refused(
    layout: str, transform: str, fits: str, known: str, tmp_path: Path
) -> None:
    params, fn = conv_of(layout)
    x = jnp.ones((1, 4, 4, IN))
    lora = jlora.lora(fn, CONFIG)
    adapter, plan = lora.init(jax.random.key(0), params, x), lora.plan(params, x)
    base = plan if known == "plan" else params
    rules = [("proj", "proj", transform)]
    with pytest.raises(jlora.AdapterError, match=f'proj.*the transform "{fits}"'):
        jlora.peft.save(tmp_path / "p", base, adapter, CONFIG, rules)
    jlora.peft.save(tmp_path / "p", base, adapter, CONFIG, [("proj", "proj", fits)])
    assert tensors(tmp_path / "p")["proj.lora_A.weight"].shape == (RANK, IN, 3, 2)

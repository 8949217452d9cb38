"""Files of kohya's scripts: the names of modules, alphas, and what is refused."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from format_files import deltas
from safetensors.numpy import load_file, save_file

import jlora
from jlora import AdapterError, UnsupportedFeatureError
from jlora._formats import kohya

Tensors = dict[str, np.ndarray]
OWN = "lora_unet_mid_to_q"


def tensors(name: str = OWN, rank: int = 2, alpha: Any = 3.0) -> Tensors:
    """One module of a file, its alpha not its rank."""
    rng = np.random.default_rng(len(name))
    found = {
        f"{name}.lora_down.weight": rng.normal(size=(rank, 5)),
        f"{name}.lora_up.weight": rng.normal(size=(7, rank)),
    }
    found |= {} if alpha is None else {f"{name}.alpha": np.array(alpha)}
    return {key: value.astype(np.float32) for key, value in found.items()}


def written(folder: Path, own: Tensors) -> Path:
    """A file of some tensors."""
    save_file(own, folder / "a.safetensors")
    return folder / "a.safetensors"


# --- scalings and layouts ---


@pytest.mark.parametrize("alpha, scaling", [(3.0, 1.5), (None, 1.0), (0.25, 0.125)])
def test_the_scaling_is_alpha_over_the_rank(
    alpha: float | None, scaling: float, tmp_path: Path
) -> None:
    own = tensors(alpha=alpha)
    (module,) = kohya.modules(written(tmp_path, own))
    assert module.scaling == scaling
    down, up = own[f"{OWN}.lora_down.weight"], own[f"{OWN}.lora_up.weight"]
    expected = scaling * up.astype(np.float64) @ down
    np.testing.assert_allclose(deltas([module])[f"{OWN}.weight"], expected)


@pytest.mark.parametrize("window", [(3, 3), (1, 1), (2,), (2, 3, 4)])
def test_convolutions_are_written_and_read(
    window: tuple[int, ...], tmp_path: Path
) -> None:
    rng, ones = np.random.default_rng(0), (1,) * len(window)
    own = {
        f"{OWN}.lora_down.weight": rng.normal(size=(2, 5, *window)),
        f"{OWN}.lora_up.weight": rng.normal(size=(7, 2, *ones)),
        f"{OWN}.alpha": np.array(5.0),
    }
    own = {key: value.astype(np.float32) for key, value in own.items()}
    base = ["unet.mid.to_q"]
    configs, adapter = kohya.read(written(tmp_path, own), base=base)
    (factors,) = adapter.values()
    assert factors.kernel_shape == (*window, 5, 7)
    back = tmp_path / "back.safetensors"
    with pytest.raises(UnsupportedFeatureError, match="no factors of dense kernels"):
        kohya.write(back, adapter, configs)
    kohya.write(back, adapter, configs, convolutions=True)
    found = load_file(back)
    assert {key: value.tolist() for key, value in found.items()} == {
        key: value.tolist() for key, value in own.items()
    }


def test_an_alpha_that_32_bits_do_not_hold_keeps_the_delta(tmp_path: Path) -> None:
    axes = jlora.KernelAxes((), (0,), (1,))
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(3, 7))
    with jax.enable_x64(True):
        factors = jlora.LoraFactors(a, b, axes, 0.1)
        file = tmp_path / "a.safetensors"
        kohya.write(file, {"params/unet/q/kernel": factors}, ())
        (module,) = kohya.modules(file)
    expected = 0.1 * (a @ b).T
    np.testing.assert_allclose(deltas([module])[f"{module.name}.weight"], expected)


# --- names ---

NAMES = {
    "unet.mid.to_q": ["unet.mid.to_q.weight", "unet.mid.to_q.bias"],
    "unet.mid_to.q": ["unet.mid_to.q.weight"],
    "transformer.mid.to_q": ["transformer.mid.to_q.weight", "vae.mid.to_q.weight"],
    "mid.to_q": ["mid.to_q.weight", "norm.weight"],
    "model.diffusion_model.mid.to_q": ["model.diffusion_model.mid.to_q.weight"],
}


@pytest.mark.parametrize("expected", NAMES)
def test_names_are_those_of_the_base(expected: str, tmp_path: Path) -> None:
    file = written(tmp_path, tensors())
    (module,) = kohya.modules(file, base=NAMES[expected])
    assert module.name == expected


@pytest.mark.parametrize(
    "own, expected",
    [
        ("lora_te_layers_0_q", "text_encoder.layers.0.q"),
        ("lora_te1_layers_0_q", "text_encoder.layers.0.q"),
        ("lora_te2_layers_0_q", "text_encoder_2.layers.0.q"),
        ("lora_of_mine_unet_layers_0_q", "unet.layers.0.q"),
    ],
)
def test_prefixes_stand_for_parts_of_a_pipeline(
    own: str, expected: str, tmp_path: Path
) -> None:
    parts = ("unet", "text_encoder", "text_encoder_2")
    names = [f"{part}.layers.0.q" for part in parts]
    (module,) = kohya.modules(written(tmp_path, tensors(own)), base=names)
    assert module.name == expected


@pytest.mark.parametrize(
    "names, words",
    [
        (["unet.mid.to_k", "unet.other"], ["is no module", "unet.mid.to_k"]),
        (["unet.mid.to_q", "unet.mid_to.q"], ["unet.mid.to_q", "unet.mid_to.q"]),
        (["a.mid.to_q", "b.mid.to_q"], ["a.mid.to_q", "b.mid.to_q"]),
        (["text_encoder.mid.to_q", "unet.mid.k"], ["is no module"]),
    ],
)
def test_names_that_none_or_several_give_are_listed(
    names: list[str], words: list[str], tmp_path: Path
) -> None:
    own = tensors() | tensors("lora_unet_gone")
    with pytest.raises(AdapterError) as caught:
        kohya.modules(written(tmp_path, own), base=names)
    for word in [repr(OWN), "'lora_unet_gone'", *words]:
        assert word in str(caught.value)


def test_one_module_under_two_names_is_refused(tmp_path: Path) -> None:
    own = tensors() | tensors("lora_unet_unet_mid_to_q")
    with pytest.raises(AdapterError, match="under two names"):
        kohya.modules(written(tmp_path, own), base=["unet.mid.to_q", "unet.unet.k"])


def test_a_params_tree_has_the_names(tmp_path: Path) -> None:
    kernel = jax.ShapeDtypeStruct((5, 7), np.float32)
    params = {"params": {"mid": {"to_q": {"kernel": kernel}}}}
    file = written(tmp_path, tensors())
    (module,) = kohya.modules(file, base=params)
    assert module.name == "mid.to_q"
    shapes = {"params/mid/to_q/kernel": (5, 7)}
    _, adapter = kohya.read(file, params=shapes)
    assert list(adapter) == ["params/mid/to_q/kernel"]
    with pytest.raises(AdapterError, match="does not fit the params"):
        kohya.read(file, params={"params/mid/to_q/kernel": (5, 6)})
    with pytest.raises(ValueError, match="--params"):
        kohya.read(file, names="llama")


def test_names_of_files_are_read_from_headers(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"mid.to_q.weight": np.zeros((7, 5))}, base / "model.safetensors")
    file = written(tmp_path, tensors())
    for place in (base, str(base), base / "model.safetensors"):
        (module,) = kohya.modules(file, base=place)
        assert module.name == "mid.to_q"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        kohya.modules(file, base=tmp_path / "nowhere")


# --- writing ---


def adapter_of(*names: str) -> dict[str, Any]:
    """Factors of dense kernels under torch's names."""
    axes, rng = jlora.KernelAxes((), (0,), (1,)), np.random.default_rng(0)
    number = lambda shape: rng.normal(size=shape).astype(np.float32)
    factors = lambda: jlora.LoraFactors(number((5, 2)), number((2, 3)), axes, 1.5)
    return {f"params/{n.replace('.', '/')}/kernel": factors() for n in names}


@pytest.mark.parametrize(
    "names, prefix, expected",
    [
        (["unet.a_b.c"], None, ["lora_unet_a_b_c"]),
        (["text_encoder.a"], None, ["lora_te_a"]),
        (
            ["text_encoder.a", "text_encoder_2.a", "text_encoder_3.a"],
            None,
            ["lora_te1_a", "lora_te2_a", "lora_te3_a"],
        ),
        (["a.b"], "lora_unet", ["lora_unet_a_b"]),
        (["transformer.b"], "lora_unet", ["lora_unet_b"]),
        (["x.b"], "lora_own", ["lora_own_x_b"]),
    ],
)
def test_names_are_written_without_their_dots(
    names: list[str], prefix: str | None, expected: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    adapter = adapter_of(*names)
    kohya.write(file, adapter, (), prefix=prefix)
    assert {key.partition(".")[0] for key in load_file(file)} == set(expected)
    back = {module.name for module in kohya.modules(file, base=names)}
    assert back == set(names)
    assert load_file(file)[f"{expected[0]}.alpha"].shape == ()


@pytest.mark.parametrize(
    "names, prefix, error, words",
    [
        (["unet.a.b", "unet.a_b"], None, AdapterError, "the same names without"),
        (["vae.a"], None, ValueError, "--prefix lora_unet"),
        (["unet"], None, ValueError, "--prefix lora_unet"),
        (["unet.a"], "unet", ValueError, "a prefix of kohya's"),
        (["unet.a"], "lora_a.b", ValueError, "a prefix of kohya's"),
    ],
)
def test_names_that_can_not_be_written_are_refused(
    names: list[str],
    prefix: str | None,
    error: type[Exception],
    words: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        kohya.write(tmp_path / "a.safetensors", adapter_of(*names), (), prefix=prefix)
    assert not list(tmp_path.iterdir())


def test_a_table_has_no_place(tmp_path: Path) -> None:
    (factors,) = adapter_of("x").values()
    adapter = {"params/text_encoder/embed/embedding": factors}
    with pytest.raises(UnsupportedFeatureError, match=r"text_encoder\.embed"):
        kohya.write(tmp_path / "a.safetensors", adapter, ())


def test_a_file_is_replaced_on_request_alone(tmp_path: Path) -> None:
    file, adapter = tmp_path / "a.safetensors", adapter_of("unet.a")
    kohya.write(file, adapter, ())
    before = file.read_bytes()
    with pytest.raises(FileExistsError):
        kohya.write(file, adapter_of("unet.b"), ())
    assert file.read_bytes() == before
    kohya.write(file, adapter_of("unet.b"), (), overwrite=True)
    assert file.read_bytes() != before


# --- what is refused ---

SMALL = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"lora_mid.weight": SMALL}, UnsupportedFeatureError, "LoCon's core"),
        ({"dora_scale": SMALL}, UnsupportedFeatureError, "DoRA"),
        ({"hada_w1_a": SMALL}, UnsupportedFeatureError, "LoHa"),
        ({"lokr_w2_b": SMALL}, UnsupportedFeatureError, "LoKr"),
        ({"lora_down.bias": SMALL}, AdapterError, "lora_down.bias"),
        ({"lora_up.weight": np.ones((7, 3), np.float32)}, AdapterError, "2 and 3"),
        ({"lora_up.weight": SMALL[0]}, AdapterError, "of the shapes"),
        ({"lora_up.weight": np.ones((7, 2), np.float16)}, AdapterError, "dtypes"),
        ({"alpha": np.array(np.inf, np.float32)}, AdapterError, "infinite"),
        ({"alpha": np.array(0, np.float32)}, AdapterError, "alpha"),
        ({"alpha": np.array(-2, np.float32)}, AdapterError, "alpha"),
        ({"alpha": SMALL}, AdapterError, "alpha"),
        ({"lora_down.weight": None}, AdapterError, "the two factors"),
    ],
)
def test_what_is_wrong_is_told_by_name(
    change: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    own = tensors() | {f"{OWN}.{ending}": t for ending, t in change.items()}
    file = written(tmp_path, {key: t for key, t in own.items() if t is not None})
    with pytest.raises(error) as caught:
        kohya.modules(file)
    assert OWN in str(caught.value) and words in str(caught.value)


def test_a_file_of_loha_alone_is_known_and_refused(tmp_path: Path) -> None:
    file = written(tmp_path, {"lora_unet_a.hada_w1_a": SMALL})
    assert kohya.holds(file)
    with pytest.raises(UnsupportedFeatureError, match="LoHa"):
        kohya.modules(file)

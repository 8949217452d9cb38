"""PEFT's files of IA3, whose scales go to kernels of any layout, and back.

The reference is a scale by NumPy of the weight in torch's layout, `(out, in)`. What
real PEFT saves and computes is in test_peft_relatives.py.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_close
from paths import DATA
from relative_twin import model as twin
from relative_twin import output_of_peft, params_of
from safetensors.numpy import load_file, save_file

import jlora
import jlora.peft

CONFIG = jlora.LoraConfig(variant="ia3")
RNG = np.random.default_rng(7)
NAMES = [(r"layers/(?P<name>up|down)", "layers.{0}.{name}")]


def write(folder: Path, scales: dict[str, Any], **values: Any) -> Path:
    """A folder as PEFT saves it."""
    folder.mkdir()
    tensors = {
        f"base_model.model.{name}.ia3_l": np.asarray(scale, np.float32)
        for name, scale in scales.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "IA3", "target_modules": sorted(scales), **values}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def kernel(*shape: int) -> dict[str, np.ndarray]:
    return {"kernel": draw(*shape)}


def test_a_stack_of_layers_of_which_some_have_no_scale(tmp_path: Path) -> None:
    params = {"layers": {"up": kernel(3, 4, 6), "down": kernel(3, 6, 4)}}
    scales = {f"layers.{i}.up": draw(6, 1) for i in (0, 2)}
    scales |= {f"layers.{i}.down": draw(1, 6) for i in (1, 2)}
    folder = write(tmp_path / "a", scales, feedforward_modules=["down"])
    configs, adapter = jlora.peft.load(folder, params, NAMES)
    assert [entry.scale_side for entry in adapter.values()] == ["in", "out"]
    assert {c.variant for c in configs} == {"ia3"}
    assert {c.scale_side for c in configs} == {"in", "out"}
    merged = jlora.merge(params, adapter)
    for name in ("up", "down"):
        for i in range(3):
            scale = scales.get(f"layers.{i}.{name}", np.ones((1, 1)))
            own = (params["layers"][name]["kernel"][i].T * scale).T
            assert_close(merged["layers"][name]["kernel"][i], jnp.asarray(own), 1e-6)


def test_a_small_scale_keeps_its_digits(tmp_path: Path) -> None:
    scale = np.asarray([[1e-6], [-3e-5], [1e-3]], np.float32)
    folder = write(tmp_path / "a", {"w": scale})
    _, adapter = jlora.peft.load(folder, {"w": kernel(4, 3)}, [("w", "w")])
    assert np.array_equal(adapter["w/kernel"].scale, scale[:, 0])


def test_kernels_that_are_fused_in_jax_or_in_torch(tmp_path: Path) -> None:
    params = {"qkv": kernel(4, 7), "gate": kernel(4, 5), "up": kernel(4, 5)}
    names = [
        ("qkv", ("q=3", "k=2", "v=2")),
        ("gate", "gate_up[0]"),
        ("up", "gate_up[1]"),
    ]
    scales = {"q": draw(3, 1), "v": draw(2, 1), "gate_up": draw(10, 1)}
    folder = write(tmp_path / "a", scales)
    _, adapter = jlora.peft.load(folder, params, names)
    got = {path: np.asarray(entry.scale) for path, entry in adapter.items()}
    q, v, both = (scales[name][:, 0] for name in ("q", "v", "gate_up"))
    assert np.array_equal(got["qkv/kernel"], np.concatenate([q, [1, 1], v]))
    assert np.array_equal(got["gate/kernel"], both[:5])
    assert np.array_equal(got["up/kernel"], both[5:])
    inputs = write(tmp_path / "b", {"q": draw(1, 4)})
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"'q': .*part of a fused"):
        jlora.peft.load(inputs, params, names)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("given", [["w"], ["other"], r".*w", None])
def test_a_scale_of_one_value_is_what_the_config_says(
    given: Any, side: str, tmp_path: Path
) -> None:
    shape = (1, 5) if side == "in" else (5, 1)
    folder = write(tmp_path / "a", {"w": [[3.0]]}, feedforward_modules=given)
    of_inputs = given in (["w"], r".*w")
    load = lambda: jlora.peft.load(folder, {"w": kernel(*shape)}, [("w", "w")])[1]
    if of_inputs == (side == "in"):
        assert load()["w/kernel"].scale_side == side
    else:
        with pytest.raises(jlora.AdapterError, match="w/kernel"):
            load()


@pytest.mark.parametrize("given", [3, [3], {"w": 1}, "(", r"(?<=a)w"])
def test_fields_that_choose_nothing_are_refused(given: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"w": [[3.0]]}, feedforward_modules=given)
    with pytest.raises(jlora.AdapterError, match="feedforward_modules"):
        jlora.peft.load(folder, {"w": kernel(1, 5)}, [("w", "w")])


@pytest.mark.parametrize("shape", [(), (4,), (2, 2), (4, 1, 2), (1, 4, 2)])
def test_tensors_of_other_shapes_are_refused(shape: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", {"w": np.ones(shape)})
    with pytest.raises(jlora.AdapterError):
        jlora.peft.load(folder, {"w": kernel(4, 4)}, [("w", "w")])


def test_scales_of_another_size_are_refused(tmp_path: Path) -> None:
    for i, shape in enumerate([(5, 1), (1, 3)]):
        folder = write(tmp_path / str(i), {"w": draw(*shape)})
        with pytest.raises(jlora.AdapterError, match=r"'w/kernel' \(4, 3\)"):
            jlora.peft.load(folder, {"w": kernel(4, 3)}, [("w", "w")])


def test_both_sides_in_one_stack_are_refused(tmp_path: Path) -> None:
    scales = {"layers.0.up": draw(6, 1), "layers.1.up": draw(1, 4)}
    folder = write(tmp_path / "a", scales)
    params = {"layers": {"up": kernel(2, 4, 6)}}
    with pytest.raises(jlora.AdapterError, match=r"'layers/up/kernel'.*one side"):
        jlora.peft.load(folder, params, NAMES)


def test_biases_that_peft_scales_along_are_refused(tmp_path: Path) -> None:
    """Of scaled outputs; a scale of inputs leaves the bias as it is."""
    params = {"w": {"kernel": draw(4, 3), "bias": draw(3)}}
    outputs = write(tmp_path / "out", {"w": draw(3, 1)})
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"alone: w\nMerge"):
        jlora.peft.load(outputs, params, [("w", "w")])
    scale = draw(1, 4)
    inputs = write(tmp_path / "in", {"w": scale}, feedforward_modules=["w"])
    _, adapter = jlora.peft.load(inputs, params, [("w", "w")])
    assert np.array_equal(adapter["w/kernel"].scale, scale[0])
    out = {"w/kernel": scaled("out", params["w"]["kernel"])}
    config = jlora.LoraConfig("w/kernel", variant="ia3")
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"alone: w\nMerge"):
        jlora.peft.save(tmp_path / "new", params, out, config, [("w", "w")], kind="IA3")


def scaled(side: str, w: np.ndarray) -> jlora.KernelScale:
    """A random scale of one side of a matrix."""
    axes = jlora.KernelAxes(batch=(), in_=(0,), out=(1,))
    scale = draw(w.shape[side == "out"])
    return jlora.KernelScale(jnp.asarray(scale), axes, side, w.shape)


def model(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["up"]["kernel"])
    return hidden @ params["down"]["kernel"]


def both_sides(tmp_path: Path) -> tuple[Any, Any, Path]:
    """A model whose `up` has a scale of outputs, `down` of inputs, and its files."""
    params = {"up": kernel(12, 90), "down": kernel(90, 18)}
    sides = {"up": "out", "down": "in"}
    adapter = {
        f"{n}/kernel": scaled(side, params[n]["kernel"]) for n, side in sides.items()
    }
    configs = [
        jlora.LoraConfig(f"{n}/kernel", variant="ia3", scale_side=side)
        for n, side in sides.items()
    ]
    names = [(r"(?P<name>up|down)", "{name}")]
    where = tmp_path / "own"
    jlora.peft.save(where, params, adapter, configs, names, kind="IA3")
    return params, adapter, where


def test_files_of_both_sides_are_read_again(tmp_path: Path) -> None:
    params, adapter, where = both_sides(tmp_path)
    said = json.loads((where / "adapter_config.json").read_text())
    assert said["feedforward_modules"] == ["down"]
    assert said["target_modules"] == ["down", "up"]
    tensors = load_file(where / "adapter_model.safetensors")
    shapes = {name.split(".")[-2]: tensor.shape for name, tensor in tensors.items()}
    assert shapes == {"up": (90, 1), "down": (1, 90)}
    configs, again = jlora.peft.load(where, params, [(r"(?P<n>up|down)", "{n}")])
    for path, entry in adapter.items():
        assert again[path].scale_side == entry.scale_side
        assert np.array_equal(again[path].scale, entry.scale)
    x = draw(3, 12)
    y = jlora.lora(model, configs).apply(params, again, x)
    assert_close(y, model(jlora.merge(params, adapter), x), 1e-5)


def test_as_factors_of_lora_scales_are_refused(tmp_path: Path) -> None:
    params, adapter, _ = both_sides(tmp_path)
    with pytest.raises(jlora.UnsupportedFeatureError, match='`kind="IA3"`'):
        jlora.peft.save(tmp_path / "b", params, adapter, CONFIG)


def test_names_that_peft_would_mix_up_are_refused(tmp_path: Path) -> None:
    """PEFT compares ends: what scales the inputs of `down` it finds in `updown`."""
    params = {"updown": kernel(4, 6), "down": kernel(6, 4)}
    adapter = {
        "updown/kernel": scaled("out", params["updown"]["kernel"]),
        "down/kernel": scaled("in", params["down"]["kernel"]),
    }
    names = [(r"(?P<name>updown|down)", "{name}")]
    with pytest.raises(jlora.UnsupportedFeatureError, match="updown"):
        jlora.peft.save(tmp_path / "a", params, adapter, CONFIG, names, kind="IA3")


@pytest.mark.oracle
def test_peft_computes_what_both_sides_say(tmp_path: Path) -> None:
    arrays = dict(np.load(DATA / "peft_relatives" / "ia3" / "arrays.npz"))
    params = params_of(arrays)
    adapter = {
        "up/kernel": scaled("out", params["up"]["kernel"]),
        "down/kernel": scaled("in", params["down"]["kernel"]),
    }
    where, names = tmp_path / "own", [(r"(?P<name>up|down)", "{name}")]
    jlora.peft.save(where, params, adapter, CONFIG, names, kind="IA3")
    y = output_of_peft(where, arrays)
    expected = twin(jlora.merge(params, adapter), jnp.asarray(arrays["x"]))
    assert_close(y, expected, 1e-5)

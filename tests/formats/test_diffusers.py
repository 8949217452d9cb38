"""Diffusers' files: the configs in their metadata, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from format_files import FILES
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jlora
from jlora import AdapterError, CorruptFileError, UnsupportedFeatureError
from jlora._files.format import Format
from jlora._formats import diffusers, gguf, kohya, peft

Tensors = dict[str, np.ndarray]
DOWN, UP = "unet.mid.to_q.lora.down.weight", "unet.mid.to_q.lora.up.weight"


def tensors(rank: int = 2) -> Tensors:
    """One module."""
    rng = np.random.default_rng(0)
    found = {DOWN: rng.normal(size=(rank, 5)), UP: rng.normal(size=(7, rank))}
    return {key: value.astype(np.float32) for key, value in found.items()}


def written(folder: Path, own: Tensors, said: Any = None) -> Path:
    """A file of some tensors, with a metadata."""
    text = said if isinstance(said, str) else json.dumps(said)
    metadata = {} if said is None else {diffusers.METADATA: text}
    save_file(own, folder / "a.safetensors", {"format": "pt", **metadata})
    return folder / "a.safetensors"


def config(part: str = "unet.", **changes: Any) -> dict[str, Any]:
    """What PEFT says of a part."""
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["to_q"]}
    return {f"{part}{field}": value for field, value in {**values, **changes}.items()}


# --- the configs ---


@pytest.mark.parametrize(
    "said, scaling",
    [
        (None, 1.0),
        (config(), 1.5),
        (config(use_rslora=True), 3 / 2**0.5),
        (config(alpha_pattern={"mid.to_q": 5}), 2.5),
        (config(r=4, rank_pattern={"to_q": 2}), 1.5),
        (config("text_encoder."), 1.0),
        (config("", target_modules=["unet.mid.to_q"]), 1.5),
        (config(lora_dropout=0.5), 1.5),
    ],
)
def test_the_scaling_is_that_of_the_parts_config(
    said: Any, scaling: float, tmp_path: Path
) -> None:
    (module,) = diffusers.modules(written(tmp_path, tensors(), said))
    assert module.scaling == pytest.approx(scaling, rel=1e-12)
    assert module.name == "unet.mid.to_q"


@pytest.mark.parametrize(
    "said, error, words",
    [
        (config(r=3), AdapterError, "rank 2, and its metadata says 3"),
        (config(target_modules=["k"]), AdapterError, "does not select it"),
        (config(use_dora=True), UnsupportedFeatureError, "DoRA"),
        (config(peft_type="LOHA"), AdapterError, "LOHA"),
        (config(lora_alpha="3"), CorruptFileError, "lora_alpha"),
        (config(init_lora_weights="pissa"), UnsupportedFeatureError, "pissa"),
        ("{", CorruptFileError, "JSON"),
        ("[]", CorruptFileError, "no object"),
        ('{"unet.r": NaN}', CorruptFileError, "JSON"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    said: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        diffusers.modules(written(tmp_path, tensors(), said))


def test_fields_can_be_done_without(tmp_path: Path) -> None:
    file = written(tmp_path, tensors(), config(r=3, target_modules=["k"]))
    (module,) = diffusers.modules(file, ignore=["r", "target_modules"])
    assert module.scaling == 1.5


# --- keys ---

SMALL = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"unet.q.lora_magnitude_vector": SMALL}, UnsupportedFeatureError, "DoRA"),
        ({"unet.q.lora_B.bias": SMALL}, UnsupportedFeatureError, "a bias"),
        ({"unet.q.lora_embedding_A": SMALL}, UnsupportedFeatureError, "a table"),
        (
            {"unet.processor.to_q_lora.down.weight": SMALL},
            UnsupportedFeatureError,
            "old releases",
        ),
        ({"unet.norm.weight": SMALL}, AdapterError, "'unet.norm.weight'"),
        ({"unet.mid.to_q.lora_A.weight": SMALL}, AdapterError, "under two keys"),
        ({UP: np.ones((7, 3), np.float32)}, AdapterError, "2 and 3"),
        ({UP: np.full((7, 2), np.inf, np.float32)}, AdapterError, "infinite"),
        ({UP: np.ones((7, 2), np.int32)}, AdapterError, "I32"),
        ({"unet." + "x" * 600: SMALL}, CorruptFileError, "no names"),
        ({"unet.\n.lora_A.weight": SMALL}, CorruptFileError, "no names"),
        ({UP: None}, AdapterError, "the two factors"),
    ],
)
def test_what_is_wrong_is_told_by_name(
    change: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    own = {key: t for key, t in {**tensors(), **change}.items() if t is not None}
    with pytest.raises(error, match=re.escape(words)):
        diffusers.modules(written(tmp_path, own))


FORMATS: dict[str, Format] = {
    "peft": peft.FORMAT,
    "diffusers": diffusers.FORMAT,
    "kohya": kohya.FORMAT,
    "gguf": gguf.FORMAT,
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_known_by_its_own_format_alone(case: str, tmp_path: Path) -> None:
    known = {name for name, form in FORMATS.items() if form.holds(FILES[case])}
    assert known == {case}
    renamed = tmp_path / f"x{FILES[case].suffix}"
    renamed.write_bytes(FILES[case].read_bytes())
    assert {name for name, form in FORMATS.items() if form.holds(renamed)} == {case}


def test_what_is_another_kind_of_file_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "text.safetensors").write_text("no header")
    (tmp_path / "short.bin").write_bytes(b"GG")
    save_file({"a.weight": SMALL}, tmp_path / "model.safetensors")
    own = {"base_model.model.q.lora_A.weight": SMALL}
    save_file(own, tmp_path / "renamed.safetensors")
    for path in [*tmp_path.iterdir(), tmp_path / "nowhere", tmp_path]:
        assert not [n for n, form in FORMATS.items() if form.holds(path)], path


# --- writing ---


def adapter_of(*names: str, dtype: Any = np.float32) -> dict[str, Any]:
    """Factors of dense kernels under torch's names, no rank and scaling alike."""
    axes, rng = jlora.KernelAxes((), (0,), (1,)), np.random.default_rng(0)
    number = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        f"params/{name.replace('.', '/')}/kernel": jlora.LoraFactors(
            number((5, rank)), number((rank, 3)), axes, 0.5 + rank
        )
        for rank, name in enumerate(names, 1)
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_what_is_written_is_read(dtype: Any, tmp_path: Path) -> None:
    names = ("unet.a.q", "unet.b.q", "unet.q", "text_encoder_2.q")
    adapter, file = adapter_of(*names, dtype=dtype), tmp_path / "a.safetensors"
    diffusers.write(file, adapter, ())
    _, back = diffusers.read(file)
    assert set(back) == set(adapter)
    for path, factors in adapter.items():
        assert back[path].scaling == factors.scaling
        assert back[path].a.dtype == dtype
        assert np.array_equal(back[path].a, factors.a)
        assert np.array_equal(back[path].b, factors.b)
    with safe_open(file, "np") as opened:
        said = json.loads(opened.metadata()[diffusers.METADATA])
    assert said["text_encoder_2.lora_alpha"] == 18  # (0.5 + 4) · 4
    assert said["unet.peft_type"] == "LORA"


def test_a_part_is_put_before_the_names(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="--prefix unet"):
        diffusers.write(file, adapter_of("mid.q"), ())
    diffusers.write(file, adapter_of("mid.q"), (), prefix="unet")
    assert {key.partition(".lora_")[0] for key in load_file(file)} == {"unet.mid.q"}


def test_a_table_has_no_place(tmp_path: Path) -> None:
    (factors,) = adapter_of("x").values()
    adapter = {"params/text_encoder/embed/embedding": factors}
    with pytest.raises(UnsupportedFeatureError, match=r"text_encoder\.embed"):
        diffusers.write(tmp_path / "a.safetensors", adapter, ())


def test_params_of_a_model_take_it(tmp_path: Path) -> None:
    file = written(tmp_path, tensors(), config())
    shapes = {"params/unet/mid/to_q/kernel": (5, 7), "params/unet/k/kernel": (5, 7)}
    _, adapter = diffusers.read(file, params=shapes)
    (factors,) = adapter.values()
    expected = 1.5 * (tensors()[UP].astype(np.float64) @ tensors()[DOWN]).T
    np.testing.assert_allclose(jlora.delta(factors), expected, rtol=1e-5)

"""Adapters of LoRA's relatives that PEFT saved, read by jlora; no torch is needed.

The fixtures come from `tests/oracle/make_relatives.py`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_close
from paths import DATA
from safetensors.numpy import load_file, save_file

import jlora
import jlora.peft

FOLDER = DATA / "peft_relatives"
CASES = ("loha", "lokr", "lokr_both", "lokr_whole", "vera")
# LoHa's rank squared, LoKr's by blocks, of `up`.
RANKS = {"loha": 4, "lokr": 6, "lokr_both": 3, "lokr_whole": 12, "vera": 4}
each_case = pytest.mark.parametrize("name", CASES)


def model(params: Any, x: jax.Array) -> jax.Array:
    """The twin of `Model` in make_relatives.py."""
    image = jnp.tanh(x @ params["up"]["kernel"]).reshape(-1, 6, 3, 5)
    image = jnp.pad(image, ((0, 0), (0, 0), (0, 0), (0, 1)))
    layout = ("NCHW", "HWIO", "NCHW")
    image = jax.lax.conv_general_dilated(
        image, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=layout
    )
    return jnp.tanh(image).reshape(len(x), -1) @ params["down"]["kernel"]


def params_of(arrays: Any) -> dict[str, Any]:
    """The params of the twin from torch's weights."""
    up, down = (jnp.asarray(arrays[f"{name}.weight"].T) for name in ("up", "down"))
    conv = jnp.asarray(arrays["conv.weight"].transpose(2, 3, 1, 0))
    return {n: {"kernel": v} for n, v in (("up", up), ("conv", conv), ("down", down))}


@pytest.fixture(scope="module")
def arrays() -> dict[str, Any]:
    return {name: dict(np.load(FOLDER / name / "arrays.npz")) for name in CASES}


NAMES = [(r"(?P<name>up|down)", "{name}"), (r"conv", "conv", "conv")]


@each_case
def test_outputs_are_those_of_peft(name: str, arrays: Any) -> None:
    own = arrays[name]
    params = params_of(own)
    config, adapter = jlora.peft.load(FOLDER / name, params, NAMES)
    lora = jlora.lora(model, config)
    y = lora.apply(params, adapter, jnp.asarray(own["x"]))
    assert_close(y, jnp.asarray(own["y"]), 1e-5)
    merged = model(jlora.merge(params, adapter), jnp.asarray(own["x"]))
    assert_close(merged, jnp.asarray(own["y"]), 1e-5)
    assert adapter["up/kernel"].rank == RANKS[name]


def changed(folder: Path, to: Path, tensors: Any = None, **values: Any) -> Path:
    """A copy of a fixture with other values in its config, or other tensors."""
    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, **values}))
    if tensors is not None:
        save_file(tensors, to / "adapter_model.safetensors")
    return to


def test_what_is_not_told_is_refused_by_name(arrays: Any, tmp_path: Path) -> None:
    params, load = params_of(arrays["loha"]), jlora.peft.load
    with pytest.raises(jlora.UnsupportedFeatureError, match="Tucker form"):
        load(FOLDER / "loha_tucker", params, NAMES)
    with pytest.raises(jlora.UnsupportedFeatureError, match="save_projection=True"):
        load(FOLDER / "vera_without", params, NAMES)
    dropping = changed(FOLDER / "loha", tmp_path / "drop", rank_dropout=0.1)
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"`rank_dropout` is 0\.1"):
        load(dropping, params, NAMES)
    load(dropping, params, NAMES, ignore=["rank_dropout"])
    wrong = changed(FOLDER / "loha", tmp_path / "wrong", alpha="much")
    with pytest.raises(jlora.CorruptFileError, match="'alpha': 'much'"):
        load(wrong, params, NAMES)
    with pytest.raises(jlora.AdapterError, match="'IA3'; jlora reads 'LORA', 'LOHA'"):
        load(changed(FOLDER / "lokr", tmp_path / "ia3", peft_type="IA3"), params, NAMES)


@pytest.mark.parametrize("name, part", [("loha", "hada_w2_b"), ("lokr", "lokr_w1")])
def test_tensors_that_do_not_fit_are_refused(
    name: str, part: str, arrays: Any, tmp_path: Path
) -> None:
    params = params_of(arrays[name])
    tensors = load_file(FOLDER / name / "adapter_model.safetensors")
    key = f"base_model.model.up.{part}"
    without = {k: v for k, v in tensors.items() if k != key}
    cut = {**tensors, key: np.ascontiguousarray(tensors[key][:1])}
    for i, other in enumerate((without, cut)):
        folder = changed(FOLDER / name, tmp_path / str(i), other)
        with pytest.raises(jlora.AdapterError, match="up"):
            jlora.peft.load(folder, params, NAMES)


def test_vera_s_vectors_must_fit_the_projections(arrays: Any, tmp_path: Path) -> None:
    params = params_of(arrays["vera"])
    cuts = {"vera_B": (slice(20), "'base_model.model.up' .*projections")}
    cuts["vera_A"] = ((slice(None), slice(9)), "up")
    for name, (cut, match) in cuts.items():
        tensors = load_file(FOLDER / "vera" / "adapter_model.safetensors")
        key = f"base_model.{name}"
        tensors[key] = np.ascontiguousarray(tensors[key][cut])
        folder = changed(FOLDER / "vera", tmp_path / name, tensors)
        with pytest.raises(jlora.AdapterError, match=match):
            jlora.peft.load(folder, params, NAMES)


@pytest.mark.parametrize("name", ["loha", "vera"])
def test_the_command_says_what_it_needs(name: str, tmp_path: Path) -> None:
    command = (
        "convert",
        str(FOLDER / name),
        str(tmp_path / "out"),
        "--to",
        "checkpoint",
    )
    done = subprocess.run(
        [sys.executable, "-m", "jlora", *command], capture_output=True, text=True
    )
    assert done.returncode and "how many inputs a module has" in done.stderr, done

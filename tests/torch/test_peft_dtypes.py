"""Folders with tensors of dtypes that few have: the others are read, all are kept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_files import RANK, SCALE, draw, factors, merged, write_adapter

import jlora
import jlora.weights

# The bits of a value.
BITS = {
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64, "F4": 4, "F6_E2M3": 6,
    "F6_E3M2": 6,
}  # fmt: skip
SHARED = ("F4", "F6_E2M3", "F6_E3M2")
OUT, N = 6, 4


def write(folder: Path, dtype: str, weight: np.ndarray) -> tuple[Path, bytes]:
    """A model of one plain weight, and one of a dtype."""
    folder.mkdir(parents=True)
    values = np.random.default_rng(3).integers(1, 100, (8 * BITS[dtype]) // 8)
    odd = values.astype(np.uint8).tobytes()
    parts: dict[str, Any] = {"q.weight": ("F32", [OUT, N], weight.tobytes())}
    parts["q.weight_scale"] = (dtype, [2, 4], odd)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (kind, shape, part) in parts.items():
        begin, data = len(data), data + part
        header[name] = {
            "dtype": kind,
            "shape": shape,
            "data_offsets": [begin, len(data)],
        }
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder, odd


def raw(folder: Path, name: str) -> tuple[Any, bytes]:
    """The entry of a tensor, and its bytes."""
    data = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:end])[name]
    begin, stop = entry["data_offsets"]
    return entry, data[end + begin : end + stop]


@pytest.mark.parametrize("dtype", BITS)
def test_other_tensors_of_the_folder_are_read(dtype: str, tmp_path: Path) -> None:
    weight = draw()(OUT, N)
    folder, odd = write(tmp_path / "base", dtype, weight)
    opened = jlora.weights.open_weights(folder)
    np.testing.assert_array_equal(opened["q.weight"], weight)
    assert opened.shape("q.weight_scale").shape == (2, 4)
    if dtype in SHARED:
        with pytest.raises(
            jlora.UnsupportedFeatureError, match=rf"weight_scale.*{dtype}"
        ):
            opened["q.weight_scale"]
    else:
        assert opened["q.weight_scale"].tobytes() == odd


@pytest.mark.parametrize("dtype", BITS)
def test_what_is_not_merged_is_kept_to_the_bit(dtype: str, tmp_path: Path) -> None:
    weight, rand = draw()(OUT, N), draw(1)
    folder, odd = write(tmp_path / "base", dtype, weight)
    a, b = rand(RANK, N), rand(OUT, RANK)
    peft = write_adapter(tmp_path / "peft", factors("q", a, b), target_modules=["q"])
    out = tmp_path / "merged"
    jlora.weights.merge_folder(folder, peft, out)
    entry, data = raw(out, "q.weight_scale")
    assert (entry["dtype"], entry["shape"], data) == (dtype, [2, 4], odd)
    found = jlora.weights.open_weights(out)
    np.testing.assert_allclose(found["q.weight"], weight + SCALE * b @ a, atol=1e-5)


@pytest.mark.parametrize("dtype", SHARED)
def test_what_would_be_merged_is_refused_by_name(dtype: str, tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "base", dtype, draw()(OUT, N))
    (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes().replace(b"_scale", b".scale")
    )
    rand = draw(1)
    tensors = factors("q", rand(RANK, N), rand(OUT, RANK)) | {
        "q.weight.scale": rand(2, 4)
    }
    said: Any = {"target_modules": ["q"], "modules_to_save": ["weight"]}
    peft = write_adapter(tmp_path / "peft", tensors, **said)
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"q\.weight\.scale"):
        merged(tmp_path, folder, peft)


@pytest.mark.parametrize("dtype", SHARED)
def test_values_that_fill_no_bytes_are_refused(dtype: str, tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "base", dtype, draw()(OUT, N))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"[2, 4]", b"[3, 3]"))
    with pytest.raises(jlora.CorruptFileError, match="does not fit its offsets"):
        jlora.weights.open_weights(folder)

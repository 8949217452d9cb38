"""The weights of a torch model: opened lazily, and merged as PEFT merges them."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import DATA
from safetensors.numpy import load_file, save_file

import jlora.peft
import jlora.weights

CASES = DATA / "peft"
# Cases whose weights PEFT merges, and merges rightly.
MERGED = sorted(
    folder.name
    for folder in CASES.iterdir()
    if (folder / "arrays.npz").exists()
    and any(k.startswith("merged/") for k in np.load(folder / "arrays.npz").files)
)


def arrays_of(case: str, group: str) -> dict[str, np.ndarray]:
    """The arrays of one group of a case, by torch's names."""
    found = np.load(CASES / case / "arrays.npz")
    prefix = f"{group}/"
    return {
        k.removeprefix(prefix): found[k] for k in found.files if k.startswith(prefix)
    }


def model_folder(place: Path, weights: dict[str, np.ndarray], shards: int = 2) -> Path:
    """A folder as Hugging Face has it: some files of weights, an index, a config."""
    folder = place / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    homes: dict[str, str] = {}
    for number in range(shards):
        own = dict(list(weights.items())[number::shards])
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({k: np.ascontiguousarray(v) for k, v in own.items()}, folder / name)
        homes |= dict.fromkeys(own, name)
    index = {"metadata": {}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def merge_quietly(base: Path, adapter: Path, out: Path) -> None:
    """Merges; that PEFT doubles the output of an attention is known."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PEFT up to 0.21 adds the delta")
        jlora.weights.merge_folder(base, adapter, out, ignore=["lora_dropout"])


def test_there_are_cases() -> None:
    assert len(MERGED) > 20


@pytest.mark.parametrize("case", MERGED)
def test_merged_weights_are_those_of_peft(case: str, tmp_path: Path) -> None:
    base, expected = arrays_of(case, "base"), arrays_of(case, "merged")
    folder = model_folder(tmp_path, base)
    merge_quietly(folder, CASES / case, tmp_path / "merged")
    found = jlora.weights.open_weights(tmp_path / "merged")
    assert set(found) == set(base)
    for name, before in base.items():
        wanted = expected.get(name, before)
        assert found[name].dtype == before.dtype
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-6)
    changed = [n for n in base if not np.array_equal(found[n], base[n])]
    assert set(changed) >= set(expected) & set(base)


def test_everything_else_in_the_folder_is_copied(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, arrays_of("linear", "base"))
    merge_quietly(folder, CASES / "linear", tmp_path / "merged")
    names = lambda place: sorted(file.name for file in place.iterdir())
    assert names(tmp_path / "merged") == names(folder)
    assert names(tmp_path) == ["merged", "model"]  # nothing is left beside them
    for file in folder.glob("*.json"):
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    base = arrays_of("linear", "base")
    coarse = {k: v.astype(jnp.bfloat16) for k, v in base.items()}
    folder = model_folder(tmp_path, coarse)
    merge_quietly(folder, CASES / "linear", tmp_path / "merged")
    found = jlora.weights.open_weights(tmp_path / "merged")
    for name, merged in arrays_of("linear", "merged").items():
        exact = coarse[name].astype(np.float32) + (merged - base[name])
        assert found[name].dtype == jnp.bfloat16
        step = np.spacing(np.abs(exact).max()) * 2.0**16  # of bfloat16
        assert np.abs(found[name].astype(np.float32) - exact).max() <= step / 2 * 1.01


def test_float64_is_summed_in_float64(tmp_path: Path) -> None:
    base = {k: v.astype(np.float64) for k, v in arrays_of("linear", "base").items()}
    fine = {k: v + 1e-9 for k, v in base.items()}  # lost in float32
    merge_quietly(model_folder(tmp_path, fine), CASES / "linear", tmp_path / "merged")
    found = jlora.weights.open_weights(tmp_path / "merged")
    (tmp_path / "coarse").mkdir()
    folder = model_folder(tmp_path / "coarse", base)
    merge_quietly(folder, CASES / "linear", tmp_path / "coarse" / "merged")
    for name, coarse in jlora.weights.open_weights(folder.parent / "merged").items():
        np.testing.assert_allclose(found[name] - coarse, 1e-9, rtol=1e-3)


def changed_by(case: str) -> list[str]:
    """The weights that the adapter of a case changes."""
    base, merged = arrays_of(case, "base"), arrays_of(case, "merged")
    return [n for n in base if n in merged and not np.array_equal(merged[n], base[n])]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("case", ["linear", "modules_to_save", "mha", "experts_two"])
def test_quantised_weights_are_refused_by_name(
    case: str, dtype: Any, tmp_path: Path
) -> None:
    base = arrays_of(case, "base")
    codes = {name: base[name].astype(dtype) for name in changed_by(case)}
    scales = {f"{n}.SCB": np.ones(len(codes[n]), np.float32) for n in codes}
    folder = model_folder(tmp_path, base | codes | scales)
    with pytest.raises(jlora.UnsupportedFeatureError) as caught:
        merge_quietly(folder, CASES / case, tmp_path / "merged")
    assert len(codes) > 1
    for name in codes:
        assert f"{name!r} ({np.dtype(dtype).name})" in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_codes_that_the_adapter_leaves_alone_are_copied(tmp_path: Path) -> None:
    codes = {
        "other.weight": np.arange(6, dtype=np.int8).reshape(2, 3),
        "scaled.weight": np.ones((2, 3), jnp.float8_e4m3fn),
    }
    folder = model_folder(tmp_path, arrays_of("linear", "base") | codes)
    merge_quietly(folder, CASES / "linear", tmp_path / "merged")
    found = jlora.weights.open_weights(tmp_path / "merged")
    for name, before in codes.items():
        assert found[name].dtype == before.dtype
        assert found[name].tobytes() == before.tobytes()


def test_sums_that_overflow_are_refused_by_name(tmp_path: Path) -> None:
    base, largest = arrays_of("linear", "base"), np.finfo(np.float16).max
    half = {name: weight.astype(np.float16) for name, weight in base.items()}
    changed = changed_by("linear")
    # The sum with an infinity that was there before is nobody's overflow.
    half = {n: np.full_like(w, -np.inf) for n, w in half.items() if n not in changed}
    full = {n: np.full(base[n].shape, largest) for n in changed}
    folder = model_folder(tmp_path, half | full)
    adapter = tmp_path / "adapter"
    enlarged(CASES / "linear", adapter, by=1e3)
    with pytest.raises(jlora.NonFiniteError) as caught:
        merge_quietly(folder, adapter, tmp_path / "merged")
    assert len(changed) > 1
    assert all(f"{name!r} (float16)" in str(caught.value) for name in changed)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "model"]


def enlarged(source: Path, target: Path, by: float) -> None:
    """Writes an adapter with a larger delta."""
    target.mkdir()
    shutil.copy(source / "adapter_config.json", target)
    tensors = load_file(source / "adapter_model.safetensors")
    larger = {n: t * by if "lora_B" in n else t for n, t in tensors.items()}
    save_file(larger, target / "adapter_model.safetensors")


def test_weights_in_other_formats_are_not_copied_as_merged(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, arrays_of("linear", "base"))
    kept = {file.name for file in folder.iterdir()}
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "flax.msgpack"):
        (folder / name).write_bytes(b"{}")
    merge_quietly(folder, CASES / "linear", tmp_path / "merged")
    assert {file.name for file in (tmp_path / "merged").iterdir()} == kept


def test_one_file_of_a_model_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, arrays_of("linear", "base"), shards=1)
    (file,) = folder.glob("*.safetensors")
    with pytest.raises(NotADirectoryError, match=re.escape(f"give {folder}")):
        merge_quietly(file, CASES / "linear", tmp_path / "merged")


def test_progress_ends_with_all_tensors(tmp_path: Path) -> None:
    base = arrays_of("linear", "base")
    folder, seen = model_folder(tmp_path, base), []
    note = lambda done, total, name: seen.append((done, total))
    out = tmp_path / "merged"
    jlora.weights.merge_folder(folder, CASES / "linear", out, progress=note)
    assert len(seen) == 2 and seen[-1] == (len(base), len(base))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_copy_of_the_weights_in_another_layout_is_left(
    shards: int, tmp_path: Path
) -> None:
    """Mistral's models have one: merged alone it would keep the old weights."""
    base = arrays_of("linear", "base")
    folder = model_folder(tmp_path, base, shards)
    index = "model.safetensors.index.json"
    if shards == 1:  # the index is stale then
        (file,) = folder.glob("*.safetensors")
        file.rename(folder / "model.safetensors")
    copy = {f"layers.{name}": value for name, value in base.items()}
    save_file(copy, folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors.index.json").write_text("{}")
    assert set(jlora.weights.open_weights(folder)) == set(base)
    out = tmp_path / "merged"
    jlora.weights.merge_folder(folder, CASES / "linear", out)
    assert not list(out.glob("consolidated*"))
    assert (out / index).exists() == (shards > 1)
    assert set(jlora.weights.open_weights(out)) == set(base)


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": ["model-00001-of-00002.safetensors"]}',
        '{"weight_map": {"w": 1}}',
        '{"weight_map": {"w": "../model-00001-of-00002.safetensors"}}',
        '{"weight_map": {"w": "pytorch_model.bin"}}',
        '{"weight_map": {"w": ',
    ],
)
def test_an_index_that_is_none_is_refused(index: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, arrays_of("linear", "base"))
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(jlora.CorruptFileError, match=r"index\.json"):
        jlora.weights.open_weights(folder)


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, arrays_of("linear", "base"))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: \['model-00002-of-00002"):
        jlora.weights.open_weights(folder)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, arrays_of("linear", "base"))
    with pytest.raises(FileExistsError, match="there already"):
        merge_quietly(folder, CASES / "linear", folder)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, arrays_of("llama", "base"))
    with pytest.raises(jlora.AdapterError, match="lin"):
        merge_quietly(folder, CASES / "linear", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_selected_weights_without_factors_are_refused(tmp_path: Path) -> None:
    base = arrays_of("linear", "base")
    name = next(n for n, v in arrays_of("linear", "merged").items() if v.ndim == 2)
    extra = {f"more.{name}": base[name]}  # its name ends like one that is selected
    folder = model_folder(tmp_path, base | extra)
    with pytest.raises(jlora.AdapterError, match="no factors"):
        merge_quietly(folder, CASES / "linear", tmp_path / "merged")


@pytest.mark.parametrize("damage", ["truncated", "header", "link"])
def test_damaged_weights_are_refused(damage: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path, arrays_of("linear", "base"), shards=1)
    (file,) = folder.glob("*.safetensors")
    data = file.read_bytes()
    if damage == "link":
        moved = file.rename(tmp_path / "elsewhere.safetensors")
        file.symlink_to(moved)
    else:
        file.write_bytes(data[:-1] if damage == "truncated" else b"\xff" * 8 + data[8:])
    error = {"link": jlora.UnsafeFormatError}.get(damage, jlora.CorruptFileError)
    with pytest.raises(error, match="safetensors"):
        jlora.weights.open_weights(folder)


def test_two_files_with_the_same_tensor_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": np.ones((2, 3), np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(jlora.AdapterError, match="several files"):
        jlora.weights.open_weights(tmp_path)


def test_weights_feed_params(tmp_path: Path) -> None:
    """`params_from_torch` takes the folder as a mapping."""
    weights = {
        "out.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
        "out.bias": np.arange(3, dtype=np.float32),
    }
    folder = model_folder(tmp_path, weights)
    shapes = {"kernel": (2, 3), "bias": (3,)}
    struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    params = {"params": {"out": {k: struct(s) for k, s in shapes.items()}}}
    found = jlora.peft.params_from_torch(jlora.weights.open_weights(folder), params)
    kernel = found["params"]["out"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel.astype(np.float32), weights["out.weight"].T)

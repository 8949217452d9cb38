"""The weights of a torch model: opened lazily, and merged as PEFT merges them."""

import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora.peft
import jlora.weights

CASES = Path(__file__).parent / "data" / "peft"
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


def test_progress_ends_with_all_tensors(tmp_path: Path) -> None:
    base = arrays_of("linear", "base")
    folder, seen = model_folder(tmp_path, base), []
    note = lambda done, total, name: seen.append((done, total))
    out = tmp_path / "merged"
    jlora.weights.merge_folder(folder, CASES / "linear", out, progress=note)
    assert len(seen) == 2 and seen[-1] == (len(base), len(base))


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

"""MLX's folders: what mlx-lm makes of an adapter, and what jlora reads and writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import DATA
from safetensors.numpy import load_file, save_file

import jlora
import jlora.checkpoint
import jlora.peft
import jlora.weights
from jlora.__main__ import FAILED, SAME, main
from jlora._formats import mlx, peft

CASES = DATA / "mlx"
each_case = pytest.mark.parametrize("case", ["linear", "dora", "table", "experts"])
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


def arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(folder / f"{name}.safetensors")


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def jax_kernel(name: str, weights: dict[str, np.ndarray]) -> np.ndarray:
    """A weight of MLX's, `(out, in)` or `(rows, dims)`, as the kernel of a path."""
    weight = weights[f"{name}.weight"]
    return weight if "embed" in name else np.swapaxes(weight, -1, -2)


def module(path: str) -> str:
    return ".".join(path.split("/")[1:-1])


@each_case
def test_the_kernels_are_those_that_mlx_fuses(case: str) -> None:
    configs, adapter = mlx.read(CASES / case)
    base, fused = (arrays(CASES / case, n) for n in ("base", "fused"))
    assert adapter
    for path, entry in adapter.items():
        kernel = jax_kernel(module(path), base)
        wanted = jax_kernel(module(path), fused)
        merged = jlora.merge({"w": jnp.asarray(kernel)}, {"w": entry})["w"]
        assert np.abs(wanted - kernel).max() > 0.1
        np.testing.assert_allclose(merged, wanted, rtol=1e-4, atol=1e-5)
        assert entry.scaling == 2.5
    several = (configs,) if isinstance(configs, jlora.LoraConfig) else configs
    assert {(c.rank, c.scaling, c.dora) for c in several} == {(3, 2.5, case == "dora")}


@each_case
def test_what_is_converted_to_a_checkpoint_and_back_is_the_same(
    case: str, tmp_path: Path
) -> None:
    source, between, back = CASES / case, tmp_path / "between", tmp_path / "back"
    assert run("convert", source, between, "--to", "checkpoint") == SAME
    assert run("diff", source, between) == SAME
    assert run("convert", between, back, "--to", "MLX") == SAME
    one, other = (load_file(folder / WEIGHTS) for folder in (source, back))
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    config = json.loads((back / CONFIG).read_text())
    parameters = config["lora_parameters"]
    keys = sorted({name.rpartition(".")[0] for name in one})
    assert parameters == {"dropout": 0.0, "keys": keys, "rank": 3, "scale": 2.5}
    assert config["fine_tune_type"] == ("dora" if case == "dora" else "lora")


@pytest.mark.parametrize("case", ["linear", "dora"])
def test_peft_has_the_same_delta(case: str, tmp_path: Path) -> None:
    assert run("convert", CASES / case, tmp_path / "peft") == SAME
    assert run("diff", CASES / case, tmp_path / "peft") == SAME
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    assert config["lora_alpha"] == 7.5 and config["use_dora"] == (case == "dora")
    assert run("convert", tmp_path / "peft", tmp_path / "back", "--to", "mlx") == SAME
    assert run("diff", CASES / case, tmp_path / "back") == SAME


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A Hugging Face folder of the weights of a case, which torch calls the same."""

    def folder(case: str) -> Path:
        place = tmp_path / "model"
        place.mkdir()
        shutil.copy(CASES / case / "config.json", place)
        save_file(arrays(CASES / case, "base"), place / "model.safetensors")
        return place

    return folder  # type: ignore[return-value]


@each_case
def test_merge_gives_the_weights_that_mlx_fuses(
    case: str, model: Any, tmp_path: Path
) -> None:
    assert run("merge", model(case), CASES / case, tmp_path / "out") == SAME
    merged = load_file(tmp_path / "out" / "model.safetensors")
    fused = arrays(CASES / case, "fused")
    del fused["logits"]
    assert merged.keys() == fused.keys()  # the head of a tied table stays tied
    for name, weight in fused.items():
        np.testing.assert_allclose(merged[name], weight, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (CASES / case / "config.json").read_text()
    )


def test_experts_are_not_converted_to_peft(tmp_path: Path, capsys: Any) -> None:
    assert run("convert", CASES / "experts", tmp_path / "peft") == FAILED
    assert "switch_mlp.up_proj" in (said := capsys.readouterr().err)
    assert "jlora merge" in said
    assert not (tmp_path / "peft").exists()


def test_a_table_is_not_converted_to_peft(tmp_path: Path, capsys: Any) -> None:
    assert run("convert", CASES / "table", tmp_path / "peft") == FAILED
    assert "adapts the head too" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()


def test_a_table_of_peft_is_not_converted_to_mlx(tmp_path: Path, capsys: Any) -> None:
    params = {"params": {"embed": {"embedding": jnp.ones((9, 4))}}}
    fn = lambda p, ids: p["params"]["embed"]["embedding"][ids]
    config = jlora.LoraConfig("embedding", rank=2)
    adapter = jlora.lora(fn, config).init(jax.random.key(0), params, jnp.ones(2, int))
    jlora.peft.save(tmp_path / "peft", params, adapter, config)
    words = ("convert", tmp_path / "peft", tmp_path / "mlx", "--to", "mlx")
    assert run(*words) == FAILED
    assert "for the lookup alone" in capsys.readouterr().err


# --- what is written ---


def factors(shape: tuple[int, int], rank: int, scaling: float, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, shape[1]))
    axes = jlora.KernelAxes((), (0,), (1,))
    make = lambda x: jnp.asarray(x, jnp.float32)
    return jlora.LoraFactors(make(a), make(b), axes, scaling)


def test_several_ranks_and_scalings_become_one(tmp_path: Path) -> None:
    adapter = {
        "params/up/kernel": factors((5, 7), 2, 1.5, 0),
        "params/down/kernel": factors((7, 5), 4, 1.5, 1),
        "params/out/kernel": factors((5, 3), 3, 0.25, 2),
    }
    configs = [
        jlora.LoraConfig("up", rank=2, alpha=3.0, dropout=0.1),
        jlora.LoraConfig("down", rank=4, alpha=6.0),
        jlora.LoraConfig("out", rank=3, alpha=0.75),
    ]
    mlx.write(tmp_path, adapter, configs)
    parameters = json.loads((tmp_path / CONFIG).read_text())["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (4, 1.5)
    assert parameters["dropout"] == 0.1
    tensors = load_file(tmp_path / WEIGHTS)
    for path, entry in adapter.items():
        a, b = (tensors[f"{module(path)}.{k}"] for k in ("lora_a", "lora_b"))
        assert a.shape[1] == b.shape[0] == 4
        np.testing.assert_allclose(1.5 * a @ b, jlora.delta(entry), 1e-5, 1e-6)


def test_names_of_a_family_number_the_layers_of_a_stack(tmp_path: Path) -> None:
    one = [factors((5, 7), 2, 1.5, seed) for seed in range(3)]
    axes = jlora.KernelAxes((0,), (1,), (2,))
    a, b = (jnp.stack([getattr(f, n) for f in one]) for n in ("a", "b"))
    path = "params/layers/mlp/up_proj/kernel"
    adapter = {path: jlora.LoraFactors(a, b, axes, 1.5)}
    config = jlora.LoraConfig("up_proj", rank=2, alpha=3.0)
    jlora.checkpoint.save(tmp_path / "stack", adapter, config=config)
    words = ["convert", tmp_path / "stack", tmp_path / "mlx", "--to", "mlx"]
    assert run(*words, "--names", "llama") == SAME
    tensors = load_file(tmp_path / "mlx" / WEIGHTS)
    for i, entry in enumerate(one):
        name = f"model.layers.{i}.mlp.up_proj"
        delta = 1.5 * tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
        np.testing.assert_allclose(delta, jlora.delta(entry), 1e-5, 1e-6)
    (tmp_path / "shapes.json").write_text(json.dumps({path: [3, 5, 7]}))
    words = ["convert", tmp_path / "mlx", tmp_path / "back", "--to", "checkpoint"]
    told = ["--names", "llama", "--params", tmp_path / "shapes.json"]
    assert run(*words, *told) == SAME
    assert run("diff", tmp_path / "stack", tmp_path / "back") == SAME


@pytest.mark.parametrize(
    "change, message",
    [
        ({"params/c/kernel": ((0, 1, 2), (3,))}, "no factors of dense kernels"),
        ({"params/layers/up/kernel": ((1,), (2,))}, "batch axes"),
        ({"params/up/kernel": None}, "of all modules or of none"),
    ],
)
def test_what_mlx_has_no_place_for_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapter = {"params/q/kernel": factors((5, 7), 2, 1.5, 0)}
    for path, roles in change.items():
        if roles is None:
            up = factors((5, 7), 2, 1.5, 3)
            norms = jnp.ones(7)
            up = jlora.LoraFactors(up.a, up.b, up.axes, up.scaling, norms)
            adapter[path] = up
        else:
            axes = jlora.KernelAxes(
                tuple({0, 1, 2} - {*roles[0], *roles[1]}), roles[0], roles[1]
            )
            shapes = axes.factor_shapes((3, 3, 4, 6)[: axes.ndim], 2)
            adapter[path] = jlora.LoraFactors(*map(jnp.ones, shapes), axes, 1.5)
    with pytest.raises(jlora.AdapterError, match=message):
        mlx.write(tmp_path, adapter, jlora.LoraConfig("q", rank=2, alpha=3.0))
    assert not any(tmp_path.iterdir())


def test_neither_kind_of_folder_is_written_into_the_other(
    tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(CASES / "linear", tmp_path / "mlx")
    assert run("convert", tmp_path / "mlx", tmp_path / "peft") == SAME
    for kind, name in (("peft", "mlx"), ("mlx", "peft")):
        source = tmp_path / kind
        words = ("convert", source, tmp_path / name, "--to", name, "--overwrite")
        assert run(*words) == SAME, capsys.readouterr().err  # its own kind
        words = ("convert", source, tmp_path / name, "--to", kind, "--overwrite")
        assert run(*words) == FAILED
        assert "another folder" in capsys.readouterr().err


# --- which files are whose ---


def test_an_adapter_of_mlx_is_none_of_peft(tmp_path: Path) -> None:
    shutil.copytree(CASES / "linear", tmp_path / "mlx")
    assert run("convert", tmp_path / "mlx", tmp_path / "peft") == SAME
    names = {"mlx": WEIGHTS, "peft": "adapter_model.safetensors"}
    for folder, weights in names.items():
        for path in (folder, f"{folder}/{CONFIG}", f"{folder}/{weights}"):
            kinds = [form.holds(tmp_path / path) for form in (mlx, peft)]
            assert kinds == [folder == "mlx", folder == "peft"], path
        assert run("inspect", tmp_path / folder / CONFIG) == SAME


# --- what is wrong ---


def altered(tmp_path: Path, config: Any = None, **tensors: Any) -> Path:
    """The linear case with another config, or other tensors; `...` takes one out."""
    folder = tmp_path / "altered"
    shutil.copytree(CASES / "linear", folder)
    values = json.loads((folder / CONFIG).read_text())
    own = {**values["lora_parameters"], **(config or {}).pop("lora_parameters", {})}
    own = {k: v for k, v in own.items() if v is not ...}
    values = {**values, "lora_parameters": own, **(config or {})}
    (folder / CONFIG).write_text(json.dumps(values))
    name = "model.layers.0.self_attn.q_proj"
    found = load_file(folder / WEIGHTS)
    found |= {f"{name}.{k}": v for k, v in tensors.items()}
    found = {k: v for k, v in found.items() if v is not ...}
    save_file(found, folder / WEIGHTS)
    return folder


def numbers(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    "config, tensors, message",
    [
        ({"lora_parameters": {"scale": ...}}, {}, "`scale` is None"),
        ({"lora_parameters": {"scale": -2}}, {}, "`scale` is -2"),
        ({"lora_parameters": {"rank": 4}}, {}, "the rank is 4"),
        ({"lora_parameters": {"rank": True}}, {}, "`rank` is True"),
        ({"lora_parameters": {"alpha": 16}}, {}, "an `alpha`, 16"),
        ({"fine_tune_type": "full"}, {}, "`fine_tune_type` is 'full'"),
        ({"fine_tune_type": "dora"}, {}, "'dora' has"),
        ({}, {"lora_a": ...}, r"q_proj' has \['lora_b'\]"),
        ({}, {"m": numbers(12)}, "'lora' has"),
        ({}, {"weight": numbers(12, 12)}, "none of lora_a, lora_b and m"),
        ({}, {"lora_a": numbers(12, 2)}, "the rank is 3"),
        ({}, {"lora_a": numbers(2, 12, 3)}, "no layer"),
        ({}, {"lora_a": numbers(12, 3).astype(np.float16)}, "dtypes float16"),
        ({}, {"lora_a": numbers(12, 3) * np.nan}, "NaN"),
    ],
)
def test_what_is_wrong_is_one_line(
    config: Any, tensors: Any, message: str, tmp_path: Path, capsys: Any
) -> None:
    folder = altered(tmp_path, config, **tensors)
    with pytest.raises(jlora.AdapterError, match=message):
        mlx.read(folder)
    assert run("inspect", folder) == FAILED
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_alpha_is_left_out_of_account_on_request(tmp_path: Path) -> None:
    folder = altered(tmp_path, {"lora_parameters": {"alpha": 16}})
    assert run("inspect", folder, "--ignore", "alpha") == SAME
    _, adapter = mlx.read(folder, ignore=["alpha"])
    assert {entry.scaling for entry in adapter.values()} == {2.5}


def test_no_link_is_followed(tmp_path: Path) -> None:
    folder = altered(tmp_path)
    (folder / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(jlora.UnsafeFormatError, match="is a link"):
        mlx.read(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = altered(tmp_path)
    (folder / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=CONFIG):
        mlx.read(folder)

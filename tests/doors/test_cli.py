"""The command line, in process: what it prints, writes and returns."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import DATA, ROOT
from safetensors.numpy import load_file, save_file

import jlora.checkpoint
import jlora.peft
import jlora.weights
from jlora import SlicedFactors, TrainedRows
from jlora.__main__ import DIFFERENT, FAILED, SAME, main

CASES = DATA / "peft"
GOLDEN = DATA / "checkpoint_v1"
SHAPES = {"params/up/kernel": (5, 7), "params/down/kernel": (3, 7, 5)}
CONFIG = jlora.LoraConfig("up|down", rank=2, alpha=3.0)


def adapter_of(seed: int = 0) -> dict[str, Any]:
    """Factors of a dense kernel and of a stack of three, with b off zero."""
    generator = np.random.default_rng(seed)
    number = lambda shape: jnp.asarray(generator.normal(size=shape), jnp.float32)
    found = {}
    for path, shape in SHAPES.items():
        batch = tuple(range(len(shape) - 2))
        axes = jlora.KernelAxes(batch, (len(batch),), (len(batch) + 1,))
        a, b = map(number, axes.factor_shapes(shape, CONFIG.rank))
        found[path] = jlora.LoraFactors(a, b, axes, CONFIG.scaling)
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of `adapter_of()`."""
    jlora.checkpoint.save(tmp_path / "saved", adapter_of(), config=CONFIG)
    return tmp_path / "saved"


def dense(seed: int = 0) -> dict[str, Any]:
    """The dense kernel of `adapter_of`, alone."""
    return {"params/up/kernel": adapter_of(seed)["params/up/kernel"]}


def same(one: Any, other: Any) -> bool:
    """Whether two adapters are equal to the bit."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_inspect_prints_norms_and_spectrum(saved: Path, capsys: Any) -> None:
    assert main(["inspect", str(saved)]) == SAME
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("params/up/kernel"))
    factors = adapter_of()["params/up/kernel"]
    values = np.linalg.svd(np.asarray(jlora.delta(factors), np.float64))[1]
    cells = line.split()
    assert cells[1:5] == ["5×7", "2", "1.5", "float32"]
    assert float(cells[7]) == pytest.approx(np.linalg.norm(values), rel=1e-3)
    assert float(cells[8]) == pytest.approx(values[0], rel=1e-3)
    assert "2 targets" in lines[-1]


@pytest.mark.parametrize(
    "case",
    sorted(
        f.name
        for f in CASES.iterdir()
        if (f / "arrays.npz").exists() and not f.name.startswith("lora_bias")
    ),
)
@pytest.mark.filterwarnings("ignore:PEFT up to 0.21 adds the delta")
def test_every_adapter_of_peft_is_inspected(case: str, capsys: Any) -> None:
    words = ["inspect", str(CASES / case), "--ignore", "lora_dropout"]
    assert main(words) == SAME, capsys.readouterr().err
    assert "targets" in capsys.readouterr().out


def test_a_checkpoint_is_converted_and_back(tmp_path: Path) -> None:
    first, peft, back = (tmp_path / name for name in ("first", "peft", "back"))
    jlora.checkpoint.save(first, dense(), config=CONFIG)
    assert main(["convert", str(first), str(peft)]) == SAME
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    assert config["target_modules"] == ["up"]
    assert main(["convert", str(peft), str(back)]) == SAME
    assert same(jlora.checkpoint.restore(back), dense())
    assert main(["diff", str(first), str(back)]) == SAME
    assert main(["diff", str(first), str(peft)]) == SAME


def test_what_is_trained_whole_is_converted_and_back(tmp_path: Path) -> None:
    kernels = {"k": (4, 6), "q": (4, 6)}
    params = {"params": {n: {"kernel": jnp.ones(s)} for n, s in kernels.items()}}
    params["params"]["norm"] = {"scale": jnp.ones(5)}
    fn = lambda p, x: (
        x @ p["params"]["k"]["kernel"] + x @ p["params"]["q"]["kernel"],
        p["params"]["norm"]["scale"],
    )
    configs = [jlora.LoraConfig("k|norm", full=True), jlora.LoraConfig("q", rank=2)]
    adapter = jlora.lora(fn, configs).init(jax.random.key(0), params, jnp.ones((1, 4)))
    adapter = jax.tree.map(lambda x: jnp.arange(x.size * 1.0).reshape(x.shape), adapter)
    first, between, back = (tmp_path / name for name in ("first", "between", "back"))
    jlora.peft.save(first, params, adapter, configs)
    assert main(["convert", str(first), str(between)]) == SAME
    assert main(["convert", str(between), str(back)]) == SAME
    read = lambda folder: load_file(folder / "adapter_model.safetensors")
    assert same(read(first), read(back))
    said = [json.loads((f / "adapter_config.json").read_text()) for f in (first, back)]
    assert said[0] == said[1] and said[0]["modules_to_save"] == ["k", "norm"]


def test_names_of_a_family_number_the_layers_of_a_stack(tmp_path: Path) -> None:
    factors = adapter_of()["params/down/kernel"]
    adapter = {"params/layers/mlp/down_proj/kernel": factors}
    config = jlora.LoraConfig("down_proj", rank=2, alpha=3.0)
    jlora.checkpoint.save(tmp_path / "stack", adapter, config=config)
    words = ["convert", str(tmp_path / "stack"), str(tmp_path / "peft")]
    assert main([*words, "--names", "llama"]) == SAME
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    wanted = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert config["target_modules"] == wanted


def several_inputs(window: tuple[int, ...], seed: int = 0) -> jlora.LoraFactors:
    """Factors of a kernel `(*window, 4, 6)`, of a convolution or of heads."""
    axes = jlora.KernelAxes((), tuple(range(len(window) + 1)), (len(window) + 1,))
    generator = np.random.default_rng(seed)
    shapes = axes.factor_shapes((*window, 4, 6), 2)
    a, b = (jnp.asarray(generator.normal(size=s), jnp.float32) for s in shapes)
    return jlora.LoraFactors(a, b, axes, 1.5)


@pytest.mark.parametrize(
    "words, path, shape",
    [
        (["--names", "vit"], "params/patch_embeddings/projection/kernel", (2, 4, 3, 3)),
        (["--names", "llama"], "params/layers_0/attn/out/kernel", (2, 36)),
        ([], "params/patch/kernel", None),
        ([], "params/attn/out/kernel", None),
    ],
)
def test_convolutions_are_written_where_names_tell_them(
    words: list[str], path: str, shape: Any, tmp_path: Path, capsys: Any
) -> None:
    adapter = {path: several_inputs((3, 3))}
    config = jlora.LoraConfig("kernel", rank=2, alpha=3.0)
    jlora.checkpoint.save(tmp_path / "first", adapter, config=config)
    peft = tmp_path / "peft"
    done = main(["convert", str(tmp_path / "first"), str(peft), *words])
    if shape is None:
        (line,) = capsys.readouterr().err.splitlines()
        assert done == FAILED and not peft.exists()
        assert f"{path!r} (3×3×4×6)" in line and "jlora.peft.save" in line
        return
    assert done == SAME
    tensors = load_file(peft / "adapter_model.safetensors")
    (a,) = (tensor for name, tensor in tensors.items() if "lora_A" in name)
    assert a.shape == shape


@pytest.mark.parametrize(
    "case", ["linear", "bert", "modules_to_save", "bias_all", "embedding", "llama"]
)
def test_files_of_peft_come_back_from_a_checkpoint(case: str, tmp_path: Path) -> None:
    first, back = tmp_path / "first", tmp_path / "back"
    assert main(["convert", str(CASES / case), str(first)]) == SAME
    assert main(["convert", str(first), str(back)]) == SAME
    before, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (CASES / case, back)
    )
    assert set(after) == set(before)
    assert all(np.array_equal(after[name], before[name]) for name in after)


def test_a_frozen_table_that_peft_writes_along_is_passed_over(
    tmp_path: Path, capsys: Any
) -> None:
    tensors = load_file(CASES / "embedding" / "adapter_model.safetensors")
    table = {"base_model.model.embed.base_layer.weight": np.ones((17, 6), np.float32)}
    shutil.copy(CASES / "embedding" / "adapter_config.json", tmp_path)
    save_file(tensors | table, tmp_path / "adapter_model.safetensors")
    assert main(["diff", str(CASES / "embedding"), str(tmp_path)]) == SAME


@pytest.mark.parametrize(
    "path, shape, fits",
    [
        ("params/head/weight", (4, 6), False),
        ("params/cls_token", (1, 1, 6), False),
        ("params/norm/gain", (6,), True),
        ("params/q/bias", (2, 3), True),
        ("params/head/kernel", (4, 6), True),
    ],
)
def test_whole_arrays_of_unknown_layout_are_not_written(
    path: str, shape: Any, fits: bool, tmp_path: Path, capsys: Any
) -> None:
    config = jlora.LoraConfig(".*", full=True)
    adapter: dict[str, Any] = {path: jnp.ones(shape)}
    jlora.checkpoint.save(tmp_path / "first", adapter, config=config)
    done = main(["convert", str(tmp_path / "first"), str(tmp_path / "peft")])
    assert done == (SAME if fits else FAILED)
    assert fits or repr(path) in capsys.readouterr().err


def test_a_step_of_a_run_is_read_by_its_folder(saved: Path, capsys: Any) -> None:
    assert main(["diff", str(saved), str(saved / "0")]) == SAME
    assert main(["inspect", str(saved / "1")]) == FAILED
    assert main(["inspect", str(saved / "0" / "adapter")]) == FAILED
    assert "is neither a checkpoint nor" in capsys.readouterr().err


def test_slices_are_converted_as_the_factors_they_stand_for(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.normal(size=s).astype(np.float32) for s in [(5, 4), (2, 6)])
    axes, slices = jlora.KernelAxes((), (0,), (1,)), ((0, 3), (6, 9))
    factors = SlicedFactors(jnp.asarray(a), jnp.asarray(b), axes, 1.5, slices, (9,))
    config = jlora.LoraConfig("q", rank=2, alpha=3.0, slices=slices)
    first, peft = tmp_path / "first", tmp_path / "peft"
    adapter: dict[str, Any] = {"params/q/kernel": factors}
    jlora.checkpoint.save(first, adapter, config=config)
    assert main(["convert", str(first), str(peft)]) == SAME
    params = {"params": {"q": {"kernel": jax.ShapeDtypeStruct((5, 9), jnp.float32)}}}
    _, found = jlora.peft.load(peft, params)
    wanted = jlora.delta(factors.lowered())
    assert np.array_equal(jlora.delta(found["params/q/kernel"]), wanted)


@pytest.mark.parametrize("place", ["", "0", "peft", "../other"])
def test_peft_is_not_written_into_a_checkpoint(
    place: str, saved: Path, capsys: Any
) -> None:
    jlora.checkpoint.save(saved.parent / "other", dense(1), config=CONFIG)
    assert main(["convert", str(saved), str(saved / place), "--overwrite"]) == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "is a checkpoint, or in one" in line
    for folder in (saved, saved.parent / "other"):
        jlora.checkpoint.save(folder, dense(2), config=CONFIG, overwrite=True)


@pytest.mark.parametrize("words", [["--base-model", "x"], ["--profile", "vllm"]])
def test_options_that_a_checkpoint_has_no_place_for_are_refused(
    words: list[str], tmp_path: Path, capsys: Any
) -> None:
    target = tmp_path / "new"
    command = ["convert", str(CASES / "linear"), str(target), *words]
    assert main(command) == FAILED and not target.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert words[0] in line and "becomes a checkpoint" in line


def test_a_model_is_merged(tmp_path: Path, capsys: Any) -> None:
    arrays = np.load(CASES / "linear" / "arrays.npz")
    part = lambda group: {
        k.removeprefix(group): arrays[k] for k in arrays.files if k.startswith(group)
    }
    (tmp_path / "model").mkdir()
    weights = {k: np.ascontiguousarray(v) for k, v in part("base/").items()}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    out = tmp_path / "merged"
    words = ["merge", str(tmp_path / "model"), str(CASES / "linear"), str(out)]
    assert main(words) == SAME
    assert f"{len(weights)}/{len(weights)} tensors" in capsys.readouterr().err
    found = jlora.weights.open_weights(out)
    for name, merged in part("merged/").items():
        np.testing.assert_allclose(found[name], merged, rtol=0, atol=1e-6)
    assert main(words) == FAILED
    assert "there already" in capsys.readouterr().err


def test_diff_says_what_and_how_much(saved: Path, tmp_path: Path, capsys: Any) -> None:
    changed = adapter_of()
    up = changed["params/up/kernel"]
    moved = jlora.LoraFactors(up.a, 1.25 * up.b, up.axes, up.scaling)
    other = {"params/up/kernel": moved}
    jlora.checkpoint.save(tmp_path / "other", other, config=CONFIG)
    assert main(["diff", str(saved), str(tmp_path / "other")]) == DIFFERENT
    out = capsys.readouterr().out
    assert f"only in {saved}" in out and "params/down/kernel" in out
    (line,) = (line for line in out.splitlines() if line.startswith("params/up"))
    assert line.split()[1:] == ["0.25", "values"]


def test_the_same_delta_in_other_factors_is_a_distance_of_zero(
    tmp_path: Path, capsys: Any
) -> None:
    up = dense()["params/up/kernel"]
    turned = jlora.LoraFactors(2 * up.a, up.b / 2, up.axes, up.scaling)
    for name, factors in (("one", up), ("two", turned)):
        folder = tmp_path / name
        jlora.checkpoint.save(folder, {"params/up/kernel": factors}, config=CONFIG)
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "two")]) == DIFFERENT
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "params/up" in x)
    assert float(line.split()[1]) < 1e-7


@pytest.mark.parametrize(
    "rows, values, said",
    [((1, 4), 2.0, "rows"), (None, 2.0, "rows and a whole table"), ((1, 3), 2.0, None)],
)
def test_diff_compares_which_rows_are_trained(
    rows: Any, values: float, said: str | None, tmp_path: Path, capsys: Any
) -> None:
    axes = jlora.KernelAxes((), (0,), (1,))
    trained = lambda rows: TrainedRows(jnp.full((2, 3), values), rows, 5, axes)
    one, other = trained((1, 3)), trained(rows) if rows else jnp.full((5, 3), values)
    for name, entry in (("one", one), ("other", other)):
        own = {"rows": entry.rows} if isinstance(entry, TrainedRows) else {"full": True}
        config = jlora.LoraConfig("table", **own)
        jlora.checkpoint.save(tmp_path / name, {"table": entry}, config=config)
    done = main(["diff", str(tmp_path / "one"), str(tmp_path / "other")])
    assert done == (DIFFERENT if said else SAME)
    out = capsys.readouterr().out.splitlines()
    assert out[-1].split(maxsplit=1)[1].strip() == (said or "same: 1 targets")


def test_paths_of_any_text_take_one_line_each(tmp_path: Path, capsys: Any) -> None:
    adapter = {"up\n\x1b[2J": dense()["params/up/kernel"]}
    config = jlora.LoraConfig(rank=2, alpha=3.0)
    jlora.checkpoint.save(tmp_path / "odd", adapter, config=config)
    assert main(["inspect", str(tmp_path / "odd")]) == SAME
    out = capsys.readouterr().out
    assert "\x1b" not in out and len(out.splitlines()) == 4


@pytest.mark.parametrize(
    "words, said",
    [
        (["inspect", "nowhere"], "there is no nowhere"),
        (["diff", "nowhere", "nowhere"], "there is no nowhere"),
        (["merge", "nowhere", str(CASES / "linear"), "out"], "nowhere"),
        (["inspect", str(CASES / "lora_bias")], "lora_bias"),
        (["convert", str(CASES / "linear"), str(CASES / "linear")], "linear"),
        (["convert", "nowhere", "nowhere"], "there is no nowhere"),
        (["merge", "base", str(GOLDEN), "out"], "python -m jlora convert"),
    ],
)
def test_errors_are_one_line(words: list[str], said: str, capsys: Any) -> None:
    assert main(words) == FAILED
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert said in line and not printed.out


def test_the_module_runs() -> None:
    command = [sys.executable, "-m", "jlora", "inspect", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (FAILED, "")
    assert done.stderr == "python -m jlora inspect: there is no nowhere\n"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_is_printed_may_find_no_reader_or_few_letters(
    encoding: str,
) -> None:
    """Neither ends the command, or changes its exit code."""
    paths = [str(CASES / name) for name in ("linear", "conv2d")]
    command = [sys.executable, "-m", "jlora", "diff", *paths]
    read, write = os.pipe()
    os.close(read)
    said = subprocess.run(
        command,
        stdout=write if encoding == "utf-8" else subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    os.close(write)
    assert (said.returncode, said.stderr) == (DIFFERENT, b"")


def llama_of_peft(folder: Path, layers: int = 3) -> None:
    """Writes an adapter of the query projections of a Llama."""
    generator = np.random.default_rng(0)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {
        name.format(i, side): generator.normal(size=shape).astype(np.float32)
        for i in range(layers)
        for side, shape in (("A", (2, 12)), ("B", (20, 2)))
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


MODELS = {
    "numbered": {
        f"params/layers_{i}/self_attn/q_proj/kernel": (12, 20) for i in range(3)
    },
    "scanned": {"params/layers/attention/query/kernel": (3, 12, 20)},
}


@pytest.mark.parametrize("model", MODELS)
def test_files_of_peft_are_converted_for_a_model(model: str, tmp_path: Path) -> None:
    """To the paths and shapes that the model has, as `jlora.peft.load` places them."""
    shapes, folder = MODELS[model], tmp_path / "peft"
    llama_of_peft(folder)
    file = tmp_path / "shapes.json"
    file.write_text(json.dumps(shapes), encoding="utf-8")
    words = ["convert", str(folder), str(tmp_path / "out"), "--names", "llama"]
    assert main([*words, "--params", str(file)]) == SAME
    params: Any = {}
    for path, shape in shapes.items():
        node = params
        for name in path.split("/")[:-1]:
            node = node.setdefault(name, {})
        node["kernel"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    _, wanted = jlora.peft.load(folder, params, jlora.peft.names("llama"))
    found = jlora.checkpoint.restore(tmp_path / "out")
    assert set(found) == set(shapes)
    assert same(found, dict(sorted(wanted.items())))
    back = ["convert", str(tmp_path / "out"), str(tmp_path / "back")]
    assert main([*back, "--names", "llama"]) == SAME
    weights = "adapter_model.safetensors"
    again, first = load_file(tmp_path / "back" / weights), load_file(folder / weights)
    assert again.keys() == first.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(again[name], tensor)


SHAPES_OF_NONE = {
    "text": "no shapes",
    "a list": "[]",
    "a size": '{"w": 3}',
    "a leaf above": '{"w": [3], "w/b": [3]}',
}


@pytest.mark.parametrize("text", SHAPES_OF_NONE.values(), ids=SHAPES_OF_NONE)
def test_what_are_no_shapes(text: str, tmp_path: Path, capsys: Any) -> None:
    llama_of_peft(tmp_path / "peft")
    file = tmp_path / "shapes.json"
    file.write_text(text, encoding="utf-8")
    words = ["convert", str(tmp_path / "peft"), str(tmp_path / "out")]
    assert main([*words, "--names", "llama", "--params", str(file)]) == FAILED
    assert "shapes.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_without_shapes_say_what_is_needed(tmp_path: Path, capsys: Any) -> None:
    llama_of_peft(tmp_path / "peft")
    words = ["convert", str(tmp_path / "peft"), str(tmp_path / "out")]
    assert main([*words, "--names", "llama"]) == FAILED
    error = capsys.readouterr().err
    assert "--params" in error and "jlora.peft.load(folder, params" in error


def test_the_version(capsys: Any) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith(f"jlora {jlora.__version__}, jax ")


@pytest.mark.parametrize(
    ("called", "name"), [("/bin/jlora", "jlora"), ("/x/__main__.py", "python -m jlora")]
)
def test_errors_name_the_command(
    called: str, name: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert main(["inspect", "nowhere"]) == FAILED
    assert capsys.readouterr().err.startswith(f"{name} inspect: ")


def test_the_command_is_the_function_of_the_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"jlora": "jlora.__main__:main"}

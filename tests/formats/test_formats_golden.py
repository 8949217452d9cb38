"""Files that diffusers and gguf wrote: their deltas, conversions and merges."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_files import FILES, arrays, assert_merged, deltas, model, names, pipeline
from format_files import weights as weights_in
from safetensors.numpy import load_file, save_file

import jlora
import jlora.peft
from jlora.__main__ import DIFFERENT, FAILED, SAME, main
from jlora._formats import diffusers, gguf, kohya

GGUF_BASE = FILES["gguf"].parent
MODULES = {
    "diffusers": lambda: diffusers.modules(FILES["diffusers"]),
    "kohya": lambda: kohya.modules(FILES["kohya"], base=names("kohya")),
    "gguf": lambda: gguf.modules(FILES["gguf"], base=GGUF_BASE),
}
each_case = pytest.mark.parametrize("case", MODULES)


def told(capsys: Any, *words: Any) -> str:
    """What a command prints that succeeds."""
    code = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert code == SAME, printed.err
    return printed.out


def refused(capsys: Any, *words: Any) -> str:
    """The one line of a command that fails."""
    assert main([str(word) for word in words]) == FAILED
    (line,) = capsys.readouterr().err.splitlines()
    return line


def base_of(case: str, folder: Path) -> Path:
    """The folder of the base of a case."""
    return model(folder, case) if case == "gguf" else pipeline(folder, case)


@each_case
def test_deltas_are_those_that_the_real_library_adds(case: str) -> None:
    base, merged = arrays(case, "base"), arrays(case, "merged")
    found = deltas(MODULES[case]())
    assert set(found) == set(merged)
    for name, delta in found.items():
        moved = merged[name].astype(np.float64) - base[name]
        np.testing.assert_allclose(delta, moved, rtol=1e-4, atol=2e-6)


@each_case
def test_entries_have_the_same_deltas_laid_out_for_jax(case: str) -> None:
    module = {"diffusers": diffusers, "kohya": kohya, "gguf": gguf}[case]
    base = {"kohya": {"base": names("kohya")}, "gguf": {"base": GGUF_BASE}}
    _, adapter = module.read(FILES[case], **base.get(case, {}))
    expected = deltas(MODULES[case]())
    assert len(adapter) == len(expected)
    for name, delta in expected.items():
        path = f"params/{name.removesuffix('.weight').replace('.', '/')}"
        if f"{path}/embedding" in adapter:
            path, turned = f"{path}/embedding", delta
        else:
            turned = np.moveaxis(delta, (0, 1), (-1, -2))
            path = f"{path}/kernel"
        found = np.asarray(jlora.delta(adapter[path]))
        np.testing.assert_allclose(found, turned, rtol=1e-3, atol=1e-5)


@each_case
def test_merged_it_is_what_the_real_library_makes(
    case: str, tmp_path: Path, capsys: Any
) -> None:
    base, out = base_of(case, tmp_path / "base"), tmp_path / "out"
    told(capsys, "merge", base, FILES[case], out)
    merged, before = weights_in(out), weights_in(base)
    assert_merged(case, merged)
    assert set(merged) == set(before)
    kept = set(before) - set(arrays(case, "merged"))
    assert all(np.array_equal(merged[name], before[name]) for name in kept)
    copied = {f.relative_to(base) for f in base.rglob("*")}
    assert copied == {f.relative_to(out) for f in out.rglob("*")}


@each_case
def test_it_becomes_a_folder_of_peft_and_is_itself_again(
    case: str, tmp_path: Path, capsys: Any
) -> None:
    own = ["--base", base_of(case, tmp_path / "base")] if case != "diffusers" else []
    suffix = ".gguf" if case == "gguf" else ".safetensors"
    peft, back = tmp_path / "peft", tmp_path / f"back{suffix}"
    told(capsys, "convert", FILES[case], peft, *own)
    into = own if case == "gguf" else []
    told(capsys, "convert", peft, back, "--to", case, *into)
    assert told(capsys, "diff", FILES[case], back, *own).startswith("the same:")
    assert told(capsys, "diff", FILES[case], peft, *own).startswith("the same:")
    again = tmp_path / "again"
    told(capsys, "convert", back, again, *own)
    both = [load_file(f / "adapter_model.safetensors") for f in (peft, again)]
    assert both[0].keys() == both[1].keys() and both[0]
    assert all(np.array_equal(value, both[1][name]) for name, value in both[0].items())


def test_kohya_becomes_diffusers_by_the_names_of_a_pipeline(
    tmp_path: Path, capsys: Any
) -> None:
    base = pipeline(tmp_path / "base", "kohya")
    target = tmp_path / "own.safetensors"
    words = ("convert", FILES["kohya"], target, "--to", "diffusers", "--base", base)
    assert "12 targets" in told(capsys, *words)
    keys = load_file(target)
    assert all(key.startswith("unet.") and ".lora_" in key for key in keys)
    expected = deltas(MODULES["kohya"]())
    for name, delta in deltas(diffusers.modules(target)).items():
        np.testing.assert_allclose(delta, expected[name], rtol=1e-6)
    words = ("diff", target, FILES["kohya"], "--base", base)
    assert told(capsys, *words).startswith("the same: 12")


def test_a_part_alone_takes_what_is_for_it(tmp_path: Path, capsys: Any) -> None:
    base = pipeline(tmp_path / "base", "kohya") / "unet"
    told(capsys, "merge", base, FILES["kohya"], tmp_path / "one")
    base_and_names = ("--base", base.parent, "--to", "diffusers")
    own = tmp_path / "own.safetensors"
    told(capsys, "convert", FILES["kohya"], own, *base_and_names)
    told(capsys, "merge", base, own, tmp_path / "two")
    for out in ("one", "two"):
        found = weights_in(tmp_path / out)
        assert_merged("kohya", {f"unet.{name}": w for name, w in found.items()})


def test_parts_that_the_pipeline_has_not_are_named(tmp_path: Path, capsys: Any) -> None:
    base = pipeline(tmp_path / "base", "kohya")  # no text encoder
    line = refused(capsys, "merge", base, FILES["diffusers"], tmp_path / "out")
    assert "text_encoder" in line and "unet" in line
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@each_case
def test_it_is_inspected_without_its_base(case: str, capsys: Any) -> None:
    lines = told(capsys, "inspect", FILES[case]).splitlines()
    count = len(MODULES[case]())
    assert lines[-1].startswith(f"{count} targets, ")
    first = {
        "diffusers": "params/text_encoder/encoder/layers/0/mlp/fc1/kernel",
        "kohya": "params/lora_unet_down_blocks_1_attentions_0_proj_out/kernel",
        "gguf": "params/model/embed_tokens/embedding",
    }
    assert any(line.startswith(first[case]) for line in lines)


@pytest.mark.parametrize("case", ["kohya", "gguf"])
def test_without_its_base_it_is_not_converted(
    case: str, tmp_path: Path, capsys: Any
) -> None:
    line = refused(capsys, "convert", FILES[case], tmp_path / "out")
    assert "--base FOLDER" in line
    assert not (tmp_path / "out").exists()


def test_a_file_without_its_base_differs_from_itself_with_other_numbers(
    tmp_path: Path, capsys: Any
) -> None:
    other = load_file(FILES["kohya"])
    key = next(key for key in other if key.endswith("lora_up.weight"))
    save_file(other | {key: other[key] * 2}, tmp_path / "other.safetensors")
    words = ["diff", str(FILES["kohya"]), str(tmp_path / "other.safetensors")]
    assert main(words) == DIFFERENT
    assert key.removesuffix(".lora_up.weight") in capsys.readouterr().out


def test_a_file_of_two_formats_is_asked_for(tmp_path: Path, capsys: Any) -> None:
    words = ("convert", FILES["diffusers"], tmp_path / "a.safetensors")
    line = refused(capsys, *words)
    assert "--to diffusers or --to kohya" in line
    line = refused(capsys, *words, "--to", "nothing")
    assert "'kohya'" in line and "'gguf'" in line
    line = refused(capsys, *words, "--to", "diffusers", "--base", tmp_path)
    assert "no place for --base" in line
    line = refused(capsys, "inspect", FILES["diffusers"], "--base", tmp_path)
    assert "no place for --base" in line


def test_dropout_is_said_to_be_lost(tmp_path: Path, capsys: Any) -> None:
    axes = jlora.KernelAxes((), (0,), (1,))
    factors = jlora.LoraFactors(np.ones((5, 2)), np.ones((2, 3)), axes, 1.5)
    factors = jlora.LoraFactors(
        factors.a.astype(np.float32), factors.b.astype(np.float32), axes, 1.5
    )
    params = {"params": {"unet": {"q": {"kernel": np.zeros((5, 3), np.float32)}}}}
    config = jlora.LoraConfig("q", rank=2, alpha=3.0, dropout=0.25)
    adapter = {"params/unet/q/kernel": factors}
    jlora.peft.save(tmp_path / "peft", params, adapter, config)
    words = ("convert", tmp_path / "peft", tmp_path / "a.safetensors", "--to")
    assert "dropout of training, [0.25]" in told(capsys, *words, "diffusers")
    out = told(capsys, *words, "kohya", "--overwrite")
    assert "dropout of training" in out and "--base" in out

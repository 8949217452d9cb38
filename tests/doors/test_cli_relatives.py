"""`inspect` of PEFT's folders of LoHa, LoKr and VeRA, which needs their files alone.

The folders are those that PEFT wrote, and some that `jlora.peft.save` or a test writes.
"""

import json
import math
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
import jlora.peft
from jlora.__main__ import FAILED, SAME, main
from jlora._peft.described import describe

FOLDER = DATA / "peft_relatives"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
CASES = sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())
HEAD = ["path", "kind", "kernel", "rank", "alpha", "scaling", "dtype", "values"]
# Modules by case: the rank, the alpha and the scaling that PEFT gave them.
SAID = {
    "ia3": dict.fromkeys(("conv", "down", "up"), "none  1"),
    "loha": {"conv": "2 3 1.5", "down": "3 5 1.66667", "up": "2 3 1.5"},
    "loha_tucker": {"conv": "2 8 4"},
    "lokr": dict.fromkeys(("conv", "down", "up"), "2 3 1.5"),
    "lokr_both": dict.fromkeys(("down", "up"), "1 3 3"),
    "lokr_tucker": {"conv": "2 3 1.5"},
    "lokr_whole": dict.fromkeys(("conv", "down", "up"), "none 8 0.2"),
    "vera": dict.fromkeys(("down", "up"), "4  1"),
    "vera_without": dict.fromkeys(("down", "up"), "4  1"),
}
HELD = {
    "ia3": "a scale of",
    "loha": "two products",
    "loha_tucker": "two Tucker products",
    "lokr": "w1 whole, w2 low rank",
    "lokr_both": "w1 low rank, w2 low rank",
    "lokr_tucker": "w1 whole, w2 Tucker",
    "lokr_whole": "w1 whole, w2 whole",
    "vera": "two vectors",
    "vera_without": "two vectors",
}
TELLS_WINDOWS = {"loha_tucker", "lokr_tucker", "lokr_whole"}


def cells(out: str) -> tuple[dict[str, list[str]], str]:
    """The cells of a printed table by path, and the line below it."""
    head, rule, *rows, total = out.splitlines()
    starts = [i for i, c in enumerate(rule) if c == "-" and rule[i - 1 : i] != "-"]
    cut = lambda line: [
        line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)
    ]
    assert cut(head) == [*HEAD, "held as"]
    return {cut(row)[0]: cut(row)[1:] for row in rows}, total


def kernel_of(case: str, module: str) -> str:
    """The shape of a kernel by what the base of the case was, as far as it is told."""
    # All cases have modules of these sizes.
    weight = np.load(FOLDER / "loha" / "arrays.npz")[f"{module}.weight"]
    out, in_, *window = weight.shape
    if case == "ia3":
        return {"up": f"?×{out}", "down": f"{in_}×?", "conv": "?×?"}[module]
    if case.startswith("vera"):
        return f"?×{out}"
    if case in TELLS_WINDOWS:
        return "×".join(map(str, (*window, in_, out)))
    return f"{in_ * math.prod(window)}×{out}"


def test_the_cases_are_all_there() -> None:
    assert set(CASES) == set(SAID) == set(HELD)


@pytest.mark.parametrize("case", CASES)
def test_each_module_is_described(case: str, capsys: Any) -> None:
    assert main(["inspect", str(FOLDER / case)]) == SAME
    rows, total = cells(capsys.readouterr().out)
    tensors = load_file(FOLDER / case / WEIGHTS)
    assert set(rows) == {f"params/{module}/kernel" for module in SAID[case]}
    values = 0
    for module, said in SAID[case].items():
        own = [t for key, t in tensors.items() if key.startswith(f"{PREFIX}{module}.")]
        count = sum(t.size for t in own)
        kind = case.split("_")[0].upper()
        rank, alpha, scaling = said.split(" ")
        wanted = [kind, kernel_of(case, module), rank, alpha, scaling, "float32"]
        *found, held = rows[f"params/{module}/kernel"]
        assert found == [*wanted, str(count)] and held.startswith(HELD[case])
        values += count
    assert total.startswith(
        f"{len(rows)} targets, {values:,} values, {4 * values:,} bytes"
    )


@pytest.mark.parametrize(
    "case, said",
    [
        ("loha", "a convolution, whose window"),
        ("loha_tucker", None),
        ("ia3", "on its other side, and of a convolution"),
        ("vera", "the widest has 80"),
        ("vera_without", "nor the projections"),
    ],
)
def test_what_the_files_do_not_tell_is_said(
    case: str, said: str | None, capsys: Any
) -> None:
    assert main(["inspect", str(FOLDER / case)]) == SAME
    printed = capsys.readouterr()
    if said is None:
        assert not printed.err
        return
    (line,) = printed.err.splitlines()
    assert line.startswith("not told by the files: ") and said in line


def test_projections_are_no_trained_values(capsys: Any) -> None:
    main(["inspect", str(FOLDER / "vera")])
    main(["inspect", str(FOLDER / "vera_without")])
    totals = [x for x in capsys.readouterr().out.splitlines() if "targets" in x]
    frozen = "; frozen projections of 680 values beside them"
    plain = "2 targets, 116 values, 464 bytes"
    assert totals == [plain + frozen, plain]


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_one_of_the_files_will_do(file: str, capsys: Any) -> None:
    assert main(["inspect", str(FOLDER / "lokr")]) == SAME
    whole = capsys.readouterr().out
    assert main(["inspect", str(FOLDER / "lokr" / file)]) == SAME
    assert capsys.readouterr().out == whole


VARIANTS: dict[str, dict[str, Any]] = {
    "loha": {},
    "lokr": {"decompose_factor": 4},
    "vera": {"projection_seed": 5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_jlora_writes_is_described(
    variant: str, tmp_path: Path, capsys: Any
) -> None:
    params = {n: {"kernel": jnp.ones((12, 20))} for n in ("q", "v")}
    model = lambda p, x: (x @ p["q"]["kernel"], x @ p["v"]["kernel"])
    own = VARIANTS[variant]
    config = jlora.LoraConfig("q|v", rank=2, alpha=3.0, variant=variant, **own)
    lora, x = jlora.lora(model, config), jnp.ones((1, 12))
    adapter = jax.tree.map(jnp.ones_like, lora.init(jax.random.key(0), params, x))
    names, kind = [(r"(?P<name>q|v)", "{name}")], variant.upper()
    plan = lora.plan(params, x)
    jlora.peft.save(tmp_path / "own", plan, adapter, config, names, kind=kind)
    assert main(["inspect", str(tmp_path / "own")]) == SAME
    rows, _ = cells(capsys.readouterr().out)
    assert set(rows) == {"params/q/kernel", "params/v/kernel"}
    kernel = "?×20" if variant == "vera" else "12×20"
    for row in rows.values():
        assert row[:3] == [kind, kernel, "2"]
        assert variant == "vera" or row[3:5] == ["3", "1.5"]


def changed(case: str, to: Path, tensors: Any = None, **values: Any) -> Path:
    """A copy of a folder with other values in its config, and tensors added."""
    shutil.copytree(FOLDER / case, to)
    config = json.loads((to / CONFIG).read_text(encoding="utf-8"))
    (to / CONFIG).write_text(json.dumps({**config, **values}), encoding="utf-8")
    if tensors is not None:
        found = {**load_file(to / WEIGHTS), **tensors}
        kept = {key: tensor for key, tensor in found.items() if tensor is not None}
        save_file(kept, to / WEIGHTS)
    return to


def test_what_is_trained_whole_is_a_line_too(tmp_path: Path, capsys: Any) -> None:
    whole = {f"{PREFIX}head.weight": np.ones((3, 5), np.float16)}
    whole[f"{PREFIX}up.base_layer.weight"] = np.ones((90, 12), np.float16)  # frozen
    assert main(["inspect", str(changed("loha", tmp_path / "own", whole))]) == SAME
    rows, total = cells(capsys.readouterr().out)
    told = ["full", "5×3", "", "", "", "float16", "15", ""]
    assert rows["params/head/kernel"] == told
    assert total == "4 targets, 1,195 values, 4,750 bytes"


def test_fields_of_training_alone_do_not_matter(tmp_path: Path, capsys: Any) -> None:
    folder = changed("loha", tmp_path / "own", rank_dropout=0.1, module_dropout=0.1)
    assert main(["inspect", str(folder)]) == SAME
    assert main(["inspect", str(FOLDER / "loha")]) == SAME
    one, other = capsys.readouterr().out.split("path ")[1:]
    assert one == other


def test_products_that_would_be_large_are_described(
    tmp_path: Path, capsys: Any
) -> None:
    n, (up, ones) = 200_000, (f"{PREFIX}up.lokr_", np.ones)
    tensors = {f"{up}w1": ones((n, 1), np.float32), f"{up}w2_a": None}
    tensors |= {f"{up}w2": ones((1, n), np.float32), f"{up}w2_b": None}
    assert main(["inspect", str(changed("lokr", tmp_path / "own", tensors))]) == SAME
    rows, _ = cells(capsys.readouterr().out)
    assert rows["params/up/kernel"][1] == f"{n}×{n}"


UP = f"{PREFIX}up."
ONES = np.ones((3, 5), np.float32)
BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "no product": ("loha", {f"{UP}hada_w1_a": ONES}, "(3, 5) and (2, 12)"),
    "other sizes": ("loha", {f"{UP}hada_w1_b": np.ones((2, 5), "f")}, "90×5 and 90×12"),
    "a lost tensor": ("loha", {f"{UP}hada_w2_b": None}, "lacks 'w2_b'"),
    "a lost w2": ("lokr", {f"{UP}lokr_w2_a": None}, "lacks 'w2_a'"),
    "a vector": ("lokr_whole", {f"{UP}lokr_w2": np.ones(3, "f")}, "(3,) is no matrix"),
    "a window in w1": ("lokr", {f"{UP}lokr_w1": np.ones((2, 2, 2), "f")}, "`w1`"),
    "a core": ("lokr_tucker", {f"{PREFIX}conv.lokr_t2": ONES}, "has no place between"),
    "no vector": ("vera", {f"{UP}vera_lambda_d": ONES}, "no vectors"),
    "too long": ("vera", {f"{UP}vera_lambda_b": np.ones(91, "f")}, "the projections"),
    "one projection": ("vera", {"base_model.vera_B": None}, "save_projection=True"),
    "NaN": ("lokr", {f"{UP}lokr_w1": np.full((9, 3), np.nan, "f")}, "NaN"),
    "LoRA's": ("lokr", {f"{UP}lora_A.weight": None, "x.lora_A.weight": ONES}, "x"),
}


@pytest.mark.parametrize("bad", BAD)
def test_tensors_that_do_not_fit_are_one_line(
    bad: str, tmp_path: Path, capsys: Any
) -> None:
    case, tensors, said = BAD[bad]
    refused(changed(case, tmp_path / "bad", tensors), said, capsys)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"alpha": "much"}, "'alpha': 'much'"),
        ({"r": 0}, "'r': 0"),
        ({"rank_pattern": [3]}, "'rank_pattern': [3]"),
        ({"peft_type": "LOKR"}, "is of LOKR, whose tensors have 'lokr_'"),
    ],
)
def test_a_config_that_says_no_numbers_is_one_line(
    values: dict[str, Any], said: str, tmp_path: Path, capsys: Any
) -> None:
    refused(changed("loha", tmp_path / "bad", **values), said, capsys)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_file_that_is_cut_is_one_line(file: str, tmp_path: Path, capsys: Any) -> None:
    folder = changed("loha", tmp_path / "bad")
    (folder / file).write_bytes((folder / file).read_bytes()[:-9])
    refused(folder, file, capsys)


def refused(folder: Path, said: str, capsys: Any) -> None:
    """Asserts that a folder is refused: by a typed error, and by one line."""
    with pytest.raises(jlora.AdapterError):
        describe(folder)
    assert main(["inspect", str(folder)]) == FAILED
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert said in line and str(folder) in line and not printed.out


def test_a_base_has_no_place(capsys: Any) -> None:
    assert main(["inspect", str(FOLDER / "loha"), "--base", "model"]) == FAILED
    assert "leave that out" in capsys.readouterr().err

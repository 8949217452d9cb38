"""`_product.measured`: forms that were timed are taken on such devices alone."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from paths import ROOT

import jlora
from jlora._jax.platforms import Target
from jlora._product.choice import ByPlatform, form_on
from jlora._product.measured import OfSize

TOKENS, FEATURES, OUTPUTS = 24, 16, 40
ROW = {
    "dtype": "float32",
    "tokens": TOKENS,
    "features": FEATURES,
    "outputs": OUTPUTS,
    "form": "extended",
}
X = jnp.linspace(-1, 1, TOKENS * FEATURES).reshape(TOKENS, FEATURES)
PARAMS = {"w": jnp.cos(jnp.arange(FEATURES * OUTPUTS)).reshape(FEATURES, OUTPUTS)}


def written(folder: Path, *rows: Any, device: Any = "cpu") -> Path:
    path = folder / "forms.json"
    path.write_text(json.dumps({"device": device, "forms": rows}), encoding="utf-8")
    return path


def adapted(path: Any) -> jlora.Lora:
    config = jlora.LoraConfig("w", rank=3, alpha=5)
    return jlora.lora(lambda p, x: x @ p["w"], config, contraction=path)


def form_of(lora: jlora.Lora, x: Any = X) -> str | None:
    return lora.plan(PARAMS, x).targets[0].uses[0].form


@pytest.mark.parametrize("form", ["separate", "extended", "joined", "copied"])
@pytest.mark.parametrize("as_text", [False, True], ids=["path", "text"])
def test_a_form_that_was_timed_is_taken(tmp_path, form, as_text):
    path = written(tmp_path, {**ROW, "form": form})
    lora = adapted(str(path) if as_text else path)
    assert form_of(lora) == form
    adapter = jax.tree.map(
        lambda leaf: leaf + 0.1, lora.init(jax.random.key(0), PARAMS, X)
    )
    merged = jlora.merge(PARAMS, adapter)["w"]
    found, pull = jax.vjp(lambda x: jax.jit(lora.apply)(PARAMS, adapter, x), X)
    assert jnp.allclose(found, X @ merged, atol=1e-5)
    assert jnp.allclose(pull(found)[0], found @ merged.T, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [{"features": 17}, {"outputs": 41}, {"dtype": "bfloat16"}, {"tokens": 49}],
    ids=lambda change: next(iter(change)),
)
def test_it_is_taken_for_its_size_alone(tmp_path, change):
    assert form_of(adapted(written(tmp_path, {**ROW, **change}))) == "separate"


def test_the_nearest_number_of_tokens_decides(tmp_path):
    rows = [{**ROW, "tokens": n, "form": f} for n, f in [(8, "joined"), (40, "copied")]]
    lora = adapted(written(tmp_path, *rows))
    taken = {n: form_of(lora, jnp.ones((n, FEATURES))) for n in (8, 16, 20, 80, 81)}
    # 16 is twice 8, and 40 twice 20; 81 is far from both.
    assert taken == {
        8: "joined",
        16: "joined",
        20: "copied",
        80: "copied",
        81: "separate",
    }


def test_another_device_takes_its_own_forms(tmp_path):
    assert form_of(adapted(written(tmp_path, ROW, device="TPU v5 lite"))) == "separate"


@pytest.mark.parametrize("devices", [1, 2])
def test_on_a_mesh_it_is_not_taken(devices):
    timed = OfSize("cpu", ((TOKENS, "extended"),))
    by = ByPlatform("never", 0, False, TOKENS, FEATURES, OUTPUTS, timed)
    form = form_on(by, Target("cpu", devices, kind="cpu"))
    assert form == ("extended" if devices == 1 else "separate")


def test_a_kernel_that_cannot_run_is_not_taken(tmp_path):
    assert form_of(adapted(written(tmp_path, {**ROW, "form": "fused"}))) == "separate"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "no JSON"),
        ("[]", '"device"'),
        ('{"device": 3}', '"device"'),
        ('{"device": "cpu", "forms": []}', '"forms"'),
    ],
)
def test_what_is_no_such_file_is_said(tmp_path, text, told):
    path = tmp_path / "forms.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"forms.json(.|\n)*{told}"):
        adapted(path)


def test_all_rows_that_are_wrong_are_named(tmp_path):
    rows = [{**ROW, "tokens": 0}, ROW, {**ROW, "form": "merged"}, {"dtype": 3}, 7]
    rows.append({**ROW, "dtype": 3})
    with pytest.raises(ValueError) as error:
        adapted(written(tmp_path, *rows))
    told = [line.split(":")[0] for line in str(error.value).splitlines()[1:-1]]
    assert told == [f"row {i}" for i in (0, 2, 3, 4, 5)]


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        adapted(tmp_path / "none.json")


@pytest.mark.slow
def test_the_tool_writes_what_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tune

    path = tmp_path / "forms.json"
    words = f"--kernels {FEATURES}x{OUTPUTS} --tokens {TOKENS} --rounds 2 --rank 3"
    tune.main([*words.split(), "--out", str(path)])
    assert f"{TOKENS} × {FEATURES} × {OUTPUTS}" in capsys.readouterr().out
    (row,) = json.loads(path.read_text(encoding="utf-8"))["forms"]
    assert form_of(adapted(path)) == row["form"]
    assert tune.fastest({"separate": 1.0, "extended": 0.99}) == "separate"
    assert tune.fastest({"separate": 1.0, "extended": 0.9}) == "extended"

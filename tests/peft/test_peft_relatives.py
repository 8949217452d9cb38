"""Adapters of LoRA's relatives that PEFT saved, read by jlora; no torch is needed.

The fixtures come from `tests/oracle/make_relatives.py`.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_close
from paths import DATA
from relative_twin import model, output_of_peft, params_of
from safetensors.numpy import load_file, save_file

import jlora
import jlora.peft
import jlora.weights

FOLDER = DATA / "peft_relatives"
TUCKER = ("loha_tucker", "lokr_tucker")
CASES = ("loha", "lokr", "lokr_both", "lokr_whole", "vera", *TUCKER, "ia3")
# LoHa's rank squared, LoKr's by blocks, of `up`.
RANKS = {"loha": 4, "lokr": 6, "lokr_both": 3, "lokr_whole": 12, "vera": 4}
RANKS |= {"loha_tucker": 4, "lokr_tucker": 4}
each_case = pytest.mark.parametrize("name", CASES)


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
    path = "conv/kernel" if name in TUCKER else "up/kernel"
    assert name == "ia3" or adapter[path].rank == RANKS[name]


@pytest.mark.parametrize("name", TUCKER)
def test_a_core_that_does_not_fit_is_refused(
    name: str, arrays: Any, tmp_path: Path
) -> None:
    tensors = load_file(FOLDER / name / "adapter_model.safetensors")
    (key, *_) = [key for key in tensors if key.endswith("_t2")]
    tensors[key] = np.ascontiguousarray(tensors[key][:, :1])
    folder = changed(FOLDER / name, tmp_path / "cut", tensors)
    with pytest.raises(jlora.AdapterError, match=r"\(2, 1, 2, 3\) has no place"):
        jlora.peft.load(folder, params_of(arrays[name]), NAMES)


@pytest.mark.parametrize("name", TUCKER)
def test_a_core_of_one_axis_has_a_second_of_size_one(name: str, tmp_path: Path) -> None:
    """As PEFT writes those of `Conv1d`: `Σ t[p, q, k]·a[p, o]·b[q, i]`."""
    rng, rank, ins, outs, taps = np.random.default_rng(4), 2, 6, 10, 3
    drawn = lambda *shape: np.asarray(rng.normal(size=shape), np.float32)
    core = lambda a, b, t: np.einsum("pqk,po,qi->oik", t[..., 0], a, b)
    if name == "loha_tucker":
        one, two = (
            (drawn(rank, outs), drawn(rank, ins), drawn(rank, rank, taps, 1))
            for _ in range(2)
        )
        parts = zip(
            ("w1_a", "w1_b", "t1", "w2_a", "w2_b", "t2"), one + two, strict=True
        )
        tensors = {f"hada_{key}": value for key, value in parts}
        delta = core(*one) * core(*two)
    else:
        left, first, last = drawn(2, 2), drawn(rank, outs // 2), drawn(rank, ins // 2)
        middle = drawn(rank, rank, taps, 1)
        tensors = {"w1": left, "w2_a": first, "w2_b": last, "t2": middle}
        tensors = {f"lokr_{key}": value for key, value in tensors.items()}
        delta = np.kron(left[..., None], core(first, last, middle))
    tensors = {f"base_model.model.conv.{key}": v for key, v in tensors.items()}
    folder = changed(FOLDER / name, tmp_path / "one", tensors, alpha=5, r=rank)
    params = {"conv": {"kernel": jnp.asarray(drawn(taps, ins, outs))}}
    _, adapter = jlora.peft.load(folder, params, NAMES)
    found = jlora.merge(params, adapter)["conv"]["kernel"] - params["conv"]["kernel"]
    assert_close(found, 2.5 * jnp.asarray(delta.transpose(2, 1, 0)), 1e-5)


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
    with pytest.raises(jlora.UnsupportedFeatureError, match="save_projection=True"):
        load(FOLDER / "vera_without", params, NAMES)
    dropping = changed(FOLDER / "loha", tmp_path / "drop", rank_dropout=0.1)
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"`rank_dropout` is 0\.1"):
        load(dropping, params, NAMES)
    load(dropping, params, NAMES, ignore=["rank_dropout"])
    wrong = changed(FOLDER / "loha", tmp_path / "wrong", alpha="much")
    with pytest.raises(jlora.CorruptFileError, match="'alpha': 'much'"):
        load(wrong, params, NAMES)
    with pytest.raises(jlora.AdapterError, match=r"LOHA, .* 'hada_' .*lokr_w1"):
        load(
            changed(FOLDER / "lokr", tmp_path / "mix", peft_type="LOHA"), params, NAMES
        )
    with pytest.raises(jlora.AdapterError, match="'BOFT'; jlora reads 'LORA', and"):
        load(
            changed(FOLDER / "lokr", tmp_path / "oft", peft_type="BOFT"), params, NAMES
        )


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


N = 30_000
SMALL = {
    "loha": {"w1_a": (1, N), "w1_b": (N, 1), "w2_a": (1, N), "w2_b": (N, 1)},
    "lokr": {"w1": (N, 1), "w2_a": (N, 1), "w2_b": (1, N)},
    "lokr_both": {"w1_a": (N, 1), "w1_b": (1, N), "w2_a": (1, 1), "w2_b": (1, 1)},
}


@pytest.mark.parametrize("name", SMALL)
def test_small_tensors_that_make_large_factors_take_no_memory(
    name: str, arrays: Any, tmp_path: Path
) -> None:
    kind = "hada" if name == "loha" else "lokr"
    tensors = {
        f"base_model.model.up.{kind}_{part}": np.ones(shape, np.float32)
        for part, shape in SMALL[name].items()
    }
    folder = changed(FOLDER / name, tmp_path / "large", tensors)
    tracemalloc.start()
    try:
        with pytest.raises(jlora.AdapterError, match=r"'.*up' .*`max_bytes`"):
            jlora.peft.load(folder, params_of(arrays[name]), NAMES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 * N


def test_the_factors_of_all_modules_are_counted(arrays: Any, tmp_path: Path) -> None:
    params = params_of(arrays["vera"])
    size = (FOLDER / "vera" / "adapter_model.safetensors").stat().st_size
    jlora.peft.load(FOLDER / "vera", params, NAMES, max_bytes=3 * size)
    with pytest.raises(jlora.AdapterError, match="`max_bytes` are left"):
        jlora.peft.load(FOLDER / "vera", params, NAMES, max_bytes=size)


@pytest.mark.parametrize(
    "name, part, value",
    [
        ("loha", "hada_w1_a", np.ones(3)),
        ("lokr", "lokr_w1", np.ones(3)),
        ("lokr", "lokr_w1", np.ones(())),
        ("lokr_whole", "lokr_w2", np.ones(())),
        ("vera", "vera_lambda_b", np.ones(())),
        ("vera", "vera_lambda_b", np.ones((20, 1))),
        ("vera", "vera_lambda_d", np.full(4, np.inf)),
        ("lokr", "lokr_w1", np.full((3, 4), np.nan)),
        ("loha", "hada_w1_a", np.full((20, 2), 3e38)),
    ],
)
def test_tensors_of_other_axes_and_values_are_refused(
    name: str, part: str, value: Any, arrays: Any, tmp_path: Path
) -> None:
    tensors = load_file(FOLDER / name / "adapter_model.safetensors")
    tensors[f"base_model.model.up.{part}"] = np.asarray(value, np.float32)
    folder = changed(FOLDER / name, tmp_path / "other", tensors)
    with pytest.raises(jlora.AdapterError):
        jlora.peft.load(folder, params_of(arrays[name]), NAMES)


@pytest.mark.parametrize("alpha", [10**400, 0, True])
def test_an_alpha_that_is_no_number_of_use_is_refused(
    alpha: Any, arrays: Any, tmp_path: Path
) -> None:
    folder = changed(FOLDER / "loha", tmp_path / "alpha", alpha=alpha)
    with pytest.raises(jlora.CorruptFileError, match="no numbers"):
        jlora.peft.load(folder, params_of(arrays["loha"]), NAMES)


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


@each_case
def test_merged_into_a_model_on_disk(name: str, arrays: Any, tmp_path: Path) -> None:
    own = arrays[name]
    weights = {k: v for k, v in own.items() if k not in ("x", "y")}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "none"}')
    merge = jlora.weights.merge_folder
    merge(tmp_path / "base", FOLDER / name, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    y = model(params_of(merged), jnp.asarray(own["x"]))
    assert_close(y, jnp.asarray(own["y"]), 1e-5)


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


# --- PEFT's own files, written ---

KINDS = {"loha": "LOHA", "lokr": "LOKR", "vera": "VERA", "ia3": "IA3"}
OWN = {"vera": {"projection_seed": 5}, "lokr": {"decompose_factor": 4}}
each_kind = pytest.mark.parametrize("variant", KINDS)
TARGETS = {"loha": "up|conv|down", "lokr": "up|down", "vera": "up|down"}
TARGETS |= {"ia3": "up|down"}


def trained(variant: str, params: Any, fn: Any, x: Any, **settings: Any) -> Any:
    """A plan, an adapter of random values and its configs."""
    config = jlora.LoraConfig(
        TARGETS[variant], rank=2, alpha=3.0, variant=variant, **OWN.get(variant, {})
    )
    config = dataclasses.replace(config, **settings)
    lora = jlora.lora(fn, config)
    adapter = lora.init(jax.random.key(0), params, x)
    fill = lambda v: 0.4 * jax.random.normal(jax.random.key(v.size), v.shape)
    return lora.plan(params, x), jax.tree.map(fill, adapter), lora.configs


@each_kind
def test_own_files_hold_the_same_change(
    variant: str, arrays: Any, tmp_path: Path
) -> None:
    params, x = params_of(arrays["loha"]), jnp.ones((3, 12))
    plan, adapter, configs = trained(variant, params, model, x, rslora=True)
    kind = KINDS[variant]
    jlora.peft.save(tmp_path / "own", plan, adapter, configs, NAMES, kind=kind)
    tensors = load_file(tmp_path / "own" / "adapter_model.safetensors")
    example = load_file(FOLDER / variant / "adapter_model.safetensors")
    own = [name for name in example if "conv" not in name or variant == "loha"]
    assert {*tensors} == {*own}
    said = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    theirs = json.loads((FOLDER / variant / "adapter_config.json").read_text())
    assert {*said} == {*theirs} and said["peft_type"] == kind
    _, plain = jlora.peft.load(tmp_path / "own", plan, NAMES)
    pair = jlora.merge(params, adapter), jlora.merge(params, plain)
    assert_close(*pair, 1e-5)


def stack(params: Any, x: jax.Array) -> jax.Array:
    """Layers under a scan, the outputs of each in heads."""

    def layer(x: jax.Array, own: Any) -> Any:
        y = jnp.einsum("ni,ihd->nhd", x, own["up"])
        return jnp.tanh(jnp.einsum("nhd,hdo->no", y, own["down"])), None

    return jax.lax.scan(layer, x, params)[0]


@each_kind
def test_own_files_of_a_stack_of_heads(variant: str, tmp_path: Path) -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        "up": jax.random.normal(keys[0], (3, 12, 2, 10)),
        "down": jax.random.normal(keys[1], (3, 2, 10, 12)),
    }
    x = jax.random.normal(keys[2], (4, 12))
    plan, adapter, configs = trained(variant, params, stack, x, target="up|down")
    names = [(r"(?P<name>up|down)", "layers.{0}.{name}")]
    kind = KINDS[variant]
    jlora.peft.save(tmp_path / "own", plan, adapter, configs, names, kind=kind)
    tensors = load_file(tmp_path / "own" / "adapter_model.safetensors")
    counts = (1,) if variant == "ia3" else (2, 3, 4)
    assert sum("layers.2.down" in name for name in tensors) in counts
    _, plain = jlora.peft.load(tmp_path / "own", plan, names)
    assert_close(jlora.merge(params, adapter), jlora.merge(params, plain), 1e-5)


@pytest.mark.oracle
@each_kind
def test_peft_loads_own_files(variant: str, arrays: Any, tmp_path: Path) -> None:
    params, own = params_of(arrays["loha"]), arrays["loha"]
    plan, adapter, configs = trained(variant, params, model, jnp.asarray(own["x"]))
    where = tmp_path / "own"
    jlora.peft.save(where, plan, adapter, configs, NAMES, kind=KINDS[variant])
    y = output_of_peft(where, own)
    expected = model(jlora.merge(params, adapter), jnp.asarray(own["x"]))
    assert_close(y, expected, 1e-5)


def test_own_files_are_of_one_variant(arrays: Any, tmp_path: Path) -> None:
    params, x = params_of(arrays["loha"]), jnp.ones((3, 12))
    plan, adapter, configs = trained("vera", params, model, x)
    save = lambda adapter=adapter, configs=configs, **how: jlora.peft.save(
        tmp_path / "no", plan, adapter, configs, NAMES, **how
    )
    unsupported = jlora.UnsupportedFeatureError
    with pytest.raises(unsupported, match=r"LOHA.*\['down/kernel', 'up/kernel'\]"):
        save(kind="LOHA")
    with pytest.raises(ValueError, match="`kind` is one of"):
        save(kind="OFT")
    with pytest.raises(ValueError, match="for 'peft'"):
        save(kind="VERA", profile="vllm")
    with pytest.raises(jlora.AdapterError, match="it is empty"):
        save({}, kind="VERA")
    other = dataclasses.replace(adapter["up/kernel"], projection_seed=6)
    with pytest.raises(unsupported, match="one seed for all modules"):
        save({**adapter, "up/kernel": other}, kind="VERA")
    _, conv, _ = trained("lokr", params, model, x, target="conv")
    with pytest.raises(unsupported, match=r"another order of .*: conv\nLeave `kind`"):
        save(conv, kind="LOKR")
    plan, loha, configs = trained("loha", params, model, x, dropout=0.1)
    with pytest.raises(unsupported, match="no dropout of inputs"):
        save(loha, configs, kind="LOHA")
    assert not (tmp_path / "no").exists()

"""What PEFT writes along with the factors, without a field that says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_files import RANK, SCALE, draw, factors, merged, write_adapter, write_model

import jlora
import jlora.peft
from jlora.__main__ import FAILED, SAME, main

N, ROWS = 4, 7
TABLE, HEAD = "model.embed_tokens", "lm_head"

# --- the frozen weight of a head that is adapted ---

KERNEL = draw()(N, ROWS)
PARAMS = {"params": {"lm_head": {"kernel": jnp.asarray(KERNEL)}}}


def model(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["params"]["lm_head"]["kernel"]


def bases() -> dict[str, Any]:
    plan = jlora.lora(model, jlora.LoraConfig("lm_head")).plan(PARAMS, jnp.ones((1, N)))
    return {"arrays": PARAMS, "plan": plan, "shapes": jax.eval_shape(lambda: PARAMS)}


def head_file(place: Path, weight: np.ndarray) -> tuple[Path, np.ndarray]:
    rand = draw(1)
    a, b = rand(RANK, N), rand(ROWS, RANK)
    own = {f"{HEAD}.base_layer.weight": weight}
    tensors = factors(HEAD, a, b) | own
    return write_adapter(place, tensors, target_modules=[HEAD]), SCALE * b @ a


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("known", ["arrays", "plan", "shapes"])
def test_the_frozen_weight_of_a_head_is_no_trained_one(
    known: str, dtype: Any, tmp_path: Path
) -> None:
    """It may have been loaded in another dtype than the params have."""
    peft, delta = head_file(tmp_path / "peft", KERNEL.T.astype(dtype))
    _, adapter = jlora.peft.load(peft, bases()[known])
    assert set(adapter) == {"params/lm_head/kernel"}
    np.testing.assert_allclose(
        jlora.delta(adapter["params/lm_head/kernel"]), delta.T, atol=1e-5
    )


@pytest.mark.parametrize("weight", [KERNEL.T + 1, KERNEL.T[:, ::-1]])
def test_another_frozen_weight_is_refused_where_there_are_values(
    weight: np.ndarray, tmp_path: Path
) -> None:
    peft, _ = head_file(tmp_path / "peft", np.ascontiguousarray(weight))
    with pytest.raises(jlora.AdapterError, match="own weight is not that of"):
        jlora.peft.load(peft, PARAMS)
    base = write_model(tmp_path / "base", {f"{HEAD}.weight": np.array(KERNEL.T)})
    with pytest.raises(jlora.AdapterError, match="own weight is not that of"):
        merged(tmp_path, base, peft)


# --- tables of a vocabulary that was resized ---


def tables(rows: int, seed: int = 1) -> dict[str, np.ndarray]:
    rand = draw(seed)
    return {f"{TABLE}.weight": rand(rows, N), f"{HEAD}.weight": rand(rows, N)}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("more", [1, 3])
def test_tables_are_extended_on_request(
    more: int, shards: int, nested: bool, tmp_path: Path
) -> None:
    rand, new = draw(), tables(ROWS + more)
    q = rand(N, 5)
    old: dict[str, np.ndarray] = {**tables(ROWS, 2), "q.weight": q}
    text: Any = {"vocab_size": ROWS}
    config = {"text_config": text} if nested else text
    half = {n: t.astype(np.float16) if n != "q.weight" else t for n, t in old.items()}
    base = write_model(
        tmp_path / "b", half, shards, model_type="llama", other=ROWS, **config
    )
    a, b = rand(RANK, 5), rand(N, RANK)
    peft = write_adapter(
        tmp_path / "peft", factors("q", a, b) | new, target_modules=["q"]
    )
    with pytest.raises(
        jlora.AdapterError, match=rf"{more} tokens were added.*extend_tables"
    ):
        merged(tmp_path, base, peft)
    assert not (tmp_path / "merged").exists()
    found, said = merged(tmp_path, base, peft, extend_tables=True)
    for name, table in new.items():
        np.testing.assert_array_equal(found[name], table.astype(np.float16))
    np.testing.assert_allclose(found["q.weight"], q + SCALE * b @ a, atol=1e-5)
    part = said["text_config"] if nested else said
    assert part["vocab_size"] == ROWS + more and said["other"] == ROWS
    if shards > 1:
        index = json.loads(
            (tmp_path / "merged/model.safetensors.index.json").read_text()
        )
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())


def test_a_tied_table_that_was_extended_stays_tied(tmp_path: Path) -> None:
    new = draw(1)(ROWS + 2, N)
    config = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": ROWS}
    base = write_model(
        tmp_path / "base", {f"{TABLE}.weight": draw()(ROWS, N)}, **config
    )
    both = {f"{TABLE}.weight": new, f"{HEAD}.weight": new}
    peft = write_adapter(tmp_path / "peft", both, target_modules=["q"])
    found, said = merged(tmp_path, base, peft, extend_tables=True)
    assert said == {**config, "vocab_size": ROWS + 2} and set(found) == {
        f"{TABLE}.weight"
    }
    np.testing.assert_array_equal(found[f"{TABLE}.weight"], new)


def test_a_head_that_is_adapted_is_extended_with_its_own_weight(tmp_path: Path) -> None:
    rand = draw()
    old, new = tables(ROWS), tables(ROWS + 2, 3)
    base = write_model(tmp_path / "base", old, model_type="llama", vocab_size=ROWS)
    a, b = rand(RANK, N), rand(ROWS + 2, RANK)
    own = {f"{HEAD}.base_layer.weight": new[f"{HEAD}.weight"]}
    alone = write_adapter(
        tmp_path / "alone", factors(HEAD, a, b) | own, target_modules=[HEAD]
    )
    with pytest.raises(jlora.AdapterError, match=rf"nothing of \['{TABLE}"):
        merged(tmp_path, base, alone, extend_tables=True)
    own[f"{TABLE}.weight"] = new[f"{TABLE}.weight"]
    peft = write_adapter(
        tmp_path / "peft", factors(HEAD, a, b) | own, target_modules=[HEAD]
    )
    found, _ = merged(tmp_path, base, peft, extend_tables=True)
    np.testing.assert_array_equal(found[f"{TABLE}.weight"], new[f"{TABLE}.weight"])
    wanted = new[f"{HEAD}.weight"] + SCALE * b @ a
    np.testing.assert_allclose(found[f"{HEAD}.weight"], wanted, atol=1e-5)


def test_tables_are_not_cut(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tables(ROWS), model_type="llama")
    peft = write_adapter(tmp_path / "peft", tables(ROWS - 2, 3), target_modules=["q"])
    with pytest.raises(jlora.AdapterError, match="2 tokens were taken from"):
        merged(tmp_path, base, peft, extend_tables=True)


def params_of(rows: int) -> dict[str, Any]:
    found = tables(rows, 5)
    return {
        "embed_tokens": {"embedding": jnp.asarray(found[f"{TABLE}.weight"])},
        "lm_head": {"kernel": jnp.asarray(found[f"{HEAD}.weight"].T)},
    }


def test_tables_that_no_field_names_are_loaded_whole(tmp_path: Path) -> None:
    new, names = tables(ROWS), jlora.peft.names("llama")
    peft = write_adapter(tmp_path / "peft", new, target_modules=["q"])
    _, adapter = jlora.peft.load(peft, params_of(ROWS), names)
    np.testing.assert_array_equal(
        adapter["embed_tokens/embedding"], new[f"{TABLE}.weight"]
    )
    np.testing.assert_array_equal(adapter["lm_head/kernel"], new[f"{HEAD}.weight"].T)
    with pytest.raises(
        jlora.AdapterError, match=r"3 tokens were added.*'lm_head/kernel' 4"
    ):
        jlora.peft.load(peft, params_of(ROWS - 3), names)


def test_other_tensors_still_need_a_field(tmp_path: Path) -> None:
    peft = write_adapter(
        tmp_path / "p", {"q.weight": draw()(ROWS, N)}, target_modules=[]
    )
    params = {"q": {"kernel": jnp.ones((N, ROWS))}}
    with pytest.raises(jlora.AdapterError, match="does not say that it is trained"):
        jlora.peft.load(peft, params)


# --- biases ---

BIAS = {"query.base_layer.bias", "classifier.bias", "classifier.modules_to_save.bias"}


def head_of_classes(place: Path, bias: str, **more: np.ndarray) -> tuple[Path, Any]:
    """An adapter as PEFT writes it with `task_type="SEQ_CLS"`."""
    rand = draw(1)
    a, b = rand(RANK, N), rand(N, RANK)
    trained, query, weight = rand(3), rand(N), rand(3, N)
    tensors = factors("query", a, b) | {
        "query.base_layer.bias": query,
        "classifier.weight": weight,
        "classifier.bias": trained,
        "classifier.modules_to_save.bias": trained,
        "classifier.original_module.bias": rand(3),
    }
    if bias == "none":
        tensors = {n: t for n, t in tensors.items() if n not in BIAS}
        tensors["classifier.bias"] = trained
    peft = write_adapter(
        place,
        tensors | more,
        target_modules=["query"],
        modules_to_save=["classifier", "score"],
        bias=bias,
    )
    new = {"query.bias": query, "classifier.bias": trained, "classifier.weight": weight}
    if bias == "none":
        del new["query.bias"]
    return peft, new | {"query.weight": SCALE * b @ a}


@pytest.mark.parametrize("bias", ["all", "lora_only", "none"])
def test_biases_of_saved_modules_are_read_under_all_their_names(
    bias: str, tmp_path: Path
) -> None:
    rand = draw()
    shapes = {"query.weight": (N, N), "query.bias": (N,), "classifier.weight": (3, N),
              "classifier.bias": (3,)}  # fmt: skip
    old = {name: rand(*shape) for name, shape in shapes.items()}
    base = write_model(tmp_path / "base", old, model_type="bert")
    peft, new = head_of_classes(tmp_path / "peft", bias)
    found, _ = merged(tmp_path, base, peft)
    new["query.weight"] = old["query.weight"] + new["query.weight"]
    for name, value in {**old, **new}.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
    # And into params.
    flax = lambda name: name.replace(".weight", ".kernel").replace(".", "/")
    turned = lambda t: jnp.asarray(t.T if t.ndim == 2 else t)
    params = {flax(name): turned(value) for name, value in old.items()}
    _, adapter = jlora.peft.load(peft, params)
    after = jlora.merge(params, adapter)
    for name, value in {**old, **new}.items():
        np.testing.assert_allclose(after[flax(name)], turned(value), atol=1e-5)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_beside_saved_modules_are_saved(bias: str, tmp_path: Path) -> None:
    """Those of modules that are saved are no part of what `bias` says."""
    peft, _ = head_of_classes(tmp_path / "peft", bias)
    params = {
        "query": {"kernel": jnp.ones((N, N)), "bias": jnp.ones(N)},
        "classifier": {"kernel": jnp.ones((N, 3)), "bias": jnp.ones(3)},
    }
    config, adapter = jlora.peft.load(peft, params)
    jlora.peft.save(tmp_path / "again", params, adapter, config)
    said = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert said["bias"] in ("all", "lora_only")
    assert said["modules_to_save"] == ["classifier"]
    _, again = jlora.peft.load(tmp_path / "again", params)
    assert set(again) == set(adapter)
    for one, other in zip(
        jax.tree.leaves(again), jax.tree.leaves(adapter), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_were_not_saved_are_not_merged_in_silence(
    bias: str, tmp_path: Path
) -> None:
    """PEFT before 0.21 writes `lora_only` and the factors alone."""
    rand = draw()
    old = {"query.weight": rand(N, N), "query.bias": rand(N), "out.bias": rand(3)}
    base = write_model(tmp_path / "base", old, model_type="bert")
    a, b = rand(RANK, N), rand(N, RANK)
    peft = write_adapter(
        tmp_path / "peft", factors("query", a, b), target_modules=["query"], bias=bias
    )
    told = r"\['query\.bias'\] are missing .* promises; .* ignore the field `bias`"
    with pytest.raises(jlora.AdapterError, match=told):
        merged(tmp_path, base, peft)
    assert not (tmp_path / "merged").exists()
    found, _ = merged(tmp_path, base, peft, ignore=["bias"])
    new = {**old, "query.weight": old["query.weight"] + SCALE * b @ a}
    for name, value in new.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


ONES = np.ones((RANK, N), np.float32)
FACTORS = factors("query", ONES, ONES.T)
OWN_BIAS = {"query.base_layer.bias": ONES[0]}


@pytest.mark.parametrize(
    "bias, version, more, told",
    [
        ("lora_only", "0.18.1", {}, True),
        ("lora_only", "0.20.0", {}, True),
        ("lora_only", ..., {}, True),
        ("lora_only", "0.21.0", {}, False),  # then the modules have none
        ("lora_only", ..., OWN_BIAS, False),
        ("all", "0.18.1", {}, False),
        ("none", "0.18.1", {}, False),
    ],
)
def test_biases_that_may_be_lost_are_not_converted_in_silence(
    bias: str,
    version: Any,
    more: Any,
    told: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As real PEFT writes: up to 0.20.0 without the biases of `lora_only`."""
    said = {"target_modules": ["query"], "bias": bias, "peft_version": version}
    peft = write_adapter(tmp_path / "peft", {**FACTORS, **more}, **said)
    text = "PEFT before 0.21 does not save those of `lora_only`"
    assert main(["inspect", str(peft)]) == SAME
    assert (text in capsys.readouterr().err) is told
    convert = ["convert", str(peft), str(tmp_path / "out")]
    for target in ([], ["--to", "mlx"]):
        if target and more:  # which MLX has no place for
            continue
        assert main([*convert, *target]) == (FAILED if told else SAME)
        assert (text in capsys.readouterr().err) is told
        out = tmp_path / "out"
        assert out.exists() is not told
        if told:
            assert main([*convert, *target, "--ignore", "bias"]) == SAME
        out.unlink() if out.is_file() else shutil.rmtree(out)


def test_two_values_of_one_bias_are_refused(tmp_path: Path) -> None:
    more = {"classifier.modules_to_save.bias": np.ones(3, np.float32)}
    peft, _ = head_of_classes(tmp_path / "peft", "all", **more)
    with pytest.raises(jlora.AdapterError, match=r"two values of 'classifier\.bias'"):
        jlora.peft.read_files(peft)

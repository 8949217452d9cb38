"""Tables that are heads as well: what an adapter of one of the two does to the other.

PEFT's logits are those of two tensors, unless the adapter says that they are tied.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_files import RANK, SCALE, draw, factors, merged, write_adapter, write_model

import jlora
import jlora.peft

ROWS, N = 7, 4
TIED = "tie_word_embeddings"
# The kind of model, its table, and the head that transformers makes of it.
KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "llama": ({"model_type": "llama", TIED: True}, "model.embed_tokens", "lm_head"),
    "gpt2": ({"model_type": "gpt2"}, "transformer.wte", "lm_head"),  # by default
    "opt": ({"model_type": "opt"}, "model.decoder.embed_tokens", "lm_head"),
    "bloom": ({"model_type": "bloom"}, "transformer.word_embeddings", "lm_head"),
    "gemma3": (
        {"model_type": "gemma3", "text_config": {"vocab_size": ROWS, TIED: True}},
        "model.language_model.embed_tokens",
        "lm_head",
    ),
    "captions": (
        {
            "model_type": "vision-encoder-decoder",
            "encoder": {"model_type": "vit"},
            "decoder": {"model_type": "gpt2", "vocab_size": ROWS},
        },
        "decoder.transformer.wte",
        "decoder.lm_head",
    ),
}
MODES = [
    "table",
    "head",
    "apart",
    "factors of table",
    "factors of head",
    "factors apart",
]


def make(
    mode: str, table: str, head: str, old: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray, np.ndarray]:
    """The tensors and fields of an adapter, and both tables with it."""
    rand = draw(1)
    tensors: dict[str, np.ndarray] = {}
    new = {table: old, head: old}
    for name in (table, head):
        if mode not in ("apart", "factors apart") and not mode.endswith(
            "table" if name == table else "head"
        ):
            continue
        if not mode.startswith("factors"):
            new[name] = tensors[f"{name}.weight"] = rand(ROWS, N)
            continue
        a, b = rand(RANK, ROWS), rand(N, RANK)
        if name == table:
            tensors[f"{name}.lora_embedding_A"] = a
            tensors[f"{name}.lora_embedding_B"] = b
        else:
            tensors |= factors(name, b.T, a.T)
        tensors[f"{name}.base_layer.weight"] = old
        new[name] = old + SCALE * (b @ a).T
    touched = sorted({n for n in (table, head) if f"{n}.weight" in tensors})
    adapted = sorted({n for n in (table, head) if f"{n}.base_layer.weight" in tensors})
    fields = {"modules_to_save": touched or None, "target_modules": ["q", *adapted]}
    return tensors, fields, new[table], new[head]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_tensors_are_written_where_one_would_change_the_other(
    kind: str, mode: str, tmp_path: Path
) -> None:
    config, table, head = KINDS[kind]
    rand = draw()
    old, weight, a, b = rand(ROWS, N), rand(N, 5), rand(RANK, 5), rand(N, RANK)
    base = write_model(
        tmp_path / "b", {f"{table}.weight": old, "q.weight": weight}, **config
    )
    tensors, fields, new_table, new_head = make(mode, table, head, old)
    peft = write_adapter(tmp_path / "peft", factors("q", a, b) | tensors, **fields)
    found, said = merged(tmp_path, base, peft)
    np.testing.assert_allclose(found[f"{table}.weight"], new_table, atol=1e-5)
    np.testing.assert_allclose(found[f"{head}.weight"], new_head, atol=1e-5)
    np.testing.assert_allclose(found["q.weight"], weight + SCALE * b @ a, atol=1e-5)
    assert set(found) == {f"{table}.weight", f"{head}.weight", "q.weight"}
    tied = lambda values: values.get(TIED) is True
    assert said[TIED] is False and not any(
        tied(part) for part in said.values() if isinstance(part, dict)
    )


@pytest.mark.parametrize("mode", ["whole", "whole, alone", "factors", "neither"])
def test_what_the_adapter_has_tied_stays_so(mode: str, tmp_path: Path) -> None:
    config, table, head = KINDS["llama"]
    rand = draw()
    old, new, weight = rand(ROWS, N), rand(ROWS, N), rand(N, 5)
    names = {f"{table}.weight": old, "q.weight": weight}
    base = write_model(tmp_path / "base", names, **config)
    tensors, fields = factors("q", rand(RANK, 5), rand(N, RANK)), {}
    if mode.startswith("whole"):
        tensors[f"{table}.weight"] = new
        tensors |= {} if "alone" in mode else {f"{head}.weight": new}
        fields = {"modules_to_save": ["embed_tokens", table]}
    elif mode == "factors":
        a, b = rand(RANK, ROWS), rand(N, RANK)
        tensors |= {f"{table}.lora_embedding_A": a, f"{table}.lora_embedding_B": b}
        tensors |= factors(head, b.T, a.T)
        fields = {"target_modules": ["q", "embed_tokens", "lm_head"]}
        new = old + SCALE * (b @ a).T
    said: dict[str, Any] = {"target_modules": ["q"], **fields}
    peft = write_adapter(tmp_path / "peft", tensors, **said, ensure_weight_tying=True)
    found, config = merged(tmp_path, base, peft)
    wanted = old if mode == "neither" else new
    np.testing.assert_allclose(found[f"{table}.weight"], wanted, atol=1e-5)
    assert set(found) == set(names) and config[TIED] is True


HEADLESS: list[dict[str, Any]] = [
    {"model_type": "llama", TIED: False},
    {"model_type": "llama"},  # not tied by default
    {
        "model_type": "llama",
        TIED: True,
        "architectures": ["LlamaForSequenceClassification"],
    },
]  # fmt: skip


@pytest.mark.parametrize("config", HEADLESS)
def test_no_head_is_made_where_there_is_none(config: Any, tmp_path: Path) -> None:
    table = f"{KINDS['llama'][1]}.weight"
    base = write_model(tmp_path / "base", {table: draw()(ROWS, N)}, **config)
    new = draw(1)(ROWS, N)
    peft = write_adapter(
        tmp_path / "peft", {table: new}, modules_to_save=["embed_tokens"]
    )
    found, said = merged(tmp_path, base, peft)
    assert set(found) == {table} and said == config
    np.testing.assert_array_equal(found[table], new)


def test_a_head_that_is_on_disk_as_well_is_no_longer_tied(tmp_path: Path) -> None:
    config, table, head = KINDS["llama"]
    old, new = draw()(ROWS, N), draw(1)(ROWS, N)
    base = write_model(
        tmp_path / "b", {f"{table}.weight": old, f"{head}.weight": old}, **config
    )
    peft = write_adapter(
        tmp_path / "peft", {f"{table}.weight": new}, modules_to_save=["embed_tokens"]
    )
    found, said = merged(tmp_path, base, peft)
    np.testing.assert_array_equal(found[f"{table}.weight"], new)
    np.testing.assert_array_equal(found[f"{head}.weight"], old)
    assert said[TIED] is False


def test_a_table_of_unknown_names_that_is_tied_is_refused(tmp_path: Path) -> None:
    base = write_model(
        tmp_path / "base",
        {"shared.weight": draw()(ROWS, N)},
        model_type="t5",
        **{TIED: True},
    )
    new = {"shared.weight": draw(1)(ROWS, N)}
    peft = write_adapter(tmp_path / "peft", new, modules_to_save=["shared"])
    with pytest.raises(jlora.UnsupportedFeatureError, match=rf"shared\.weight.*{TIED}"):
        merged(tmp_path, base, peft)


@pytest.mark.parametrize("shards", [2, 3])
def test_the_index_names_the_new_head(shards: int, tmp_path: Path) -> None:
    config, table, head = KINDS["llama"]
    rand = draw()
    names = {f"layers.{i}.q.weight": rand(N, 5) for i in range(3)}
    names[f"{table}.weight"] = rand(ROWS, N)
    base = write_model(tmp_path / "base", names, shards, **config)
    peft = write_adapter(
        tmp_path / "peft",
        {f"{table}.weight": rand(ROWS, N)},
        modules_to_save=["embed_tokens"],
    )
    found, _ = merged(tmp_path, base, peft)
    index = json.loads((tmp_path / "merged/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found) == {*names, f"{head}.weight"}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    opened = jlora.weights.open_weights(tmp_path / "merged")
    np.testing.assert_array_equal(opened[f"{head}.weight"], names[f"{table}.weight"])


# --- params ---

PATH = "embed/embedding"
NAMES = [(PATH, "model.embed_tokens", "embedding+tied(lm_head)")]


def model(params: Any, ids: jax.Array) -> jax.Array:
    """Looks rows up, and ends with the same table."""
    return jnp.tanh(params[PATH][ids]) @ params[PATH].T


def params() -> dict[str, jax.Array]:
    return {PATH: jnp.asarray(draw()(ROWS, N))}


@pytest.mark.parametrize(
    "trained", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]]
)
def test_params_with_one_table_take_no_half_of_it(
    trained: list[str], tmp_path: Path
) -> None:
    rand = draw(1)
    prefix = {"embed_tokens": "model.", "lm_head": ""}
    tensors = {f"{prefix[name]}{name}.weight": rand(ROWS, N) for name in trained}
    peft = write_adapter(tmp_path / "peft", tensors, modules_to_save=trained)
    with pytest.raises(
        jlora.UnsupportedFeatureError, match=rf"'{PATH}' is a table and.*lm_head"
    ):
        jlora.peft.load(peft, params(), NAMES)
    plan = jlora.lora(model, jlora.LoraConfig(PATH)).plan(params(), jnp.arange(3))
    plain = [(PATH, "model.embed_tokens", "embedding")]
    with pytest.raises(jlora.AdapterError, match=r"tied\(lm_head\)|lm_head"):
        jlora.peft.load(peft, plan, plain)


def test_a_table_that_may_be_the_head_needs_to_be_told(tmp_path: Path) -> None:
    """The rules of a family know a head, and the params have none."""
    new = draw(1)(ROWS, N)
    base = {"embed_tokens/embedding": jnp.zeros((ROWS, N))}
    peft = write_adapter(
        tmp_path / "peft",
        {"model.embed_tokens.weight": new},
        modules_to_save=["embed_tokens"],
    )
    names = jlora.peft.names("llama")
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"no leaf.*'lm_head'"):
        jlora.peft.load(peft, base, names)
    look = lambda params, ids: params["embed_tokens/embedding"][ids]
    plan = jlora.lora(look, jlora.LoraConfig("embedding")).plan(base, jnp.arange(3))
    headless = [rule for rule in names if rule.module != "lm_head"]
    for known, rules in ((plan, names), (base, headless), (base, None)):
        rules = [("embed_tokens", "model.embed_tokens")] if rules is None else rules
        _, adapter = jlora.peft.load(peft, known, rules)
        np.testing.assert_array_equal(adapter["embed_tokens/embedding"], new)


def test_a_tied_table_that_is_trained_whole_goes_to_peft_and_back(
    tmp_path: Path,
) -> None:
    new = draw(1)(ROWS, N)
    config = jlora.LoraConfig(PATH, full=True)
    lora = jlora.lora(model, config)
    plan = lora.plan(params(), jnp.arange(3))
    jlora.peft.save(tmp_path / "peft", plan, {PATH: jnp.asarray(new)}, config, NAMES)
    said = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert said["ensure_weight_tying"] is True
    assert said["modules_to_save"] == ["model.embed_tokens"]
    tensors = jlora.weights.open_weights(tmp_path / "peft/adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        np.testing.assert_array_equal(tensors[f"base_model.model.{name}.weight"], new)
    for base in (plan, params()):
        _, adapter = jlora.peft.load(tmp_path / "peft", base, NAMES)
        np.testing.assert_array_equal(adapter[PATH], new)

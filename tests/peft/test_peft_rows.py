"""PEFT's `trainable_token_indices`: rows of a table, both ways."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_files import RANK, SCALE, draw, factors, merged, write_adapter, write_model
from paths import DATA

import jlora
import jlora.peft

N, ROWS = 4, 7
MODULE = "model.embed_tokens"
KEY = f"{MODULE}.token_adapter.trainable_tokens_delta"
PATH = "embed_tokens/embedding"
INDICES: list[Any] = [[5, 1], {"embed_tokens": [5, 1]}, {MODULE: [5, 1]}]
NAMES = jlora.peft.names("llama")
TIED = [(PATH, MODULE, "embedding+tied(lm_head)")]


def model(params: Any, ids: jax.Array) -> jax.Array:
    return jnp.tanh(params[PATH][ids])


def tied_model(params: Any, ids: jax.Array) -> jax.Array:
    return model(params, ids) @ params[PATH].T


def params() -> dict[str, jax.Array]:
    return {PATH: jnp.asarray(draw()(ROWS, N))}


def with_rows(table: Any, rows: list[int], values: np.ndarray) -> np.ndarray:
    new = np.array(table)
    new[rows] = values
    return new


def row_file(place: Path, indices: Any, **config: Any) -> tuple[Path, np.ndarray]:
    values = draw(1)(2, N)
    fields = {"trainable_token_indices": indices, "target_modules": ["q"], **config}
    return write_adapter(place, {KEY: values}, **fields), values


@pytest.mark.parametrize("known", ["arrays", "shapes", "plan", "tied"])
@pytest.mark.parametrize("indices", INDICES)
def test_rows_are_loaded(indices: Any, known: str, tmp_path: Path) -> None:
    peft, values = row_file(tmp_path / "peft", indices)
    fn = tied_model if known == "tied" else model
    plan = jlora.lora(fn, jlora.LoraConfig(PATH)).plan(params(), jnp.arange(3))
    shapes = jax.eval_shape(params)
    base = {"arrays": params(), "shapes": shapes}.get(known, plan)
    config, adapter = jlora.peft.load(peft, base, TIED if known == "tied" else NAMES)
    assert isinstance(config, jlora.LoraConfig) and config.rows == (5, 1)
    assert isinstance(adapter[PATH], jlora.TrainedRows)
    wanted = with_rows(params()[PATH], [5, 1], values)
    np.testing.assert_array_equal(jlora.merge(params(), adapter)[PATH], wanted)
    ids, lora = jnp.arange(ROWS), jlora.lora(fn, config)
    np.testing.assert_allclose(
        lora.apply(params(), adapter, ids),
        fn({PATH: jnp.asarray(wanted)}, ids),
        atol=1e-5,
    )
    fresh = lora.init(jax.random.key(0), params(), ids)
    assert jax.tree.structure(fresh) == jax.tree.structure(adapter)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", INDICES)
def test_rows_are_merged(indices: Any, tied: bool, tmp_path: Path) -> None:
    """Those of a table that is the head as well are those of both."""
    rand = draw()
    table, q = rand(ROWS, N), rand(N, 5)
    disk = {f"{MODULE}.weight": table, "q.weight": q}
    config = {"model_type": "llama", "tie_word_embeddings": tied}
    base = write_model(tmp_path / "base", disk, **config)
    a, b, values = rand(RANK, 5), rand(N, RANK), draw(1)(2, N)
    peft = write_adapter(
        tmp_path / "peft",
        factors("q", a, b) | {KEY: values},
        target_modules=["q"],
        trainable_token_indices=indices,
    )
    found, said = merged(tmp_path, base, peft)
    wanted = with_rows(table, [5, 1], values)
    np.testing.assert_array_equal(found[f"{MODULE}.weight"], wanted)
    np.testing.assert_allclose(found["q.weight"], q + SCALE * b @ a, atol=1e-5)
    assert said == config and set(found) == set(disk)


@pytest.mark.parametrize("names", [NAMES, TIED])
def test_rows_are_saved_as_peft_has_them(names: Any, tmp_path: Path) -> None:
    peft, values = row_file(tmp_path / "peft", [5, 1])
    config, adapter = jlora.peft.load(peft, params(), names)
    jlora.peft.save(tmp_path / "again", params(), adapter, config, names)
    said = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert said["trainable_token_indices"] == {MODULE: [5, 1]}
    tensors = jlora.weights.open_weights(tmp_path / "again/adapter_model.safetensors")
    assert set(tensors) == {f"base_model.model.{KEY}"}
    np.testing.assert_array_equal(tensors[f"base_model.model.{KEY}"], values)
    same, back = jlora.peft.load(tmp_path / "again", params(), names)
    assert same == config
    np.testing.assert_array_equal(back[PATH].values, values)


def test_what_peft_wrote_is_read() -> None:
    folder = DATA / "peft" / "trainable_tokens"
    base = {"embed/embedding": jnp.zeros((9, 6)), "head/kernel": jnp.ones((6, 4))}
    _, adapter = jlora.peft.load(folder, base)
    tensors = jlora.weights.open_weights(folder / "adapter_model.safetensors")
    values = tensors["base_model.model.embed.token_adapter.trainable_tokens_delta"]
    new = jlora.merge(base, adapter)["embed/embedding"]
    old = base["embed/embedding"]
    np.testing.assert_array_equal(new, with_rows(old, [0, 3], values))


WRONG: list[tuple[Any, str]] = [
    ([5], r"rows \(2, 4\).*names 1"),
    ([5, 5], "twice"),
    ([5, 7], "row 7"),
    ({"other": [5, 1]}, "names none of it"),
    ({"embed_tokens": [5, 1], "other": [1]}, "'other', of which there are no rows"),
    (None, "names none of it"),
]


@pytest.mark.parametrize("indices, told", WRONG)
def test_rows_that_do_not_fit_are_refused(
    indices: Any, told: str, tmp_path: Path
) -> None:
    peft, _ = row_file(tmp_path / "peft", indices)
    with pytest.raises(jlora.AdapterError, match=told):
        jlora.peft.load(peft, params(), NAMES)


def test_rows_of_what_is_no_table_are_refused(tmp_path: Path) -> None:
    peft, _ = row_file(tmp_path / "peft", [5, 1])
    base = {"head/kernel": jnp.ones((N, ROWS))}
    with pytest.raises(jlora.AdapterError, match='transform "embedding"'):
        jlora.peft.load(peft, base, [("head", MODULE)])


def test_vllm_would_drop_rows(tmp_path: Path) -> None:
    peft, _ = row_file(tmp_path / "peft", [5, 1])
    config, adapter = jlora.peft.load(peft, params(), NAMES)
    both = {**params(), "lm_head/kernel": jnp.ones((N, ROWS))}
    lora = jlora.lora(lambda p, x: x @ p["lm_head/kernel"], jlora.LoraConfig("lm_head"))
    adapter |= lora.init(jax.random.key(0), both, jnp.ones((1, N)))
    with pytest.raises(jlora.UnsupportedFeatureError, match="drops what is"):
        jlora.peft.save(tmp_path / "out", both, adapter, config, NAMES, profile="vllm")


# --- keys with the name of an adapter ---

KEYS = {
    "q.lora_A.weight": (RANK, N), "q.lora_B.weight": (5, RANK),
    "e.lora_embedding_A": (RANK, ROWS), "e.lora_embedding_B": (N, RANK),
}  # fmt: skip


@pytest.mark.parametrize("name", ["default", "my_adapter-2"])
def test_keys_may_have_the_name_of_the_adapter(name: str, tmp_path: Path) -> None:
    """As a model's own state dict has them."""
    rand = draw()
    tensors = {key: rand(*shape) for key, shape in KEYS.items()}
    tensors["head.weight"] = rand(3, N)

    def with_name(key: str) -> str:
        if key == "head.weight":
            return f"head.modules_to_save.{name}.weight"
        head, _, end = key.rpartition(".")
        return f"{head}.{name}.{end}" if end == "weight" else f"{key}.{name}"

    base = {"q/kernel": jnp.ones((N, 5)), "e/embedding": jnp.ones((ROWS, N)),
            "head/kernel": jnp.ones((N, 3))}  # fmt: skip
    fields: Any = {"target_modules": ["q", "e"], "modules_to_save": ["head"]}
    plain = write_adapter(tmp_path / "plain", tensors, **fields)
    named = {with_name(key): tensor for key, tensor in tensors.items()}
    assert set(named).isdisjoint(tensors)
    other = write_adapter(tmp_path / "named", named, **fields)
    (_, one), (_, two) = (jlora.peft.load(f, base) for f in (plain, other))
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    rand = draw()
    tensors = {
        f"q.lora_{kind}.{name}.weight": rand(*shape)
        for name in ("one", "two")
        for kind, shape in (("A", (RANK, N)), ("B", (5, RANK)))
    }
    peft = write_adapter(tmp_path / "peft", tensors, target_modules=["q"])
    with pytest.raises(jlora.AdapterError, match=r"adapters \['one', 'two'\]"):
        jlora.peft.load(peft, {"q": {"kernel": jnp.ones((N, 5))}})


def test_mica_is_plain_lora(tmp_path: Path) -> None:
    rand = draw()
    a, b = rand(RANK, N), rand(5, RANK)
    peft = write_adapter(
        tmp_path / "p",
        factors("q", a, b),
        target_modules=["q"],
        init_lora_weights="mica",
    )
    _, adapter = jlora.peft.load(peft, {"q": {"kernel": jnp.ones((N, 5))}})
    np.testing.assert_allclose(
        jlora.delta(adapter["q/kernel"]), SCALE * (b @ a).T, atol=1e-5
    )


# --- convolutions without a rule ---


LAYOUTS = [("kernel", "HWIO"), ("w", "HWIO"), ("weight", "OIHW")]


@pytest.mark.parametrize("leaf, layout", LAYOUTS)
def test_a_plan_tells_that_a_kernel_is_convolved(
    leaf: str, layout: str, tmp_path: Path
) -> None:
    shape = dict(zip("HWIO", (3, 2, 5, 4), strict=True))
    kernel = jnp.asarray(draw()(*(shape[axis] for axis in layout)))
    base = {"conv": {leaf: kernel}}
    name = "conv" if leaf != "w" else "conv.w"

    def fn(params: Any, x: jax.Array) -> jax.Array:
        dims = ("NHWC", layout, "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["conv"][leaf], (1, 1), "SAME", dimension_numbers=dims
        )

    rand = draw(1)
    a, b = rand(RANK, 5, 3, 2), rand(4, RANK, 1, 1)
    peft = write_adapter(tmp_path / "peft", factors(name, a, b), target_modules=[name])
    plan = jlora.lora(fn, jlora.LoraConfig("conv")).plan(base, jnp.ones((1, 6, 6, 5)))
    _, adapter = jlora.peft.load(peft, plan)
    wanted = SCALE * np.einsum(f"or,rihw->{layout.lower()}", b[..., 0, 0], a)
    np.testing.assert_allclose(jlora.delta(adapter[f"conv/{leaf}"]), wanted, atol=1e-5)
    # And back, to the bit.
    config, _ = jlora.peft.load(peft, plan)
    jlora.peft.save(tmp_path / "again", plan, adapter, config)
    tensors = jlora.weights.open_weights(tmp_path / "again/adapter_model.safetensors")
    for key, value in factors(name, a, b).items():
        np.testing.assert_array_equal(tensors[f"base_model.model.{key}"], value)

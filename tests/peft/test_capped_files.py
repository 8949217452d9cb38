"""Files of adapters in which some kernels got a smaller rank than was asked.

What PEFT makes of a config is `peft_meaning`, which does not use jlora; its torch
layouts are written out here.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import randomized
from oracle import assert_close
from peft_golden import json_of, read
from peft_meaning import meaning

import jlora
import jlora.checkpoint
import jlora.peft

Tree = dict[str, Any]
LAYERS, WIDTH = 3, 12
SHAPES = {
    "types/embedding": (2, WIDTH),
    "query/kernel": (WIDTH, 16),
    "blocks/gate/kernel": (LAYERS, 16, 1),
    "blocks/back/kernel": (LAYERS, 1, 16),
    "third/kernel": (16, 3),
    "head/kernel": (16, 2),
}
MOST = {"types": 2, "query": 12, "blocks/gate": 1, "blocks/back": 1}
MOST |= {"third": 3, "head": 2}
NAMES = [
    (r"params/blocks/(?P<name>gate|back)", "blocks.{layer}.{name}"),
    (r"params/(?P<name>types|query|third|head)", "{name}"),
]


def model(params: Tree, kinds: jax.Array) -> tuple[jax.Array, ...]:
    p = params["params"]
    h = jnp.tanh(p["types"]["embedding"][kinds] @ p["query"]["kernel"])

    def block(h: jax.Array, layer: Tree) -> tuple[jax.Array, None]:
        gate = jnp.tanh(h @ layer["gate"]["kernel"])
        return h + gate @ layer["back"]["kernel"], None

    h, _ = jax.lax.scan(block, h, p["blocks"])
    return h @ p["head"]["kernel"], h @ p["third"]["kernel"]


def make_params() -> Tree:
    params: Tree = {}
    for i, (path, shape) in enumerate(SHAPES.items()):
        *above, last = path.split("/")
        tree = params
        for name in above:
            tree = tree.setdefault(name, {})
        tree[last] = 0.3 * jax.random.normal(jax.random.key(i), shape)
    return {"params": params}


PARAMS, KINDS = make_params(), jnp.array([0, 1, 1, 0, 1])


def make(config: Any) -> tuple[jlora.Lora, Tree]:
    lora = jlora.lora(model, config)
    adapter = lora.init(jax.random.key(0), PARAMS, KINDS)
    return lora, randomized(adapter, jax.random.key(1))


def assert_equal(actual: Tree, expected: Tree) -> None:
    """Asserts the same arrays, and the same roles and scalings."""
    same = lambda x, y: np.testing.assert_array_equal(x, y)
    jax.tree.map(same, dict(sorted(actual.items())), dict(sorted(expected.items())))


CONFIGS = {
    "default": jlora.LoraConfig(".*"),
    "rslora": jlora.LoraConfig(".*", rslora=True),
    # Of these some scalings are no float alpha by a rank of 3, or by its root.
    "fifths": jlora.LoraConfig(".*", rank=5),
    "rslora fifths": jlora.LoraConfig(".*", rank=5, alpha=7.0, rslora=True),
    "rank below some": jlora.LoraConfig(".*", rank=2, alpha=3.0),
    "all capped": jlora.LoraConfig(".*", rank=64, alpha=3.0),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


# --- jlora's own ---


@each_config
def test_a_checkpoint_keeps_them(config: jlora.LoraConfig, tmp_path: Path):
    lora, adapter = make(config)
    jlora.checkpoint.save(tmp_path / "x", adapter, config=config, base=PARAMS)
    like = lora.init(jax.random.key(9), PARAMS, KINDS)
    assert_equal(
        jlora.checkpoint.restore(tmp_path / "x", base=PARAMS, like=like), adapter
    )
    record = jlora.checkpoint.describe(tmp_path / "x")
    assert record.config == config
    for entry in record.entries:
        path = entry.path.removeprefix("params/").rpartition("/")[0]
        assert entry.rank == min(config.rank, MOST[path])
        assert (entry.alpha, entry.scaling) == (config.alpha, config.scaling)


def test_a_checkpoint_of_another_rank_is_none_of_the_config(tmp_path: Path):
    config = jlora.LoraConfig(".*")
    _, adapter = make(config)
    few = jlora.truncate(adapter, 1)
    with pytest.raises(
        jlora.AdapterError, match=r"'params/head/kernel' has rank 1"
    ) as e:
        jlora.checkpoint.save(tmp_path / "x", few, config=config)
    assert "gate" not in str(e.value)


# --- PEFT's ---


def module_of(path: str, layer: int | None) -> str:
    name = path.removeprefix("params/").rpartition("/")[0]
    if layer is None:
        return name
    return name.replace("blocks/", f"blocks.{layer}.")


@each_config
def test_peft_computes_the_same_scalings_and_reads_back_equal(
    config: jlora.LoraConfig, tmp_path: Path
):
    _, adapter = make(config)
    jlora.peft.save(tmp_path, PARAMS, adapter, config, NAMES)
    tensors, said = read(tmp_path), json_of(tmp_path)
    names = [k.removeprefix("base_model.model.") for k in tensors]
    modules = {n.split(".lora_")[0] for n in names}
    found = meaning(said, [f"{module}.weight" for module in modules])
    for path, entry in adapter.items():
        layers = range(LAYERS) if entry.axes.batch else [None]
        for layer in layers:
            module = module_of(path, layer)
            rank, alpha = found.modules[module]
            scaling = alpha / (math.sqrt(rank) if config.rslora else rank)
            assert rank == entry.rank
            assert math.isclose(scaling, config.scaling, rel_tol=1e-15)
            a, b = (x if layer is None else x[layer] for x in (entry.a, entry.b))
            place = f"base_model.model.{module}.lora_"
            if "embedding" in path:
                pair = tensors[f"{place}embedding_A"], tensors[f"{place}embedding_B"]
            else:
                pair = tensors[f"{place}A.weight"], tensors[f"{place}B.weight"]
            np.testing.assert_array_equal(pair[0], a.T)
            np.testing.assert_array_equal(pair[1], b.T)
    loaded, again = jlora.peft.load(tmp_path, PARAMS, NAMES)
    assert_equal(again, adapter)
    # One config gave them, and one config gives them.
    assert isinstance(loaded, jlora.LoraConfig)
    assert loaded.scaling == config.scaling
    new = jlora.lora(model, loaded).init(jax.random.key(0), PARAMS, KINDS)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, adapter)


@each_config
def test_vllm_gets_one_rank_and_one_alpha(config: jlora.LoraConfig, tmp_path: Path):
    """Zeros fill the factors up to a rank that vLLM knows: no delta changes."""
    config = dataclasses.replace(config, exclude="types")
    lora, adapter = make(config)
    jlora.peft.save(tmp_path, PARAMS, adapter, config, NAMES, profile="vllm")
    said = json_of(tmp_path)
    largest = max(entry.rank for entry in adapter.values())
    assert said["r"] == (8 if largest <= 8 else 16)
    assert said["rank_pattern"] == said["alpha_pattern"] == {}
    assert {x.shape["lora_B" in n] for n, x in read(tmp_path).items()} == {said["r"]}
    _, again = jlora.peft.load(tmp_path, PARAMS, NAMES)
    assert again.keys() == adapter.keys()
    for path, entry in adapter.items():
        assert_close(jlora.delta(again[path]), jlora.delta(entry), 1e-6)
    actual = lora.apply(PARAMS, again, KINDS)
    assert_close(actual, lora.apply(PARAMS, adapter, KINDS), 1e-5)


def test_peft_itself_caps_nothing_and_what_it_wrote_is_taken(tmp_path: Path):
    """A head of two labels with a rank of 8 works, is saved, and stays as it is."""
    config = jlora.LoraConfig("head|query", rank=8)
    lora, adapter = make(config)
    head = adapter["params/head/kernel"]
    a, b = jnp.ones((16, 8)), jax.random.normal(jax.random.key(3), (8, 2))
    wide = {**adapter, "params/head/kernel": dataclasses.replace(head, a=a, b=b)}
    jlora.peft.save(tmp_path / "x", PARAMS, wide, config, NAMES)
    assert json_of(tmp_path / "x")["rank_pattern"] == {}
    loaded, again = jlora.peft.load(tmp_path / "x", PARAMS, NAMES)
    assert_equal(again, wide)
    assert isinstance(loaded, jlora.LoraConfig)
    jlora.checkpoint.save(tmp_path / "y", again, config=loaded, base=PARAMS)
    assert_equal(jlora.checkpoint.restore(tmp_path / "y", base=PARAMS), wide)
    merged = jlora.merge(PARAMS, again)["params"]["head"]["kernel"]
    total = PARAMS["params"]["head"]["kernel"] + 2.0 * a @ b
    assert_close(merged, total, 1e-5)
    actual = lora.apply(PARAMS, again, KINDS)
    assert_close(actual, model(jlora.merge(PARAMS, again), KINDS), 1e-5)


def test_ranks_that_were_asked_apart_stay_apart(tmp_path: Path):
    """A kernel may have its rank from a config of its own, with another scaling."""
    configs = [
        jlora.LoraConfig("head", rank=2, alpha=7.0),
        jlora.LoraConfig("query|third", rank=8),
    ]
    _, adapter = make(configs)
    jlora.peft.save(tmp_path, PARAMS, adapter, configs, NAMES)
    loaded, again = jlora.peft.load(tmp_path, PARAMS, NAMES)
    assert_equal(again, adapter)
    assert sorted((c.rank, c.alpha) for c in loaded) == [(2, 7.0), (8, 16.0)]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]

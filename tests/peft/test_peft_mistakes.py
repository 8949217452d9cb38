"""Mistakes with the arguments of the door to PEFT, and of that to checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jlora
import jlora.checkpoint
import jlora.peft
from jlora import AdapterError, LoraConfig

LAYERS, PARTS = 16, ("q_proj", "k_proj", "v_proj", "o_proj")
MODULE = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """An adapter of a Llama of some layers."""
    path = tmp_path_factory.mktemp("peft")
    shapes = {"A": (2, 12), "B": (20, 2)}
    tensors = {
        MODULE.format(i, part, side): np.ones(shape, np.float32)
        for i in range(LAYERS)
        for part in PARTS
        for side, shape in shapes.items()
    }
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": [*PARTS]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def params(inner: str = "self_attn", parts: tuple[str, ...] = PARTS) -> Any:
    leaf = jax.ShapeDtypeStruct((12, 20), jnp.float32)
    layer = {inner: {part: {"kernel": leaf} for part in parts}}
    return {"params": {f"layers_{i}": layer for i in range(LAYERS)}}


def refusal(kind: type[Exception], call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(kind) as error:
        call(*args, **kwargs)
    assert type(error.value) is kind
    return str(error.value)


def test_names_forgotten(folder: Path) -> None:
    """Few lines, a count, and the family that fits."""
    message = refusal(AdapterError, jlora.peft.load, folder, params())
    assert message.count("\n") == 12
    assert "… and " in message
    assert 'names=jlora.peft.names("llama")' in message
    assert "64 of 64 modules" in message


@pytest.mark.parametrize("given", ["gpt2", "bert"])
def test_names_of_another_family(folder: Path, given: str) -> None:
    names = jlora.peft.names(given)
    message = refusal(AdapterError, jlora.peft.load, folder, params(), names)
    assert 'names=jlora.peft.names("llama")' in message


def test_params_that_no_family_knows(folder: Path) -> None:
    strange = {"params": {"core": {"w": jnp.ones((12, 20))}}}
    message = refusal(AdapterError, jlora.peft.load, folder, strange)
    assert "None of the modules" in message
    assert '"gpt2"' in message


def test_names_that_fit_have_no_such_hint(folder: Path) -> None:
    names = jlora.peft.names("llama")
    message = refusal(
        AdapterError, jlora.peft.load, folder, params(parts=PARTS[:3]), names
    )
    assert "jlora.peft.names" not in message


@pytest.mark.parametrize(
    "call", ["load", "save", "params_from_torch", "params_to_torch"]
)
def test_a_family_for_names(call: str, tmp_path: Path, folder: Path) -> None:
    tree = {"params": {"layers_0": {"mlp": {"up_proj": {"kernel": jnp.ones((4, 6))}}}}}
    fn = lambda p, x: x @ p["params"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    lora = jlora.lora(fn, LoraConfig("up_proj", rank=2))
    adapter = lora.init(jax.random.key(0), tree, jnp.ones((2, 4)))
    args = {
        "load": (folder, tree, "llama"),
        "save": (tmp_path, tree, adapter, LoraConfig("up_proj", rank=2), "llama"),
        "params_from_torch": ({"a": np.ones(2)}, tree, "llama"),
        "params_to_torch": (tree, "llama"),
    }
    message = refusal(TypeError, getattr(jlora.peft, call), *args[call])
    assert "jlora.peft.names('llama')" in message


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the arguments of a save are."""

    params: Any
    adapter: Any
    config: LoraConfig
    plan: jlora.Plan


@pytest.fixture(scope="module")
def parts() -> Parts:
    config = LoraConfig("w", rank=2)
    tree, x = {"w": jnp.ones((5, 7))}, jnp.ones((3, 5))
    lora = jlora.lora(lambda p, x: x @ p["w"], config)
    adapter = lora.init(jax.random.key(0), tree, x)
    return Parts(tree, adapter, config, lora.plan(tree, x))


ORDER = "jlora.peft.save(path, params_or_plan, adapter, config, names)"


@pytest.mark.parametrize("first", ["params", "plan"])
def test_save_with_the_adapter_first(parts: Parts, first: str, tmp_path: Path) -> None:
    other = getattr(parts, first)
    kind = AdapterError if first == "params" else TypeError
    message = refusal(kind, jlora.peft.save, tmp_path / "x", parts.adapter, other)
    assert ORDER in message
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("place", range(4))
def test_save_with_arguments_in_another_order(
    parts: Parts, place: int, tmp_path: Path
) -> None:
    right = [tmp_path / "x", parts.params, parts.adapter, parts.config]
    wrong = [*right[place:], *right[:place]]
    if place:
        assert ORDER in refusal(TypeError, jlora.peft.save, *wrong)
    else:
        jlora.peft.save(*wrong)


def test_save_of_names_for_a_config(parts: Parts, tmp_path: Path) -> None:
    names = jlora.peft.names("llama")
    args = tmp_path / "x", parts.params, parts.adapter, names
    assert ORDER in refusal(TypeError, jlora.peft.save, *args)


def test_load_with_the_params_first(parts: Parts, folder: Path) -> None:
    message = refusal(TypeError, jlora.peft.load, parts.params, folder)
    assert "jlora.peft.load(path, params, names)" in message


def test_an_adapter_for_params(parts: Parts, folder: Path) -> None:
    for call in (
        lambda: jlora.peft.load(folder, parts.adapter),
        lambda: jlora.peft.params_to_torch(parts.adapter),
    ):
        assert "got an adapter" in refusal(TypeError, call)


def test_a_state_dict_behind_the_params(parts: Parts) -> None:
    nested = {"params": parts.params}
    args = nested, {"w.weight": np.ones((7, 5))}
    message = refusal(TypeError, jlora.peft.params_from_torch, *args)
    assert "(state_dict, params, names)" in message


def test_checkpoints_have_the_path_first(parts: Parts, tmp_path: Path) -> None:
    save, restore = jlora.checkpoint.save, jlora.checkpoint.restore
    message = refusal(TypeError, save, parts.adapter, tmp_path, config=parts.config)
    assert "save(path, adapter, config=..., base=...)" in message
    assert "restore(path, base=...)" in refusal(TypeError, restore, parts.params)

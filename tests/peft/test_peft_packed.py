"""Packed experts on the command line, for vLLM, and where PEFT swaps their sides."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hub_files import RANK, SCALE, draw, factors, write_adapter

import jlora
import jlora.peft
import jlora.weights
from jlora.__main__ import main

E, N, INNER = 3, 6, 4
OWNER = "model.layers.0.mlp.experts"
SIDES = {"gate_up_proj": (N, 2 * INNER), "down_proj": (INNER, N)}


def expert_file(place: Path, **more: np.ndarray) -> Path:
    """An adapter of both parameters and of a projection, as PEFT 0.21 writes it."""
    rand, tensors = draw(1), dict(more)
    for depth, name in (("", "down_proj"), (".base_layer", "gate_up_proj")):
        fan_in, out = SIDES[name]
        a, b = rand(E * RANK, fan_in), rand(out, RANK * E)
        tensors |= factors(f"{OWNER}{depth}", a, b)
    tensors |= factors("model.layers.0.self_attn.q_proj", rand(RANK, N), rand(N, RANK))
    return write_adapter(
        place,
        tensors,
        target_modules=["q_proj"],
        target_parameters=[f"experts.{name}" for name in SIDES],
    )


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return dict(jlora.weights.open_weights(folder / "adapter_model.safetensors"))


def test_packed_experts_are_converted_both_ways(tmp_path: Path, capsys: Any) -> None:
    peft = expert_file(tmp_path / "peft")
    checkpoint, back = tmp_path / "checkpoint", tmp_path / "back"
    for one, other in ((peft, checkpoint), (checkpoint, back)):
        assert main(["convert", str(one), str(other)]) == 0
    assert main(["diff", str(peft), str(back)]) == 0
    given, found = tensors_of(peft), tensors_of(back)
    assert set(found) == set(given)
    for name, tensor in given.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    said = json.loads((back / "adapter_config.json").read_text())
    assert said["target_parameters"] == [f"{OWNER}.{name}" for name in sorted(SIDES)]
    assert main(["inspect", str(peft)]) == 0
    assert "3×6×8" in capsys.readouterr().out


def test_rows_are_shown_and_not_converted(tmp_path: Path, capsys: Any) -> None:
    """The files do not say how many rows the table has."""
    key = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    peft = write_adapter(
        tmp_path / "peft",
        {key: draw()(2, N)},
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [5, 1]},
    )
    assert main(["inspect", str(peft)]) == 0
    assert "2 rows" in capsys.readouterr().out
    assert main(["convert", str(peft), str(tmp_path / "out")]) == 2
    assert "how many the tables have" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- vLLM ---

NAMES = [
    ("up/kernel", f"{OWNER}.gate_up_proj", "experts"),
    ("down/kernel", f"{OWNER}.down_proj", "experts"),
]
IN_FIRST = [(path, name, f"{steps}+fan_in_fan_out") for path, name, steps in NAMES]


def params() -> dict[str, Any]:
    shapes = {"up": SIDES["gate_up_proj"], "down": SIDES["down_proj"]}
    return {f"{n}/kernel": jnp.zeros((E, *shape)) for n, shape in shapes.items()}


def loaded(tmp_path: Path, names: Any) -> tuple[Any, dict[str, Any]]:
    peft = expert_file(tmp_path / "peft")
    config, adapter = jlora.peft.load(
        peft, params(), names, leave_out=["self_attn"], ignore=["target_modules"]
    )
    return config, adapter


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_5_moe", "qwen3_5_moe_text"])
def test_experts_stay_packed_where_vllm_has_them_so(kind: str, tmp_path: Path) -> None:
    names = IN_FIRST if kind == "gpt_oss" else NAMES
    config, adapter = loaded(tmp_path, names)
    out = tmp_path / "out"
    options: Any = {"profile": "vllm", "model_type": kind}
    jlora.peft.save(out, params(), adapter, config, names, **options)
    found = {n.removeprefix("base_model.model."): t for n, t in tensors_of(out).items()}
    said = json.loads((out / "adapter_config.json").read_text())
    rank, scale = said["r"], said["lora_alpha"] / said["r"]
    assert rank == 8 and said["rank_pattern"] == said["alpha_pattern"] == {}
    for place, path in ((f"{OWNER}.base_layer", "up/kernel"), (OWNER, "down/kernel")):
        a, b = (found[f"{place}.lora_{kind}.weight"] for kind in "AB")
        a, b = a.reshape(E, rank, -1), b.reshape(-1, rank, E)
        delta = scale * np.einsum("ore,eri->eio", b, a)
        np.testing.assert_allclose(delta, jlora.delta(adapter[path]), atol=1e-5)


@pytest.mark.parametrize("kind", [None, "qwen3_moe", "mixtral"])
def test_experts_are_apart_where_vllm_has_them_so(
    kind: str | None, tmp_path: Path
) -> None:
    config, adapter = loaded(tmp_path, NAMES)
    options: Any = {"profile": "vllm", "model_type": kind}
    jlora.peft.save(tmp_path / "out", params(), adapter, config, NAMES, **options)
    keys = {
        name.removeprefix("base_model.model.") for name in tensors_of(tmp_path / "out")
    }
    wanted = {
        f"{OWNER}.{e}.{part}_proj.lora_{x}.weight"
        for e in range(E)
        for part in ("gate", "up", "down")
        for x in "AB"
    }
    assert keys == wanted


def test_gate_and_up_that_may_alternate_are_not_halved(tmp_path: Path) -> None:
    config, adapter = loaded(tmp_path, IN_FIRST)
    with pytest.raises(jlora.UnsupportedFeatureError, match="give `model_type`"):
        jlora.peft.save(
            tmp_path / "out", params(), adapter, config, IN_FIRST, profile="vllm"
        )


# --- Llama 4: (experts, in, out), and PEFT is not told ---

SWAPPED = [(path, name, f"{steps}+swapped") for path, name, steps in IN_FIRST]


@pytest.mark.parametrize("inner", [INNER, N])
def test_sides_that_peft_swaps_are_swapped_back(inner: int, tmp_path: Path) -> None:
    """`lora_A` has the outputs; a square parameter does not show it."""
    rand, sides = draw(1), {"gate_up_proj": (N, 2 * inner), "down_proj": (inner, N)}
    tensors, deltas = {}, {}
    for depth, name in (("", "down_proj"), (".base_layer", "gate_up_proj")):
        fan_in, out = sides[name]
        a, b = rand(E * RANK, out), rand(fan_in, RANK * E)
        tensors |= factors(f"{OWNER}{depth}", a, b)
        a, b = a.reshape(E, RANK, -1), b.reshape(-1, RANK, E)
        deltas[name] = SCALE * np.einsum("ire,ero->eio", b, a)
    parameters = [f"experts.{name}" for name in sides]
    fields: Any = {"target_modules": [], "target_parameters": parameters}
    peft = write_adapter(tmp_path / "peft", tensors, **fields)
    base = {
        "up/kernel": jnp.zeros((E, *sides["gate_up_proj"])),
        "down/kernel": jnp.zeros((E, *sides["down_proj"])),
    }
    config, adapter = jlora.peft.load(peft, base, SWAPPED)
    for path, name in (("up/kernel", "gate_up_proj"), ("down/kernel", "down_proj")):
        np.testing.assert_allclose(jlora.delta(adapter[path]), deltas[name], atol=1e-5)
    jlora.peft.save(tmp_path / "again", base, adapter, config, SWAPPED)
    found = tensors_of(tmp_path / "again")
    for name, tensor in tensors_of(peft).items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def test_sides_that_peft_swaps_are_converted_both_ways_by_the_kind(
    tmp_path: Path,
) -> None:
    """A parameter that is not square tells the sides; on the way back the kind does."""
    rand, tensors = draw(1), {}
    for depth, name in (("", "down_proj"), (".base_layer", "gate_up_proj")):
        fan_in, out = SIDES[name]
        a, b = rand(E * RANK, out), rand(fan_in, RANK * E)
        tensors |= factors(f"{OWNER}{depth}", a, b)
    parameters = [f"experts.{name}" for name in SIDES]
    fields: Any = {"target_modules": [], "target_parameters": parameters}
    peft = str(write_adapter(tmp_path / "peft", tensors, **fields))
    checkpoint, back, other = (str(tmp_path / n) for n in ("checkpoint", "back", "o"))
    assert main(["convert", peft, checkpoint]) == 0
    kind = ["--model-type", "llama4_text"]
    assert main(["convert", *kind, checkpoint, back]) == 0
    given, found = tensors_of(tmp_path / "peft"), tensors_of(tmp_path / "back")
    assert set(found) == set(given)
    for name, tensor in given.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    # The delta is the same, and the sides are those of other kinds.
    assert main(["convert", "--model-type", "mixtral", checkpoint, other]) == 0
    assert main(["diff", back, other]) == 0
    key = f"base_model.model.{OWNER}.lora_A.weight"
    assert tensors_of(tmp_path / "o")[key].shape == (E * RANK, INNER)
    assert given[key].shape == (E * RANK, N)


def test_a_kind_has_no_place_in_a_checkpoint(tmp_path: Path, capsys: Any) -> None:
    peft = expert_file(tmp_path / "peft")
    command = ["convert", "--model-type", "mixtral", str(peft), str(tmp_path / "out")]
    assert main(command) == 2
    assert "has no place for --model-type" in capsys.readouterr().err

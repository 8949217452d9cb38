"""Fields of a config that are done without: the keys of the file decide."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hub_files import (
    ALPHA,
    RANK,
    SCALE,
    draw,
    factors,
    merged,
    write_adapter,
    write_model,
)

import jlora
import jlora.peft

N, OUT = 4, 5
Q, V = "layers.0.q_proj", "layers.1.q_proj"
LOOKAHEAD = r"^(?!.*visual).*(?:q_proj|v_proj)$"


def params() -> dict[str, Any]:
    leaf = lambda: {"kernel": jnp.ones((N, OUT)), "bias": jnp.zeros(OUT)}
    return {"layers": {i: {"q_proj": leaf()} for i in "01"}, "head": leaf()}


def kernel(params: Any, module: str) -> Any:
    for part in module.split("."):
        params = params[part]
    return params["kernel"]


CASES: list[tuple[dict[str, Any], list[str]]] = [
    ({"target_modules": LOOKAHEAD}, ["target_modules"]),
    ({"target_modules": "all-linear"}, ["target_modules"]),
    ({"target_modules": ["v_proj"]}, ["target_modules"]),  # and not what is there
    ({"target_modules": ["q_proj"], "exclude_modules": LOOKAHEAD}, ["exclude_modules"]),
    (
        {"target_modules": LOOKAHEAD, "exclude_modules": LOOKAHEAD},
        ["target_modules", "exclude_modules"],
    ),
    (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        ["layers_to_transform"],
    ),
    ({"target_modules": ["q_proj"], "layers_pattern": ["layers"]}, ["layers_pattern"]),
    ({"target_modules": ["q_proj"], "rank_pattern": {"(?!x)q": 3}}, ["rank_pattern"]),
    ({"target_modules": ["q_proj"], "alpha_pattern": {"(?!x)q": 3}}, ["alpha_pattern"]),
    ({"target_modules": ["q_proj"], "r": "many"}, ["r"]),
    ({"target_modules": ["q_proj"], "use_dora": True}, ["use_dora"]),
    ({"target_modules": ["q_proj"], "bias": "some"}, ["bias"]),
]


@pytest.mark.parametrize("modules", [[Q], [Q, V]])
@pytest.mark.parametrize("fields, ignore", CASES)
def test_the_keys_tell_what_is_adapted(
    fields: dict[str, Any], ignore: list[str], modules: list[str], tmp_path: Path
) -> None:
    if modules == [Q] and ignore[0] not in ("target_modules", "exclude_modules"):
        pytest.skip("both are selected")
    rand, tensors, deltas = draw(), {}, {}
    for module in modules:
        a, b = rand(RANK, N), rand(OUT, RANK)
        tensors |= factors(module, a, b)
        deltas[module] = SCALE * b @ a
    peft = write_adapter(tmp_path / "peft", tensors, **fields)
    config, adapter = jlora.peft.load(peft, params(), ignore=ignore)
    assert isinstance(config, jlora.LoraConfig)
    assert (config.rank, config.alpha) == (RANK, ALPHA)
    new = jlora.merge(params(), adapter)
    for module, delta in deltas.items():
        np.testing.assert_allclose(kernel(new, module), 1 + delta.T, atol=1e-5)
    assert len(adapter) == len(modules)
    # And merged on disk.
    disk = {f"{m}.weight": rand(OUT, N) for m in (Q, V)}
    base = write_model(tmp_path / "base", disk, model_type="llama")
    found, _ = merged(tmp_path, base, peft, ignore=ignore)
    for module in (Q, V):
        wanted = disk[f"{module}.weight"] + deltas.get(module, 0)
        np.testing.assert_allclose(found[f"{module}.weight"], wanted, atol=1e-5)


@pytest.mark.parametrize("fields, ignore", CASES)
def test_without_it_the_field_is_refused_or_contradicted(
    fields: dict[str, Any], ignore: list[str], tmp_path: Path
) -> None:
    rand = draw()
    peft = write_adapter(
        tmp_path / "peft", factors(Q, rand(RANK, N), rand(OUT, RANK)), **fields
    )
    if fields["target_modules"] != "all-linear":
        with pytest.raises(jlora.AdapterError):
            jlora.peft.load(peft, params())


def test_ranks_are_those_of_the_keys(tmp_path: Path) -> None:
    rand = draw()
    ranks = {Q: 1, V: 3}
    tensors = {}
    for module, rank in ranks.items():
        tensors |= factors(module, rand(rank, N), rand(OUT, rank))
    said: Any = {"target_modules": ["q_proj"], "rank_pattern": {"(?!x)q": 1}}
    peft = write_adapter(tmp_path / "peft", tensors, **said)
    _, adapter = jlora.peft.load(peft, params(), ignore=["rank_pattern"])
    for module, rank in ranks.items():
        entry = adapter[f"{module.replace('.', '/')}/kernel"]
        assert entry.rank == rank and entry.scaling == ALPHA / rank


def test_what_is_whole_is_told_by_the_keys(tmp_path: Path) -> None:
    rand = draw()
    tensors = factors(Q, rand(RANK, N), rand(OUT, RANK))
    whole = {"head.weight": rand(OUT, N), "head.bias": rand(OUT)}
    peft = write_adapter(tmp_path / "peft", tensors | whole, target_modules=["q_proj"])
    fields = ["target_modules", "modules_to_save"]
    _, adapter = jlora.peft.load(peft, params(), ignore=fields)
    np.testing.assert_array_equal(adapter["head/kernel"], whole["head.weight"].T)
    np.testing.assert_array_equal(adapter["head/bias"], whole["head.bias"])


def test_biases_and_magnitudes_are_told_by_the_keys(tmp_path: Path) -> None:
    rand = draw()
    a, b, c, m = rand(RANK, N), rand(OUT, RANK), rand(OUT), rand(OUT)
    said: Any = {"target_modules": [Q]}
    biased = write_adapter(
        tmp_path / "biased", factors(Q, a, b) | {f"{Q}.lora_B.bias": c}, **said
    )
    _, adapter = jlora.peft.load(biased, params(), ignore=["lora_bias"])
    np.testing.assert_allclose(adapter["layers/0/q_proj/bias"], SCALE * c, rtol=1e-6)
    scaled = write_adapter(
        tmp_path / "dora", factors(Q, a, b) | {f"{Q}.lora_magnitude_vector": m}, **said
    )
    _, adapter = jlora.peft.load(scaled, params(), ignore=["use_dora"])
    np.testing.assert_array_equal(adapter["layers/0/q_proj/kernel"].magnitude, m)

"""Square weights, whose layout no shape tells: the kind of model and PEFT's release do.

The sums are einsums of what each release of PEFT computes, read in its source.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hub_files import RANK, SCALE, draw, factors, merged, write_adapter, write_model

import jlora
import jlora.peft
from jlora.__main__ import main

E, N, HALF = 3, 6, 3
OWNER = "model.layers.0.mlp.experts"
UNFLAGGED = ["mixtral", "qwen3_5_moe_text", "llama4"]  # (experts, out, in), or not told
FLAGGED = ["gpt_oss", "aria", "openai_privacy_filter"]


def packed(a: np.ndarray, b: np.ndarray, sides: str) -> np.ndarray:
    """The delta of all experts; "io" has the axis of `lora_A` first, "oi" last."""
    a, b = a.reshape(E, RANK, -1), b.reshape(len(b), RANK, E)
    return SCALE * np.einsum(f"ore,eri->e{sides}", b, a)


def sides_of(version: str, flagged: bool) -> str:
    """Which order PEFT's `ParamWrapper.get_delta_weight` of a release gives."""
    if version.startswith(("0.17", "0.18")):
        return "io"
    swapped = flagged if version == "0.19.0" else not flagged
    return "oi" if swapped else "io"


def one_expert_file(place: Path, **config: Any) -> tuple[Path, np.ndarray, np.ndarray]:
    """An adapter of `down_proj` alone, square."""
    rand = draw(1)
    a, b = rand(E * RANK, N), rand(N, RANK * E)
    said = {"target_modules": [], "target_parameters": ["experts.down_proj"], **config}
    return write_adapter(place, factors(OWNER, a, b), **said), a, b


VERSIONS = ["0.17.1", "0.18.2.dev0", "0.19.0", "0.19.1", "0.21.2", "1.0"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", UNFLAGGED + FLAGGED)
def test_square_experts_are_merged_as_the_release_meant(
    kind: str, version: str, tmp_path: Path
) -> None:
    weight, name = draw()(E, N, N), f"{OWNER}.down_proj"
    base = write_model(tmp_path / "base", {name: weight}, model_type=kind)
    peft, a, b = one_expert_file(tmp_path / "peft", peft_version=version)
    wanted = weight + packed(a, b, sides_of(version, kind in FLAGGED))
    found = merged(tmp_path, base, peft)[0][name]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("version", [..., None, "", "of today", 21])
def test_square_experts_of_no_release_are_refused(version: Any, tmp_path: Path) -> None:
    name = f"{OWNER}.down_proj"
    base = write_model(tmp_path / "b", {name: draw()(E, N, N)}, model_type="gpt_oss")
    peft, *_ = one_expert_file(tmp_path / "peft", peft_version=version)
    with pytest.raises(jlora.UnsupportedFeatureError, match=rf"{name}.*peft_version"):
        merged(tmp_path, base, peft)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("config", [{}, {"model_type": "mine"}, {"model_type": 3}])
def test_square_experts_of_an_unknown_kind_are_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    name = f"{OWNER}.down_proj"
    base = write_model(tmp_path / "base", {name: draw()(E, N, N)}, **config)
    peft, a, b = one_expert_file(tmp_path / "peft")
    with pytest.raises(jlora.UnsupportedFeatureError, match=rf"{name}.*model_type"):
        merged(tmp_path, base, peft)
    # To releases that did not ask the module, the kind is nothing.
    old, a, b = one_expert_file(tmp_path / "old", peft_version="0.18.1")
    found, _ = merged(tmp_path, base, old)
    np.testing.assert_allclose(
        found[name] - draw()(E, N, N), packed(a, b, "io"), atol=1e-5
    )


@pytest.mark.parametrize("sides", ["oi", "io"])
def test_a_parameter_beside_it_tells(sides: str, tmp_path: Path) -> None:
    """PEFT asks the module for all of its parameters, and this one is not square."""
    rand = draw()
    weights = {
        f"{OWNER}.gate_up_proj": rand(E, 2 * N, N),
        f"{OWNER}.down_proj": rand(E, N, N),
    }
    x, y = (N, 2 * N) if sides == "oi" else (2 * N, N)
    up, down = (
        (rand(E * RANK, x), rand(y, RANK * E)),
        (rand(E * RANK, N), rand(N, RANK * E)),
    )
    base = write_model(tmp_path / "base", weights, model_type="mine")
    peft = write_adapter(
        tmp_path / "peft",
        factors(f"{OWNER}.base_layer", *up) | factors(OWNER, *down),
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        peft_version=...,
    )
    found, _ = merged(tmp_path, base, peft)
    for name, (a, b) in {"gate_up_proj": up, "down_proj": down}.items():
        wanted = weights[f"{OWNER}.{name}"] + packed(a, b, sides)
        np.testing.assert_allclose(found[f"{OWNER}.{name}"], wanted, atol=1e-5)
    # And without the params: what goes into the first comes out of the last.
    _, adapter = read(peft)
    for name, (a, b) in {"gate_up_proj": up, "down_proj": down}.items():
        path = "params/" + f"{OWNER}.{name}".replace(".", "/") + "/kernel"
        delta = packed(a, b, "io" if sides == "oi" else "oi")  # (experts, in, out)
        np.testing.assert_allclose(jlora.delta(adapter[path]), delta, atol=1e-5)


def read(peft: Path) -> Any:
    """An adapter without its params, as the command line has it."""
    from jlora._formats.peft import FORMAT

    return FORMAT.read(peft)


@pytest.mark.parametrize("version", ["0.18.1", ...])
def test_a_square_parameter_alone_needs_its_params(
    version: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft, *_ = one_expert_file(tmp_path / "peft", peft_version=version)
    assert main(["inspect", str(peft)]) == 0
    assert main(["convert", str(peft), str(tmp_path / "out")]) == 2
    assert "down_proj" in capsys.readouterr().err


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("transform", ["experts", "experts+fan_in_fan_out"])
def test_square_experts_are_loaded_as_the_release_meant(
    version: str, transform: str, tmp_path: Path
) -> None:
    """The rule says how torch keeps them; the kernel is (experts, in, out)."""
    peft, a, b = one_expert_file(tmp_path / "peft", peft_version=version)
    params = {"down": {"kernel": jnp.zeros((E, N, N))}}
    names = [("down/kernel", f"{OWNER}.down_proj", transform)]
    flagged = "fan_in_fan_out" in transform
    torch = packed(a, b, sides_of(version, flagged))
    wanted = torch if flagged else torch.transpose(0, 2, 1)
    _, adapter = jlora.peft.load(peft, params, names)
    np.testing.assert_allclose(jlora.delta(adapter["down/kernel"]), wanted, atol=1e-5)


def test_square_experts_of_no_release_are_not_loaded(tmp_path: Path) -> None:
    peft, *_ = one_expert_file(tmp_path / "peft", peft_version=...)
    params = {"down": {"kernel": jnp.zeros((E, N, N))}}
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"down_proj.*peft_version"):
        jlora.peft.load(
            peft, params, [("down/kernel", f"{OWNER}.down_proj", "experts")]
        )


def test_experts_of_old_releases_are_loaded_the_other_way(tmp_path: Path) -> None:
    """Of a parameter that is not square the shapes tell, whatever the file says."""
    rand = draw()
    a, b = rand(E * RANK, 2 * N), rand(N, RANK * E)  # of (experts, 2·n, n)
    peft = write_adapter(
        tmp_path / "peft",
        factors(OWNER, a, b),
        target_modules=[],
        target_parameters=["experts.gate_up_proj"],
        peft_version="0.18.1",
    )
    params = {"up": {"kernel": jnp.zeros((E, N, 2 * N))}}
    names = [("up/kernel", f"{OWNER}.gate_up_proj", "experts")]
    _, adapter = jlora.peft.load(peft, params, names)
    np.testing.assert_allclose(
        jlora.delta(adapter["up/kernel"]), packed(a, b, "oi"), atol=1e-5
    )


# --- `fan_in_fan_out`, of which a file has one for all modules ---

C_ATTN, C_PROJ = "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"


def linear_file(
    place: Path, shapes: dict[str, tuple[int, int]], flag: bool
) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter of modules (in, out), and `s·B·A` of each, (out, in)."""
    rand, tensors, deltas = draw(2), {}, {}
    for module, (fan_in, fan_out) in shapes.items():
        a, b = rand(RANK, fan_in), rand(fan_out, RANK)
        tensors |= factors(module, a, b)
        deltas[module] = SCALE * b @ a
    said = {"target_modules": sorted(shapes), "fan_in_fan_out": flag}
    return write_adapter(place, tensors, **said), deltas


KINDS: list[tuple[dict[str, Any], dict[str, tuple[int, int]], set[str]]] = [
    # GPT-2 with its head, which comes last and is a linear layer.
    (
        {"model_type": "gpt2"},
        {C_ATTN: (N, 3 * N), C_PROJ: (N, N), "lm_head": (N, 7)},
        {C_ATTN, C_PROJ},
    ),
    ({"model_type": "gpt2"}, {C_PROJ: (N, N), "score": (N, N)}, {C_PROJ}),
    # A captioner: a ViT, then GPT-2.
    (
        {
            "model_type": "vision-encoder-decoder",
            "encoder": {"model_type": "vit"},
            "decoder": {"model_type": "gpt2"},
        },
        {"encoder.layers.0.attention.q_proj": (N, N), f"decoder.{C_PROJ}": (N, N)},
        {f"decoder.{C_PROJ}"},
    ),
    ({"model_type": "gpt_bigcode"}, {C_ATTN: (N, N + 4), C_PROJ: (N, N)}, set()),
    ({"model_type": "llama"}, {"q_proj": (N, N), "down_proj": (9, N)}, set()),
    # Of a kind that is not known, names and the flag agree.
    ({"model_type": "mine"}, {"q_proj": (N, N)}, set()),
]  # fmt: skip


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("config, shapes, turned", KINDS)
def test_square_weights_are_merged_as_the_kind_has_them(
    config: Any, shapes: Any, turned: set[str], flag: bool, tmp_path: Path
) -> None:
    if flag and config["model_type"] in ("mine", "llama"):
        pytest.skip("a file that PEFT does not write")
    rand = draw()
    weights = {
        f"{m}.weight": rand(*(s if m in turned else s[::-1])) for m, s in shapes.items()
    }
    base = write_model(tmp_path / "base", weights, **config)
    peft, deltas = linear_file(tmp_path / "peft", shapes, flag)
    found, _ = merged(tmp_path, base, peft)
    for module, delta in deltas.items():
        wanted = weights[f"{module}.weight"] + (delta.T if module in turned else delta)
        np.testing.assert_allclose(found[f"{module}.weight"], wanted, atol=1e-5)


UNKNOWN: list[tuple[dict[str, tuple[int, int]], set[str], bool]] = [
    ({C_PROJ: (N, N)}, set(), False),  # called as a Conv1D, and the flag says no
    ({"q_proj": (N, N)}, set(), True),  # and the other way round
    ({"q_proj": (N, N), C_ATTN: (N, 3 * N)}, {C_ATTN}, False),  # there are others
]


@pytest.mark.parametrize("config", [{}, {"model_type": "mine"}])
@pytest.mark.parametrize("shapes, turned, flag", UNKNOWN)
def test_square_weights_in_doubt_are_refused(
    shapes: Any, turned: set[str], flag: bool, config: Any, tmp_path: Path
) -> None:
    rand = draw()
    weights = {
        f"{m}.weight": rand(*(s if m in turned else s[::-1])) for m, s in shapes.items()
    }
    base = write_model(tmp_path / "base", weights, **config)
    peft, _ = linear_file(tmp_path / "peft", shapes, flag)
    square = next(m for m, s in shapes.items() if s[0] == s[1])
    with pytest.raises(jlora.UnsupportedFeatureError, match=rf"{square}.*model_type"):
        merged(tmp_path, base, peft)


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"q_proj.weight": draw()(N, N)})
    (base / "config.json").write_text("[]")
    peft, _ = linear_file(tmp_path / "peft", {"q_proj": (N, N)}, False)
    with pytest.raises(jlora.CorruptFileError, match=r"config\.json"):
        merged(tmp_path, base, peft)


def test_a_config_with_infinities_is_read(tmp_path: Path) -> None:
    """As those of Mamba are."""
    base = write_model(tmp_path / "base", {"q_proj.weight": draw()(N, N)})
    (base / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    peft, _ = linear_file(tmp_path / "peft", {"q_proj": (N, N)}, False)
    merged(tmp_path, base, peft)

"""Checkpoints with the names of old releases, and adapters with those of modules.

Names and layouts as transformers 5.24 and PEFT 0.21.2 write them; the sums are NumPy's.
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hub_files import RANK, SCALE, draw, factors, merged, write_adapter, write_model

import jlora
import jlora.peft

N, OUT, E, INNER = 6, 5, 3, 4
LAYER = "layers.0.self_attn.q_proj"
TEXT, TREE = f"language_model.model.{LAYER}", f"model.language_model.{LAYER}"
VISION = "encoder.layers.0.self_attn.q_proj"

# The kind, and modules on disk and in an adapter.
Pairs = list[tuple[str, str]]
OLD, NEW = "vit.encoder.layer.0", "vit.layers.0"
DINO, SWIN = "dinov2.encoder.layer.0", "swin.encoder.layers.0.blocks.0.attention"
TOWER, PROJ = "vision_tower", "multi_modal_projector.linear_1"
KINDS: list[tuple[str, Pairs]] = [
    *(
        (kind, [(TEXT, TREE), (f"{TOWER}.{VISION}", f"model.{TOWER}.{VISION}")])
        for kind in (
            "gemma3", "paligemma", "llava", "mistral3", "internvl", "aya_vision"
        )
    ),
    ("gemma3", [(f"{TOWER}.vision_model.{VISION}", f"model.{TOWER}.{VISION}")]),
    (
        "llava",
        [(f"{TOWER}.vision_model.{VISION}", f"model.{TOWER}.vision_model.{VISION}")],
    ),
    ("llava", [("language_model.lm_head", "lm_head"), (TEXT, TREE)]),
    ("llava", [(PROJ, f"model.{PROJ}")]),
    ("mllama", [(TEXT, TREE), ("vision_model.q_proj", "model.vision_model.q_proj")]),
    *(
        (kind, [(f"model.{LAYER}", TREE), (f"visual.{name}", f"model.visual.{name}")])
        for kind, name in (
            ("qwen2_vl", "blocks.0.mlp.fc1"), ("qwen2_5_vl", "blocks.0.attn.proj")
        )
    ),
    (
        "vit",
        [
            (f"{OLD}.attention.attention.query", f"{NEW}.attention.q_proj"),
            (f"{OLD}.attention.output.dense", f"{NEW}.attention.o_proj"),
            (f"{OLD}.intermediate.dense", f"{NEW}.mlp.fc1"),
            (f"{OLD}.output.dense", f"{NEW}.mlp.fc2"),
        ],
    ),
    (
        "deit",
        [("deit.encoder.layer.1.attention.attention.value",
          "deit.layers.1.attention.v_proj")],
    ),
    ("beit", [("beit.encoder.layer.1.output.dense", "beit.layers.1.mlp.fc2")]),
    (
        "dinov2",
        [
            (f"{DINO}.attention.attention.key", f"{DINO}.attention.k_proj"),
            (f"{DINO}.mlp.fc1", f"{DINO}.mlp.fc1"),
        ],
    ),
    ("swin", [(f"{SWIN}.self.query", f"{SWIN}.q_proj")]),
    ("gpt_neox", [("embed_out", "lm_head")]),
    ("mixtral", [("layers.0.block_sparse_moe.gate", "layers.0.mlp.gate")]),
    # Adapters of before the renames, and of the language model alone.
    ("gemma3", [(TEXT, TEXT)]),
    ("vit", [(f"{OLD}.output.dense", f"{OLD}.output.dense")]),
    ("gemma3", [(TEXT, f"model.{LAYER}")]),
    ("qwen2_vl", [(f"model.{LAYER}", f"model.{LAYER}")]),
    # And of a wrapper, for the language model alone.
    ("gemma3_text", [(f"model.{LAYER}", TREE), ("lm_head", "lm_head")]),
    ("llama", [(f"model.{LAYER}", TEXT), ("lm_head", "language_model.lm_head")]),
]  # fmt: skip


def linear(pairs: Pairs) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Any]:
    """The tensors on disk, those of an adapter, and the sums by names on disk."""
    rand = draw()
    disk, tensors, sums = {}, {}, {}
    for old, new in pairs:
        a, b = rand(RANK, N), rand(OUT, RANK)
        disk[f"{old}.weight"] = rand(OUT, N)
        tensors |= factors(new, a, b)
        sums[f"{old}.weight"] = disk[f"{old}.weight"] + SCALE * b @ a
    return disk, tensors, sums


def tails(pairs: Pairs) -> list[str]:
    return sorted({new.rpartition(".")[2] for _, new in pairs})


def check(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kind, pairs", KINDS)
def test_an_adapter_finds_its_modules_on_disk(
    kind: str, pairs: Pairs, shards: int, tmp_path: Path
) -> None:
    disk, tensors, sums = linear(pairs)
    disk["other.bias"] = draw(3)()  # no axes, and nobody's
    base = write_model(tmp_path / "base", disk, shards, model_type=kind)
    peft = write_adapter(tmp_path / "peft", tensors, target_modules=tails(pairs))
    found, _ = merged(tmp_path, base, peft)
    check(found, sums | {"other.bias": disk["other.bias"]})


def test_a_part_of_a_model_is_renamed_by_its_own_kind(tmp_path: Path) -> None:
    """A captioner: the text decoder keeps the names that its encoder has lost."""
    old = "encoder.layer.0.output.dense"
    pairs = [
        (f"encoder.{old}", "encoder.layers.0.mlp.fc2"),
        (f"decoder.bert.{old}",) * 2,
    ]
    disk, tensors, sums = linear(pairs)
    base = write_model(
        tmp_path / "base",
        disk,
        model_type="vision-encoder-decoder",
        encoder={"model_type": "vit"},
        decoder={"model_type": "bert"},
    )
    peft = write_adapter(tmp_path / "peft", tensors, target_modules=["fc2", "dense"])
    check(merged(tmp_path, base, peft)[0], sums)


# --- experts, apart on disk ---

MIXTRAL = ("block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3",
           "block_sparse_moe.experts.{e}.w2")  # fmt: skip
QWEN = tuple(f"mlp.experts.{{e}}.{n}_proj" for n in ("gate", "up", "down"))
PACKED = {
    "mixtral": MIXTRAL, "phimoe": MIXTRAL, "minimax_m2": MIXTRAL, "qwen2_moe": QWEN,
    "qwen3_moe": QWEN, "qwen3_5_moe": QWEN, "glm4_moe": QWEN, "deepseek_v3": QWEN,
    "olmoe": QWEN, "mine": QWEN,
}  # fmt: skip
WHERE = "model.layers.0."


def experts_on_disk(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    rand, shapes = draw(), ((INNER, N), (INNER, N), (N, INNER))
    return {
        f"{WHERE}{name.format(e=e)}.weight": rand(*shape)
        for e in range(E)
        for name, shape in zip(names, shapes, strict=True)
    }


def packed_file(place: Path, **config: Any) -> tuple[Path, np.ndarray, np.ndarray]:
    """An adapter of both parameters, and their deltas `(experts, out, in)`."""
    rand = draw(1)
    up = rand(E * RANK, N), rand(2 * INNER, RANK * E)
    down = rand(E * RANK, INNER), rand(N, RANK * E)
    deltas = [
        SCALE
        * np.einsum("ore,eri->eoi", b.reshape(-1, RANK, E), a.reshape(E, RANK, -1))
        for a, b in (up, down)
    ]
    owner = f"{WHERE}mlp.experts"
    said = {
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        **config,
    }
    tensors = factors(f"{owner}.base_layer", *up) | factors(owner, *down)
    return write_adapter(place, tensors, **said), deltas[0], deltas[1]


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_factors_are_merged_into_experts_apart(
    kind: str, shards: int, tmp_path: Path
) -> None:
    names = PACKED[kind]
    disk = experts_on_disk(names)
    base = write_model(tmp_path / "base", disk, shards, model_type=kind)
    peft, up, down = packed_file(tmp_path / "peft")
    wanted = dict(disk)
    for e in range(E):
        for name, delta in zip(
            names, (up[e, :INNER], up[e, INNER:], down[e]), strict=True
        ):
            wanted[f"{WHERE}{name.format(e=e)}.weight"] = (
                disk[f"{WHERE}{name.format(e=e)}.weight"] + delta
            )
    check(merged(tmp_path, base, peft)[0], wanted)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_that_were_adapted_apart_are_found(kind: str, tmp_path: Path) -> None:
    """As transformers 4 had them."""
    names, rand = PACKED[kind], draw(2)
    disk = experts_on_disk(names)
    base = write_model(tmp_path / "base", disk, model_type=kind)
    tensors, wanted = {}, dict(disk)
    for module in (name.removesuffix(".weight") for name in disk):
        out, fan_in = disk[f"{module}.weight"].shape
        a, b = rand(RANK, fan_in), rand(out, RANK)
        tensors |= factors(module, a, b)
        wanted[f"{module}.weight"] = disk[f"{module}.weight"] + SCALE * b @ a
    targets = sorted({name.rpartition(".")[2] for name in names})
    peft = write_adapter(tmp_path / "peft", tensors, target_modules=targets)
    check(merged(tmp_path, base, peft)[0], wanted)


REVERSED: list[tuple[str, Pairs]] = [
    ("vit", [("vit.layers.0.mlp.fc2", "vit.encoder.layer.0.output.dense")]),
    ("vit", [(f"{NEW}.attention.q_proj", f"{OLD}.attention.attention.query")]),
    ("gemma3", [(TREE, TEXT), ("lm_head", "language_model.lm_head")]),
    ("qwen2_vl", [("model.visual.blocks.0.attn.proj", "visual.blocks.0.attn.proj")]),
]


@pytest.mark.parametrize("kind, pairs", REVERSED)
def test_an_old_adapter_finds_modules_that_have_new_names_on_disk(
    kind: str, pairs: Pairs, tmp_path: Path
) -> None:
    disk, tensors, sums = linear(pairs)
    base = write_model(tmp_path / "base", disk, model_type=kind)
    peft = write_adapter(tmp_path / "peft", tensors, target_modules=tails(pairs))
    check(merged(tmp_path, base, peft)[0], sums)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_that_were_adapted_apart_are_found_in_a_pack(
    kind: str, tmp_path: Path
) -> None:
    rand, owner = draw(), f"{WHERE}mlp.experts"
    disk = {
        f"{owner}.gate_up_proj": rand(E, 2 * INNER, N),
        f"{owner}.down_proj": rand(E, N, INNER),
    }
    base = write_model(tmp_path / "base", disk, model_type=kind)
    tensors, wanted = {}, {name: np.array(value) for name, value in disk.items()}
    names = PACKED[kind]
    parts = (("gate_up_proj", slice(0, INNER)), ("gate_up_proj", slice(INNER, None)),
             ("down_proj", slice(None)))  # fmt: skip
    for e in (0, 2):
        for name, (parameter, rows) in zip(names, parts, strict=True):
            part = wanted[f"{owner}.{parameter}"][e, rows]
            a, b = rand(RANK, part.shape[1]), rand(part.shape[0], RANK)
            tensors |= factors(f"{WHERE}{name.format(e=e)}", a, b)
            part += SCALE * b @ a
    targets = sorted({name.rpartition(".")[2] for name in names})
    peft = write_adapter(tmp_path / "peft", tensors, target_modules=targets)
    check(merged(tmp_path, base, peft)[0], wanted)


@pytest.mark.parametrize("missing", [0, E - 1])
def test_experts_of_which_some_are_missing_are_no_pack(
    missing: int, tmp_path: Path
) -> None:
    disk = {
        n: t for n, t in experts_on_disk(QWEN).items() if f"experts.{missing}." not in n
    }
    base = write_model(tmp_path / "base", disk, model_type="qwen3_moe")
    peft, *_ = packed_file(tmp_path / "peft")
    with pytest.raises(jlora.AdapterError):
        merged(tmp_path, base, peft)


def test_a_module_that_was_split_is_found_in_its_halves(tmp_path: Path) -> None:
    """The gated layer of DINOv2: one tensor on disk, two modules."""
    rand, where = draw(), "dinov2.encoder.layer.0.mlp"
    disk = {
        f"{where}.weights_in.weight": rand(8, N),
        f"{where}.weights_in.bias": rand(8),
    }
    base = write_model(tmp_path / "base", disk, model_type="dinov2")
    sides = {name: (rand(RANK, N), rand(4, RANK)) for name in ("gate_proj", "up_proj")}
    tensors = {}
    for name, (a, b) in sides.items():
        tensors |= factors(f"{where}.{name}", a, b)
    peft = write_adapter(tmp_path / "peft", tensors, target_modules=[*sides])
    delta = np.concatenate([SCALE * b @ a for a, b in sides.values()])
    wanted = disk | {
        f"{where}.weights_in.weight": disk[f"{where}.weights_in.weight"] + delta
    }
    check(merged(tmp_path, base, peft)[0], wanted)


# --- modules that are left out ---


def test_modules_are_left_out_on_request(tmp_path: Path) -> None:
    pairs = [(TEXT, TREE), (f"vision_tower.{VISION}", f"model.vision_tower.{VISION}")]
    disk, tensors, sums = linear(pairs)
    base = write_model(tmp_path / "base", disk, model_type="gemma3")
    peft = write_adapter(tmp_path / "peft", tensors, target_modules=["q_proj"])
    vision = f"vision_tower.{VISION}.weight"
    found, _ = merged(tmp_path, base, peft, leave_out=["vision_tower"])
    check(found, sums | {vision: disk[vision]})
    # And for params of the language model alone.
    kernel = jnp.asarray(disk[f"{TEXT}.weight"].T)
    params = {"layers": {"0": {"self_attn": {"q_proj": {"kernel": kernel}}}}}
    rules = jlora.peft.names("gemma3", prefix="model.language_model")
    with pytest.raises(jlora.AdapterError, match="vision_tower"):
        jlora.peft.load(peft, params, rules)
    _, adapter = jlora.peft.load(peft, params, rules, leave_out=["model.vision_tower"])
    new = jlora.merge(params, adapter)["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_allclose(new, sums[f"{TEXT}.weight"].T, atol=1e-5)


@pytest.mark.parametrize("leave_out", [["tower"], ["vision_tower", "audio_tower"]])
def test_what_is_left_out_must_be_there(leave_out: list[str], tmp_path: Path) -> None:
    disk, tensors, _ = linear([(f"vision_tower.{VISION}", f"vision_tower.{VISION}")])
    base = write_model(tmp_path / "base", disk, model_type="gemma3")
    peft = write_adapter(tmp_path / "peft", tensors, target_modules=["q_proj"])
    with pytest.raises(jlora.AdapterError, match=f"{leave_out[-1]}.*leave_out"):
        merged(tmp_path, base, peft, leave_out=leave_out)


@pytest.mark.parametrize("leave_out", ["vision_tower", [""]])
def test_what_is_left_out_is_a_list_of_names(leave_out: Any, tmp_path: Path) -> None:
    _, tensors, _ = linear([(TEXT, TEXT)])
    peft = write_adapter(tmp_path / "peft", tensors, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="leave_out"):
        jlora.peft.load(peft, {"a": {"kernel": jnp.ones((2, 3))}}, leave_out=leave_out)


# --- prefixes ---


@pytest.mark.parametrize(
    "family, prefix, inside, head",
    [
        ("gemma3", "model.language_model", "model.language_model.", "lm_head"),
        ("gemma3", "model.language_model.", "model.language_model.", "lm_head"),
        (
            "llama",
            "language_model.model",
            "language_model.model.",
            "language_model.lm_head",
        ),
        ("llama", "model", "model.", "lm_head"),
        ("gpt2", "decoder.transformer", "decoder.transformer.", "decoder.lm_head"),
    ],
)
def test_a_family_is_found_within_a_model(
    family: str, prefix: str, inside: str, head: str
) -> None:
    plain = jlora.peft.names(family)
    moved = jlora.peft.names(family, prefix=prefix)
    root = "transformer." if family == "gpt2" else "model."
    several = lambda rule: (
        [rule.module] if isinstance(rule.module, str) else [*rule.module]
    )
    for old, new in zip(plain, moved, strict=True):
        assert (old.path, old.transform) == (new.path, new.transform)
        for one, other in zip(several(old), several(new), strict=True):
            outside = head if one == "lm_head" else one
            wanted = f"{inside}{one.removeprefix(root)}"
            assert other == (wanted if one.startswith(root) else outside)


def test_rules_of_ones_own_take_a_prefix() -> None:
    rules = [
        ("q", "q_proj"),
        jlora.peft.Rule("e", ("a", "b=3"), "embedding+tied(head)"),
    ]
    found = jlora.peft.names(rules, prefix="model.text.")
    assert found == [
        jlora.peft.Rule("q", "model.text.q_proj"),
        jlora.peft.Rule(
            "e", ("model.text.a", "model.text.b=3"), "embedding+tied(model.text.head)"
        ),
    ]
    assert jlora.peft.names(rules) == [jlora.peft.Rule("q", "q_proj"), rules[1]]

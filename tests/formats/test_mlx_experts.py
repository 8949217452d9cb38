"""Experts of MLX's adapters, merged into models as torch keeps them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_files import write_model
from paths import DATA
from safetensors.numpy import load_file, save_file

import jlora
import jlora.weights

E, H, RANK, SCALE = 3, 12, 2, 2.5
PARTS = ("gate_proj", "up_proj", "down_proj")
APART = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
LAYER = "model.layers.0"

# By kind: what MLX calls the experts of a layer, and what torch does.
KINDS = {
    "mixtral": ("block_sparse_moe.switch_mlp", "block_sparse_moe.experts", "apart w"),
    "phimoe": ("block_sparse_moe.switch_mlp", "block_sparse_moe.experts", "apart w"),
    "qwen3_moe": ("mlp.switch_mlp", "mlp.experts", "apart"),
    "deepseek_v3": ("mlp.switch_mlp", "mlp.experts", "apart"),
    "qwen3_5_moe_text": ("mlp.switch_mlp", "mlp.experts", "packed"),
    "granitemoe": ("block_sparse_moe.switch_mlp", "block_sparse_moe", "linear"),
    "llama4_text": ("feed_forward.experts", "feed_forward.experts", "turned"),
    "gemma4_text": ("experts.switch_glu", "experts", "packed"),
    "gpt_oss": ("mlp.experts", "mlp.experts", "alternating"),
}


def torch_weights(kind: str, each: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors on disk, of the parts `(experts, out, in)`."""
    _, own, how = KINDS[kind]
    owner = f"{LAYER}.{own}"
    gate, up, down = (each[part] for part in PARTS)
    if how.startswith("apart"):
        names = APART if how.endswith("w") else dict(zip(PARTS, PARTS, strict=True))
        return {
            f"{owner}.{e}.{names[part]}.weight": each[part][e]
            for part in each
            for e in range(E)
        }
    both = np.concatenate([gate, up], axis=1)
    if how == "linear":
        names = ("input_linear.weight", "output_linear.weight")
        return {f"{owner}.{n}": t for n, t in zip(names, (both, down), strict=True)}
    if how == "alternating":
        both = np.stack([gate, up], axis=2).reshape(both.shape)
    if how != "packed":
        both, down = both.swapaxes(1, 2), down.swapaxes(1, 2)
    return {f"{owner}.gate_up_proj": both, f"{owner}.down_proj": down}


def adapter(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A folder as mlx-lm writes it."""
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    said = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": said}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def made(kind: str, width: int, parts: Any, place: Path) -> tuple[Path, Path, Any]:
    """A base, an adapter of some of its parts, and what the weights become."""
    rand = lambda *shape: np.float32(
        np.random.default_rng(sum(shape)).normal(size=shape)
    )
    shapes = dict.fromkeys(PARTS, (E, width, H)) | {"down_proj": (E, H, width)}
    old = {part: rand(*shape) for part, shape in shapes.items()}
    new, tensors = dict(old), {}
    for part in parts:
        a, b = rand(E, RANK, shapes[part][2]), rand(E, shapes[part][1], RANK)
        name = f"{LAYER}.{KINDS[kind][0]}.{part}"
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        new[part] = old[part] + SCALE * b @ a
    q, q_a, q_b = rand(H, H), rand(H, RANK), rand(RANK, H)
    name = f"{LAYER}.self_attn.q_proj"
    tensors |= {f"{name}.lora_a": q_a, f"{name}.lora_b": q_b}
    base = {**torch_weights(kind, old), f"{name}.weight": q}
    wanted = torch_weights(kind, new) | {f"{name}.weight": q + SCALE * (q_a @ q_b).T}
    plain = {n: np.ascontiguousarray(t) for n, t in base.items()}
    model = write_model(place / "base", plain, model_type=kind)
    return model, adapter(place / "mlx", tensors), wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [10, H])
@pytest.mark.parametrize("parts", [PARTS, PARTS[1:2]])
def test_experts_are_merged_under_torchs_names(
    kind: str, width: int, parts: Any, tmp_path: Path
) -> None:
    base, mlx, wanted = made(kind, width, parts, tmp_path)
    jlora.weights.merge_folder(base, mlx, tmp_path / "out")
    found = dict(jlora.weights.open_weights(tmp_path / "out"))
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-4, err_msg=name)


def test_a_merge_is_that_of_mlx(tmp_path: Path) -> None:
    """With what mlx-lm fuses of a Mixtral, whose experts torch has apart."""
    case = DATA / "mlx" / "experts"
    base, fused = (load_file(case / f"{n}.safetensors") for n in ("base", "fused"))

    def as_torch(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        plain = {n: t for n, t in weights.items() if "switch_mlp" not in n}
        owner = f"{LAYER}.block_sparse_moe.switch_mlp"
        each = {part: weights[f"{owner}.{part}.weight"] for part in PARTS}
        return plain | torch_weights("mixtral", each)

    del fused["logits"]
    config = json.loads((case / "config.json").read_text())
    model = write_model(tmp_path / "base", as_torch(base), **config)
    jlora.weights.merge_folder(model, case, tmp_path / "out")
    found = dict(jlora.weights.open_weights(tmp_path / "out"))
    wanted = as_torch(fused)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name], tensor, 1e-4, 1e-5, err_msg=name)


def test_experts_of_a_kind_whose_layout_is_not_known_are_refused(
    tmp_path: Path,
) -> None:
    base, mlx, _ = made("llama4_text", H, PARTS, tmp_path)
    (base / "config.json").write_text(json.dumps({"model_type": "of_tomorrow"}))
    with pytest.raises(jlora.AdapterError, match=r"experts\.0\.gate_proj"):
        jlora.weights.merge_folder(base, mlx, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_under_names_that_are_not_known_are_refused(tmp_path: Path) -> None:
    base, mlx, _ = made("mixtral", 10, PARTS, tmp_path)
    weights = mlx / "adapters.safetensors"
    save_file(
        {n.replace("switch_mlp", "pool"): t for n, t in load_file(weights).items()},
        weights,
    )
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"pool.*switch_mlp"):
        jlora.weights.merge_folder(base, mlx, tmp_path / "out")

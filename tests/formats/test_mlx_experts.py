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
import jlora.peft
import jlora.weights
from jlora._formats import mlx as formats_mlx

E, H, RANK, SCALE = 3, 12, 2, 2.5
PARTS = ("gate_proj", "up_proj", "down_proj")
APART = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"

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


def mlx_weights(kind: str, each: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors as MLX saves them, of the parts `(experts, out, in)`."""
    return {f"{LAYER}.{KINDS[kind][0]}.{part}.weight": t for part, t in each.items()}


def made(
    kind: str, width: int, parts: Any, place: Path, on_disk: Any = torch_weights
) -> tuple[Path, Path, Any]:
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
    base = {**on_disk(kind, old), f"{name}.weight": q}
    wanted = on_disk(kind, new) | {f"{name}.weight": q + SCALE * (q_a @ q_b).T}
    plain = {n: np.ascontiguousarray(t) for n, t in base.items()}
    model = write_model(place / "base", plain, model_type=kind)
    return model, adapter(place / "mlx", tensors), wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [10, H])
@pytest.mark.parametrize("parts", [PARTS, PARTS[1:2]])
@pytest.mark.parametrize("on_disk", [torch_weights, mlx_weights])
def test_experts_are_merged_under_the_names_of_the_base(
    kind: str, width: int, parts: Any, on_disk: Any, tmp_path: Path
) -> None:
    base, mlx, wanted = made(kind, width, parts, tmp_path, on_disk)
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


# --- in a base that MLX saved ---


def altered_base(base: Path, change: Any) -> None:
    """Replaces the tensors of experts."""
    file = base / "model.safetensors"
    tensors = {n: change(t) if t.ndim == 3 else t for n, t in load_file(file).items()}
    save_file(tensors, file)


def test_experts_under_any_names_are_merged_into_a_base_that_has_them(
    tmp_path: Path,
) -> None:
    base, mlx, wanted = made("mixtral", 10, PARTS, tmp_path, mlx_weights)
    renamed = lambda names: {n.replace("switch_mlp", "pool"): t for n, t in names}
    for file in (base / "model.safetensors", mlx / "adapters.safetensors"):
        save_file(renamed(load_file(file).items()), file)
    jlora.weights.merge_folder(base, mlx, tmp_path / "out")
    found = dict(jlora.weights.open_weights(tmp_path / "out"))
    for name, tensor in renamed(wanted.items()).items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: np.zeros(t.shape, np.uint32), r"quantised '.*up_proj\.0\.weight'"),
        (lambda t: t[:2], r"up_proj\.2"),
        (lambda t: t[:, :, 1:].copy(), r"maps 11 to 10.*12 to 10"),
    ],
)
def test_experts_that_do_not_fit_are_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    base, mlx, _ = made("qwen3_moe", 10, PARTS[1:2], tmp_path, mlx_weights)
    altered_base(base, change)
    with pytest.raises(jlora.AdapterError, match=message):
        jlora.weights.merge_folder(base, mlx, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- in params ---

CASE = DATA / "mlx" / "experts"
OWNER = f"{LAYER}.block_sparse_moe.switch_mlp"


def fused(name: str) -> np.ndarray:
    return load_file(CASE / "fused.safetensors")[f"{name}.weight"]


def test_experts_are_placed_in_params_that_have_their_names(tmp_path: Path) -> None:
    """With a base of MLX's, and what mlx-lm fuses."""
    base = jlora.weights.open_weights(CASE / "base.safetensors")
    paths = {f"params/{n.replace('.', '/')}/kernel": n for n in (f"{OWNER}.up_proj", Q)}
    params = {p: base[f"{name}.weight"].swapaxes(-1, -2) for p, name in paths.items()}
    shapes = {path: kernel.shape for path, kernel in params.items()}
    configs, adapter = formats_mlx.read(CASE, params=shapes)
    assert list(adapter) == list(shapes)
    merged = jlora.merge(params, adapter)
    for path, name in paths.items():
        wanted = fused(name).swapaxes(-1, -2)
        assert np.abs(wanted - params[path]).max() > 0.1
        np.testing.assert_allclose(merged[path], wanted, 1e-4, 1e-5)
    formats_mlx.write(tmp_path, adapter, configs)
    one, other = (load_file(f / "adapters.safetensors") for f in (CASE, tmp_path))
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])


def test_experts_of_a_stack_of_layers_are_placed(tmp_path: Path) -> None:
    """A rule of one's own loads the base of MLX into such a stack, too."""
    rng = np.random.default_rng(0)
    kernels = np.float32(rng.normal(size=(2, E, H, 5)))
    names = [f"layers.{i}.experts.up_proj" for i in range(2)]
    tensors, deltas = {}, []
    for name in names:
        a = np.float32(rng.normal(size=(E, RANK, H)))
        b = np.float32(rng.normal(size=(E, 5, RANK)))
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        deltas.append(SCALE * (b @ a).swapaxes(1, 2))
    folder = adapter(tmp_path / "mlx", tensors)
    torch = {
        f"{n}.weight": k.swapaxes(1, 2) for n, k in zip(names, kernels, strict=True)
    }
    rule = ("params/layers/up", "layers.{i}.experts.up_proj.weight", "experts")
    shapes = {"params": {"layers": {"up": {"kernel": kernels}}}}
    params = jlora.peft.params_from_torch(torch, shapes, [rule])
    np.testing.assert_array_equal(params["params"]["layers"]["up"]["kernel"], kernels)
    paths = {f"params/{n.replace('.', '/')}/kernel": (E, H, 5) for n in names}
    _, found = formats_mlx.read(folder, params=paths)
    for path, delta in zip(paths, deltas, strict=True):
        np.testing.assert_allclose(jlora.delta(found[path]), delta, 1e-5, 1e-5)


@pytest.mark.parametrize("shape", [(12, 10), (2, 12, 10), (3, 10, 12), (3, 2, 5, 10)])
def test_params_that_have_no_place_for_the_experts_are_refused(shape: Any) -> None:
    shapes = {f"params/{n.replace('.', '/')}/kernel": (12, 12) for n in (Q,)}
    shapes[f"params/{OWNER.replace('.', '/')}/up_proj/kernel"] = shape
    with pytest.raises(jlora.AdapterError, match="up_proj"):
        formats_mlx.read(CASE, params=shapes)

"""Folders of models and adapters as transformers and PEFT lay them out, small."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

import jlora.weights

Tensors = dict[str, np.ndarray]
RANK, ALPHA = 2, 6
SCALE = ALPHA / RANK
PEFT = {
    "alpha_pattern": {}, "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "lora_alpha": ALPHA,
    "lora_dropout": 0.0,
    "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2", "r": RANK,
    "rank_pattern": {}, "target_modules": None, "target_parameters": None,
    "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
}  # fmt: skip


def draw(seed: int = 0) -> Any:
    """Returns a function from a shape to values."""
    normal = np.random.default_rng(seed).normal
    return lambda *shape: normal(size=shape).astype(np.float32)


def write_model(folder: Path, tensors: Tensors, shards: int = 1, **config: Any) -> Path:
    """Writes a model, of one file or of some with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    homes: dict[str, str] = {}
    for number in range(shards):
        own = dict([*tensors.items()][number::shards])
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(own, folder / name, metadata={"format": "pt"})
        homes |= dict.fromkeys(own, name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """Writes an adapter; a field that is given as `...` is left out."""
    folder.mkdir(parents=True)
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    plain = {name: np.ascontiguousarray(tensor) for name, tensor in named.items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {k: v for k, v in {**PEFT, **config}.items() if v is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def factors(module: str, a: np.ndarray, b: np.ndarray) -> Tensors:
    """The factors of a module under PEFT's keys: `(rank, in)` and `(out, rank)`."""
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def merged(place: Path, base: Path, peft: Path, **options: Any) -> tuple[Tensors, Any]:
    """The tensors and the config that jlora's merge writes."""
    out = place / "merged"
    jlora.weights.merge_folder(base, peft, out, **options)
    tensors: Tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors, json.loads((out / "config.json").read_text())

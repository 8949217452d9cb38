"""Which rows of a model llama.cpp has in another order than Hugging Face."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .._errors import AdapterError
from .modules import TorchModule

# Architectures whose weights llama.cpp's converter keeps as they are but for the rows
# of queries and keys, with whether it reorders these: features 2i and 2i + 1 of a head
# are a pair of its rotary embedding, and i and i + d/2 are one at Hugging Face.
PERMUTED = {"llama": True, "granite": True, "smollm3": True}
PERMUTED |= dict.fromkeys(("qwen2", "qwen3", "gemma", "gemma2", "gemma3"), False)
# What `config.json` calls others of them.
_TYPES = {"mistral": "llama", "gemma3_text": "gemma3"}
_ROTATED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a `config.json` says of the language model."""
    own = config.get("text_config")
    return {**config, **own} if isinstance(own, Mapping) else dict(config)


def architecture_of(config: Mapping[str, Any]) -> str:
    """Returns the architecture that llama.cpp makes of a model.

    Example:
        >>> architecture_of({"model_type": "mistral"})
        'llama'
    """
    kind = str(config.get("model_type"))
    return _TYPES.get(kind, kind)


def is_rotated(name: str, architecture: str) -> bool:
    """Returns whether the outputs of a module are in another order in llama.cpp."""
    return PERMUTED[architecture] and name.rpartition(".")[2] in _ROTATED


def reordered(
    module: TorchModule,
    architecture: str,
    config: Mapping[str, Any] | None,
    of: Callable[[np.ndarray], np.ndarray],
) -> TorchModule:
    """Returns a module whose outputs are in another order, if it is one of those.

    Args:
        module: the module.
        architecture: llama.cpp's name of the model.
        config: what that of the base says of heads; without it nothing is done.
        of: what to make of the order, which says where llama.cpp's rows are in torch's.

    Raises:
        AdapterError: if the heads do not divide the outputs.
    """
    if config is None or not is_rotated(module.name, architecture):
        return module
    field, outputs = _ROTATED[module.name.rpartition(".")[2]], module.b.shape[1]
    count = config.get(field) or config.get("num_attention_heads")
    if not isinstance(count, int) or count < 1 or outputs % (2 * count):
        raise AdapterError(
            f"{module.name!r} has {outputs} outputs, and the config of the base says "
            f"`{field}` {str(count)[:50]}, which does not make heads of an even size"
        )
    order = np.arange(outputs).reshape(count, 2, -1).swapaxes(1, 2).ravel()
    return dataclasses.replace(module, b=module.b[:, of(order)])

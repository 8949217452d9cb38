"""What every reader of pretrained weights gives back."""

import dataclasses
from collections.abc import Callable, Collection

import numpy as np
from llama import LlamaConfig
from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as Hugging Face would name and lay it out, whatever its format.

    `names` are those of the tensors, without `.weight`; `weight(name)` reads one as
    float32, linear maps as (out, in), with rotary features in halves.
    """

    config: LlamaConfig
    names: Collection[str]
    weight: Callable[[str], np.ndarray]
    tokenizer: Tokenizer

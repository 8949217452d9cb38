"""A Llama as an encoder of texts: its first layers, the mean of what they return."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from llama import Llama
from pretrained import Pretrained
from tokenizers import Tokenizer

INPUT_AXES = {"o_proj": 2}  # of its kernel: heads and their features; 1 of all others


class Texts(NamedTuple):
    """Rows of tokens, each padded on the right; `real` says which are no padding."""

    tokens: np.ndarray
    real: np.ndarray


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Texts:
    """Returns the first `length` tokens of each text."""
    rows = [tokenizer.encode(text).ids[:length] for text in texts]
    found = Texts(
        np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    )
    for i, row in enumerate(rows):
        found.tokens[i, : len(row)] = row
        found.real[i, : len(row)] = True
    return found


def first_layers(base: Pretrained, layers: int) -> Pretrained:
    """Returns the model without the layers behind the first ones."""
    config = base.model.config
    if not 1 <= layers <= config.layers:
        raise ValueError(f"`--layers` must be 1 to {config.layers}, got {layers}")
    params = dict(base.variables["params"])
    params["blocks"] = jax.tree.map(lambda leaf: leaf[:layers], params["blocks"])
    model = Llama(dataclasses.replace(config, layers=layers))
    return dataclasses.replace(base, model=model, variables={"params": params})


def make_encode(model: Llama) -> Callable[[Any, Texts], jax.Array]:
    """Returns `encode(variables, texts)`: (rows, hidden), the mean of the last outputs.

    The logits are not used, so that nothing of the head is computed under `jax.jit`.
    """

    def encode(variables: Any, texts: Texts) -> jax.Array:
        time = texts.tokens.shape[1]
        mask = jnp.tril(jnp.ones((1, time, time), bool)) & texts.real[:, None, :]
        _, found = model.apply(
            variables,
            texts.tokens,
            mask=mask,
            capture_intermediates=lambda module, _: module.name == "norm",
            mutable=["intermediates"],
        )
        (outputs,) = found["intermediates"]["norm"]["__call__"]
        weights = (texts.real / texts.real.sum(1, keepdims=True))[..., None]
        return jnp.sum(outputs * weights, axis=1)

    return encode


def with_biases(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `apply` with a bias after each module whose params have one.

    A Llama has no biases and BERT has them everywhere; `new_biases` makes them.
    """

    def fn(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(_add_bias):
            return apply(*args, **kwargs)

    return fn


def _add_bias(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    out, module = call(*args, **kwargs), context.module
    if context.method_name != "__call__" or not module.has_variable("params", "bias"):
        return out
    bias = module.get_variable("params", "bias").astype(out.dtype)
    return out + jnp.expand_dims(bias, range(out.ndim - bias.ndim))


def new_biases(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the params with zero biases beside the kernels and scales of all layers.

    They belong to a scanned model, whose leaves begin with the axis of layers.
    """

    def grown(node: Any, name: str) -> Any:
        if not isinstance(node, dict):
            return node
        node = {key: grown(value, key) for key, value in node.items()}
        if "kernel" in node:
            layers, *rest = node["kernel"].shape
            node["bias"] = jnp.zeros((layers, *rest[INPUT_AXES.get(name, 1) :]))
        elif "scale" in node:
            node["bias"] = jnp.zeros_like(node["scale"])
        return node

    return {**params, "blocks": grown(params["blocks"], "blocks")}

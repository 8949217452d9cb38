"""Two other methods that are trained beside an adapter: prefixes and bottlenecks.

Neither changes the model's code. A prefix is a cache that is trained instead of being
computed; a bottleneck is a function of what a module returns, and finds its values
among those of the module, so that a scan over layers gives each layer its own.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from llama import KVCache, LlamaConfig, empty_cache
from pretrained import Pretrained

import jlora

Tree = dict[str, Any]
PLACES = ("attention", "mlp")  # modules of a layer whose outputs go through one


def new_bottleneck(key: jax.Array, config: LlamaConfig, width: int) -> Tree:
    """Returns the values of all bottlenecks; `up` is zero, so that nothing changes."""
    shape = (config.layers, config.hidden, width)
    keys = jax.random.split(key, len(PLACES))
    return {
        place: {
            "down": jax.random.normal(k, shape) / np.sqrt(config.hidden),
            "up": jnp.zeros((config.layers, width, config.hidden)),
        }
        for place, k in zip(PLACES, keys, strict=True)
    }


def with_bottlenecks(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn(variables, bottleneck, ...)`, which is `apply(variables, ...)`.

    The output y of each module in `PLACES` becomes y + gelu(y·down)·up before it is
    added to the residual stream; no values, `{}`, leave the model as it is. The base is
    an argument of its own, so that LoRA's targets are paths of the base alone.

    References:
        Houlsby et al., Parameter-Efficient Transfer Learning for NLP
        <https://arxiv.org/abs/1902.00751>, 2019, section 2.1.
    """

    def fn(variables: Any, bottleneck: Tree, *args: Any, **kwargs: Any) -> Any:
        blocks = dict(variables["params"].get("blocks", {}))
        if bottleneck and not blocks:
            raise ValueError("bottlenecks go into `params/blocks`: give scan=True")
        for place, values in bottleneck.items():
            blocks[place] = {**blocks[place], "bottleneck": values}
        params = {**variables["params"], "blocks": blocks}
        with nn.intercept_methods(_after):
            return apply({**variables, "params": params}, *args, **kwargs)

    return fn


def _after(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Returns what a method returns, through the bottleneck of its module if any."""
    out, module = call(*args, **kwargs), context.module
    if context.method_name != "__call__":
        return out
    if not module.has_variable("params", "bottleneck"):
        return out
    values = module.get_variable("params", "bottleneck")
    y, *rest = out if isinstance(out, tuple) else (out,)
    down, up = (values[name].astype(y.dtype) for name in ("down", "up"))
    y = y + nn.gelu(y @ down) @ up
    return (y, *rest) if isinstance(out, tuple) else y


def new_prompt(base: Pretrained, text: str, length: int) -> Tree:
    """Returns a prefix: keys and values that each layer computes for `text`.

    A text too short is repeated. They are values of the cache, which is to say that the
    keys are turned by their positions already.

    References:
        Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation
        <https://arxiv.org/abs/2101.00190>, 2021; section 7.4 on starting from words.
    """
    cache = empty_cache(base.model.config, 1, length)
    if length:
        tokens = np.resize(base.tokenizer.encode(text).ids, (1, length))
        at = jnp.zeros((1, 1), jnp.int32)
        _, cache = base.model.apply(base.variables, tokens, at=at, cache=cache)
    return {"keys": cache.keys, "values": cache.values}


def as_cache(prompt: Tree, rows: int, time: int) -> KVCache:
    """Returns the cache of `rows` that have read the prefix, with room for `time`."""

    def with_room(v: jax.Array) -> jax.Array:
        rest = v.shape[2:]
        room = jnp.zeros((v.shape[0], rows, time, *rest[1:]), v.dtype)
        return jnp.concatenate([v.repeat(rows, axis=1), room], axis=2)

    keys, values = with_room(prompt["keys"]), with_room(prompt["values"])
    return KVCache(keys, values, jnp.array(prompt["keys"].shape[2], jnp.int32))


def make_apply(lora: jlora.Lora, config: LlamaConfig) -> Callable[..., jax.Array]:
    """Returns `apply(variables, trained, tokens, mask=, at=)` of all that is trained.

    `lora` is that of a function made by `with_bottlenecks`. `trained` has the trees
    "lora", "prompt" and "bottleneck", or some of them.
    """

    def apply(
        variables: Any, trained: Tree, tokens: Any, *, mask: jax.Array, at: Any
    ) -> jax.Array:
        cache = empty_cache(config, 1, 0)
        prompt = trained.get("prompt", {"keys": cache.keys, "values": cache.values})
        seen = jnp.ones((*tokens.shape, prompt["keys"].shape[2]), bool)
        logits, _ = lora.apply(
            variables,
            trained.get("lora", {}),
            trained.get("bottleneck", {}),
            tokens,
            mask=jnp.concatenate([seen, mask], axis=-1),  # all see the prefix
            at=at,
            cache=as_cache(prompt, *tokens.shape),
        )
        return logits

    return apply

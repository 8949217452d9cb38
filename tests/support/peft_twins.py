"""The JAX twins of the torch models that PEFT's golden fixtures were made with.

Each is a plain function of a params tree under Flax's names, with the rules that map
these names to torch's.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from peft_twin import (
    Bias,
    Conv,
    Dense,
    Experts,
    Names,
    Parameter,
    Plain,
    Stacked,
    Table,
    Tree,
    Twin,
    affine,
    attend,
    biased,
)
from peft_twins_transformers import transformer_twins

# MLP: the names are torch's, without a rule.


def mlp(variables: Tree, x: jax.Array) -> jax.Array:
    """Two linear maps and a head."""
    params = variables["params"]
    for name in ("lin0", "lin1"):
        x = jnp.tanh(affine(params[name], x))
    return affine(params["head"], x)


MLP = {
    **biased("params/lin0", "lin0"),
    **biased("params/lin1", "lin1"),
    **biased("params/head", "head"),
}


# Layers, numbered as torch numbers them or stacked for a scan.


def _layer(params: Tree, x: jax.Array) -> jax.Array:
    return x + affine(params["down"], jnp.tanh(affine(params["up"], x)))


def layers(variables: Tree, x: jax.Array) -> jax.Array:
    """Three layers one after the other, and a head."""
    params = variables["params"]
    for i in range(3):
        x = _layer(params["model"]["layers"][str(i)], x)
    return affine(params["head"], x)


def scanned(variables: Tree, x: jax.Array) -> jax.Array:
    """The same as a scan over stacked layers."""
    params = variables["params"]
    x, _ = jax.lax.scan(lambda h, p: (_layer(p, h), None), x, params["stack"])
    return affine(params["head"], x)


def _numbered_leaves() -> dict[str, Any]:
    leaves = biased("params/head", "head")
    for i in range(3):
        path, module = f"params/model/layers/{i}", f"model.layers.{i}"
        leaves |= biased(f"{path}/up", f"{module}.up")
        leaves[f"{path}/down/kernel"] = Dense(f"{module}.down")
    return leaves


def stacked(path: str, make: Callable[[str], Any], template: str, n: int) -> Tree:
    """Returns the leaf of a stack, made by `make` of the module of each layer."""
    return {path: Stacked(tuple(make(template.format(layer=i)) for i in range(n)))}


_LAYER = "model.layers.{layer}"
NUMBERED = _numbered_leaves()
SCANNED = {
    **stacked("params/stack/up/kernel", Dense, f"{_LAYER}.up", 3),
    **stacked("params/stack/up/bias", Plain, f"{_LAYER}.up.bias", 3),
    **stacked("params/stack/down/kernel", Dense, f"{_LAYER}.down", 3),
    **biased("params/head", "head"),
}
SCANNED_NAMES: Names = [
    (r"params/stack/(?P<name>up|down)", "model.layers.{layer}.{name}"),
    (r"params/head", "head"),
]


# Convolutions, channels last.


def convolution(
    features: int, window: tuple[int, ...], **options: Any
) -> Callable[[Tree, jax.Array], jax.Array]:
    """Returns a convolution, the mean over what it slides over, and a head."""

    def fn(variables: Tree, x: jax.Array) -> jax.Array:
        params = variables["params"]
        conv = nn.Conv(features, window, **options)
        y = jnp.tanh(conv.apply({"params": params["conv"]}, jnp.moveaxis(x, 1, -1)))
        return affine(params["head"], y.mean(tuple(range(1, y.ndim - 1))))

    return fn


CONV = {**biased("params/conv", "conv", Conv("conv")), **biased("params/head", "head")}
CONV_NAMES: Names = [(r"params/conv", "conv", "conv"), (r"params/head", "head")]


# Embeddings.


def embedded(variables: Tree, tokens: jax.Array) -> jax.Array:
    """A table of embeddings and a head."""
    params = variables["params"]
    x = nn.Embed(17, 6).apply({"params": params["embed"]}, tokens)
    return affine(params["head"], jnp.tanh(x))


EMBEDDED = {
    "params/embed/embedding": Table("embed"),
    **biased("params/head", "head"),
}


# torch's MultiheadAttention, with its query, key and value apart.


def attention(variables: Tree, x: jax.Array) -> jax.Array:
    """Self-attention of three heads."""
    params = variables["params"]["attn"]
    q, k, v = (affine(params[name], x) for name in ("query", "key", "value"))
    return affine(params["out"], attend(q, k, v), 2)


def _attention_leaves() -> dict[str, Any]:
    leaves: dict[str, Any] = {
        "params/attn/out/kernel": Dense("attn.out_proj", (3, 4, 12)),
        "params/attn/out/bias": Plain("attn.out_proj.bias"),
    }
    for i, name in enumerate(("query", "key", "value")):
        leaves[f"params/attn/{name}/kernel"] = Dense(
            "attn", (12, 3, 4), part=(i, 3), weight=".in_proj_weight"
        )
        leaves[f"params/attn/{name}/bias"] = Bias("attn.in_proj_bias", (3, 4), (i, 3))
    return leaves


ATTENTION_NAMES: Names = [
    (r"params/attn/query", "attn[0]", "mha"),
    (r"params/attn/key", "attn[1]", "mha"),
    (r"params/attn/value", "attn[2]", "mha"),
    (r"params/attn/out", "attn.out_proj"),
]


# GPT-2's Conv1D.


def transposed(variables: Tree, x: jax.Array) -> jax.Array:
    """Two linear maps."""
    params = variables["params"]
    return affine(params["proj"], jnp.tanh(affine(params["fc"], x)))


TRANSPOSED = {
    **biased("params/fc", "fc", Dense("fc", turned=True)),
    **biased("params/proj", "proj", Dense("proj", turned=True)),
}


# Experts.


def mixture(variables: Tree, x: jax.Array) -> jax.Array:
    """A router whose probabilities scale what each expert gets."""
    params = variables["params"]
    shares = jax.nn.softmax(affine(params["router"], x))
    experts = params["experts"]
    given = jnp.einsum("ne,nd->end", shares, x)
    both = jnp.einsum("end,edh->enh", given, experts["gate_up_proj"])
    gate, up = jnp.split(both, 2, axis=-1)
    down = experts["down_proj"]
    return x + jnp.einsum("enh,ehd->end", jax.nn.silu(gate) * up, down).sum(0)


def _mixture_leaves(down: str, up: str, is_transposed: bool = False) -> dict[str, Any]:
    name = "experts.{}_proj".format
    return {
        **biased("params/router", "router"),
        "params/experts/gate_up_proj": Experts(name("gate_up"), up, is_transposed),
        "params/experts/down_proj": Experts(name("down"), down, is_transposed),
    }


_NESTED = ("experts", "experts.base_layer")
MIXTURE_NAMES: Names = [
    (r"params/router", "router"),
    (r"params/experts/(?P<name>gate_up_proj)", "experts.{name}", "experts"),
    (r"params/experts/(?P<name>down_proj)", "experts.{name}", "experts"),
]
TRANSPOSED_MIXTURE_NAMES: Names = [
    (*rule[:2], "experts+fan_in_fan_out") if len(rule) == 3 else rule
    for rule in MIXTURE_NAMES or ()
]


# A raw parameter.


def mixed(variables: Tree, x: jax.Array) -> jax.Array:
    """A product with a parameter of its own, and a head."""
    params = variables["params"]
    return affine(params["head"], jnp.tanh(x @ params["mixer"]["table"]))


MIXED = {
    "params/mixer/table": Parameter("mixer.table", "mixer"),
    **biased("params/head", "head"),
}
MIXED_NAMES: Names = [
    (r"params/mixer/table", "mixer.table", "experts+fan_in_fan_out"),
    (r"params/head", "head"),
]
WEIGHT_NAMES: Names = [
    (r"params/lin0/kernel", "lin0.weight", "experts"),
    (r"params/(?P<name>\w+)", "{name}"),
]


# --- all of them, by name ---


def _twins() -> dict[str, Twin]:
    found = {
        name: Twin(name, mlp, MLP)
        for name in (
            "linear",
            "bf16",
            "bias_all",
            "bias_lora_only",
            "modules_to_save",
            "pissa",
            "olora_rslora",
            "dora",
        )
    }
    found["dropout"] = Twin("dropout", mlp, MLP)
    # Its biases are sums with those of the base, and are saved as PEFT's `bias`.
    found["lora_bias"] = Twin("lora_bias", mlp, MLP, exact=False)
    stack = "lora_bias_stack"
    found[stack] = Twin(stack, layers, NUMBERED, exact=False)
    found[f"{stack}/scan"] = Twin(stack, scanned, SCANNED, SCANNED_NAMES, exact=False)
    found |= {
        name: Twin(name, layers, NUMBERED)
        for name in (
            "linear_regex",
            "rslora",
            "patterns",
            "exclude_modules",
            "layers_to_transform",
            "all_linear",
            "dora_stack",
        )
    }
    for case in ("rslora", "linear_regex", "exclude_modules", "dora_stack"):
        found[f"{case}/scan"] = Twin(case, scanned, SCANNED, SCANNED_NAMES)
    found["patterns/scan"] = Twin(
        "patterns", scanned, SCANNED, SCANNED_NAMES, exact=False
    )
    return found | _convolutions() | _others() | transformer_twins()


def _convolutions() -> dict[str, Twin]:
    fns = {
        "conv1d": convolution(7, (3,), padding=2),
        "conv2d": convolution(7, (3, 2), strides=2, padding=1),
        "conv2d_1x1": convolution(7, (1, 1)),
        "conv3d": convolution(7, (3, 2, 1), padding="VALID"),
    }
    fns["dora_conv"] = fns["conv2d"]
    return {name: Twin(name, fn, CONV, CONV_NAMES) for name, fn in fns.items()}


def _others() -> dict[str, Twin]:
    one = _mixture_leaves("experts", "unused")
    two = _mixture_leaves(*_NESTED)
    turned = _mixture_leaves(*_NESTED, is_transposed=True)
    doubtful = functools.partial(Twin, in_doubt=True)
    turning: Names = [(r"params/(?P<name>fc|proj)", "{name}", "fan_in_fan_out")]
    return {
        "embedding": Twin("embedding", embedded, EMBEDDED),
        "dora_embedding": Twin("dora_embedding", embedded, EMBEDDED),
        "mha": Twin("mha", attention, _attention_leaves(), ATTENTION_NAMES),
        "fan_in_fan_out": Twin("fan_in_fan_out", transposed, TRANSPOSED, turning),
        "experts_one": doubtful("experts_one", mixture, one, MIXTURE_NAMES),
        "experts_two": doubtful("experts_two", mixture, two, MIXTURE_NAMES),
        "experts_transposed": doubtful(
            "experts_transposed", mixture, turned, TRANSPOSED_MIXTURE_NAMES
        ),
        "parameter_2d": doubtful("parameter_2d", mixed, MIXED, MIXED_NAMES),
        "parameter_linear": Twin("parameter_linear", mlp, MLP, WEIGHT_NAMES),
    }


TWINS = _twins()

"""`Case`: a use whose kernels are quantised, and its comparison with the dense ones."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from case import GRADIENTS, VALUES, adapt, randomized
from oracle import assert_close, materialized, random_like, weighted_sum
from use import Use

is_quantized = lambda node: isinstance(node, qwix.QArray)


def made_dense(params: Any) -> Any:
    """The params with each quantised leaf as Qwix makes it dense."""
    dense = lambda leaf: qwix.dequantize(leaf) if is_quantized(leaf) else leaf
    return jax.tree.map(dense, params, is_leaf=is_quantized)


def quantized(use: Use, params: Any, qtype: str) -> Any:
    """The params with every kernel of the use quantised, in small tiles."""
    layer = dict(params["layer"])
    for name, kernel in use.kernels.items():
        _, in_, _ = kernel.axes
        # One scale for two values where that goes: not along axes of 5 or 7.
        last = in_[-1]
        tiles = {i: kernel.shape[i] for i in in_}
        if kernel.shape[last] % 2 == 0:
            tiles[last] = 2
        single = [i for i in range(len(kernel.shape)) if i not in tiles]
        layer[name] = qwix.quantize(
            layer[name], qtype, tiled_axes=tiles, channelwise_axes=single
        )
    return {**params, "layer": layer}


@dataclasses.dataclass(frozen=True)
class Case:
    use: Use
    lora: Any
    params: Any
    adapter: Any
    inputs: tuple[Any, ...]

    @property
    def loose(self) -> bool:
        return self.use.loose


def make_case(
    use: Use,
    getkey: Callable[[], jax.Array],
    fn: Callable[..., Any] | None = None,
    *,
    qtype: str = "int8",
    adapted: bool = True,
    **settings: Any,
) -> Case:
    lora = adapt(use, fn or use.model, **settings)
    params = quantized(use, use.make_params(getkey(), jnp.float32), qtype)
    inputs = use.make_inputs(getkey(), jnp.float32)
    adapter = {}
    if adapted:
        adapter = lora.init(getkey(), *use.arguments(params, inputs))
        adapter = randomized(adapter, getkey())
    return Case(use, lora, params, adapter, inputs)


def reference(case: Case, fn: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The function of the dense kernels, with their deltas if they are adapted."""
    fn = fn or case.use.model

    def run(params: Any, adapter: Any, *inputs: Any) -> Any:
        params = made_dense(params)
        return fn(
            materialized(case.use, params, adapter) if adapter else params, *inputs
        )

    return run


def check(
    case: Case,
    apply: Callable[..., Any],
    expected: Callable[..., Any],
    reverse: bool = True,
) -> None:
    """Outputs are equal, and so are the gradients of the adapter and the inputs."""
    coarse = "bfloat16" if case.loose else "float32"
    args = case.params, case.adapter
    where = [
        i for i, x in enumerate(case.inputs) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    out = jax.eval_shape(expected, *args, *case.inputs)
    weights = random_like(out, len(case.use.name))

    def loss(f: Callable[..., Any]) -> Callable[..., Any]:
        def scalar(adapter: Any, floats: Any, params: Any, inputs: Any) -> Any:
            inputs = list(inputs)
            for i, x in zip(where, floats, strict=True):
                inputs[i] = x
            y = f(params, adapter, *inputs)
            return weighted_sum(y, weights), y

        return scalar

    floats = [case.inputs[i] for i in where]
    operands = case.adapter, floats, case.params, case.inputs
    both = []
    for f in (apply, expected):
        if reverse and case.use.reverse:
            both.append(jax.jit(jax.grad(loss(f), (0, 1), has_aux=True))(*operands))
        else:
            both.append(((), jax.jit(f)(*args, *case.inputs)))
    (grads, y), (wanted, truth) = both
    assert_close(y, truth, VALUES[coarse], "output")
    assert_close(grads, wanted, GRADIENTS[coarse], "gradient")

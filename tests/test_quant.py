"""Quantised bases: equal, in every use and wrapper, to what they are made dense."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from case import ALPHA, GRADIENTS, RANK, VALUES, adapt, randomized
from oracle import assert_close, materialized, random_like, weighted_sum
from use import Use
from uses import CONVS, USES
from wrappers import WRAPPERS, Wrapper

import jlora

pytest.importorskip("qwix")
import qwix  # noqa: E402

pytestmark = pytest.mark.usefixtures("fast_compile")
BY_NAME = {use.name: use for use in USES + CONVS}
is_quantized = lambda node: isinstance(node, qwix.QArray)


def made_dense(params: Any) -> Any:
    """The params with each quantised leaf as Qwix makes it dense."""
    dense = lambda leaf: qwix.dequantize(leaf) if is_quantized(leaf) else leaf
    return jax.tree.map(dense, params, is_leaf=is_quantized)


def quantized(use: Use, params: Any, qtype: str) -> Any:
    """The params with every kernel of the use quantised, in small tiles."""
    layer = dict(params["layer"])
    for name, kernel in use.kernels.items():
        batch, in_, _ = kernel.axes
        # One scale for two values where that goes, as it does not along axes of 5 or 7.
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


def check(case: Case, apply: Callable[..., Any], expected: Callable[..., Any]) -> None:
    """Outputs are equal, and so are the gradients of the adapter and the inputs."""
    loose = 20 if case.loose else 1
    args = case.params, case.adapter
    where = [i for i, x in enumerate(case.inputs) if jnp.issubdtype(x.dtype, jnp.floating)]
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
        if case.use.reverse:
            both.append(jax.jit(jax.grad(loss(f), (0, 1), has_aux=True))(*operands))
        else:
            both.append(((), jax.jit(f)(*args, *case.inputs)))
    (grads, y), (wanted, truth) = both
    assert_close(y, truth, loose * VALUES["float32"], "output")
    assert_close(grads, wanted, loose * GRADIENTS["float32"], "gradient")


def positioned(case: Case) -> Callable[..., Any]:
    """`lora.apply` with the params first."""
    n = case.use.argnum
    if n == 0:
        return case.lora.apply
    return lambda params, adapter, *inputs: case.lora.apply(
        params, adapter, *inputs
    )


each_use = pytest.mark.parametrize("use", list(BY_NAME.values()), ids=lambda u: u.name)


@each_use
def test_an_adapted_kernel_is_that_of_its_dense_form(use: Use, getkey):
    case = make_case(use, getkey)
    check(case, positioned(case), reference(case))


@each_use
def test_a_frozen_kernel_is_that_of_its_dense_form(use: Use, getkey):
    case = make_case(use, getkey, adapted=False)
    check(case, positioned(case), reference(case))

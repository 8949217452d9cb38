"""`Case`: an adapted use with numbers in it, and the comparisons that it must pass."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxpr_checks import assert_not_materialized, slice_shapes
from oracle import assert_close, random_like, relative_error, weighted_sum
from use import ALPHA, RANK, Use

import jlora

Fn = Callable[..., Any]
VALUES = {"float32": 1e-5, "bfloat16": 1e-2}
GRADIENTS = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A use, its adapted form, and arguments of both; `b` is not zero."""

    use: Use
    lora: Any
    params: Any
    adapter: dict[str, Any]
    inputs: tuple[jax.Array, ...]

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of `lora.apply`."""
        return self.params, self.adapter, *self.inputs

    def tolerance(self, table: dict[str, float]) -> float:
        """The relative error allowed for the coarsest dtype that is involved."""
        leaves = jax.tree.leaves((self.params, self.inputs))
        coarse = self.use.loose or any(x.dtype == jnp.bfloat16 for x in leaves)
        return table["bfloat16" if coarse else "float32"]


def adapt(use: Use, fn: Fn, *, variant: Any = None, **settings: Any) -> jlora.Lora:
    """Adapts the kernels of a use in `fn`, which takes params first."""
    variant = variant or {}
    config = jlora.LoraConfig(list(use.paths), rank=RANK, alpha=ALPHA, **variant)
    return jlora.lora(use.positioned(fn), config, argnum=use.argnum, **settings)


def make_case(
    use: Use,
    getkey: Callable[[], jax.Array],
    *,
    fn: Fn | None = None,
    x_dtype: Any = jnp.float32,
    w_dtype: Any = jnp.float32,
    **settings: Any,
) -> Case:
    """Adapts a use, or `fn` made of it, and fills it with random numbers."""
    lora = adapt(use, fn or use.model, **settings)
    params = use.make_params(getkey(), w_dtype)
    inputs = use.make_inputs(getkey(), x_dtype)
    adapter = lora.init(getkey(), *use.arguments(params, inputs))
    adapter = randomized(adapter, getkey())
    return Case(use, lora, params, adapter, inputs)


def randomized(adapter: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """Replaces every `b`, which is zero at first, and stretches DoRA's magnitudes."""
    keys = jax.random.split(key, len(adapter))
    new = {}
    for k, (path, factors) in zip(keys, adapter.items(), strict=True):
        b = 0.5 * jax.random.normal(k, factors.b.shape, factors.b.dtype)
        new[path] = dataclasses.replace(factors, b=b)
        if (magnitude := factors.magnitude) is not None:
            stretched = magnitude * jax.random.uniform(k, magnitude.shape, minval=0.5)
            new[path] = dataclasses.replace(new[path], magnitude=stretched)
    return new


def check_values(case: Case, apply: Fn, reference: Fn) -> None:
    """Outputs of both functions are equal, and so are their dtypes."""
    actual, expected = apply(*case.args), jax.jit(reference)(*case.args)
    assert_close(actual, expected, case.tolerance(VALUES), "output")


def check_half(
    case: Case, apply: Fn, reference: Fn, least: float = VALUES["bfloat16"]
) -> None:
    """Outputs are as near to those in float32 as those of the materialized kernel.

    Within `least`, that is, or within three times the error of the materialized kernel
    where a deep chain of bfloat16 products makes that larger.
    """
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, case.args
    )
    actual, formed = apply(*case.args), jax.jit(reference)(*case.args)
    same = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
    assert jax.tree.all(jax.tree.map(same, actual, formed))
    truth = jax.tree.leaves(jax.jit(reference)(*wide))
    for x, y, z in zip(*map(jax.tree.leaves, (actual, formed)), truth, strict=True):
        allowed = max(least, 3 * relative_error(y, z))
        error = relative_error(x, z)
        assert error <= allowed, f"relative error {error:.2e} > {allowed:.2e}"


def check_gradients(
    case: Case, apply: Fn, reference: Fn, *, jaxpr: bool = True
) -> None:
    """Outputs and all gradients are equal, and no kernel is formed on the way.

    The gradients are those of params (base kernels among them), adapter and inputs.
    """
    where = [
        i for i, x in enumerate(case.inputs) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    shapes = jax.eval_shape(reference, *case.args)
    weights = random_like(shapes, len(case.use.name))

    def loss(f: Fn) -> Fn:
        def scalar(
            params: Any, adapter: Any, floats: Any, inputs: Any, weights: Any
        ) -> tuple[jax.Array, Any]:
            inputs = list(inputs)
            for i, x in zip(where, floats, strict=True):
                inputs[i] = x
            out = f(params, adapter, *inputs)
            return weighted_sum(out, weights), out

        return scalar

    floats = [case.inputs[i] for i in where]
    args = case.params, case.adapter, floats, case.inputs, weights
    differentiate = lambda f: jax.jit(jax.grad(loss(f), (0, 1, 2), has_aux=True))(*args)
    (grads, out), (wanted, expected) = differentiate(apply), differentiate(reference)
    # Both outputs are rounded: in bfloat16 each has an error of its own.
    values = VALUES if case.tolerance(VALUES) < 1e-3 else GRADIENTS
    assert_close(out, expected, case.tolerance(values), "output")
    for name, x, y in zip(("params", "adapter", "inputs"), grads, wanted, strict=True):
        assert_close(x, y, case.tolerance(GRADIENTS), f"gradient of {name}")
    if jaxpr:
        program = jax.make_jaxpr(jax.grad(loss(apply), (1, 2), has_aux=True))(*args)
        check_program(case, program)


def check_program(case: Case, program: Any) -> None:
    """The program has no captured constants, and only the base is kernel-shaped.

    Params must be the first argument of the program.
    """
    captured = [c.shape for c in program.consts if jnp.size(c) > 1]
    assert not captured, f"captured constants: {captured}"
    if not case.use.formed:
        shapes = [
            shape
            for kernel in case.use.kernels.values()
            for n in range(len(kernel.axes[0]) + 1)
            for shape in slice_shapes(kernel.shape, kernel.axes[0][:n])
        ]
        base = range(len(jax.tree.leaves(case.params)))
        assert_not_materialized(program, base, shapes)

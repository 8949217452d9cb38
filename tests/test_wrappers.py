"""Wrappers around `lora.apply`, and wrappers inside of the adapted function.

The full cross is marked slow. By default every wrapper meets the core uses inside, the
first three of them outside, and every other use meets one wrapper, which differs from
use to use.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from case import check_gradients, check_values, make_case, randomized
from oracle import assert_close, materialized, random_like, reference, weighted_sum
from use import Use
from uses import USES
from wrappers import WRAPPERS, Wrapper

pytestmark = pytest.mark.usefixtures("fast_compile")
BY_NAME = {use.name: use for use in USES}
CORE = [
    BY_NAME[name]
    for name in (
        "dense_general_two_in_two_out",
        "tied",
        "scan_stack",
        "conv_2d_groups",
        "experts_ragged",
    )
]
CHOSEN = [
    *CORE,
    *(
        BY_NAME[name]
        for name in (
            "matmul_left",
            "siblings",
            "einsum_fused_ckdh",
            "reshape_transpose_reshape",
            "concatenate_kernels",
            "slices_in",
            "lookup_fill_value",
            "conv_transpose_kernel",
            "experts_selected",
            "index_fori",
            "recurrent",
        )
    ),
]


def fits(use: Use, wrapper: Wrapper) -> bool:
    """Whether a wrapper makes sense for a use."""
    floats = [make(jax.random.key(0), jnp.float32) for make in use.inputs]
    differentiable = any(jnp.issubdtype(x.dtype, jnp.floating) for x in floats)
    return not wrapper.floats or (use.reverse and differentiable)


def pairs(core: int, others: bool) -> list[Any]:
    """The pairs of use and wrapper; those beyond the rule above are marked slow."""
    found = []
    for i, use in enumerate(USES):
        for j, wrapper in enumerate(WRAPPERS):
            if not fits(use, wrapper):
                continue
            often = use in CORE[:core]
            once = others and (i - j) % len(WRAPPERS) == 0
            slow = [] if often or once else [pytest.mark.slow]
            if not slow or use in CHOSEN:
                name = f"{use.name}-{wrapper.name}"
                found.append(pytest.param(use, wrapper, id=name, marks=slow))
    return found


def check(case: Any, apply: Any, expected: Any, reverse: bool) -> None:
    """Gradients where they are defined, else values."""
    if reverse and case.use.reverse:
        check_gradients(case, apply, expected)
    else:
        check_values(case, jax.jit(apply), expected)


@pytest.mark.parametrize("use, wrapper", pairs(core=5, others=True))
def test_inside(use: Use, wrapper: Wrapper, getkey):
    fn = wrapper.wrap(use.model, 1)
    case = make_case(use, getkey, fn=fn)
    check(case, case.lora.apply, reference(use, fn), wrapper.reverse)


@pytest.mark.parametrize(
    "use, wrapper",
    [p for p in pairs(core=3, others=False) if not p.values[1].inside_only],
)
def test_outside(use: Use, wrapper: Wrapper, getkey):
    case = make_case(use, getkey)
    apply = wrapper.wrap(case.lora.apply, 2)
    check(case, apply, wrapper.wrap(reference(use), 2), wrapper.reverse)


@pytest.mark.parametrize("use", CHOSEN, ids=lambda use: use.name)
def test_vmap_over_adapters(use: Use, getkey):
    case = make_case(use, getkey)
    adapters = [randomized(case.adapter, getkey()) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    axes = (None, 0) + (None,) * len(case.inputs)
    together = jax.jit(jax.vmap(case.lora.apply, axes))
    actual = together(case.params, stacked, *case.inputs)
    expected = [reference(use)(case.params, each, *case.inputs) for each in adapters]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("use", CHOSEN, ids=lambda use: use.name)
def test_jvp_with_autodiff(use: Use, getkey):
    case = make_case(use, getkey, backward="autodiff")
    tangent = jax.tree.map(
        lambda x: jax.random.normal(getkey(), x.shape, x.dtype), case.adapter
    )
    push = lambda f: jax.jit(
        lambda adapter, tangent: jax.jvp(
            lambda adapter: f(case.params, adapter, *case.inputs),
            (adapter,),
            (tangent,),
        )
    )(case.adapter, tangent)
    actual, expected = push(case.lora.apply), push(reference(use))
    assert_close(actual, expected, 1e-4)


@pytest.mark.parametrize("use", CHOSEN, ids=lambda use: use.name)
def test_gradients_with_autodiff(use: Use, getkey):
    case = make_case(use, getkey, backward="autodiff")
    check_gradients(case, case.lora.apply, reference(use), jaxpr=False)


@pytest.mark.parametrize("backward", ["autodiff", "custom"])
@pytest.mark.parametrize("use", [CORE[1], BY_NAME["chain"]], ids=lambda use: use.name)
def test_second_derivatives(use: Use, backward: str, getkey):
    """`jax.hessian` with autodiff; reverse over reverse with the custom backward."""
    case = make_case(use, getkey, backward=backward)
    second = (
        jax.hessian if backward == "autodiff" else lambda f: jax.jacrev(jax.grad(f))
    )

    def run(f: Any) -> Any:
        def loss(b: Any) -> jax.Array:
            adapter = {
                path: dataclasses.replace(factors, b=b[path])
                for path, factors in case.adapter.items()
            }
            out = f(case.params, adapter, *case.inputs)
            return weighted_sum(out, random_like(out, 0))

        b = {path: factors.b for path, factors in case.adapter.items()}
        return jax.jit(second(loss))(b)

    assert_close(run(case.lora.apply), run(reference(use)), 1e-4)


@pytest.mark.parametrize("use", CHOSEN, ids=lambda use: use.name)
def test_eval_shape(use: Use, getkey):
    case = make_case(use, getkey)
    actual = jax.eval_shape(case.lora.apply, *case.args)
    expected = jax.eval_shape(use.model, case.params, *case.inputs)
    same = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
    assert jax.tree.all(jax.tree.map(same, actual, expected))


@pytest.mark.parametrize("use", CHOSEN, ids=lambda use: use.name)
def test_export(use: Use, getkey):
    """The adapter crosses the file as a list of leaves, as any registered tree can."""
    case = make_case(use, getkey)
    leaves, tree = jax.tree.flatten(case.adapter)
    program = jax.jit(
        lambda p, leaves, *x: case.lora.apply(p, tree.unflatten(leaves), *x)
    )
    exported = jax.export.export(program)(case.params, leaves, *case.inputs)
    restored = jax.export.deserialize(exported.serialize())
    actual = restored.call(case.params, leaves, *case.inputs)
    expected = use.model(materialized(use, case.params, case.adapter), *case.inputs)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("use", CORE[:1], ids=lambda use: use.name)
def test_export_of_the_adapter_itself(use: Use, getkey):
    case = make_case(use, getkey)
    exported = jax.export.export(jax.jit(case.lora.apply))(*case.args)
    restored = jax.export.deserialize(exported.serialize())
    assert_close(restored.call(*case.args), case.lora.apply(*case.args), 1e-5)

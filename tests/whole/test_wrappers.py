"""Wrappers around `lora.apply`, and wrappers inside of the adapted function.

Every wrapper meets the core uses inside, the first three of them outside, and every
other use meets one wrapper, which differs from use to use. What does not work yet is
listed in `GAPS`; each entry must fail, so that none outlives its reason.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from case import adapt, check_gradients, check_values, make_case, randomized
from oracle import assert_close, materialized, random_like, reference, weighted_sum
from use import Use
from uses import USES
from wrappers import WRAPPERS, Wrapper

import jlora

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


# One index, in a loop, into a stack of biases looks the same: no evidence of a table.
ONE_ROW = ("lookup_one_token", "lookup_in_scan")
LOOPS = ("scan", "scan_everything", "while", "scan_of_checkpoint")
# JAX turns a cond with a batched predicate into a choice between kernels.
BRANCHES = ("cond_both_branches", "cond_one_branch", "switch", "experts_switch")
VMAPS = ("vmap", "jit_of_vmap_of_cond")
# A derivative inside of the function makes these kernels residuals of a loop or branch,
RESIDUALS = ("experts_switch", "scan_second_axis", "scan_groups", "index_fori")
# and cuts these into their groups.
GROUPED = (
    "conv_2d_groups",
    "conv_2d_groups_nchw",
    "conv_2d_depthwise",
    "conv_2d_depthwise_multiplier",
    "conv_1d_depthwise_causal",
)


def refused(use: Use, wrapper: Wrapper) -> type[Exception] | None:
    """The error for a pair in which the kernel can't stay factored, inside."""
    if wrapper.name in LOOPS and use.name in ONE_ROW:
        return jlora.TargetError
    apart = (*RESIDUALS, *GROUPED, "scale_from_input")
    if wrapper.name == "value_and_grad" and use.name in apart:
        return jlora.MaterializationError
    return None


def fits(use: Use, wrapper: Wrapper) -> bool:
    """Whether a wrapper makes sense for the plain function."""
    if use.name in ("experts_ragged", "experts_routed") and wrapper.name in VMAPS:
        return False  # not implemented in JAX
    return not wrapper.floats or (use.reverse and takes_floats(use.name))


@functools.cache
def takes_floats(name: str) -> bool:
    """Whether any input of the use of this name is floating."""
    make = lambda key: BY_NAME[name].make_inputs(key, jnp.float32)
    inputs = jax.eval_shape(make, jax.random.key(0))
    return any(jnp.issubdtype(x.dtype, jnp.floating) for x in inputs)


def pairs(core: int, *, inside: bool) -> list[Any]:
    """The pairs of use and wrapper, by the rule above."""
    found = []
    for i, use in enumerate(USES):
        for j, wrapper in enumerate(WRAPPERS):
            if not fits(use, wrapper) or (inside and refused(use, wrapper)):
                continue
            often = use in CORE[:core]
            once = inside and (i - j) % len(WRAPPERS) == 0
            if often or once:
                name = f"{use.name}-{wrapper.name}"
                found.append(pytest.param(use, wrapper, id=name))
    return found


def check(case: Any, apply: Any, expected: Any, reverse: bool) -> None:
    """Gradients where they are defined, else values."""
    if reverse and case.use.reverse:
        check_gradients(case, apply, expected)
    else:
        check_values(case, jax.jit(apply), expected)


@pytest.mark.parametrize("use, wrapper", pairs(5, inside=True))
def test_inside(use: Use, wrapper: Wrapper, getkey):
    fn = wrapper.wrap(use.model, 1)
    case = make_case(use, getkey, fn=fn)
    check(case, case.lora.apply, reference(use, fn), wrapper.reverse)


@pytest.mark.parametrize("wrapper", VMAPS)
@pytest.mark.parametrize("name", [*BRANCHES, "scale_from_input"])
def test_branches_under_vmap(name: str, wrapper: str, getkey):
    """Factors are chosen, or scaled, for each example."""
    (wrap,) = [w.wrap for w in WRAPPERS if w.name == wrapper]
    use = BY_NAME[name]
    fn = wrap(use.model, 1)
    case = make_case(use, getkey, fn=fn)
    check_gradients(case, case.lora.apply, reference(use, fn), jaxpr=False)


@pytest.mark.parametrize(
    "use, wrapper",
    [
        pytest.param(use, wrapper, id=f"{use.name}-{wrapper.name}")
        for use in USES
        for wrapper in WRAPPERS
        if fits(use, wrapper) and refused(use, wrapper)
    ],
)
def test_refused_inside(use: Use, wrapper: Wrapper, getkey):
    error = refused(use, wrapper)
    params = use.make_params(getkey(), jnp.float32)
    inputs = use.make_inputs(getkey(), jnp.float32)
    with pytest.raises(error, match=r"layer/w"):
        adapt(use, wrapper.wrap(use.model, 1)).plan(params, *inputs)


@pytest.mark.parametrize(
    "name",
    ["conv_2d_groups", "conv_2d_depthwise", *RESIDUALS],
)
def test_refused_derivative_may_materialize(name: str, getkey):
    (wrapper,) = [w for w in WRAPPERS if w.name == "value_and_grad"]
    use = BY_NAME[name]
    fn = wrapper.wrap(use.model, 1)
    case = make_case(use, getkey, fn=fn, materialize="allow")
    check_gradients(case, case.lora.apply, reference(use, fn), jaxpr=False)


@pytest.mark.parametrize(
    "use, wrapper",
    [p for p in pairs(3, inside=False) if not p.values[1].inside_only],
)
def test_outside(use: Use, wrapper: Wrapper, getkey):
    case = make_case(use, getkey)
    apply = wrapper.wrap(case.lora.apply, 2)
    check(case, apply, wrapper.wrap(reference(use), 2), wrapper.reverse)


@pytest.mark.parametrize(
    "use",
    # JAX has no vmap of ragged_dot over the experts alone.
    [use for use in CHOSEN if use.name != "experts_ragged"],
    ids=lambda use: use.name,
)
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


@pytest.mark.parametrize("kind", ["slices", "rows", "svd", "dora"])
def test_export_of_other_entries(kind: str, getkey):
    config = {"slices": {"slices": [(0, 2), (3, 6)]}, "rows": {"rows": [4, 1]}}
    given = config.get(kind, {"dora": kind == "dora"})
    lora = jlora.lora(
        lambda p, i: jnp.tanh(p["table"][i] @ p["table"].T),
        jlora.LoraConfig("table", rank=2, init="orthogonal", **given),
    )
    params, ids = {"table": jax.random.normal(getkey(), (5, 6))}, jnp.array([4, 2, 1])
    args = params, lora.init(getkey(), params, ids), ids
    apply = lora.apply
    if kind == "svd":
        args = params, jlora.adalora.from_factors(args[1]), ids
        apply = lambda p, svd, i: lora.apply(p, jlora.adalora.to_factors(svd), i)
    exported = jax.export.export(jax.jit(apply))(*args)
    restored = jax.export.deserialize(exported.serialize())
    assert restored.in_tree == exported.in_tree
    assert_close(restored.call(*args), apply(*args), 1e-5)

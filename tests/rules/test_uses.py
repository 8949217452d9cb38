"""Every use of a kernel, factored, equals the same use of the materialized kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from case import adapt, check_gradients, check_half, check_values, make_case
from oracle import assert_close, reference
from use import RANK, Use
from uses import MATERIALIZING, USES

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")
HALF = jnp.bfloat16

each_use = pytest.mark.parametrize("use", USES, ids=lambda use: use.name)
reversible = pytest.mark.parametrize(
    "use", [use for use in USES if use.reverse], ids=lambda use: use.name
)
# Mixed dtypes differ from equal ones only in casts: one use in four shows them.
mixed = pytest.mark.parametrize("use", USES[::4], ids=lambda use: use.name)
# One product deep, so that rounding does not pile up.
HALF_GRADIENTS = [
    use
    for use in USES
    if use.name
    in (
        "matmul",
        "matmul_left",
        "dense_general_batch",
        "siblings",
        "split_out",
        "lookup_take",
        "conv_2d_groups",
        "experts_ragged",
        "experts_selected",
    )
]
each_formed = pytest.mark.parametrize("use", MATERIALIZING, ids=lambda use: use.name)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@each_use
def test_axes_come_from_the_program(use: Use, getkey):
    params, inputs = abstract(
        (use.make_params(getkey(), HALF), use.make_inputs(getkey(), HALF))
    )
    args = use.arguments(params, inputs)
    lora = adapt(use, use.model)
    plan = lora.plan(*args)
    found = {
        t.path: (t.shape, t.axes.batch, t.axes.in_, t.axes.out) for t in plan.targets
    }
    assert found == {
        path: (kernel.shape, *kernel.axes) for path, kernel in use.paths.items()
    }
    adapter = jax.eval_shape(lora.init, getkey(), *args)
    for path, kernel in use.paths.items():
        shapes = (adapter[path].a.shape, adapter[path].b.shape)
        assert shapes == kernel.factor_shapes(RANK)
        assert adapter[path].a.dtype == adapter[path].b.dtype == jnp.float32


@each_use
def test_values_without_jit(use: Use, getkey):
    case = make_case(use, getkey)
    check_values(case, case.lora.apply, reference(use))


@each_use
def test_zero_b_changes_nothing(use: Use, getkey):
    """Bit for bit, but in loops, whose body XLA compiles as a whole: there nearly."""
    case = make_case(use, getkey)
    zero = {
        path: dataclasses.replace(factors, b=jnp.zeros_like(factors.b))
        for path, factors in case.adapter.items()
    }
    actual = case.lora.apply(case.params, zero, *case.inputs)
    expected = use.model(case.params, *case.inputs)
    program = str(jax.make_jaxpr(use.model)(case.params, *case.inputs))
    loops = "scan[" in program or "while[" in program
    assert_close(actual, expected, 1e-6 if loops else 0.0)


@reversible
def test_gradients(use: Use, getkey):
    case = make_case(use, getkey)
    check_gradients(case, case.lora.apply, reference(use))


@each_use
def test_bfloat16(use: Use, getkey):
    case = make_case(use, getkey, x_dtype=HALF, w_dtype=HALF)
    check_half(case, jax.jit(case.lora.apply), reference(use))


@mixed
@pytest.mark.parametrize("x_dtype, w_dtype", [(HALF, jnp.float32), (jnp.float32, HALF)])
def test_mixed_dtypes(use: Use, x_dtype, w_dtype, getkey):
    case = make_case(use, getkey, x_dtype=x_dtype, w_dtype=w_dtype)
    check_half(case, jax.jit(case.lora.apply), reference(use))


@pytest.mark.parametrize("use", HALF_GRADIENTS, ids=lambda use: use.name)
@pytest.mark.parametrize("x_dtype, w_dtype", [(HALF, jnp.float32), (HALF, HALF)])
def test_half_gradients(use: Use, x_dtype, w_dtype, getkey):
    case = make_case(use, getkey, x_dtype=x_dtype, w_dtype=w_dtype)
    check_gradients(case, case.lora.apply, reference(use))


@pytest.mark.parametrize("use", USES[1::6], ids=lambda use: use.name)
def test_one_trace_and_one_compilation(use: Use, getkey):
    traces = []

    def counted(params, *inputs):
        traces.append(None)
        return use.model(params, *inputs)

    case = make_case(use, getkey, fn=counted)
    step = jax.jit(case.lora.apply)
    step(*case.args)
    before = len(traces)
    for scale in (0.5, 2.0):
        adapter = jax.tree.map(lambda x, s=scale: s * x, case.adapter)
        step(case.params, adapter, *case.inputs)
    assert len(traces) == before
    assert step._cache_size() == 1


@each_formed
def test_without_a_rule_is_an_error(use: Use, getkey):
    params, inputs = use.make_params(getkey(), HALF), use.make_inputs(getkey(), HALF)
    lora = adapt(use, use.model)
    for attempt in (lora.plan, lambda *args: lora.init(getkey(), *args)):
        with pytest.raises(jlora.MaterializationError) as error:
            attempt(params, *inputs)
        message = str(error.value)
        for part in ("'layer/w'", "(5, 7)", use.primitive, 'materialize="allow"'):
            assert part in message, message
        if use.primitive != "output":
            assert "uses_materializing.py:" in message, message


@each_formed
def test_apply_refuses_what_plan_refuses(use: Use, getkey):
    allowed = make_case(use, getkey, materialize="allow")
    with pytest.raises(jlora.MaterializationError, match="layer/w"):
        adapt(use, use.model).apply(*allowed.args)


@each_formed
def test_materialize_allow(use: Use, getkey):
    case = make_case(use, getkey, materialize="allow")
    if use.reverse:
        check_gradients(case, case.lora.apply, reference(use))
    else:
        check_values(case, case.lora.apply, reference(use))


@each_formed
def test_plan_tells_where_a_kernel_is_formed(use: Use, getkey):
    params, inputs = use.make_params(getkey(), HALF), use.make_inputs(getkey(), HALF)
    plan = adapt(use, use.model, materialize="allow").plan(params, *inputs)
    assert "materialized" in str(plan)
    assert use.primitive in str(plan)


def test_uses_are_named_apart():
    names = [use.name for use in USES + MATERIALIZING]
    assert len(set(names)) == len(names)

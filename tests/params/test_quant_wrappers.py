"""Quantised bases in wrapped functions, and wrappers around `lora.apply`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import randomized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close
from uses import CONVS, USES
from wrappers import WRAPPERS, Wrapper

import jlora

pytest.importorskip("qwix")
from quant_case import check, make_case, reference

pytestmark = pytest.mark.usefixtures("fast_compile")
BY_NAME = {use.name: use for use in [*USES, *CONVS]}
CORE = ("dense_general_two_in_two_out", "tied", "scan_stack", "conv_2d_groups")
# Always; the others run with the slow tests.
QUICK = ("vmap", "checkpoint", "scan_everything", "cond", "while", "shard_map")
INSIDE = [(w, name) for w in WRAPPERS for name in (*CORE, "experts_ragged")]


def fits(wrapper: Wrapper, name: str) -> bool:
    """Whether JAX has it: no ragged product under vmap, no derivative of tokens."""
    if wrapper.floats:
        return name not in ("tied", "conv_2d_groups")
    return not (name == "experts_ragged" and "vmap" in wrapper.name)


def pairs(quick: dict[str, str], *, outside: bool = False) -> list[Any]:
    return [
        pytest.param(
            wrapper,
            name,
            id=f"{name}-{wrapper.name}",
            marks=() if quick.get(wrapper.name) == name else pytest.mark.slow,
        )
        for wrapper, name in INSIDE
        if fits(wrapper, name) and not (outside and wrapper.inside_only)
    ]


IN = dict(zip(QUICK, ["tied", "scan_stack", *CORE], strict=True))
OUT = dict(zip(QUICK, ["scan_stack", CORE[0], "tied", *CORE[1:]], strict=True))


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "frozen"])
@pytest.mark.parametrize("wrapper, name", pairs(IN))
def test_inside(wrapper: Wrapper, name: str, adapted: bool, getkey):
    fn = wrapper.wrap(BY_NAME[name].model, 1)
    case = make_case(BY_NAME[name], getkey, fn, adapted=adapted)
    check(case, case.lora.apply, reference(case, fn), wrapper.reverse)


@pytest.mark.parametrize("wrapper, name", pairs(OUT, outside=True))
def test_outside(wrapper: Wrapper, name: str, getkey):
    case = make_case(BY_NAME[name], getkey)
    apply = wrapper.wrap(case.lora.apply, 2)
    check(case, apply, wrapper.wrap(reference(case), 2), wrapper.reverse)


@pytest.mark.parametrize("name", [CORE[0], "tied", "scan_stack"])
def test_vmap_over_adapters(name: str, getkey):
    case = make_case(BY_NAME[name], getkey)
    adapters = [randomized(case.adapter, getkey()) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    axes = (None, 0) + (None,) * len(case.inputs)
    together = jax.jit(jax.vmap(case.lora.apply, axes))
    actual = together(case.params, stacked, *case.inputs)
    expected = [reference(case)(case.params, a, *case.inputs) for a in adapters]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("contraction", ["merged", "auto"])
@pytest.mark.parametrize("name", ["siblings", "scan_stack"])
def test_other_contractions(name: str, contraction: str, getkey):
    case = make_case(BY_NAME[name], getkey, contraction=contraction)
    check(case, case.lora.apply, reference(case))


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "frozen"])
@pytest.mark.parametrize("name", ["siblings", "conv_2d_groups", "scan_stack"])
def test_forward_mode_with_autodiff(name: str, adapted: bool, getkey):
    case = make_case(BY_NAME[name], getkey, adapted=adapted, backward="autodiff")
    primals = case.adapter, case.inputs

    def push(f: Any) -> Any:
        run = functools.partial(f, case.params)
        flat = lambda adapter, inputs: run(adapter, *inputs)
        return jax.jit(lambda p, t: jax.jvp(flat, p, t))(primals, primals)

    assert_close(push(case.lora.apply), push(reference(case)), 1e-4)
    check(case, case.lora.apply, reference(case))


SPECS = (P(), P("model"), P(None, "model"))


@pytest.mark.parametrize("stored", SPECS, ids=str)
@pytest.mark.parametrize("enters", SPECS, ids=str)
@pytest.mark.parametrize("qtype", ["int8", "nf4"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_pieces_enter_a_shard_map(kind: Any, qtype: str, enters: P, stored: P, getkey):
    """However they are laid out, codes and scales become what the function asks for."""
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((2, 2), ("data", "model"), (kind,) * 2, devices=devices)
    summed = enters == P("model")
    rows = P("data", "model") if summed else P("data")
    columns = P("data", "model") if enters == P(None, "model") else P("data")

    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x @ w, "model") if summed else x @ w

    def fn(params: Any, x: jax.Array) -> jax.Array:
        w = params["w"]
        if kind is AxisType.Explicit:
            w = jax.sharding.reshard(w, enters)
        sharded = jax.shard_map(product, in_specs=(enters, rows), out_specs=columns)
        return sharded(w, x)

    with jax.set_mesh(mesh):
        put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
        x = put(jax.random.normal(getkey(), (4, 8)), rows)
        params = {"w": put(jax.random.normal(getkey(), (8, 6)), stored)}
        base = jlora.quantize(params, "w", qtype)
        lora = jlora.lora(fn, jlora.LoraConfig("w", rank=2, alpha=3.0))
        adapter = randomized(lora.init(getkey(), base, x), getkey())
        merged = jlora.merge(base, adapter, dequantize=True)["w"]
        y = jax.jit(lora.apply)(base, adapter, x)
        frozen = jax.jit(fn)({"w": merged}, x)
    assert_close(y, np.asarray(x) @ np.asarray(merged), 1e-5)
    assert_close(frozen, y, 1e-5)

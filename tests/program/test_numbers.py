"""Numbers that a program writes down: operands that are no values of its equations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import randomized
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora
from jlora._jax.versions import vary

Fn = Callable[[Any, jax.Array], jax.Array]


def within(fn: Fn) -> Fn:
    """The function inside of a `shard_map` whose types are checked."""
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,))
    specs = {"in_specs": (P(), P("d")), "out_specs": P("d")}
    return jax.shard_map(fn, mesh=mesh, **specs)


def cast(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"] * vary(jnp.float32(2), frozenset("d"))


USES: dict[str, Fn] = {
    "reshape": lambda p, x: x @ p["w"] + lax.reshape(2.0, (1, 1)),
    "broadcast": lambda p, x: x @ p["w"] + lax.broadcast(2.0, (4, 5)),
    "convert": lambda p, x: x @ p["w"] * lax.convert_element_type(2, jnp.float32),
    "barrier": lambda p, x: x @ p["w"] + lax.optimization_barrier(2.0),
    "cast in a shard_map": within(cast),
}
WRAPPERS = {"plain": lambda fn: fn, "jit": jax.jit, "remat": jax.checkpoint}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name", USES)
def test_a_number_goes_through_what_kernels_go_through(
    name: str, wrap: Callable[[Fn], Fn]
) -> None:
    fn = wrap(USES[name])
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    params, x = {"w": draw(0, 3, 5)}, draw(1, 4, 3)
    lora = jlora.lora(fn, jlora.LoraConfig(rank=2, alpha=7.0))
    adapter = randomized(lora.init(jax.random.key(2), params, x), jax.random.key(3))
    assert [target.path for target in lora.plan(params, x).targets] == ["w"]
    found = jax.jit(lora.apply)(params, adapter, x)
    expected = jax.jit(fn)(jlora.merge(params, adapter), x)
    assert_close(np.asarray(found), np.asarray(expected), 1e-5)

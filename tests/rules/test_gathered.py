"""Kernels that are gathered inside of a `shard_map`, one or two entries of a device."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from case import randomized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")

# Labels of a product, the axis of its kernel that is cut, and the kernel's other sizes.
USES = {
    "heads": ("nd,dhk->nhk", 1, (6, 4)),
    "inputs": ("nd,df->nf", 0, (5,)),
    "outputs": ("nd,df->nf", 1, (6,)),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("entries", [1, 2])
@pytest.mark.parametrize("name", USES)
def test_a_tiled_gather(name: str, entries: int, dora: bool) -> None:
    labels, axis, others = USES[name]
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Auto,))
    shape = (*others[:axis], 8 * entries, *others[axis:])
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"w": jax.random.normal(keys[0], shape)}
    x = jax.random.normal(keys[1], (16, shape[0]))
    whole = lambda p, x: jnp.einsum(labels, x, p["w"])

    def gathered(p: Any, x: jax.Array) -> jax.Array:
        return whole({"w": jax.lax.all_gather(p["w"], "i", axis=axis, tiled=True)}, x)

    config = jlora.LoraConfig("w", rank=2, alpha=3.0, dora=dora)
    adapter = jlora.lora(whole, config).init(keys[2], params, x)
    adapter = randomized(adapter, keys[3])
    lies = P(*[None] * axis, "i")
    shardings = jlora.shardings({"w": NamedSharding(mesh, lies)}, adapter)
    places = jax.tree.map(lambda one: one.spec, shardings)
    told = {"lora_input_shards": {"w": "i" if axis == 0 else ()}} if dora else {}
    lora = jlora.lora(gathered, config)
    run = lambda p, a, x: lora.apply(p, a, x, **told)
    own = jax.shard_map(
        run, mesh=mesh, in_specs=({"w": lies}, places, P("i")), out_specs=P("i")
    )
    loss = lambda fn: lambda a: jnp.sum(jnp.tanh(fn(params, a, x)) ** 2)
    alone = jlora.lora(whole, config).apply
    found, wanted = (jax.value_and_grad(loss(fn))(adapter) for fn in (own, alone))
    assert_close(found, wanted, 1e-5)
    assert_close(own(params, adapter, x), whole(jlora.merge(params, adapter), x), 1e-5)

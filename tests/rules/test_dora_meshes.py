"""DoRA where rows, inputs or outputs of a product lie along one mesh axis, as in FSDP.

A scale has the layout of its kernel, and the result of a product that of its rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import randomized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")


class Case(NamedTuple):
    """A program `fn(w, x, place)`, and how its arrays lie."""

    fn: Callable[..., jax.Array]
    kernel: tuple[int, ...]
    lies: P
    x: tuple[int, ...]
    rows: P = P("fsdp")


def of(labels: str) -> Callable[..., jax.Array]:
    """A product whose result lies as its rows do."""
    return lambda w, x, place: jnp.einsum(labels, x, w, out_sharding=place)


def scanned(w: jax.Array, x: jax.Array, place: Any) -> jax.Array:
    """Layers."""
    step = lambda h, w: (jnp.tanh(of("nd,df->nf")(w, h, place)), None)
    return jax.lax.scan(step, x, w)[0]


CASES = {
    "outputs": Case(of("nd,df->nf"), (8, 16), P(None, "fsdp"), (16, 8)),
    "inputs": Case(of("nd,df->nf"), (8, 16), P("fsdp"), (16, 8)),
    "transposed": Case(of("nf,df->nd"), (8, 16), P("fsdp"), (8, 16)),
    "turned inputs": Case(of("nf,df->nd"), (8, 16), P(None, "fsdp"), (8, 16)),
    "heads": Case(of("nd,dhk->nhk"), (6, 8, 2), P(None, "fsdp"), (16, 6)),
    "layers": Case(scanned, (3, 8, 8), P(None, None, "fsdp"), (16, 8)),
    "experts": Case(
        of("end,edf->enf"),
        (2, 6, 8),
        P(None, None, "fsdp"),
        (2, 16, 6),
        P(None, "fsdp"),
    ),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_rows_and_kernel_along_one_mesh_axis(name: str, kind: AxisType) -> None:
    case = CASES[name]
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(kind,))
    place = case.rows if kind == AxisType.Explicit else None
    fn = lambda p, x: case.fn(p["w"], x, place)
    config = jlora.LoraConfig("w", rank=2, alpha=3.0, dora=True)
    with jax.set_mesh(mesh):
        keys = jax.random.split(jax.random.key(0), 4)
        draw = lambda key, shape, spec: jax.device_put(
            jax.random.normal(key, shape) / 3, NamedSharding(mesh, spec)
        )
        params = {"w": draw(keys[0], case.kernel, case.lies)}
        x, lora = draw(keys[1], case.x, case.rows), jlora.lora(fn, config)
        adapter = randomized(lora.init(keys[2], params, x), keys[3])
        adapter = jax.device_put(adapter, jlora.shardings(params, adapter))
        loss = lambda y: (jnp.tanh(y) ** 2).sum()
        ours = lambda adapter, x: loss(lora.apply(params, adapter, x))
        merged = lambda adapter, x: loss(fn(jlora.merge(params, adapter), x))
        found, wanted = (
            jax.jit(jax.value_and_grad(one, argnums=(0, 1)))(adapter, x)
            for one in (ours, merged)
        )
    (value, (gradient, of_x)), (expected, (_, wanted_of_x)) = found, wanted
    assert_close(value, expected, 1e-5)
    assert_close(of_x, wanted_of_x, 1e-5)
    # A norm is a constant to the gradients of factors: they are those of one device.
    params, adapter, x = jax.tree.map(np.asarray, (params, adapter, x))
    alone = jlora.lora(lambda p, x: case.fn(p["w"], x, None), config)
    of_one = jax.grad(lambda adapter: loss(alone.apply(params, adapter, x)))(adapter)
    assert_close(gradient, of_one, 1e-5)

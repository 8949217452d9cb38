"""The Pallas kernel for TPUs, compiled by the TPU's own compiler: any rank."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from placed import at, compiled, placed
from tpu import MARKS, chips

import jlora

pytestmark = MARKS


def step(params: Any, x: jax.Array) -> jax.Array:
    """Three siblings, whose gradient is one sum, and one more."""
    q, k, v = (x @ params[name] for name in "qkv")
    return jnp.sum((jnp.tanh(q) * k + v) @ params["o"])


@pytest.mark.parametrize("rank", [1, 16, 100, 256])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_it_compiles_both_ways(topology: str, rank: int) -> None:
    one = NamedSharding(Mesh(np.array(chips(topology)[:1]), "d"), P())
    params = {n: placed((1024, 768), one) for n in "qkv"}
    params["o"], x = placed((768, 1024), one), placed((4096, 1024), one)
    config = jlora.LoraConfig(rank=rank)
    lora = jlora.lora(step, config, contraction="fused")
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    adapter = at(shapes, jax.tree.map(lambda _: one, shapes))
    program = compiled(jax.value_and_grad(lora.apply, (1, 2)), params, adapter, x)
    calls = re.findall(r'custom_call_target="tpu_custom_call"', program.as_text())
    assert len(calls) == 4 + 2  # each product; the siblings' gradient, and the other's

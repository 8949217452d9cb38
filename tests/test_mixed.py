"""`Lora.apply_mixed`: a batch whose examples use different adapters, or none."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import adapt, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxpr_checks import assert_not_materialized
from oracle import assert_close, reference
from use import Use
from uses import CONVS, USES

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")
Tree = dict[str, Any]
BY_NAME = {use.name: use for use in USES}
CHOSEN = (
    "matmul",
    "dense_general_two_in_two_out",
    "siblings",
    "slices_out",
    "lookup",
    "lookup_fill_nan",
    "attend",
    "tied",
    "conv_2d",
    "conv_2d_strided",
    "conv_2d_groups",
    "conv_2d_depthwise",
    "conv_1d_causal",
    "scan_stack",
    "recurrent",
    "experts_einsum",
    "experts_selected",
)
# JAX has no vmap of ragged_dot in which the experts' kernels alone are mapped, and
# turns a branch that an example decides into a choice between copies of the kernel.
RAGGED, BRANCHES = ("experts_ragged",), ("cond_both_branches", "cond_one_branch")
REST = [
    use
    for use in USES
    if use.name not in (*CHOSEN, *RAGGED, *BRANCHES, "switch", "experts_switch")
]
NONE = -1


def batched(use: Use) -> Callable[..., Any]:
    """The model of a use for a batch of one: every input has an example axis first."""

    def fn(params: Any, *inputs: jax.Array) -> Any:
        assert all(len(x) == 1 for x in inputs)
        out = use.model(params, *(x[0] for x in inputs))
        return jax.tree.map(lambda y: y[None], out)

    return fn


def check_use(use: Use, getkey: Callable[[], jax.Array]) -> None:
    """Examples of three adapters and of none equal those of the formed kernels."""
    lora = adapt(dataclasses.replace(use, argnum=0), batched(use))
    params = use.make_params(getkey(), jnp.float32)
    index = [2, 0, NONE, 1, 2]
    each = [use.make_inputs(getkey(), jnp.float32) for _ in index]
    inputs = jax.tree.map(lambda *x: jnp.stack(x), *each)
    fresh = lora.init(getkey(), params, *(x[:1] for x in inputs))
    adapters = [randomized(fresh, getkey()) for _ in range(3)]
    stacked = jlora.stack(adapters)
    found = jax.jit(lora.apply_mixed)(params, stacked, jnp.asarray(index), *inputs)
    for i, which in enumerate(index):
        run = use.model if which == NONE else reference(use)
        args = (params,) if which == NONE else (params, adapters[which])
        own = jax.tree.map(lambda y, i=i: y[i], found)
        assert_close(own, jax.jit(run)(*args, *each[i]), 1e-5)


@pytest.mark.parametrize("name", CHOSEN)
def test_each_example_gets_its_own_kernel(name: str, getkey) -> None:
    check_use(BY_NAME[name], getkey)


@pytest.mark.slow
@pytest.mark.parametrize("use", REST, ids=lambda use: use.name)
def test_each_example_gets_its_own_kernel_in_all_uses(use: Use, getkey) -> None:
    check_use(use, getkey)

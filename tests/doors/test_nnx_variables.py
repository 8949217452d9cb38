"""NNX models of references or hijax types: refused, with the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doors import config
from flax import nnx

import jlora
import jlora.nnx

KINDS = [{"hijax": True}, {"ref": True}, {"hijax": True, "ref": True}]


def model_of(**kind: bool) -> nnx.Module:
    with nnx.var_defaults(**kind):
        return nnx.Linear(5, 7, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_variables_that_are_no_arrays_are_named(kind: dict[str, bool]):
    model, x = model_of(**kind), jnp.ones((4, 5))
    named = rf"'bias' \({', '.join(kind)}\), 'kernel' .*nnx.with_vars\(model, hijax"
    for call in (
        lambda: jlora.nnx.wrap(model, config("kernel"), x),
        lambda: jlora.nnx.lora(model, config("kernel")),
        lambda: jlora.nnx.split(model),
        lambda: jlora.nnx.merge_into(model, {}),
    ):
        with pytest.raises(jlora.UnsupportedFeatureError, match=named):
            call()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_way_out_that_is_named_leads_out(kind: dict[str, bool]):
    model, x = model_of(**kind), jnp.ones((4, 5))
    plain = nnx.with_vars(model, hijax=False, ref=False)
    lora, params, adapter, rest = jlora.nnx.wrap(plain, config("kernel"), x)
    out, _ = jax.jit(lora.apply)(params, adapter, rest, x)
    np.testing.assert_allclose(out, model(x), rtol=1e-6)

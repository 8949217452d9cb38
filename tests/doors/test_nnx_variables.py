"""NNX models of references or hijax types: refused, with the way out."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doors import config
from flax import nnx
from releases import is_before

import jlora
import jlora.nnx

pytestmark = pytest.mark.usefixtures("fast_compile")

# Before Flax 0.12.3 they have other names, and their functions too.
OLD = is_before("flax", "0.12.3")
HIJAX, REF = ("is_hijax", "has_ref") if OLD else ("hijax", "ref")
KINDS = [{HIJAX: True}, {REF: True}]
if not OLD:  # where a hijax variable does not say that it holds a reference
    KINDS.append({HIJAX: True, REF: True})
WAY_OUT = "nnx.with_vars(model, hijax=False, ref=False)"
if is_before("flax", "0.12.8"):
    WAY_OUT = "nnx.vars_as(model, hijax=False, ref=False)"
if OLD:
    WAY_OUT = "nnx.as_pytree_vars(nnx.as_array_vars(model))"


def model_of(**kind: bool) -> nnx.Module:
    if not OLD:
        with nnx.var_defaults(**kind):
            return nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    model = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    model = nnx.as_ref_vars(model) if REF in kind else model
    return nnx.as_hijax_vars(model) if HIJAX in kind else model


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_variables_that_are_no_arrays_are_named(kind: dict[str, bool]):
    model, x = model_of(**kind), jnp.ones((4, 5))
    kinds = re.escape(f"'bias' ({', '.join(kind)}), 'kernel' ")
    named = f"{kinds}.*{re.escape(WAY_OUT)}"
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
    plain = eval(WAY_OUT, {"nnx": nnx, "model": model})
    lora, params, adapter, rest = jlora.nnx.wrap(plain, config("kernel"), x)
    out, _ = jax.jit(lora.apply)(params, adapter, rest, x)
    np.testing.assert_allclose(out, model(x), rtol=1e-6)

"""Every feature of the public surface on meshes of two axes, Auto and Explicit.

The reference is the same call without a mesh.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from surface_all import FEATURES, Place

pytestmark = pytest.mark.usefixtures("fast_compile")

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
PLACES = [
    Place(AUTO, "in", batch=True),
    Place(AUTO, "both", batch=False, follow=False),
    Place(EXPLICIT, "in", batch=True),
    Place(EXPLICIT, "out", batch=True),
    Place(EXPLICIT, "both", batch=True),
    Place(EXPLICIT, "both", batch=False, follow=False),
    Place(AUTO, "both", batch=True, spread=True),
    Place(EXPLICIT, "in", batch=True, spread=True),
    Place(EXPLICIT, "both", batch=True, spread=True),
]


@functools.cache
def expected(name: str) -> Any:
    """What a feature gives without a mesh, on the host."""
    return jax.tree.map(np.asarray, FEATURES[name](Place()))


def tolerance(dtype: Any) -> float:
    """A bound on the error, as a part of the largest number of an array.

    A mesh sums in another order. What is rounded to 16 bits at the end, or on the way,
    may then be rounded to a neighbour.
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        return 2e-4
    return max(2e-4, 2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_gives_on_a_mesh_what_it_gives_without(name: str, place: Place):
    wanted = expected(name)
    with jax.set_mesh(place.mesh):
        found = jax.tree.map(np.asarray, FEATURES[name](place))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        scale = max(np.abs(want).max(initial=0), 1e-3)
        bound = tolerance(want.dtype) * float(scale)
        np.testing.assert_allclose(got, want, rtol=0, atol=bound)

"""Every feature of the public surface where JAX promotes no dtypes by itself."""

import jax
import pytest
from surface_all import FEATURES, Place

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_needs_no_promotion(name: str):
    with jax.numpy_dtype_promotion("strict"):
        FEATURES[name](Place())

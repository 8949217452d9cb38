"""The entry of a target in a new adapter: from its initialiser, or from its leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from .._adapter.variants.variant import New
from .._errors import TargetError
from .._params.quantized import dequantized
from .target import Target, entry_of, variant_of


def new_entry(key: jax.Array, target: Target, leaf: Any) -> Any:
    """Returns the entry that a target has in a new adapter."""
    variant, config = variant_of(target), target.config
    if what := variant.from_leaf(config):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TargetError(
                f"{target.path!r} {what} starts from the values of its leaf; pass the "
                "params as arrays, or call `init` under `jax.eval_shape`"
            )
        leaf = jnp.asarray(dequantized(leaf, target.path))
    asked = New(target.path, config, target.axes, target.shape, target.rank, key)
    return entry_of(target, variant.new(asked, leaf))

"""What each device holds of base and batch: FSDP × tensor parallelism."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_map_with_path

# The last axes of each matrix. Over `tensor`, as in Megatron-LM: heads, the hidden
# features of the MLP, and the vocabulary. Over `fsdp`: the width of the model.
MATRICES = {
    "embed": ("tensor", "fsdp"),
    "q_proj": ("fsdp", "tensor", None),
    "k_proj": ("fsdp", "tensor", None),
    "v_proj": ("fsdp", "tensor", None),
    "o_proj": ("tensor", None, "fsdp"),
    "gate_proj": ("fsdp", "tensor"),
    "up_proj": ("fsdp", "tensor"),
    "down_proj": ("tensor", "fsdp"),
    "lm_head": ("fsdp", "tensor"),
}
ROWS = P(("data", "fsdp"))  # of a batch, and of all that is computed from it
# What comes out of a table whose width is sharded over `fsdp`, (batch, time, hidden).
EMBEDDINGS = P("data", None, "fsdp")


def leaf_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the spec of one leaf of a Llama; what has no rule is whole.

    Whole is also an axis that the mesh doesn't divide, such as the 9 heads of
    SmolLM2-135M over `tensor=2`, and the leading axis of scanned layers, which every
    device walks along.
    """
    names = next((MATRICES[s] for s in path.split("/") if s in MATRICES), ())
    names = (None,) * (len(shape) - len(names)) + names
    fits = lambda name, size: name is not None and size % mesh.shape[name] == 0
    pairs = zip(names, shape, strict=True)
    return P(*(name if fits(name, size) else None for name, size in pairs))


def param_specs(abstract: Any, mesh: Mesh) -> Any:
    """Returns the spec of each leaf of the params of a Llama, or of their shapes."""
    name = lambda path: keystr(path, simple=True, separator="/")
    return tree_map_with_path(lambda p, v: leaf_spec(name(p), v.shape, mesh), abstract)


def on_mesh(specs: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each spec."""
    is_spec = lambda node: isinstance(node, P)
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=is_spec)


def put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns a global array of which each process has taken its parts alone.

    Every process must come with the same `value`; `jax.device_put` would send it to
    the others to compare.
    """
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])


def rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows are spread over `data` and `fsdp`."""
    return NamedSharding(mesh, ROWS)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Returns a batch of host arrays as global ones."""
    return jax.tree.map(lambda v: put(v, rows(mesh)), batch)


def bytes_per_device(tree: Any) -> int:
    """Returns how many bytes of `tree` a device holds, by the shardings it has."""
    parts = lambda v: math.prod(v.sharding.shard_shape(v.shape)) * v.dtype.itemsize
    return sum(parts(leaf) for leaf in jax.tree.leaves(tree))

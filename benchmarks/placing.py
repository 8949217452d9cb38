"""Where the arrays of a step lie on a mesh: of devices, or of chips that are not there.

The axes of a mesh are called `data`, `fsdp` and `tensor`, and each may be missing. Rows
of a batch lie along the first two; kernels along the last two, as do their factors.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from models import Decoder, Params

AXES = ("data", "fsdp", "tensor")
OF_ROWS = AXES[:2]  # those that the rows of a batch lie along
# The axes of a mesh that the axes of each kernel lie along, its last two.
COLUMNS, ROWS = ("fsdp", "tensor"), ("tensor", "fsdp")
LAYOUT = dict.fromkeys(("q", "k", "v", "gate", "up", "head"), COLUMNS)
LAYOUT |= dict.fromkeys(("o", "down", "embedding"), ROWS)


def mesh_of(devices: Sequence[Any], sizes: Mapping[str, int]) -> Mesh:
    """Returns the mesh of all devices, or of the first one, with Auto axes.

    Raises:
        ValueError: if the sizes are not those of the devices.
    """
    count = math.prod(sizes.values())
    if count not in (1, len(devices)):
        raise ValueError(
            f"the mesh {dict(sizes)} has {count} devices, but there are {len(devices)}"
        )
    grid = np.array(devices[:count]).reshape(*sizes.values())
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def sizes_of(text: str, devices: int) -> dict[str, int]:
    """Returns the sizes of a mesh such as `fsdp` or `fsdp=4,tensor=2`.

    One axis may be given without a size: it has the devices that the others leave.

    Raises:
        ValueError: if an axis is none of `AXES`, or the devices do not divide so.

    Example:
        >>> sizes_of("fsdp,tensor=2", 8)
        {'fsdp': 4, 'tensor': 2}
    """
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    sizes = {name: int(size) for name, size in parts.items() if size}
    left, rest = [n for n in parts if n not in sizes], math.prod(sizes.values())
    known = set(parts) <= set(AXES) and len(left) <= 1
    if not known or devices % rest or (not left and devices != rest):
        raise ValueError(
            f"{text!r} is no mesh of {devices} devices; give axes of {AXES} with "
            "sizes, one of them at most without, such as fsdp=4,tensor=2"
        )
    # In the order of the text: devices that are near differ in the last axis.
    return {name: sizes.get(name, devices // rest) for name in parts}


def add_mesh(made: argparse.ArgumentParser) -> None:
    """Adds the flags that name a mesh."""
    made.add_argument("--mesh", help="such as data, or fsdp=4,tensor=2")
    made.add_argument("--devices", type=int, help="of the mesh, all by default")


def mesh_named(made: argparse.ArgumentParser, flags: argparse.Namespace) -> Mesh | None:
    """Returns the mesh that the flags name, or exits where they name none."""
    if not (flags.mesh or flags.devices):
        return None
    count = flags.devices or jax.device_count()
    try:
        return mesh_of(jax.devices()[:count], sizes_of(flags.mesh or "data", count))
    except ValueError as error:
        made.error(str(error))


def on_mesh(model: Decoder, mesh: Mesh) -> Decoder:
    """Returns the decoder with its embedded tokens laid out on a mesh."""
    features = "fsdp" if "fsdp" in mesh.shape else None
    along = NamedSharding(mesh, P(None, None, features))
    return dataclasses.replace(model, rows=rows_of(mesh), features=along)


def rows_of(mesh: Mesh) -> NamedSharding:
    """Returns where the rows of a batch lie."""
    return NamedSharding(mesh, P(tuple(n for n in OF_ROWS if n in mesh.shape)))


def whole_along_rows(places: Any) -> Any:
    """Returns places of factors at their use: cut as before, but not as rows are.

    A step that puts them there first gathers all factors once, and not those of each
    layer on its own.
    """

    def without(place: NamedSharding) -> NamedSharding:
        spec = [None if entry in OF_ROWS else entry for entry in place.spec]
        return NamedSharding(place.mesh, P(*spec))

    return jax.tree.map(without, places)


def inside(
    mesh: Mesh | None, loss: Callable[..., Any], *, of_rows: bool = False
) -> Callable[..., Any]:
    """Returns the mean of a loss that each device computes of its own rows.

    Args:
        mesh: the devices, of which each has whole kernels; without, the loss as it is.
        loss: a function of what is differentiated, params and rows.
        of_rows: whether the first of these lies as the rows do; else it is whole.
    """
    if mesh is None:
        return loss
    rows = rows_of(mesh).spec
    specs = (rows if of_rows else P(), P(), rows)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P())
    def mean(value: Any, params: Any, batch: Any) -> jax.Array:
        return jax.lax.pmean(loss(value, params, batch), mesh.axis_names)

    return mean


def whole_on(mesh: Mesh) -> NamedSharding:
    """Returns the place of what every device has."""
    return NamedSharding(mesh, P())


def places_of(params: Any, mesh: Mesh) -> Any:
    """Returns the place of each leaf of a decoder: matrices in parts, vectors whole."""
    return jax.tree.map_with_path(functools.partial(_place, mesh), params)


def _place(mesh: Mesh, path: Any, leaf: Any) -> NamedSharding:
    name = getattr(path[-1], "key", None)
    if name not in LAYOUT or leaf.ndim < 2:
        return whole_on(mesh)
    last = [axis if axis in mesh.shape else None for axis in LAYOUT[name]]
    return NamedSharding(mesh, P(*[None] * (leaf.ndim - 2), *last))


def drawn(model: Any, mesh: Mesh | None) -> tuple[Params, Any]:
    """Returns random params and a batch, on a mesh if there is one."""
    keys = jax.random.key(0), jax.random.key(1)
    if mesh is None:
        return model.init(keys[0]), model.data(keys[1])
    places = places_of(jax.eval_shape(model.init, keys[0]), mesh)
    params = jax.jit(model.init, out_shardings=places)(keys[0])
    return params, jax.device_put(model.data(keys[1]), rows_of(mesh))


def decode_places(mesh: Mesh, batch: int) -> tuple[NamedSharding, ...]:
    """Returns the places of tokens, of caches `(batch, heads, ...)`, and of scalars.

    Rows that the devices do not divide are whole on each, as of one sequence.
    """
    (rows,) = rows_of(mesh).spec
    if batch % math.prod(mesh.shape.get(name, 1) for name in OF_ROWS):
        rows = None
    heads = "tensor" if "tensor" in mesh.shape else None
    cache = NamedSharding(mesh, P(rows, heads))
    return NamedSharding(mesh, P(rows)), cache, whole_on(mesh)


def placed(tree: Any, places: Any) -> Any:
    """Returns shapes with places: one for all, or a tree of them."""
    if isinstance(places, NamedSharding):
        places = jax.tree.map(lambda _: places, tree)
    return jax.tree.map(
        lambda v, place: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place),
        tree,
        places,
    )

"""From abstract params and an optimizer to bytes: nothing is allocated to know them."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Sharding

from .._adapter.shardings import shardings as shardings_of
from .._adapter.shardings import state_shardings
from .._params.layout import AnyMesh, Layout, fitting, unboxed
from .._params.paths import FlatParams, PyTree, is_array, is_box
from .._params.quantized import arrays_of
from .memory import Memory
from .target import Target, counted, entry_of

# An array, or its shape and dtype, and how it is laid out; None: whole everywhere.
Placed = tuple[Any, Sharding | None]


def measure(
    params: PyTree,
    targets: Sequence[Target],
    *,
    optimizer: Any,
    mesh: AnyMesh | None,
    batch: PyTree,
    shardings: PyTree,
    policy: Mapping[str, bool],
) -> Memory:
    """Returns the memory of training `targets` of abstract params; see `Plan.memory`.

    `policy` says how factors are laid out, in the words of `jlora.shardings`.

    Raises:
        TypeError: if the optimizer has no `init`.
        ValueError: if a sharding is not known or does not fit.
    """
    _check_optimizer(optimizer)
    layout = _layout(params, mesh, shardings)
    base = _placed_base(params, layout)
    floats = lambda placed: jnp.issubdtype(placed[0].dtype, jnp.floating)
    flat = FlatParams.of(params)
    pairs = zip(flat.paths, counted(flat, targets), strict=True)
    own = {path: base[path] for path, counts in pairs if counts and path in base}
    floating = {path: placed for path, placed in own.items() if floats(placed)}
    adapter = abstract_adapter(targets)
    place = functools.partial(shardings_of, **policy)
    places = place(layout.nodes, adapter, mesh=layout.mesh)
    factors = list(zip(*map(jax.tree.leaves, (adapter, places)), strict=True))
    inputs = [_placed_input(leaf) for leaf in jax.tree.leaves(batch)]
    return Memory(
        devices=_devices([*base.values(), *inputs]),
        trainable=sum(target.trainable for target in targets),
        params=sum(math.prod(leaf.shape) for leaf, _ in own.values()),
        base=_stored(base.values()),
        factors=_bytes(factors),
        optimizer=_state_bytes(optimizer, adapter, places),
        batch=_bytes(inputs),
        full_gradients=_bytes(floating.values()),
        full_optimizer=_full_state_bytes(optimizer, floating),
        checkpoint=_bytes((leaf, None) for leaf, _ in factors),
        full_checkpoint=_stored((leaf, None) for leaf, _ in own.values()),
    )


def _check_optimizer(optimizer: Any) -> None:
    if not callable(getattr(optimizer, "init", None)):
        raise TypeError(
            "`memory(optimizer=...)` takes an optax optimizer, such as "
            f"`optax.adam(1e-4)`, got {type(optimizer).__name__}"
        )


def abstract_adapter(targets: Iterable[Target]) -> dict[str, Any]:
    """Returns the adapter that `init` gives, as shapes and dtypes."""
    return {target.path: _abstract_entry(target) for target in targets}


def _abstract_entry(target: Target) -> Any:
    return entry_of(target, target.abstract_arrays)


# where the arrays live


def _layout(params: PyTree, mesh: AnyMesh | None, shardings: PyTree) -> Layout:
    if shardings is not None:
        return Layout.of(shardings, mesh=mesh)
    layout = Layout.of(params, mesh=mesh)
    if layout.mesh is not None:
        return layout
    # Nothing says a sharding: one device, and every leaf whole on it, named or not.
    nodes = {path: unboxed(n) if is_box(n) else n for path, n in layout.nodes.items()}
    return Layout(nodes, AbstractMesh((1,), ("device",)), ())


def _placed_base(params: PyTree, layout: Layout) -> dict[str, Placed]:
    """Returns the arrays of the params with their shardings, by path."""
    placed, problems = {}, []
    for path, leaf in FlatParams.of(params).by_path().items():
        if is_array(leaf):
            try:
                placed[path] = leaf, _fitting(layout, path, tuple(leaf.shape))
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return placed


def _fitting(layout: Layout, path: str, shape: tuple[int, ...]) -> Sharding:
    """Returns the sharding of a leaf of the params, which must divide its axes."""
    place = layout.sharding(path, len(shape))
    try:
        place.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"{path!r} {shape} cannot be laid out as {place}: its mesh axes do not "
            "divide those of the leaf; leave them out of its spec"
        ) from error
    return place


def _placed_input(leaf: Any) -> Placed:
    if not is_array(leaf):
        return jax.typeof(leaf), None  # a Python number, which a step takes as an array
    place = getattr(leaf, "sharding", None)
    return leaf, place if isinstance(place, Sharding) else None


def _devices(arrays: Iterable[Placed]) -> int:
    return max((place.num_devices for _, place in arrays if place), default=1)


# bytes


def _state_bytes(optimizer: Any, trained: PyTree, shardings: PyTree) -> int:
    """Returns the bytes of the state of an optimizer on each device."""
    state = jax.eval_shape(optimizer.init, trained)
    places = state_shardings(optimizer, trained, shardings)
    return _bytes(zip(*map(jax.tree.leaves, (state, places)), strict=True))


def _full_state_bytes(optimizer: Any, floating: dict[str, Placed]) -> int | None:
    arrays = {path: leaf for path, (leaf, _) in floating.items()}
    places = {path: place for path, (_, place) in floating.items()}
    try:
        return _state_bytes(optimizer, arrays, places)
    except (TypeError, ValueError):
        return None  # one that is made for adapters alone: it looks for factors


def _bytes(arrays: Iterable[Placed]) -> int:
    """Returns the bytes of arrays on each device; whole where no sharding is given."""
    return sum(_shard_bytes(leaf, place) for leaf, place in arrays)


def _stored(base: Iterable[Placed]) -> int:
    """Returns the bytes of the params on each device; of quantised ones the codes."""
    return _bytes(
        (array, None if place is None else fitting(place, tuple(array.shape)))
        for leaf, place in base
        for array in arrays_of(leaf)
    )


def stored_bytes(leaf: Any) -> int:
    """Returns the bytes of a leaf of the params, whole."""
    return _stored([(leaf, None)])


def _shard_bytes(leaf: Any, place: Sharding | None) -> int:
    shape = tuple(leaf.shape)
    values = math.prod(shape if place is None else place.shard_shape(shape))
    return -(-values * _bits(leaf.dtype) // 8)


def _bits(dtype: Any) -> int:
    """Returns the bits of a value on a device.

    >>> [_bits(jnp.dtype(name)) for name in ("int4", "int8", "bool", "bfloat16")]
    [4, 8, 8, 16]
    """
    if jnp.issubdtype(dtype, jax.dtypes.extended):  # PRNG keys
        return 8 * dtype.itemsize
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    if dtype.itemsize > 1 or dtype.kind == "b":
        return 8 * dtype.itemsize
    info = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return info(dtype).bits

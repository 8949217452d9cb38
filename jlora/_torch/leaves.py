"""Whole leaves between a params tree and the state dict of a torch model."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .._errors import AdapterError
from .fused import alike
from .layout import (
    kernel_from,
    kernel_matrix,
    rope_order,
    sizes,
    weight,
    weight_matrix,
)
from .named_params import Base, Home, check_parts

Get = Callable[[str], np.ndarray]


# --- from torch ---


def leaf_from_torch(base: Base, path: str, get: Get) -> np.ndarray:
    """Returns the values of a leaf from torch's tensors.

    Args:
        base: the params that the leaf belongs to.
        path: the leaf.
        get: returns a tensor by its name; a KeyError is the caller's.

    Raises:
        AdapterError: if a tensor does not fit the leaf.
    """
    binding, shape = base.bindings[path], base.shape(path)
    places = list(base.names_of(path))
    tensors = alike([get(name) for _, name in places])
    found = dict(zip([home for home, _ in places], tensors, strict=True))
    if _is_as_it_is(base, path):
        return _stacked(base, path, found)
    if not _is_matrix(base, path):
        if max(tensor.ndim for tensor in tensors) > 1:
            _check_vectors(base, [path])
        return _vectors(base, path, dict(places), found)
    mats = {home: _matrices(base, home, name, found[home]) for home, name in places}
    fan_in = next(iter(mats.values())).shape[-2]
    axes = base.axes(path, fan_in)
    batch, fans = sizes(shape, axes.batch), axes.fans(shape)
    slots = range(len(binding.slots))
    rows = [
        np.concatenate([mats[Home(path, i, tuple(index))] for i in slots], axis=-1)
        for index in base.indices(path)
    ]
    whole = np.stack(rows)
    if whole.size != math.prod(shape) or whole.shape[-2:] != fans:
        raise AdapterError(
            f"{path!r} {shape} maps {fans[0]} to {fans[1]}; torch's {places[0][1]!r} "
            f"{found[places[0][0]].shape} gives {whole.shape[-2:]}"
        )
    order = rope_order(binding, fans[1], sizes(shape, axes.out))
    if order is not None:
        whole = whole[..., np.argsort(order)]
    return kernel_from(whole.reshape(*batch, *fans), axes, shape)


def _is_matrix(base: Base, path: str) -> bool:
    return base.bindings[path].leaf == "weight" and base.is_kernel(path)


def _is_as_it_is(base: Base, path: str) -> bool:
    """Whether torch has the leaf as it is, at each index of what the names count.

    Of a matrix whose axes are known, its own way tells the same, and knows of parts.
    """
    binding = base.bindings[path]
    if "parameter" in binding.steps:
        return True
    n_axes = len(base.shape(path)) - binding.n_fields
    whole = len(binding.slots) == 1 and binding.slots[0].part is None
    plain = whole and "rope" not in binding.steps
    return "same" in binding.steps and plain and (path not in base.known or n_axes > 2)


def _check_vectors(base: Base, paths: Iterable[str]) -> None:
    """Raises for leaves of several axes that are no kernels, scales or biases.

    Torch has the scale of a norm over several axes in the same order, as one axis or
    more; of any other leaf it is not known which of the axes it has first.

    Raises:
        AdapterError: with all of them.
    """
    doubtful = [
        f"{path!r} {base.shape(path)}"
        for path in paths
        if base.bindings[path].leaf == "weight"
        and path.rpartition("/")[2] != "scale"
        and len(base.shape(path)) - base.bindings[path].n_fields > 1
        and not (_is_matrix(base, path) or _is_as_it_is(base, path))
    ]
    if doubtful:
        raise AdapterError(
            f"the roles of the axes of {', '.join(doubtful[:10])} ({len(doubtful)} in "
            "all) cannot be told from names and shapes; give the plan of a "
            "`jlora.lora` that adapts them, or rules for them with a transform: "
            '"same" for torch\'s own layout, (out, in), "parameter" for a parameter '
            "that torch has as it is"
        )


def _matrices(base: Base, home: Home, name: str, found: np.ndarray) -> np.ndarray:
    """Returns what a place holds of a weight, as `(in, out)`; of experts, of each."""
    binding = base.bindings[home.path]
    if "experts" in binding.steps and found.ndim > 2:
        matrix = np.stack([weight_matrix(expert, binding) for expert in found])
    else:
        matrix = weight_matrix(found, binding)
    return matrix[..., _columns(base, home, name, matrix.shape[-1], matrix.shape[-2])]


def _columns(base: Base, home: Home, name: str, n: int, fan_in: int | None) -> slice:
    """Returns which outputs of a torch tensor belong to a place."""
    homes = base.homes(name)
    check_parts(base, homes, name)
    if len(homes) == 1:
        return slice(None)
    widths = [_width(base, other, fan_in) for other in homes]
    if sum(widths) != n:
        raise AdapterError(
            f"torch's {name!r} has {n} outputs, and its parts {widths}: "
            f"{[h.path for h in homes]}"
        )
    end = sum(widths[: homes.index(home) + 1])
    return slice(end - widths[homes.index(home)], end)


def _width(base: Base, home: Home, fan_in: int | None) -> int:
    if fan_in is None:
        n = base.bindings[home.path].n_fields
        return math.prod(base.shape(home.path)[n:])
    return base.fan_out(home.path, fan_in)


def _vectors(
    base: Base, path: str, names: Mapping[Home, str], found: Mapping[Home, np.ndarray]
) -> np.ndarray:
    binding, shape = base.bindings[path], base.shape(path)
    slots = range(len(binding.slots))

    def piece(home: Home) -> np.ndarray:
        flat = found[home].reshape(-1)
        return flat[_columns(base, home, names[home], flat.size, None)]

    rows = [
        np.concatenate([piece(Home(path, i, tuple(index))) for i in slots])
        for index in base.indices(path)
    ]
    whole = np.stack(rows)
    if whole.size != math.prod(shape):
        raise AdapterError(
            f"{path!r} {shape} has {math.prod(shape)} values, and torch's "
            f"{next(iter(names.values()))!r} gives {whole.size}"
        )
    order = rope_order(binding, whole.shape[1], shape[binding.n_fields :])
    if order is not None:
        whole = whole[:, np.argsort(order)]
    return whole.reshape(shape)


def _stacked(base: Base, path: str, found: Mapping[Home, np.ndarray]) -> np.ndarray:
    shape, n = base.shape(path), base.bindings[path].n_fields
    whole = np.stack(list(found.values()))
    long = lambda sizes: [size for size in sizes if size > 1]
    if whole.size != math.prod(shape) or long(whole.shape[1:]) != long(shape[n:]):
        raise AdapterError(
            f"{path!r} is {shape}, and torch's parameter {whole.shape[1:]}"
        )
    return whole.reshape(shape)


# --- to torch ---


def leaves_to_torch(
    base: Base, paths: Iterable[str], value: Callable[[str], np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns torch's tensors by name; parts of a fused module need to be all there.

    Args:
        base: the params.
        paths: the leaves.
        value: returns the values of a leaf.

    Raises:
        AdapterError: if the roles of a kernel's axes are in doubt or a part is missing.
    """
    paths = list(paths)
    _check_vectors(base, paths)
    pieces: dict[str, dict[int | None, np.ndarray]] = {}
    for path in paths:
        for home, name, part in _pieces(base, path, value(path)):
            number = base.bindings[path].slots[home.slot].part
            pieces.setdefault(name, {})[number] = part
    return {name: _joined(base, name, parts) for name, parts in pieces.items()}


def _pieces(base: Base, path: str, leaf: np.ndarray) -> list[tuple[Home, str, Any]]:
    binding = base.bindings[path]
    split = _split_kernel if _is_matrix(base, path) else _split_vector
    places = list(base.names_of(path))
    if _is_as_it_is(base, path):
        rows = leaf.reshape(-1, *leaf.shape[binding.n_fields :])
        return [
            (home, name, row) for (home, name), row in zip(places, rows, strict=True)
        ]
    parts = split(base, path, leaf)
    return [(home, name, parts[home.index][home.slot]) for home, name in places]


def _split_kernel(base: Base, path: str, leaf: np.ndarray) -> dict[Any, list]:
    binding = base.bindings[path]
    axes = base.axes(path)
    whole, inputs = kernel_matrix(leaf, axes), sizes(leaf.shape, axes.in_)
    order = rope_order(binding, whole.shape[-1], sizes(leaf.shape, axes.out))
    whole = whole if order is None else whole[..., order]
    bounds = np.cumsum(binding.widths(whole.shape[-1]))[:-1]

    def torch(matrix: np.ndarray) -> np.ndarray:
        if matrix.ndim == 2:
            return weight(matrix, binding, inputs)
        return np.stack([weight(expert, binding, inputs) for expert in matrix])

    return {
        tuple(index): [torch(part) for part in np.split(whole[index], bounds, axis=-1)]
        for index in base.indices(path)
    }


def _split_vector(base: Base, path: str, leaf: np.ndarray) -> dict[Any, list]:
    binding = base.bindings[path]
    outputs = leaf.shape[binding.n_fields :]
    whole = leaf.reshape(*leaf.shape[: binding.n_fields], -1)
    order = rope_order(binding, whole.shape[-1], outputs)
    whole = whole if order is None else whole[..., order]
    bounds = np.cumsum(binding.widths(whole.shape[-1]))[:-1]
    return {
        tuple(index): np.split(whole[index], bounds) for index in base.indices(path)
    }


def _joined(
    base: Base, name: str, parts: Mapping[int | None, np.ndarray]
) -> np.ndarray:
    homes = base.homes(name)
    check_parts(base, homes, name)
    if None in parts:
        return parts[None]
    if len(parts) != len(homes):
        raise AdapterError(
            f"torch's {name!r} is made of {[h.path for h in homes]}; some are missing"
        )
    steps = base.bindings[homes[0].path].steps
    ordered = [parts[number] for number in sorted(n for n in parts if n is not None)]
    if ordered[0].ndim == 1:
        return np.concatenate(ordered)
    # The output axis: the first of a weight, the last where torch keeps `(in, out)`.
    last = bool({"embedding", "fan_in_fan_out"} & set(steps))
    first = 1 if "experts" in steps and ordered[0].ndim > 2 else 0
    return np.concatenate(ordered, axis=-1 if last else first)


def check_all_used(base: Base, given: Iterable[str], ignore: Iterable[str]) -> None:
    """Raises if some tensors have no place in the params.

    Raises:
        AdapterError: with the names of them.
    """
    used = {name for path in base.bindings for _, name in base.names_of(path)}
    rest = [
        n for n in given if n not in used and not any(n.endswith(i) for i in ignore)
    ]
    if rest:
        raise AdapterError(
            f"the state dict has {len(rest)} tensors that no leaf takes: {rest[:10]}. "
            "Add rules, or name them (or how they end) in `ignore`"
        )

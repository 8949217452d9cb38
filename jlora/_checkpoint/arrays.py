"""The arrays of a checkpoint, as Orbax takes them and compared with the record."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from .._errors import BaseMismatchError, CorruptFileError
from .._params.paths import FlatParams, PyTree
from .fingerprint import contents, differences, fingerprint
from .record import Record, arrays_of
from .restoring import Arrays


def check_base(record: Record, base: PyTree, place: Any) -> None:
    """Raises if an adapter was saved for another base.

    Raises:
        BaseMismatchError: with all differences.
    """
    paths = FlatParams.of(base).paths
    found = differences(record.kernels, fingerprint(base, record.kernels), paths)
    if found:
        raise BaseMismatchError(
            f"the adapter in {place} was saved for another base:\n"
            + "\n".join(found)
            + "\nGive that base, or `base_mismatch='allow'` if this one is meant"
        )


def check_shapes(found: Any, wanted: Arrays, place: Any) -> None:
    """Raises if arrays have other shapes or dtypes than their record has."""
    ours, theirs = _shapes(found), _shapes(wanted)
    problems = [
        f"array {key} is {ours.get(key)}, and the record has {theirs.get(key)}"
        for key in sorted({**ours, **theirs})
        if ours.get(key) != theirs.get(key)
    ]
    if problems:
        raise CorruptFileError(
            f"the arrays in {place} are not those of its record:\n"
            + "\n".join(problems)
        )


def _shapes(tree: Any) -> dict[str, str]:
    return {
        keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in tree_flatten_with_path(tree)[0]
    }


def check_contents(record: Record, arrays: Arrays, place: Any) -> None:
    """Raises if a bit has changed: of large arrays, Orbax itself would not notice."""
    named = [
        (f"{entry.path!r}, {name}", entry.checksums[name], arrays[str(i)][name])
        for i, entry in enumerate(record.entries)
        for name in arrays_of(entry.value)
    ]
    found = contents([array for _, _, array in named])
    changed = [
        what
        for (what, checksum, _), content in zip(named, found, strict=True)
        if content.checksum != checksum
    ]
    if changed:
        raise CorruptFileError(
            f"{place} has changed since it was written; these arrays have other values "
            "than their checksums say:\n" + "\n".join(changed)
        )


def on_default_device(array: Any) -> jax.Array:
    """Returns what has no place yet where JAX puts it by default."""
    return jnp.array(array) if isinstance(array, np.ndarray) else array


def writable(array: Any) -> Any:
    """Returns the array as Orbax takes it.

    Of several processes, what each has by itself is the same; the first one writes it.
    """
    alone = isinstance(array, jax.Array) and array.is_fully_addressable
    return np.asarray(array) if alone and jax.process_count() > 1 else array

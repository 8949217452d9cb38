"""What is asked of an entry of an adapter, of whatever variant it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from .._params.axes import KernelAxes, Shape
from .variants import variant_of_entry


def axes_of(entry: Any) -> KernelAxes | None:
    """Returns the roles of a kernel's axes; None for a leaf that is trained whole."""
    return entry.axes if variant_of_entry(entry).has_roles else None


def kernel_shape(entry: Any) -> Shape:
    """Returns the shape of the kernel of an entry."""
    if axes_of(entry) is None:
        return tuple(entry.shape)
    return entry.kernel_shape


def lowered(entry: Any, kernel: Any) -> Any:
    """Returns an entry as `LoraFactors`; an array of a leaf trained whole as it is."""
    return variant_of_entry(entry).lowered(entry, kernel)


def static_of(entry: Any) -> tuple[dict[str, Any], Shape, KernelAxes | None]:
    """Returns the settings of an entry, and the shape and the roles of its kernel."""
    settings = variant_of_entry(entry).settings_of(entry)
    return settings, kernel_shape(entry), axes_of(entry)


def are_alike(entries: Sequence[Any]) -> bool:
    """Returns whether entries are of one kind, with the same settings and kernel."""
    kinds = {variant_of_entry(entry) for entry in entries}
    return len(kinds) == 1 and all(
        static_of(entry) == static_of(entries[0]) for entry in entries[1:]
    )


def arrays_of(entry: Any) -> dict[str, Any]:
    """Returns the arrays of one entry of an adapter, by name."""
    return variant_of_entry(entry).arrays(entry)


def entry_with(entry: Any, arrays: Mapping[str, Any]) -> Any:
    """Returns the entry with other arrays, as `arrays_of` names them."""
    return variant_of_entry(entry).replaced(entry, arrays)


def wanted_shapes(entry: Any, shape: Shape) -> dict[str, Shape]:
    """Returns the shapes that the arrays of an entry need for a kernel of a shape."""
    variant = variant_of_entry(entry)
    rank = None if variant.rank is None else entry.rank
    shapes = variant.shapes(axes_of(entry), shape, rank, **variant.settings_of(entry))
    has = variant.arrays(entry)
    return {n: s for n, s in shapes.items() if n in has or n not in variant.optional}


def given_shapes(entry: Any) -> dict[str, Shape]:
    """Returns the shapes that the arrays of an entry have."""
    return {name: tuple(array.shape) for name, array in arrays_of(entry).items()}

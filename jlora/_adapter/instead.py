"""What was given in place of an adapter, or of the params that it belongs to."""

from collections.abc import Collection, Mapping
from typing import Any

import jax

from .._errors import AdapterError
from .._params.given import described
from .._params.paths import FlatParams, PyTree, is_box
from .variants import variant_of_entry

ORDER = (
    "The adapter is the argument after the params, as in `lora.apply(params, adapter, "
    "x)`"
)


def has_entries(tree: Any) -> bool:
    """Returns whether a tree is a mapping with factors, or rows, of kernels in it."""
    if not isinstance(tree, Mapping):
        return False
    return any(variant_of_entry(entry).has_roles for entry in tree.values())


def check_order(params: PyTree, adapter: Any, order: str = ORDER) -> None:
    """Raises if an adapter is none, or is given as the params.

    Args:
        params: what is given as the params.
        adapter: what is given as the adapter.
        order: a sentence on the order of the arguments.

    Raises:
        TypeError: if the adapter is no mapping.
        AdapterError: if both are swapped.
    """
    if not isinstance(adapter, Mapping):
        state = hasattr(adapter, "params") and hasattr(adapter, "opt_state")
        hint = "Of a training state it is `state.params`" if state else order
        raise TypeError(
            "an adapter is a dict from path to `LoraFactors` or array, got "
            f"{described(adapter)}. {hint}"
        )
    if has_entries(params) or _are_leaves_of(params, adapter):
        both = not has_entries(adapter)
        told = ", and the params as the adapter: they are swapped" if both else ""
        raise AdapterError(
            f"an adapter, of {next(iter(params))!r}, is given as the params{told}. "
            f"{order}"
        )


def _are_leaves_of(params: PyTree, adapter: Mapping[str, Any]) -> bool:
    """Whether the leaves of what is given as params are entries for the other."""
    if not isinstance(params, Mapping) or not params or set(adapter) & set(params):
        return False
    try:
        return set(params) <= set(FlatParams.of(adapter).paths)
    except ValueError:  # no tree of params
        return False


_STACKED = (
    "\nThese seem to be stacked adapters: `jlora.take(stacked, i)` is one of them, and "
    "`lora.apply_mixed` takes them all"
)


def likely(adapter: Mapping[str, Any], leaves: Mapping[str, Any]) -> str:
    """Returns a line on what seems to be meant where an adapter does not fit.

    Args:
        adapter: the adapter.
        leaves: the leaves of the params by path.
    """
    inner = [str(key) for key, value in adapter.items() if has_entries(value)]
    if inner:
        return f"\nIt holds an adapter: give the one at {inner[0]!r}"
    if not (set(adapter) & set(leaves) or has_entries(adapter)):
        return f"\nThis is no adapter. {ORDER}: is it forgotten?"
    if adapter.keys() <= leaves.keys():
        return _STACKED if _are_stacked(adapter) else ""
    if all(path.removeprefix("params/") in leaves for path in adapter):
        return '\nThe paths begin with "params/": give `{"params": params}`'
    if all(f"params/{path}" in leaves for path in adapter):
        return '\nThe adapter is for what is in "params": give `variables["params"]`'
    return ""


def _are_stacked(adapter: Mapping[str, Any]) -> bool:
    """Whether each entry has arrays with one leading axis more, all of one size."""
    sizes = set()
    for entry in adapter.values():
        axes = getattr(entry, "axes", None)
        a = getattr(entry, "a", None)
        if axes is None or a is None:
            continue
        if len(a.shape) != len(axes.batch) + len(axes.in_) + 2:
            return False
        sizes.add(a.shape[0])
    return len(sizes) == 1


def check_unboxed(adapter: Mapping[str, Any]) -> None:
    """Raises if arrays of an adapter are in boxes, which no function takes.

    Raises:
        AdapterError: that says how to take them out.
    """
    for path, entry in adapter.items():
        nodes: Collection[Any] = jax.tree.leaves(entry, is_leaf=is_box)
        boxes = [type(node) for node in nodes if is_box(node)]
        if boxes:
            variable = hasattr(boxes[0], "get_raw_value")
            how = "`nnx.as_pure(adapter)` (before Flax 0.12.7 `nnx.pure`)"
            how = how if variable else "`jlora.linen.unbox(adapter)`"
            name = f"nnx.{boxes[0].__name__}" if variable else boxes[0].__name__
            raise AdapterError(
                f"the arrays of {path!r} are in `{name}`, of which the function would "
                f"see the box: give {how}"
            )

"""Whether a kernel is that of a convolution, and in which order its axes are.

A kernel `(3, 4, 16)` may be that of a convolution, or of a product over three heads of
size four: the shape is the same, and torch's layouts are not.
"""

from .._errors import AdapterError
from .._params.axes import KernelAxes
from .named_params import Base

# What a rule says only of linear layers and of tables.
_NO_WINDOW = frozenset(
    ("embedding", "experts", "fan_in_fan_out", "linear", "mha", "parameter", "rope")
)
_QUERIES = ("query", "query_proj", "q", "q_proj", "wq", "to_q")


def check_written(base: Base, path: str, axes: KernelAxes) -> None:
    """Refuses a kernel of which it is not known whether torch has it with a window.

    Args:
        base: the params.
        path: the kernel.
        axes: the roles of its axes.

    Raises:
        AdapterError: if neither a plan nor its rule nor its neighbours tell, or the
            rule means another order of the axes.
    """
    _check_order(base, path, axes)
    if not _is_known(base, path, axes):
        raise AdapterError(_doubt(base, path, "its name and shape do not tell"))


def check_read(base: Base, path: str, fan_in: int, has_window: bool) -> None:
    """Refuses factors of a convolution for a linear layer, and the other way round.

    Args:
        base: the params.
        path: the kernel.
        fan_in: the size of the input side in the file.
        has_window: whether the factors in the file have a window.

    Raises:
        AdapterError: if it is so, or the roles of the axes are not known.
    """
    steps, shape = base.bindings[path].steps, base.shape(path)
    if has_window and _NO_WINDOW & set(steps):
        raise AdapterError(
            f"{path!r} {shape} is no convolution's kernel by its rule, {_told(steps)}, "
            "and the file has the factors of one"
        )
    if "conv" in steps and not has_window:
        raise AdapterError(
            f"{path!r} {shape} is a convolution's kernel, and the file has the factors "
            f"of a linear layer of {fan_in} inputs, in an order that it does not tell"
        )
    if len(shape) < 3 or ({"same"} | _NO_WINDOW) & set(steps):
        return
    axes = base.axes(path, fan_in)
    _check_order(base, path, axes)
    if not (has_window or _is_known(base, path, axes)):
        told = f"the file has a linear layer of {fan_in} inputs"
        raise AdapterError(_doubt(base, path, told))


def _is_known(base: Base, path: str, axes: KernelAxes) -> bool:
    """Returns whether something tells if a kernel is one of a convolution."""
    binding = base.bindings[path]
    first, *others = binding.slots
    told = {"conv", "same"} | _NO_WINDOW
    fused = bool(others) or first.part is not None
    one_matrix = len(axes.in_) < 2 or len(axes.out) != 1  # no kernel with a window
    known = bool(base.uses.get(path) or told & set(binding.steps))
    return one_matrix or fused or known or _joins_heads(base, path, axes)


def _joins_heads(base: Base, path: str, axes: KernelAxes) -> bool:
    """Returns whether a kernel is the last of an attention, by the query beside it."""
    module, _, last = path.rpartition("/")
    parent = module.rpartition("/")[0]
    beside = [f"{parent}/{query}/{last}".lstrip("/") for query in _QUERIES]
    heads = tuple(base.shape(path)[i] for i in axes.in_)
    return any(q in base.leaves and base.shape(q)[-2:] == heads for q in beside)


def _check_order(base: Base, path: str, axes: KernelAxes) -> None:
    """Raises for a transform that means other axes than a kernel has.

    Raises:
        AdapterError: with the transform that there is for them.
    """
    steps = set(base.bindings[path].steps)
    if len(axes.in_) < 2 or not axes.out or "experts" in steps:
        return
    first, last = axes.out[0] < min(axes.in_), axes.out[-1] > max(axes.in_)
    if ("conv" in steps and first) or ("same" in steps and last):
        fits = (
            ("same", "(out, in, *window)") if first else ("conv", "(*window, in, out)")
        )
        raise AdapterError(
            f"{path!r} {base.shape(path)} has its outputs "
            f"{'first' if first else 'last'}"
            f'; its rule needs the transform "{fits[0]}", which is for {fits[1]}'
        )


def _doubt(base: Base, path: str, told: str) -> str:
    return (
        f"{path!r} {base.shape(path)} has several input axes, and whether it is the "
        f"kernel of a convolution or of a linear layer is not known: {told}. Give a "
        'plan instead of the params, or a rule for it with the transform "conv" or '
        '"linear"'
    )


def _told(steps: object) -> str:
    return "+".join(map(repr, steps))  # type: ignore[arg-type]

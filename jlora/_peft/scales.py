"""PEFT's files of IA3: a scale of the inputs, or of the outputs, of each module.

A scale goes to its leaf as factors of rank one do, which are fused, split, stacked and
put in another order on the way: of its outputs as `a = 1`, `b = scale - 1`, of its
inputs the other way round. They are in float64, so that nothing is lost.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .._adapter.factors import LoraFactors
from .._adapter.variants import variant_of_peft
from .._errors import AdapterError, CorruptFileError, UnsupportedFeatureError
from .._files.patterns import file_pattern
from .._params.given import listed
from .._torch.modules import TorchModule
from .._torch.named_params import Base, Home
from .keys import PREFIX

Array = np.ndarray
Tensors = Mapping[str, Array]
INPUTS = "inputs"
_VARIANT = variant_of_peft("IA3")


def with_sides(
    own: Mapping[str, Tensors], values: Mapping[str, Any], where: str
) -> dict[str, Tensors]:
    """Tells the modules whose inputs are scaled by a further tensor, `INPUTS`.

    The shape of a matrix tells it; of a convolution and of a single value it is
    `feedforward_modules` of the config, as for PEFT.

    Raises:
        CorruptFileError: if that field is neither names nor a regex.
    """
    given = values.get("feedforward_modules") or []
    try:
        chosen = _chooser(given)
        told = {
            module: chosen(module.removeprefix(PREFIX))
            if scale.ndim > 2 or scale.size == 1
            else len(scale) == 1
            for module, parts in own.items()
            if (scale := parts.get("l")) is not None
        }
    except (TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{where}: `feedforward_modules` is {str(given)[:100]}: {error}"
        ) from error
    flag = {INPUTS: np.ones(())}
    return {m: {**parts, **(flag if told.get(m) else {})} for m, parts in own.items()}


def _chooser(given: Any) -> Callable[[str], bool]:
    """Returns what a list of ends of names, or a regex of whole names, chooses."""
    if isinstance(given, str):
        return file_pattern(given)
    if not (isinstance(given, list) and all(isinstance(one, str) for one in given)):
        raise TypeError("it is a list of names, or a regex")
    ends, lengths = {*given}, {len(one) for one in given}
    return lambda name: any(name[len(name) - n :] in ends for n in lengths)


def as_factors(parts: Tensors) -> tuple[Array, Array]:
    """Returns `(out, 1)` and `(1, in)` of a module's scale.

    The side that the file does not tell has one place, see `fitted_scale`.

    Raises:
        ValueError: if it is no vector with further axes of one.
    """
    scale, one = parts["l"], np.ones((1, 1))
    if scale.ndim < 2 or scale.size != max(scale.shape[:2]):
        raise ValueError("a scale is of inputs, (1, in), or of outputs, (out, 1)")
    change = scale.reshape(-1).astype(np.float64) - 1
    return (one, change[None]) if INPUTS in parts else (change[:, None], one)


def fitted_scale(module: TorchModule, homes: Sequence[Home], base: Base) -> TorchModule:
    """Returns a module with as many inputs, or outputs, as its kernel has.

    Raises:
        UnsupportedFeatureError: if PEFT changes something else there.
    """
    path = homes[0].path
    binding, shape = base.bindings[path], base.shape(path)
    of_outputs = np.array_equal(module.a, [[1]])
    axes = base.axes(path, None if of_outputs else len(module.a))
    fan_in, fan_out = axes.fans(shape)
    window = binding.window(tuple(shape[i] for i in axes.in_))
    a, b = module.a, module.b
    if "experts" in binding.steps:
        raise UnsupportedFeatureError(
            f"{module.name!r} packs experts, of which PEFT's IA3 has no scales"
        )
    if of_outputs:
        check_no_biases([module.name], base)
        a = np.ones((fan_in, 1))
    elif window or len(homes) > 1 or len(binding.slots) > 1:
        what = "of a convolution" if window else "of a part of a fused kernel"
        raise UnsupportedFeatureError(
            f"{module.name!r}: a scale of the inputs {what}, {path!r}, has no place in "
            "jlora. Merge it in PEFT: `merge_and_unload`"
        )
    else:
        b = np.ones((1, fan_out))
    return TorchModule(module.name, a, b, window=window)


def check_no_biases(names: Sequence[str], base: Base) -> None:
    """Refuses scales of outputs of modules with a bias, which PEFT scales along.

    Raises:
        UnsupportedFeatureError: with their names.
    """
    biased = [name for name in names if base.homes(f"{name}.bias")]
    if biased:
        raise UnsupportedFeatureError(
            "PEFT's IA3 scales the biases of these along with their outputs, and "
            f"jlora the kernels alone: {listed(biased)}\nMerge such a file in PEFT, or "
            "adapt modules without a bias"
        )


def scale_of(path: str, factors: LoraFactors) -> Any:
    """Returns the scale that the factors of a leaf stand for, in float32.

    Raises:
        AdapterError: if some of its layers scale inputs, and others outputs.
    """
    axes, shape = factors.axes, factors.kernel_shape
    count = [shape[i] for i in axes.batch]
    fan_in, fan_out = axes.fans(shape)
    a = np.asarray(factors.a).reshape(*count, fan_in, -1)
    b = np.asarray(factors.b).reshape(*count, -1, fan_out).swapaxes(-1, -2)
    one_side = {"out": (a, b, axes.out), "in": (b, a, axes.in_)}
    for side, (ones, change, own) in one_side.items():
        # Layers that the file has nothing for are zeros on both sides.
        idle = ~change.any(axis=-2, keepdims=True)
        if ((ones == 1) | idle).all() and (side == "out" or ones.shape[-1] == 1):
            scale = 1 + change.sum(axis=-1)
            sizes = [*count, *(shape[i] for i in own)]
            found = scale.reshape(sizes).astype(np.float32)
            return _VARIANT.entry(found, axes, side, shape)
    raise AdapterError(
        f"{path!r}: the file scales the inputs of some of its layers and the outputs "
        "of others; jlora has one side for all of a stack"
    )


def scales_of(factors: Mapping[str, LoraFactors]) -> dict[str, Any]:
    """Returns the scales by path, see `scale_of`."""
    return {path: scale_of(path, entry) for path, entry in factors.items()}

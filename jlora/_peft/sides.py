"""At which side of packed experts the factors of a file are.

A parameter of experts has the axes (experts, first, last). `lora_A` is `(E·rank, x)`:
which of the two x is, neither the file nor its config says. Releases of PEFT differ,
and from 0.19 on the module does, by its `is_transposed`.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from .._errors import AdapterError, UnsupportedFeatureError
from .._torch.modules import TorchModule
from .._torch.named_params import Base, Home
from .._torch.names import Binding

Version = tuple[int, int, int]
FIRST, LAST = 1, 2


def version_of(value: Any) -> Version | None:
    """Returns the release in `peft_version`, if a file names one.

    Example:
        >>> version_of("0.19.1.dev0"), version_of(None)
        ((0, 19, 1), None)
    """
    text = value if isinstance(value, str) else ""
    found = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?(?!\d)", text)
    return None if found is None else tuple(int(n or 0) for n in found.groups())  # type: ignore[return-value]


def axis_of_a(in_first: bool | None, version: Version | None) -> int | None:
    """Returns the axis of (experts, first, last) that `lora_A` is at, if it is known.

    Args:
        in_first: whether the module says that its experts are (experts, in, out).
        version: the release of PEFT.
    """
    if version is None:
        return None
    if version < (0, 19, 0):
        return FIRST
    if in_first is None:
        return None
    # Release 0.19.0 took the flag for its opposite (huggingface/peft#3165).
    last = in_first == (version == (0, 19, 0))
    return LAST if last else FIRST


def by_shapes(shapes: Sequence[tuple[int, int]], factors: Sequence[Any]) -> int | None:
    """Returns the axis that `lora_A` is at in all parameters of a module, if told.

    PEFT asks the module, so that it is the same for all of its parameters, and one
    that is not square tells.

    Args:
        shapes: (first, last) of each parameter.
        factors: what `lora_A` and `lora_B` of it have, (x, y).
    """
    axes = set()
    for shape, given in zip(shapes, factors, strict=True):
        if given == shape != shape[::-1]:
            axes.add(FIRST)
        elif given == shape[::-1] != shape:
            axes.add(LAST)
    return axes.pop() if len(axes) == 1 else None


def exchanged(
    modules: Sequence[TorchModule], version: Version | None, base: Base
) -> dict[str, bool]:
    """Returns whether `lora_A` is at the outputs, by name of a parameter of experts.

    Of a square one whose side nothing tells there is no answer.

    Args:
        modules: the factors in a file by parameter, all experts of one together.
        version: the release of PEFT that wrote it.
        base: the params.
    """
    owners: dict[str, list[tuple[str, tuple[int, int], tuple[int, int], Binding]]] = {}
    for module in modules:
        homes = base.homes(module.name)
        if homes and base.experts(homes[0].path) is not None:
            given = (module.a.shape[0], module.b.shape[1])
            binding = base.bindings[homes[0].path]
            own = (module.name, _fans(homes, given, base), given, binding)
            owners.setdefault(module.name.rpartition(".")[0], []).append(own)
    found = {}
    for several in owners.values():
        _, fans, given, _ = zip(*several, strict=True)
        told = by_shapes(fans, given)  # of (in, out), so that "first" is the input
        for name, own_fans, own_given, binding in several:
            if own_given not in (own_fans, own_fans[::-1]):
                found[name] = False  # said where it is placed
            elif told is not None:
                found[name] = told == LAST
            elif (axis := axis_of_a(_says_so(binding), version)) is not None:
                found[name] = axis != (FIRST if _in_first(binding) else LAST)
    return found


def _fans(homes: Sequence[Home], given: tuple[int, int], base: Base) -> tuple[int, int]:
    """Returns (in, out) of a parameter; (0, 0) if the factors fit neither way."""
    for fan_in in given:
        try:
            fans = [base.axes(h.path, fan_in).fans(base.shape(h.path)) for h in homes]
            binding = base.bindings[homes[0].path]
            if len(binding.slots) > 1:  # fused in JAX alone
                return fans[0][0], binding.widths(fans[0][1])[homes[0].slot]
        except AdapterError:
            continue
        return fans[0][0], sum(out for _, out in fans)
    return 0, 0


def _in_first(binding: Binding) -> bool:
    return "fan_in_fan_out" in binding.steps


def _says_so(binding: Binding) -> bool:
    """Whether the module says that its experts are (experts, in, out)."""
    return _in_first(binding) and "swapped" not in binding.steps


def as_written(module: TorchModule) -> TorchModule:
    """Returns the factors of an expert at the sides where PEFT has them."""
    if not {"swapped", "experts"} <= set(module.steps) or module.expert is None:
        return module
    return dataclasses.replace(module, a=module.b.T, b=module.a.T)


def refuse_square(names: Sequence[str], why: str, where: str) -> None:
    """Raises for square weights of which nothing tells the layout.

    Raises:
        UnsupportedFeatureError: with their names.
    """
    if names:
        raise UnsupportedFeatureError(
            f"{where}: {', '.join(map(repr, names[:5]))} ({len(names)} in all) are "
            f"square, so that the shapes of the factors do not tell their layout, and "
            f"{why}; a delta could be added transposed"
        )


NO_VERSION = (
    "PEFT 0.18 and 0.19 keep the factors of experts on opposite sides, and the file's "
    "`peft_version` does not say which release wrote it: write the release there"
)

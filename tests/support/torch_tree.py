"""Params with the paths of the mechanical map, from the parameters of a torch model."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.peft import Rule

# Kinds whose packed experts are (experts, in, out), and whether the module says so.
IN_FIRST = {
    "gpt_oss": "experts+fan_in_fan_out",
    "llama4_text": "experts+fan_in_fan_out+swapped",
}


def as_params(state: Mapping[str, Any], kinds: Mapping[str, str], kind: str) -> Any:
    """Returns nested params: `a.b.weight` of a linear layer is `a/b/kernel`, turned.

    Args:
        state: the parameters by name.
        kinds: the class of the module that has each.
        kind: `model_type` of the model.
    """
    params: dict[str, Any] = {}
    for name, value in state.items():
        parts, order = _leaf(name, kinds[name], value.ndim, kind)
        node = params
        for part in parts[:-1]:
            node = node.setdefault(part, {})
        node[parts[-1]] = np.ascontiguousarray(np.transpose(value, order))
    return params


def as_state(params: Any, like: Any, kinds: Mapping[str, str], kind: str) -> Any:
    """Returns the parameters again, of the names and ranks of `like`."""
    found = {}
    for name, value in like.items():
        parts, order = _leaf(name, kinds[name], value.ndim, kind)
        node = params
        for part in parts:
            node = node[part]
        found[name] = np.transpose(np.asarray(node), np.argsort(order))
    return found


def rules(
    state: Mapping[str, Any],
    kinds: Mapping[str, str],
    kind: str,
    convolutions: bool = False,
) -> Any:
    """Returns rules for all leaves, where packed experts need them, or None.

    They are needed by adapted convolutions, too.
    """
    packed = [n for n, value in state.items() if _is_packed(n, value.ndim)]
    packed.sort(key=lambda name: ("down_proj" in name, name))
    if not (packed or convolutions):
        return None
    found = [_rule(n, kinds, 3, kind, IN_FIRST.get(kind, "experts")) for n in packed]
    for name, value in state.items():
        if name not in packed:
            parts, _ = _leaf(name, kinds[name], value.ndim, kind)
            transform = "conv" if value.ndim > 2 and parts[-1] == "kernel" else None
            found.append(_rule(name, kinds, value.ndim, kind, transform))
    return found


def _rule(
    name: str, kinds: Mapping[str, str], ndim: int, kind: str, transform: str | None
) -> Rule:
    parts, _ = _leaf(name, kinds[name], ndim, kind)
    if _is_packed(name, ndim):
        return Rule(re.escape("/".join(parts)), name, transform)
    if parts[-1] not in ("kernel", "embedding", "scale", "bias"):
        return Rule(re.escape("/".join(parts)), name, "parameter")
    return Rule(re.escape("/".join(parts[:-1])), ".".join(parts[:-1]), transform)


def _is_packed(name: str, ndim: int) -> bool:
    return ndim == 3 and ".experts." in name and not name.endswith(".weight")


def _leaf(
    name: str, owner: str, ndim: int, kind: str
) -> tuple[list[str], tuple[int, ...]]:
    """Returns the path of a leaf, and which axes of the parameter its own are."""
    *parts, last = name.split(".")
    same = tuple(range(ndim))
    if _is_packed(name, ndim):
        return [*parts, last, "kernel"], same if kind in IN_FIRST else (0, 2, 1)
    if last != "weight":
        return [*parts, last], same
    if "Embedding" in owner and ndim == 2:
        return [*parts, "embedding"], same
    if ndim == 1:
        return [*parts, "scale"], same
    turned = owner == "Conv1D" and ndim == 2  # (in, out), of transformers
    return [*parts, "kernel"], same if turned else (*range(2, ndim), 1, 0)

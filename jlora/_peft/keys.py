"""The keys of an `adapter_model.safetensors`: which tensor is what of which module."""

import re
import warnings
from collections.abc import Mapping

import numpy as np

from .._errors import AdapterError, CorruptFileError, UnsupportedFeatureError
from .._torch.modules import TorchModule, misfit

PREFIX = "base_model.model."
NAME_LIMIT = 512
MAGNITUDE = "lora_magnitude_vector"
BIAS = "lora_B.bias"
_BESIDE = {MAGNITUDE, BIAS}  # what a module may have beside its factors

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A\.weight|lora_B\.weight|lora_B\.bias"
    r"|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?P<end>\.weight)?"
)
_KINDS = (
    "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    "|trainable_tokens_delta"
)
_OF_ADAPTER = re.compile(
    rf".+\.(?:{_KINDS})\.(?!(?:weight|bias)$)(?P<adapter>[\w-]+)(?:\.weight|\.bias)?"
)
# What PEFT wraps around a module that it saves whole.
_TRAINED, _FROZEN = ".modules_to_save.", ".original_module."
# Tensors of variants that jlora does not read yet, by what is in their names.
_VARIANTS = {
    "lora_E": "AdaLoRA's singular values",
    "lora_diag": "KaSA's diagonal",
    "lora_velora_embed": "VeLoRA's projections",
}


def sort_keys(
    tensors: Mapping[str, np.ndarray], where: str
) -> tuple[dict[str, TorchModule], dict[str, np.ndarray]]:
    """Returns the factors by module, and what is trained whole by name.

    Args:
        tensors: the tensors by their keys in the file.
        where: the name of the file, for messages.

    Raises:
        CorruptFileError: if a name is absurd.
        UnsupportedFeatureError: if a tensor belongs to a variant that jlora has not.
        AdapterError: if a factor lacks its partner, or they do not fit each other.
    """
    factors: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, np.ndarray] = {}
    for key, tensor in zip(_names(tensors, where), tensors.values(), strict=True):
        found = _FACTOR.fullmatch(key)
        if found and not (found["end"] and found["kind"] != MAGNITUDE):
            factors.setdefault(found["module"], {})[found["kind"]] = tensor
        else:
            whole[key] = tensor
    problems = [
        p for module, kinds in factors.items() if (p := _problem(module, kinds))
    ]
    if problems:
        raise AdapterError(f"{where}: " + "; ".join(problems[:20]))
    modules = {name: _module(name, kinds) for name, kinds in factors.items()}
    return modules, _said_once(whole, where)


def _said_once(whole: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Returns what is trained whole, each under one name.

    With `bias="all"` PEFT writes a bias of a saved module under three: its own and the
    trained one within the wrapper, which are the same, and the frozen one.

    Raises:
        AdapterError: if the two that are trained differ.
    """
    found: dict[str, np.ndarray] = {}
    for key, tensor in whole.items():
        if _FROZEN in f".{key}":
            continue
        name = f".{key}".replace(_TRAINED, ".").removeprefix(".")
        if name in found and not np.array_equal(found[name], tensor):
            raise AdapterError(f"{where} has two values of {name!r}, one in {key!r}")
        found[name] = tensor
    return found


def _names(tensors: Mapping[str, np.ndarray], where: str) -> list[str]:
    """Returns the keys without PEFT's prefix, which all or none of them have."""
    odd = [k[:80] for k in tensors if len(k) > NAME_LIMIT or not k.isprintable()]
    if odd:
        raise CorruptFileError(f"{where}: the keys {odd[:3]} are no names of modules")
    prefixed = [key for key in tensors if key.startswith(PREFIX)]
    if prefixed and len(prefixed) < len(tensors):
        others = sorted(set(tensors) - set(prefixed))
        raise AdapterError(
            f"{where}: {len(prefixed)} keys begin with {PREFIX!r} and {others[:3]} not"
        )
    variants = {
        what: key for key in tensors for part, what in _VARIANTS.items() if part in key
    }
    if variants:
        told = "; ".join(f"{what} ({key!r})" for what, key in variants.items())
        raise UnsupportedFeatureError(f"{where} holds what jlora has not: {told}")
    return _without_adapter([key.removeprefix(PREFIX) for key in tensors], where)


def _without_adapter(keys: list[str], where: str) -> list[str]:
    """Returns the keys without the name of the adapter, as PEFT writes its files.

    A model's own state dict has it: `q.lora_A.default.weight`.

    Raises:
        AdapterError: if there are several adapters, or some factors have none.
    """
    found = [_OF_ADAPTER.fullmatch(key) for key in keys]
    names = sorted({match["adapter"] for match in found if match})
    if not names:
        return keys
    bare = [
        key
        for key, match in zip(keys, found, strict=True)
        if match is None and _FACTOR.fullmatch(key)
    ]
    if len(names) > 1 or bare:
        raise AdapterError(
            f"{where} has the adapters {names[:5]} in its keys"
            + (f", and without one {bare[:3]}" if bare else "")
            + "; save one of them by PEFT's `save_pretrained`"
        )
    end = re.compile(rf"\.({_KINDS}|modules_to_save)\.{re.escape(names[0])}(?=\.|$)")
    return [end.sub(r".\1", key) for key in keys]


def warn_of_doubling(module: str) -> None:
    """Says that PEFT 0.21 computes something else for the output of an attention."""
    warnings.warn(
        f"PEFT up to 0.21 adds the delta of {module!r} twice, its gradient once "
        "(huggingface/peft#3774); jlora adds it once",
        stacklevel=2,
    )


_PAIRS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_embedding_A", "lora_embedding_B"),
)


def _problem(module: str, kinds: Mapping[str, np.ndarray]) -> str | None:
    factors = sorted(kinds.keys() - _BESIDE)
    if tuple(factors) not in _PAIRS:
        return f"{module!r} has {sorted(kinds)}; it needs both factors, of one kind"
    a, b = (kinds[kind] for kind in factors)
    if problem := misfit(a, b):
        return f"{module!r} {problem}"
    magnitude = kinds.get(MAGNITUDE)
    if magnitude is not None and magnitude.shape not in (
        b.shape[:1],
        (1, b.shape[0], *b.shape[2:]),
    ):
        return f"{module!r} has {b.shape[0]} outputs and a magnitude {magnitude.shape}"
    bias = kinds.get(BIAS)
    if bias is not None and (bias.shape != b.shape[:1] or "lora_B.weight" not in kinds):
        return f"{module!r} has {sorted(factors)} and a bias of `b` {bias.shape}"
    return None


def _module(name: str, kinds: Mapping[str, np.ndarray]) -> TorchModule:
    a, b = (kinds[kind] for kind in sorted(kinds.keys() - _BESIDE))
    return TorchModule.of_torch(
        name,
        a,
        b,
        magnitude=kinds.get(MAGNITUDE),
        bias=kinds.get(BIAS),
        is_table="lora_embedding_A" in kinds,
    )


def check_dora(steps: Mapping[str, str | None], module: str) -> None:
    """Raises where PEFT has no DoRA, or means another norm than jlora."""
    kinds = {
        "experts": "an adapted parameter, which PEFT has no DoRA for",
        "mha": "a fused attention, which PEFT has no DoRA for",
        "tied": "a tied table, of which PEFT's head has a norm of its own",
    }
    for step, what in kinds.items():
        if step in steps:
            raise UnsupportedFeatureError(f"{module!r} has a magnitude and is {what}")

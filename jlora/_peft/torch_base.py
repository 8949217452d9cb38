"""The weights of a torch model as the params that a PEFT adapter is for."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import AdapterError, UnsupportedFeatureError
from .._files.model_files import Weights
from .._params.axes import KernelAxes
from .._torch.modules import TorchModule
from .._torch.named_params import Base
from .._torch.names import Rule
from .read import AdapterFiles

# Of these a weight can take a sum; the others are codes, or too coarse for one.
_SUMMED = frozenset(map(np.dtype, (np.float16, jnp.bfloat16, np.float32, np.float64)))


def torch_base(weights: Weights, files: AdapterFiles) -> Base:
    """Returns the weights as params under torch's own names and layouts.

    A weight is `(out, in, *window)` then, a table `(rows, features)`.

    Raises:
        UnsupportedFeatureError: if weights that the adapter changes are quantised.
        AdapterError: if the config selects weights that the file has no factors for.
    """
    # PEFT writes an adapted table along, which must be that of the base.
    copied = any(name.endswith(".base_layer.weight") for name in files.whole)
    tables = {f"{m}.weight" for m, t in files.modules.items() if t.is_table and copied}
    # `lora_bias` is added to the module's own bias.
    biases = {f"{m}.bias" for m in files.modules if files.config.lora_bias}
    leaves: dict[str, Any] = {
        name: weights[name] if name in tables | biases else weights.shape(name)
        for name in weights
    }
    _check_summed(leaves, files)
    _check_complete(leaves, files)
    chosen = files.config.selects_parameter
    rules, axes = [], {}
    for module, tensors in files.modules.items():
        name = module.replace(".base_layer.", ".")
        for leaf, step in _WEIGHTS.items():
            weight = f"{name}.{leaf}"
            if weight in leaves and not chosen(weight):
                steps = _steps(tensors, leaves, files)
                rules.append(Rule(re.escape(weight), name, f"{step}+{steps}"))
                axes[weight] = _axes(tensors, len(leaves[weight].shape), files)
    for name, fitting in _parameter_axes(leaves, files).items():
        rules.append(Rule(re.escape(name), name, "experts+same"))
        axes[name] = fitting
    rules.append(Rule(r"(?P<name>.*)", "{name}", "parameter"))
    return Base.of(leaves, rules, axes)


_WEIGHTS = {"weight": "same", "in_proj_weight": "mha"}


def _parameter_axes(
    leaves: Mapping[str, Any], files: AdapterFiles
) -> dict[str, KernelAxes]:
    """Returns the roles of the axes of adapted parameters, in the order of wrapping.

    Torch's modules define the input of a feed-forward layer before its output; whether
    experts are kept as `(experts, out, in)` or as `(experts, in, out)`, their factors
    tell, which are `(E·rank, in)` and `(out, rank·E)`.
    """
    named = [name for name in leaves if files.config.selects_parameter(name)]
    found = {}
    for name in sorted(named, key=lambda name: (name.endswith("down_proj"), name)):
        shape = leaves[name].shape
        owner = name.rpartition(".")[0]
        fans = {
            (tensors.a.shape[0], tensors.b.shape[1])
            for module, tensors in files.modules.items()
            if module.split(".base_layer")[0] == owner
        }
        batch = (0,) if len(shape) == 3 else ()
        plain = KernelAxes(batch, (len(batch) + 1,), (len(batch),))
        turned = KernelAxes(plain.batch, plain.out, plain.in_)
        fits = plain.fans(shape) in fans or turned.fans(shape) not in fans
        found[name] = plain if fits else turned
    return found


def _check_summed(leaves: Mapping[str, Any], files: AdapterFiles) -> None:
    """Raises if the adapter changes weights that are no plain numbers."""
    own = {module.replace(".base_layer.", ".") for module in files.modules}
    saved = {name.replace(".base_layer.", ".") for name in files.whole}
    beside = {"bias": "same"} if files.config.lora_bias else {}
    changed = saved | {f"{name}.{leaf}" for name in own for leaf in _WEIGHTS | beside}
    found = [
        f"{name!r} ({np.dtype(leaf.dtype).name})"
        for name, leaf in leaves.items()
        if name in changed or files.config.selects_parameter(name)
        if leaf.dtype not in _SUMMED
    ]
    if found:
        raise UnsupportedFeatureError(
            f"{files.where} cannot be merged into the quantised {', '.join(found)}: "
            "W + ΔW is not of their values. Merge into the float16, bfloat16, float32 "
            "or float64 weights that were quantised"
        )


def _check_complete(leaves: Mapping[str, Any], files: AdapterFiles) -> None:
    """Raises if the config selects weights that the file has no factors for."""
    config, present = files.config, {m.split(".base_layer")[0] for m in files.modules}
    saved = {name.rpartition(".")[0] for name in files.whole}
    missing = [
        module
        for name, leaf in leaves.items()
        if len(leaf.shape) > 1 and (module := name.removesuffix(".weight")) != name
        if config.selects(module) and module not in present | saved
    ]
    if missing and not config.all_linear:
        raise AdapterError(
            f"{files.where}: the config selects {missing[:5]}, and the file has no "
            "factors for them"
        )


def _steps(tensors: TorchModule, leaves: Mapping[str, Any], files: AdapterFiles) -> str:
    if not tensors.is_table:
        return "same"
    heads = [
        module
        for module, other in files.modules.items()
        if f"{module}.weight" not in leaves and other.a.shape == tensors.b.T.shape
    ]
    tied = files.config.ensure_weight_tying and heads
    return f"embedding+tied({heads[0]})" if tied else "embedding"


def _axes(tensors: TorchModule, ndim: int, files: AdapterFiles) -> KernelAxes:
    turned = files.fan_in_fan_out and not tensors.window
    if tensors.is_table or turned:
        return KernelAxes((), (0,), (1,))
    return KernelAxes((), tuple(range(1, ndim)), (0,))

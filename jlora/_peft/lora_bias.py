"""PEFT's `lora_bias`, a bias of `b`: in jlora the bias of the module, trained whole.

A module computes `x·W + β + s·(x·a·b + c)`. As `c` takes part in a sum with `β` and in
nothing else, `β + s·c` is the same function, and `merge` has a place for it.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .._errors import AdapterError, UnsupportedFeatureError
from .._torch.leaves import leaf_from_torch, leaves_to_torch
from .._torch.modules import TorchModule
from .._torch.named_params import Base
from .config import PeftConfig


def read_lora_biases(
    modules: Mapping[str, TorchModule],
    whole: Mapping[str, np.ndarray],
    config: PeftConfig,
    base: Base,
    where: str,
) -> dict[str, np.ndarray]:
    """Returns `β + s·c` by path, the biases of the params that `c` is added to.

    Args:
        modules: the factors by torch module.
        whole: what is trained whole by torch's names: a `β` of its own is among them.
        config: what the file's config says.
        base: the params.
        where: the name of the file, for messages.

    Raises:
        AdapterError: if the config and the tensors contradict each other.
        UnsupportedFeatureError: if there is no bias to add to, or no value of it.
    """
    biases = {m: t.bias for m, t in modules.items() if t.bias is not None}
    by_keys = config.decided_by_keys("lora_bias")
    wrong = [m for m in modules if (m in biases) != config.lora_bias]
    if wrong and not by_keys:
        raise AdapterError(
            f"{where}: the config says that `lora_bias` is {config.lora_bias}, which "
            f"is not so of {wrong[:5]}"
        )
    if not (config.lora_bias or (by_keys and biases)):
        return {}
    names = {module: f"{module}.bias" for module in biases}
    paths = list(
        dict.fromkeys(home.path for n in names.values() for home in base.homes(n))
    )
    known = {path: v for path in paths if (v := base.value(path)) is not None}
    bare = [module for module, name in names.items() if not base.homes(name)]
    _check(bare, [path for path in paths if path not in known])
    tensors = leaves_to_torch(base, paths, known.__getitem__) | {
        name.replace(".base_layer.", "."): tensor for name, tensor in whole.items()
    }
    for module, name in names.items():
        scaling = config.scaling(module, modules[module].rank)
        added, old = biases[module], tensors[name]
        wide = np.promote_types(added.dtype, np.float32)
        total = old.reshape(-1).astype(wide) + scaling * added.astype(wide)
        tensors[name] = total.reshape(old.shape)
    return {path: leaf_from_torch(base, path, tensors.__getitem__) for path in paths}


def _check(bare: Sequence[str], abstract: Sequence[str]) -> None:
    """Raises for modules with nothing to add to, and for biases without a value."""
    problems = []
    if bare:
        problems.append(f"{bare[:5]} have no bias of their own in the params")
    if abstract:
        problems.append(f"{abstract[:5]} are shapes; give the params as arrays")
    if problems:
        raise UnsupportedFeatureError(
            "`lora_bias`: in jlora the bias of `b` is the module's own bias, trained "
            f"whole, and {'; '.join(problems)}"
        )

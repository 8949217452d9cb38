"""A PEFT adapter without the params it was made for, as far as its own files tell."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from .._adapter.config import LoraConfig
from .._torch.modules import TorchModule
from .._torch.named_params import Base
from .._torch.names import Rule
from .lora_configs import configs_of
from .read import AdapterFiles, adapter_of

Shapes = dict[str, jax.ShapeDtypeStruct]
Rules = list[Rule]
Configs = LoraConfig | tuple[LoraConfig, ...]


def adapter_alone(files: AdapterFiles) -> tuple[Configs, dict[str, Any]]:
    """Returns the configs and the adapter of some files, on the host.

    Raises:
        AdapterError: if the files contradict themselves.
    """
    shapes, rules = params_alone(files)
    own = dataclasses.replace(files, whole=_trained_whole(files))
    base = Base.of(shapes, rules)
    entries = adapter_of(own, base)
    return configs_of(entries, files.config, base), entries


def params_alone(files: AdapterFiles) -> tuple[Shapes, Rules]:
    """Returns kernels by path as the mechanical map has them, and the rules for them.

    `a.b` is `params/a/b/kernel`, `(in, out)`; a table is `params/a/b/embedding`, a
    convolution's kernel `(*window, in, out)`, experts are `(experts, in, out)`. What is
    trained whole has the name that Flax gives it where there is one: a matrix is a
    `kernel (in, out)`, whatever it is for, and a vector a `scale`.
    """
    shapes: Shapes = {}
    rules: Rules = []

    def add(path: str, shape: tuple[int, ...], dtype: Any, name: str, how: Any) -> None:
        shapes[path] = jax.ShapeDtypeStruct(shape, dtype)
        rules.append(Rule(re.escape(path), name, how))

    heads = _tied_heads(files)
    packed = _parameters(files)
    for module, tensors in files.modules.items():
        name = module.replace(".base_layer.", ".")
        owner = module.split(".base_layer")[0]
        if module in heads or owner in packed:
            continue
        how = "embedding" if tensors.is_table else None
        if module in heads.values():
            how = next(
                f"tied({head})" for head, table in heads.items() if table == module
            )
        last = "embedding" if tensors.is_table else "kernel"
        shape = tensors.kernel_shape
        how = "conv" if len(shape) > 2 else how
        add(_path(name, last), shape, tensors.a.dtype, name, how)
    for owner, several in packed.items():
        for parameter, tensors in several:
            rank = files.config.rank(f"{owner}.{parameter}")
            n = tensors.rank // rank
            shape = (n, *tensors.kernel_shape)
            name = f"{owner}.{parameter}"
            add(_path(name, "kernel"), shape, tensors.a.dtype, name, "experts")
    for key, tensor in _trained_whole(files).items():
        name = key.replace(".base_layer.", ".")
        owner, _, last = name.rpartition(".")
        path = _path(owner, _flax_name(last, tensor.ndim)) if owner else _path(name)
        path = _path(name) if path in shapes else path
        if path == _path(owner, "kernel"):
            add(path, tensor.shape[::-1], tensor.dtype, owner, None)
        else:
            add(path, tensor.shape, tensor.dtype, name, "parameter")
    return shapes, rules


def _flax_name(last: str, ndim: int) -> str:
    """Returns what the mechanical map takes back to torch's name of a leaf."""
    if last == "weight":
        return {1: "scale", 2: "kernel"}.get(ndim, last)
    return {"running_mean": "mean", "running_var": "var"}.get(last, last)


def _trained_whole(files: AdapterFiles) -> dict[str, np.ndarray]:
    """Returns what is trained whole.

    PEFT may write a frozen weight of an adapted module along, of a table above all;
    there is nothing here to compare it with.
    """
    heads = _tied_heads(files)
    tied = {f"{module}.weight" for module in (*heads, *heads.values())}
    return {
        name: tensor
        for name, tensor in files.whole.items()
        if not name.endswith(".base_layer.weight") and name not in tied
    }


def _path(name: str, *last: str) -> str:
    return "/".join(["params", *name.split("."), *last])


def _tied_heads(files: AdapterFiles) -> dict[str, str]:
    """Returns the heads whose factors repeat those of a table, with the table."""
    if not files.config.ensure_weight_tying:
        return {}
    return {
        head: table
        for table, rows in files.modules.items()
        for head, other in files.modules.items()
        if rows.is_table and not other.is_table
        if np.array_equal(other.a, rows.b.T) and np.array_equal(other.b, rows.a.T)
    }


def _parameters(files: AdapterFiles) -> dict[str, list[tuple[str, TorchModule]]]:
    """Returns the adapted parameters of each module, innermost first.

    Torch's modules define the input of a feed-forward layer before its output.
    """
    chosen = files.config.target_parameters or ()
    found: dict[str, list[tuple[str, TorchModule]]] = {}
    owners = {module.split(".base_layer")[0] for module in files.modules}
    for owner in sorted(owners):
        tails = [p.rpartition(".")[2] for p in chosen]
        own = [t for t in tails if files.config.selects_parameter(f"{owner}.{t}")]
        own = sorted(set(own), key=lambda tail: (tail.endswith("down_proj"), tail))
        depths = [f"{owner}{'.base_layer' * n}" for n in range(len(own))][::-1]
        if own and all(depth in files.modules for depth in depths):
            pairs = zip(own, depths, strict=True)
            found[owner] = [(tail, files.modules[depth]) for tail, depth in pairs]
    return found

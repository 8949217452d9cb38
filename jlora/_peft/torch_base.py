"""The weights of a torch model as the params that a PEFT adapter is for."""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import AdapterError, UnsupportedFeatureError
from .._files.model_files import Weights
from .._params.axes import KernelAxes
from .._torch.model_types import ModelTypes, has_conv1d_name
from .._torch.modules import TorchModule
from .._torch.named_params import Base
from .._torch.names import Rule
from .._torch.tied import FIELD, Tied, has_unknown_table, tied_tables, untied
from .named_weights import NamedWeights, by_owner
from .read import AdapterFiles, adapter_of
from .sides import FIRST, LAST, NO_VERSION, axis_of_a, by_shapes, refuse_square
from .tables import is_table, repeats
from .vocabulary import extended, with_vocabulary

# Of these a weight can take a sum; the others are codes, or too coarse for one.
_SUMMED = frozenset(map(np.dtype, (np.float16, jnp.bfloat16, np.float32, np.float64)))


@dataclasses.dataclass(frozen=True)
class Changes:
    """What an adapter makes of a model on disk.

    Attributes:
        weights: the tensors, and those that are to be added.
        entries: the adapter by their names.
        config: the new `config.json`, if it is another.
    """

    weights: NamedWeights
    entries: Mapping[str, Any]
    config: Mapping[str, Any] | None = None


def changes_of(
    weights: Weights,
    files: AdapterFiles,
    config: Mapping[str, Any],
    *,
    extend_tables: bool = False,
) -> Changes:
    """Returns what an adapter changes of a model.

    Args:
        weights: the tensors on disk.
        files: what the adapter's files hold.
        config: what the model's `config.json` says.
        extend_tables: whether tables take the rows of a larger vocabulary.

    Raises:
        AdapterError: as `torch_base`, and with everything that does not fit.
    """
    types = ModelTypes.of(config)
    named = NamedWeights(weights, types, _wanted(files))
    vocabulary = extended(named, files, extend=extend_tables)
    tied = tied_tables(config, named)
    _check_known(config, named, files)
    apart = tied is not None and _are_apart(tied, files)
    if tied is not None and apart and tied.head not in named:
        stored = tied_tables(config, weights)
        named.add(tied.head, tied.table, stored.head if stored else tied.head)
    entries = _entries(named, files, types)
    if tied is not None and not apart and tied.head in named:  # on disk as well
        entries |= {
            n: entries[tied.table] for n in [tied.head] if tied.table in entries
        }
    said = with_vocabulary(untied(config) if apart else config, vocabulary)
    return Changes(named, entries, None if said == config else said)


def _wanted(files: AdapterFiles) -> set[str]:
    """Returns what an adapter changes: modules, and tensors that are trained whole."""
    modules = {re.sub(r"(?:\.base_layer)+$", "", name) for name in files.modules}
    names = modules | set(files.whole) | set(files.rows)
    return {name.replace(".base_layer.", ".") for name in names}


def _check_known(
    config: Mapping[str, Any], weights: NamedWeights, files: AdapterFiles
) -> None:
    """Raises if an adapter changes a table that may be tied to what has no name here.

    Raises:
        UnsupportedFeatureError: with the names of the tables.
    """
    changed = [f"{name}.weight" for name, m in files.modules.items() if m.is_table]
    changed += [name for name, tensor in files.whole.items() if is_table(name, tensor)]
    if changed and has_unknown_table(config, weights):
        raise UnsupportedFeatureError(
            f"{files.where} changes {changed[:5]}; config.json of the base says that "
            f"`{FIELD}`, and what is tied to which is not known of the kind "
            f"{ModelTypes.of(config)}: merge it in PEFT"
        )


def _are_apart(tied: Tied, files: AdapterFiles) -> bool:
    """Whether an adapter makes two tensors of the one that is table and head.

    Rows of a table that are trained alone are those of its head, too.
    """
    changed = {f"{module}.weight" for module in files.modules}
    whole = {name for name in files.whole if ".base_layer." not in name}
    both = {tied.table, tied.head}
    if both <= whole - changed and repeats(tied.head, tied.table, files.whole):
        # Written along, with a larger vocabulary.
        whole -= set() if files.config.saves(tied.head.rpartition(".")[0]) else both
    return bool(both & (changed | whole)) and not files.config.ensure_weight_tying


def _entries(
    weights: NamedWeights, files: AdapterFiles, types: ModelTypes
) -> dict[str, Any]:
    base = torch_base(weights, files, types)
    packed = [name for name, b in base.bindings.items() if "experts" in b.steps]
    sides = dict.fromkeys(packed, False)  # what is called the input is where `a` is
    return adapter_of(dataclasses.replace(files, exchanged=sides), base)


def torch_base(
    weights: Weights | NamedWeights,
    files: AdapterFiles,
    types: ModelTypes | None = None,
) -> Base:
    """Returns the weights as params under torch's own names and layouts.

    A weight is `(out, in, *window)` then, a table `(rows, features)`.

    Args:
        weights: the tensors of the model, see `open_weights`.
        files: what the adapter's files hold, see `jlora.peft.read_files`.
        types: what the `config.json` of the model says that it is, if it is known.

    Raises:
        UnsupportedFeatureError: if weights that the adapter changes are quantised, or
            square ones are in a layout that nothing tells.
        AdapterError: if the config selects weights that the file has no factors for.
    """
    # PEFT writes an adapted table or head along, which must be that of the base.
    copied = [n for n in files.whole if n.endswith(".base_layer.weight")]
    tables = {name.replace(".base_layer.", ".") for name in copied}
    tables |= {f"{m}.weight" for m, t in files.modules.items() if t.is_table and copied}
    # `lora_bias` is added to the module's own bias.
    biases = {f"{m}.bias" for m, t in files.modules.items() if t.bias is not None}
    leaves: dict[str, Any] = {
        name: weights[name] if name in tables | biases else weights.shape(name)
        for name in weights
    }
    _check_summed(leaves, files)
    _check_complete(leaves, files)
    _check_biases(leaves, files)
    types = types or ModelTypes()
    chosen = files.config.selects_parameter
    known = [n for n in leaves if isinstance(weights, NamedWeights)]
    known = {n for n in known if weights.is_turned(n)}  # type: ignore[union-attr]
    turned = _turned(leaves, files, types, known)
    rules, axes = [], {}
    for module, tensors in files.modules.items():
        name = module.replace(".base_layer.", ".")
        for leaf, step in _WEIGHTS.items():
            weight = f"{name}.{leaf}"
            if weight in leaves and not chosen(weight):
                steps = _steps(tensors, leaves, files)
                rules.append(Rule(re.escape(weight), name, f"{step}+{steps}"))
                ndim = len(leaves[weight].shape)
                axes[weight] = _axes(tensors, ndim, name in turned)
    for module in files.rows:
        rules.append(Rule(re.escape(f"{module}.weight"), module, "same+embedding"))
        axes[f"{module}.weight"] = KernelAxes((), (0,), (1,))
    for name, fitting in _parameter_axes(leaves, files, types).items():
        rules.append(Rule(re.escape(name), name, "experts+same"))
        axes[name] = fitting
    rules.append(Rule(r"(?P<name>.*)", "{name}", "parameter"))
    return Base.of(leaves, rules, axes)


_WEIGHTS = {"weight": "same", "in_proj_weight": "mha"}


def _turned(
    leaves: Mapping[str, Any],
    files: AdapterFiles,
    types: ModelTypes,
    in_first: Collection[str],
) -> set[str]:
    """Returns the modules whose weight is `(in, out)`, as that of `Conv1D`.

    PEFT corrects `fan_in_fan_out` for each module, and the file has what it found for
    the last one. Shapes tell of weights that are not square, the kind of model of all.

    Raises:
        UnsupportedFeatureError: if the layout of a square one is not known.
    """
    turned, square, kinds = set(), [], set()
    for module, factors in files.modules.items():
        name = module.replace(".base_layer.", ".")
        leaf = leaves.get(f"{name}.weight")
        if leaf is None or factors.is_table or len(leaf.shape) != 2:
            continue
        given = (factors.a.shape[0], factors.b.shape[1])
        if f"{name}.weight" in in_first:  # an expert, which is no `Conv1D`
            turned.add(name)
            continue
        known = types.is_conv1d(name)
        if given[0] == given[1] and known is None:
            square.append(name)
        elif known if given[0] == given[1] else leaf.shape == given:
            turned.add(name)
        if given[0] != given[1]:
            kinds.add(leaf.shape == given)
    # `Conv1D` is called as in GPT-2, and the flag agrees, or there is none anywhere.
    flag = files.fan_in_fan_out
    agree = flag or True not in kinds
    sure = [name for name in square if agree and has_conv1d_name(name) == flag]
    why = (
        "PEFT's `fan_in_fan_out` is that of the last module alone. The base's "
        f"config.json tells by `model_type`, which is {types}; merge it in PEFT"
    )
    refuse_square([n for n in square if n not in sure], why, files.where)
    return turned | ({*sure} if flag else set())


def _parameter_axes(
    leaves: Mapping[str, Any], files: AdapterFiles, types: ModelTypes
) -> dict[str, KernelAxes]:
    """Returns the roles of the axes of adapted parameters, in the order of wrapping.

    Torch's modules define the input of a feed-forward layer before its output. What is
    called the input is where `lora_A` is: the sum is the same.

    Raises:
        UnsupportedFeatureError: if a square one has it at a side that nothing tells.
    """
    chosen = [name for name in leaves if files.config.selects_parameter(name)]
    chosen.sort(key=lambda name: (name.endswith("down_proj"), name))
    known = axis_of_a(types.experts_in_first(), files.version)
    found, square = {}, []
    for owner, names in by_owner(chosen).items():
        given = [_given(owner, depth, files) for depth in range(len(names))][::-1]
        shapes = [leaves[name].shape[-2:] for name in names]
        told = by_shapes(shapes, given) or known
        for name, shape in zip(names, shapes, strict=True):
            packed = len(leaves[name].shape) == 3
            if packed and told is None and shape[0] == shape[1]:
                square.append(name)
            # A parameter of two axes is (out, in) to every release.
            found[name] = _roles(packed, FIRST if packed and told == FIRST else LAST)
    why = (
        f"the `model_type` of the base, {types}, is none whose experts are known; "
        "merge it in PEFT"
    )
    refuse_square(square, why if files.version else NO_VERSION, files.where)
    return {name: found[name] for name in chosen}


def _given(owner: str, depth: int, files: AdapterFiles) -> tuple[int, int] | None:
    """Returns the sizes of `lora_A` and `lora_B` at a depth of wrapping."""
    module = files.modules.get(owner + ".base_layer" * depth)
    return None if module is None else (module.a.shape[0], module.b.shape[1])


def _roles(packed: bool, a_at: int) -> KernelAxes:
    batch = (0,) if packed else ()
    first, last = (1, 2) if packed else (0, 1)
    sides = ((first,), (last,)) if a_at == FIRST else ((last,), (first,))
    return KernelAxes(batch, *sides)


def _check_summed(leaves: Mapping[str, Any], files: AdapterFiles) -> None:
    """Raises if the adapter changes weights that are no plain numbers."""
    own = {module.replace(".base_layer.", ".") for module in files.modules}
    saved = {name.replace(".base_layer.", ".") for name in files.whole}
    saved |= {f"{module}.weight" for module in files.rows}
    has_bias = any(t.bias is not None for t in files.modules.values())
    beside = {"bias": "same"} if has_bias else {}
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


def _check_biases(leaves: Mapping[str, Any], files: AdapterFiles) -> None:
    """Raises if the biases of adapted modules are trained, and the file has them not.

    Releases of PEFT before 0.21 do not save them where `bias` is "lora_only".
    """
    if files.config.bias == "none":
        return
    plain = {name.replace(".base_layer.", ".") for name in files.whole}
    own = {module.replace(".base_layer.", ".") for module in files.modules}
    missing = sorted({f"{module}.bias" for module in own} & set(leaves) - plain)
    missing = [name for name in missing if not files.config.is_left_out(name)]
    if missing:
        raise AdapterError(
            f"{files.where}: {missing[:5]} are missing ({len(missing)} in all), which "
            f"`bias`, {files.config.bias!r}, promises; PEFT before 0.21 does not save "
            "them. To do without them, ignore the field `bias`"
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


def _axes(tensors: TorchModule, ndim: int, turned: bool) -> KernelAxes:
    if tensors.is_table or turned:
        return KernelAxes((), (0,), (1,))
    return KernelAxes((), tuple(range(1, ndim)), (0,))

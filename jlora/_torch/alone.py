"""Adapters without the params that they were made for, under torch's names alone.

The kernel of the module `a.b` is `params/a/b/kernel`, `(in, out)`; a table is
`params/a/b/embedding`, a convolution's kernel `(*window, in, out)`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from .._adapter.config import LoraConfig
from .._adapter.entries import axes_of, kernel_shape, lowered
from .._adapter.variants import variant_of_entry
from .._errors import AdapterError, CorruptFileError, UnsupportedFeatureError
from .._params.axes import KernelAxes
from .assemble import factors_of, modules_of
from .configs import configs_of
from .families import names as family_names
from .layout import spread
from .model_types import swaps_experts
from .modules import TorchModule
from .named_params import Base
from .names import Names, Rule, bind

Configs: TypeAlias = LoraConfig | tuple[LoraConfig, ...]

# --- reading ---


class ParamsAlone:
    """Shapes of params for some torch modules, and the rules that name them.

    Attributes:
        shapes: by path.
    """

    def __init__(self) -> None:
        """Begins with nothing."""
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        self._rules: list[Rule] = []

    def add(
        self,
        path: str,
        shape: tuple[int, ...],
        dtype: Any,
        name: str,
        transform: str | None = None,
    ) -> None:
        """Adds a leaf, and the rule that `name` is torch's name of it."""
        self.shapes[path] = jax.ShapeDtypeStruct(shape, dtype)
        self._rules.append(Rule(re.escape(path), name, transform))

    def add_module(
        self, module: TorchModule, name: str, transform: str | None = None
    ) -> None:
        """Adds the kernel, or the table, of a module with factors."""
        last = "embedding" if module.is_table else "kernel"
        step = "conv" if module.window else transform
        step = step or ("embedding" if module.is_table else None)
        self.add(path_of(name, last), module.kernel_shape, module.a.dtype, name, step)

    def base(self, axes: Mapping[str, KernelAxes] | None = None) -> Base:
        """Returns the params under both names of each leaf.

        Args:
            axes: the roles of the axes of some leaves, by path.
        """
        return Base.of(self.shapes, self._rules, axes)


def base_given(
    params: Mapping[str, tuple[int, ...]] | None, names: str | None
) -> Base | None:
    """Returns the params whose shapes are given, under both names; None without them.

    Args:
        params: the shapes of the leaves by path.
        names: the family whose names the leaves have in torch.

    Raises:
        ValueError: if there are names without params.
    """
    if params is not None:
        return base_of_shapes(params, names)
    _check_params(names)
    return None


def path_of(name: str, *last: str) -> str:
    """Returns the path of a leaf, from torch's name."""
    return "/".join(["params", *name.split("."), *last])


def adapter_alone(
    modules: Sequence[TorchModule], where: str
) -> tuple[Configs, dict[str, Any]]:
    """Returns the configs and the adapter of some torch modules, on the host.

    Args:
        modules: with the scalings that they have.
        where: the name of the file, for messages.

    Raises:
        AdapterError: if there is none, or the factors of one do not fit each other.
    """
    _check_some(modules, where)
    params = ParamsAlone()
    for module in modules:
        params.add_module(module, module.name)
    base = params.base()
    entries: dict[str, Any] = dict(factors_of(modules, base, where))
    return configs_of(entries, base), entries


def placed(
    modules: Sequence[TorchModule],
    where: str,
    names: str | None = None,
    params: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Configs, dict[str, Any]]:
    """Returns the configs and the adapter, in the params of a model if they are known.

    Args:
        modules: with the scalings that they have.
        where: the name of the file, for messages.
        names: the family whose names the modules have, for a model with `params`.
        params: the shapes of its leaves by path; without them as `adapter_alone`.

    Raises:
        AdapterError: as `adapter_alone`, or if the modules do not fit the params.
        ValueError: if there are names without params.
    """
    base = base_given(params, names)
    if base is None:
        return adapter_alone(modules, where)
    _check_some(modules, where)
    entries: dict[str, Any] = dict(factors_of(modules, base, where))
    return configs_of(entries, base), entries


def _check_params(names: str | None) -> None:
    """Raises for the names of a family without the params that have them.

    Raises:
        ValueError: that says what to give.
    """
    if names is not None:
        raise ValueError(
            f"--names {names} says what modules are called in torch, and not which "
            "leaves a model has: give their shapes too, --params shapes.json, or call "
            f'`jlora.peft.load(folder, params, jlora.peft.names("{names}"))`'
        )


def base_of_shapes(shapes: Mapping[str, tuple[int, ...]], names: str | None) -> Base:
    """Returns the params whose leaves have some shapes by path, under both names.

    Args:
        shapes: by path.
        names: the family whose names they have in torch; mechanical ones without it.
    """
    rules = None if names is None else family_names(names)
    return Base.of(tree_of(shapes), rules)


def tree_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns params as nested dicts, from their shapes by path."""
    tree: dict[str, Any] = {}
    for path, shape in shapes.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = jax.ShapeDtypeStruct(shape, np.float32)
    return tree


def scaling_of(alpha: float, module: TorchModule, where: str) -> float:
    """Returns the scaling of a module whose file has an alpha.

    Raises:
        CorruptFileError: if the alpha is no number that files have.
    """
    if not 1e-30 < alpha < 1e30:
        raise CorruptFileError(f"{where}: the alpha of {module.name!r} is {alpha}")
    return alpha / module.rank


def dropout_of(configs: Configs) -> str | None:
    """Returns what to say of dropout where files have no place for it."""
    several = (configs,) if isinstance(configs, LoraConfig) else configs
    rates = sorted({config.dropout for config in several} - {0.0})
    return f"the dropout of training, {rates}, is not in the file" if rates else None


def _check_some(modules: Sequence[TorchModule], where: str) -> None:
    if not modules:
        raise AdapterError(f"{where} has no factors")


# --- writing ---


def kernels_alone(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what stands for the kernel of each entry: its shape, and a dtype."""
    return {path: _kernel(entry) for path, entry in adapter.items()}


def _kernel(entry: Any) -> Any:
    if axes_of(entry) is None:
        return entry
    return jax.ShapeDtypeStruct(kernel_shape(entry), jax.tree.leaves(entry)[0].dtype)


def in_doubt(adapter: Mapping[str, Any], convolutions: bool = False) -> list[str]:
    """Returns what torch may keep in another layout than paths alone tell.

    A convolution's window counts as inputs, too, and the rules of a family say which
    kernels are convolutions. An array under a name that is none of Flax's may be
    anything.

    Args:
        adapter: the entries by path.
        convolutions: whether kernels of several input axes are known to be those of
            convolutions, as they are where torch's modules were read without params.
    """
    known = _windows(adapter) if convolutions else ()
    return [p for p, e in adapter.items() if p not in known and _in_doubt(p, e)]


def _windows(adapter: Mapping[str, Any]) -> list[str]:
    """Returns the kernels `(*window, in, out)`."""
    axes = {path: axes_of(entry) for path, entry in adapter.items()}
    return [
        path
        for path, own in axes.items()
        if own is not None and len(own.in_) > 1 and not own.batch
        if own.out == (own.ndim - 1,)
    ]


def _in_doubt(path: str, entry: Any) -> bool:
    if (axes := axes_of(entry)) is not None:
        return len(axes.in_) > 1
    known = ("kernel", "embedding", "scale", "bias", "mean", "var")
    return entry.ndim > 1 and path.rpartition("/")[2] not in known


def rules_alone(
    adapter: Mapping[str, Any],
    convolutions: bool = False,
    model_type: str | None = None,
) -> list[Rule] | None:
    """Returns rules for what the mechanical map does not tell; None if it tells all.

    A kernel `(experts, in, out)` right below `experts` is a parameter of that module;
    any other leaf is what the mechanical map has. PEFT wraps the parameters in the
    order in which torch's module defines them: the output of a layer is the last.

    Args:
        adapter: the entries by path.
        convolutions: as for `in_doubt`.
        model_type: the kind of the model, which says at which side PEFT has the factors
            of experts.
    """
    packed = [path for path, entry in adapter.items() if _is_packed(path, entry)]
    windows = _windows(adapter) if convolutions else []
    if not packed and not windows:
        return None
    packed.sort(key=lambda path: ("down_proj" in path, path))
    swapped = "+fan_in_fan_out+swapped" if swaps_experts(model_type) else ""
    told = dict.fromkeys(windows, "conv")
    told |= dict.fromkeys(packed, f"experts{swapped}")
    others = [path for path in adapter if path not in packed]
    rules = []
    for path, binding in bind([*packed, *others], None).items():
        steps = told.get(path) or "+".join(binding.steps) or None
        rules.append(Rule(re.escape(path), binding.slots[0].template, steps))
    return rules


def _is_packed(path: str, entry: Any) -> bool:
    axes, below = axes_of(entry), re.search(r"(?:^|/)experts/[^/]+/kernel$", path)
    return bool(below) and axes is not None and len(axes.batch) == 1


def modules_alone(
    adapter: Mapping[str, Any], names: Names = None, *, convolutions: bool = False
) -> list[TorchModule]:
    """Returns the torch modules that an adapter adapts: `params/a/b/kernel` is `a.b`.

    Args:
        adapter: the entries by path.
        names: other rules, if they are called otherwise in torch.
        convolutions: as for `in_doubt`.

    Raises:
        UnsupportedFeatureError: if it holds more than factors of dense kernels.
        AdapterError: if a kernel has batch axes, which are no module of torch's.
    """
    _check_factors(adapter, names, convolutions)
    if not adapter:
        return []
    entries = {p: _on_host(lowered(e, None)) for p, e in sorted(adapter.items())}
    axes = {path: factors.axes for path, factors in entries.items()}
    packed = [path for path, entry in entries.items() if _is_packed(path, entry)]
    if names is None and not packed:
        names = rules_alone(entries, convolutions)
    base = Base.of(kernels_alone(entries), names, axes)
    return modules_of({p: spread(f, base.axes(p)) for p, f in entries.items()}, base)


def _check_factors(
    adapter: Mapping[str, Any], names: Names, convolutions: bool
) -> None:
    kinds = {path: variant_of_entry(entry) for path, entry in adapter.items()}
    reads = lambda p, kind: not kind.has_roles or kind.reads(adapter[p])
    bare = [path for path, kind in kinds.items() if reads(path, kind)]
    if bare or (names is None and (bare := in_doubt(adapter, convolutions))):
        raise UnsupportedFeatureError(
            f"{bare[:5]} are no factors of dense kernels, and the format has no place "
            "for anything else"
        )


def _on_host(factors: Any) -> Any:
    return jax.tree.map(np.asarray, factors)

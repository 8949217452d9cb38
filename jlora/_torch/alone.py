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
from .._errors import AdapterError, UnsupportedFeatureError
from .._params.axes import KernelAxes
from .assemble import factors_of, modules_of
from .configs import configs_of
from .families import names as family_names
from .layout import spread
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


def placed(
    params: Mapping[str, tuple[int, ...]] | None, names: str | None
) -> Base | None:
    """Returns the params whose shapes are given, under both names; None without them.

    Args:
        params: the shapes of the leaves by path.
        names: the family whose names the leaves have in torch.

    Raises:
        ValueError: if there are names without params.
    """
    rules = None if names is None else family_names(names)
    if params is not None:
        return Base.of(tree_of(params), rules)
    if names is not None:
        raise ValueError(
            f"--names {names} says what modules are called in torch, and not which "
            "leaves a model has: give their shapes too, --params shapes.json, or call "
            f'`jlora.peft.load(folder, params, jlora.peft.names("{names}"))`'
        )
    return None


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
    if not modules:
        raise AdapterError(f"{where} has no factors")
    params = ParamsAlone()
    for module in modules:
        params.add_module(module, module.name)
    base = params.base()
    entries: dict[str, Any] = dict(factors_of(modules, base, where))
    return configs_of(entries, base), entries


# --- writing ---


def kernels_alone(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what stands for the kernel of each entry: its shape, and a dtype."""
    return {path: _kernel(entry) for path, entry in adapter.items()}


def _kernel(entry: Any) -> Any:
    if axes_of(entry) is None:
        return entry
    return jax.ShapeDtypeStruct(kernel_shape(entry), jax.tree.leaves(entry)[0].dtype)


def in_doubt(adapter: Mapping[str, Any]) -> list[str]:
    """Returns what torch may keep in another layout than paths alone tell.

    A convolution's window counts as inputs, too, and the rules of a family say which
    kernels are convolutions. An array under a name that is none of Flax's may be
    anything.
    """
    return [path for path, entry in adapter.items() if _in_doubt(path, entry)]


def _in_doubt(path: str, entry: Any) -> bool:
    if (axes := axes_of(entry)) is not None:
        return len(axes.in_) > 1
    known = ("kernel", "embedding", "scale", "bias", "mean", "var")
    return entry.ndim > 1 and path.rpartition("/")[2] not in known


def expert_rules(adapter: Mapping[str, Any]) -> list[Rule] | None:
    """Returns rules for an adapter of packed experts; None if it has none.

    A kernel `(experts, in, out)` right below `experts` is a parameter of that module;
    any other leaf is what the mechanical map has. PEFT wraps the parameters in the
    order in which torch's module defines them: the output of a layer is the last.
    """
    packed = [path for path, entry in adapter.items() if _is_packed(path, entry)]
    if not packed:
        return None
    packed.sort(key=lambda path: ("down_proj" in path, path))
    others = [path for path in adapter if path not in packed]
    rules = []
    for path, binding in bind([*packed, *others], None).items():
        steps = "experts" if path in packed else "+".join(binding.steps) or None
        rules.append(Rule(re.escape(path), binding.slots[0].template, steps))
    return rules


def _is_packed(path: str, entry: Any) -> bool:
    axes, below = axes_of(entry), re.search(r"(?:^|/)experts/[^/]+/kernel$", path)
    return bool(below) and axes is not None and len(axes.batch) == 1


def modules_alone(adapter: Mapping[str, Any], names: Names = None) -> list[TorchModule]:
    """Returns the torch modules that an adapter adapts: `params/a/b/kernel` is `a.b`.

    Args:
        adapter: the entries by path.
        names: other rules, if they are called otherwise in torch.

    Raises:
        UnsupportedFeatureError: if it holds more than factors of dense kernels.
        AdapterError: if a kernel has batch axes, which are no module of torch's.
    """
    _check_factors(adapter, names)
    if not adapter:
        return []
    entries = {p: _on_host(lowered(e, None)) for p, e in sorted(adapter.items())}
    axes = {path: factors.axes for path, factors in entries.items()}
    base = Base.of(kernels_alone(entries), names, axes)
    return modules_of({p: spread(f, base.axes(p)) for p, f in entries.items()}, base)


def _check_factors(adapter: Mapping[str, Any], names: Names) -> None:
    kinds = {path: variant_of_entry(entry) for path, entry in adapter.items()}
    bare = [p for p, kind in kinds.items() if not kind.has_roles or kind.reads_kernel]
    if bare or (names is None and (bare := in_doubt(adapter))):
        raise UnsupportedFeatureError(
            f"{bare[:5]} are no factors of dense kernels, and the format has no place "
            "for anything else"
        )


def _on_host(factors: Any) -> Any:
    return jax.tree.map(np.asarray, factors)

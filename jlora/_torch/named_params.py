"""The params that an adapter in a file belongs to, under both names of each leaf."""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from .._adapter.instead import has_entries
from .._errors import AdapterError, UnsupportedFeatureError
from .._params.axes import KernelAxes
from .._params.paths import FlatParams, is_array
from .._params.quantized import dequantized
from .layout import guess_axes, with_experts
from .names import TABLES, Binding, Names, bind, rule_of


@dataclasses.dataclass(frozen=True)
class Home:
    """Where a torch module is in the params: a slot of a leaf, at an index."""

    path: str
    slot: int
    index: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Base:
    """The leaves of params, the roles of their axes, and their torch names.

    Attributes:
        params: the flattened params.
        leaves: arrays or shapes by path.
        known: the roles of the axes that a plan or an adapter tells.
        uses: the kinds of use of each kernel, where a plan tells.
        bindings: what the rules say of each path.
        missing_head: a head that the rules name, and none of the leaves is.
    """

    params: FlatParams
    leaves: Mapping[str, Any]
    known: Mapping[str, KernelAxes]
    uses: Mapping[str, tuple[str, ...]]
    bindings: Mapping[str, Binding]
    missing_head: str | None = None

    @classmethod
    def of(
        cls,
        params_or_plan: Any,
        names: Names,
        axes: Mapping[str, KernelAxes] | None = None,
    ) -> "Base":
        """Returns what is known of a params tree, or of that which a plan was made for.

        Raises:
            TypeError: if there are no arrays in it.
            AdapterError: if the axis of experts of a kernel is in doubt.
        """
        # A plan is known by its fields: rooms of files know no plans.
        is_plan = hasattr(params_or_plan, "targets") and hasattr(
            params_or_plan, "params"
        )
        if has_entries(params_or_plan):
            raise TypeError(
                "jlora.peft takes the params, as arrays or shapes, or a plan of them; "
                "got an adapter. Its file is placed by the paths of the params"
            )
        plan = params_or_plan if is_plan else None
        flat = FlatParams.of(plan.params if plan else params_or_plan)
        leaves = {p: leaf for p, leaf in flat.by_path().items() if is_array(leaf)}
        if not leaves:
            raise TypeError(
                "jlora.peft takes the params, as arrays or shapes, or a plan of them; "
                f"got {type(params_or_plan).__name__} without an array"
            )
        targets = plan.targets if plan else ()
        known = {t.path: t.axes for t in targets if t.axes is not None}
        uses = {t.path: tuple(use.kind for use in t.uses) for t in targets}
        bindings = bind(leaves, names)
        if names is None:
            bindings = {
                path: _with_window(binding, known.get(path), uses.get(path, ()))
                for path, binding in bindings.items()
            }
        known = {
            path: with_experts(own, bindings[path]) if path in bindings else own
            for path, own in (known | dict(axes or {})).items()
        }
        return cls(flat, leaves, known, uses, bindings, _missing_head(names, bindings))

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of a leaf."""
        return tuple(self.leaves[path].shape)

    def axes(self, path: str, fan_in: int | None = None) -> KernelAxes:
        """Returns the roles of a kernel's axes.

        Raises:
            AdapterError: if neither a plan nor the names of Flax tell them.
        """
        if path in self.known:
            return self.known[path]
        return guess_axes(path, self.shape(path), self.bindings[path], fan_in)

    def experts(self, path: str) -> tuple[int, ...] | None:
        """Returns the axis of experts that torch packs with a leaf, if it has one."""
        binding, n_axes = self.bindings.get(path), len(self.shape(path))
        if binding is None or "experts" not in binding.steps:
            return None
        n = binding.n_fields
        if n_axes - n < 3:
            return None
        batch = self.known[path].batch if path in self.known else range(n_axes)
        return (batch[n],) if len(batch) > n else None

    def is_kernel(self, path: str) -> bool:
        """Returns whether a leaf may be adapted, as far as is known."""
        if path in self.known:
            return True
        binding, last = self.bindings[path], path.rpartition("/")[2]
        named = last in ("kernel", *TABLES) or "experts" in binding.steps
        return named and len(self.shape(path)) - binding.n_fields >= 2

    def check_use(self, path: str) -> None:
        """Refuses a kernel that PEFT would use otherwise than the program does.

        Raises:
            UnsupportedFeatureError: if PEFT computes something else.
            AdapterError: if its rule lacks a transform.
        """
        steps = self.bindings[path].steps
        for kind in self.uses.get(path, ()):
            _, odd, order = kind.partition(", axes ")
            if odd:
                raise UnsupportedFeatureError(
                    f"{path!r} is the kernel of a convolution with its axes in the "
                    f"order {order}, where numbers are those of its window; "
                    "files have room for (*window, in, out) and (out, in, *window): "
                    "transpose it in the params, or merge the adapter instead"
                )
            if kind.startswith("conv, "):
                raise UnsupportedFeatureError(
                    f"{path!r} is the kernel of a convolution that PEFT gets wrong "
                    f"({kind.removeprefix('conv, ')}): it drops dilations, mixes "
                    "groups, and has no transposed ones; merge the adapter instead"
                )
            if kind == "conv" and not {"conv", "same"} & set(steps):
                raise AdapterError(
                    f"{path!r} is the kernel of a convolution; give its rule the "
                    'transform "conv", or "same" for (out, in, *window)'
                )
        self.check_table(path)

    def check_table(self, path: str) -> None:
        """Refuses a table whose rule does not say that it is one, or a head as well.

        Raises:
            AdapterError: if its rule lacks a transform.
        """
        steps, uses = self.bindings[path].steps, self.uses.get(path, ())
        if "lookup" not in uses:
            return
        if "embedding" not in steps:
            raise AdapterError(
                f"{path!r} is a table that is looked up; give its rule the transform "
                '"embedding"'
            )
        if len(set(uses)) > 1 and "tied" not in steps:
            raise AdapterError(
                f"{path!r} is a table and a head; give its rule the transform "
                '"tied(lm_head)", with the name of the head in torch'
            )

    def indices(self, path: str) -> list[tuple[int, ...]]:
        """Returns every index along the batch axes that the names count."""
        return list(np.ndindex(*self._counted(path)))

    def _counted(self, path: str) -> list[int]:
        """Returns the sizes of the batch axes that the names count."""
        n = self.bindings[path].n_fields
        axes = self.known[path].batch if path in self.known else range(n)
        return [self.shape(path)[i] for i in axes][:n]

    def fan_out(self, path: str, fan_in: int) -> int:
        """Returns the number of outputs of a kernel, given that of its inputs."""
        batch = math.prod(self.shape(path)[i] for i in self.axes(path, fan_in).batch)
        return math.prod(self.shape(path)) // max(batch * fan_in, 1)

    def value(self, path: str) -> np.ndarray | None:
        """Returns the values of a leaf on the host, or None if it is abstract.

        Those of a quantised one are what it is when it is made dense.
        """
        leaf = dequantized(self.leaves[path], path)
        return None if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)

    # --- from torch's names ---

    @functools.cached_property
    def _slots(self) -> tuple[dict[str, list[Home]], list[tuple[Any, str, int]]]:
        """Places by name, and patterns for the names of those that are counted."""
        fixed: dict[str, list[Home]] = defaultdict(list)
        counted = []
        for path, binding in self.bindings.items():
            for number, slot in enumerate(binding.slots):
                name = dataclasses.replace(
                    slot, template=binding.parameter(slot.template)
                )
                if slot.fields:
                    counted.append((name.pattern(), path, number))
                else:
                    fixed[name.template].append(Home(path, number, ()))
        return fixed, counted

    def homes(self, parameter: str) -> list[Home]:
        """Returns where a torch parameter is; several if it is fused in torch alone."""
        fixed, counted = self._slots
        found = list(fixed.get(parameter, ()))
        for pattern, path, number in counted:
            if match := pattern.fullmatch(parameter):
                found.append(Home(path, number, tuple(map(int, match.groups()))))
        # Numbered layers may go on where those of a stack end.
        found = [home for home in found if self._is_there(home)] or found
        part = lambda home: self.bindings[home.path].slots[home.slot].part or 0
        return sorted(found, key=part)

    def _is_there(self, home: Home) -> bool:
        sizes = self._counted(home.path)
        return all(i < n for i, n in zip(home.index, sizes, strict=False))

    def names_of(self, path: str) -> Iterator[tuple[Home, str]]:
        """Yields each place of a leaf, and torch's name of what is there."""
        binding = self.bindings[path]
        for index in self.indices(path):
            for number, slot in enumerate(binding.slots):
                home = Home(path, number, tuple(index))
                yield home, binding.parameter(slot.module(index))


_HEADS = ("lm_head", "embed_out")


def _missing_head(names: Names, bindings: Mapping[str, Binding]) -> str | None:
    """Returns torch's name of a head that the rules know and the params have not."""
    there = {slot.template for b in bindings.values() for slot in b.slots}
    tied = {str(b.steps["tied"]) for b in bindings.values() if "tied" in b.steps}
    for rule in map(rule_of, names or ()):
        name = rule.module if isinstance(rule.module, str) else ""
        if name.rpartition(".")[2] in _HEADS and name not in there | tied:
            return name
    return None


def _with_window(
    binding: Binding, axes: KernelAxes | None, uses: tuple[str, ...]
) -> Binding:
    """Returns the binding of a convolution's kernel with the transform that says so.

    A plan knows that it is one, and that its outputs come last, as in Flax.
    """
    flax = axes is not None and axes.out == (axes.ndim - 1,) and not axes.batch
    if not flax or "conv" not in uses or binding.steps:
        return binding
    return dataclasses.replace(binding, steps={"conv": None})


def check_parts(base: Base, homes: list[Home], module: str) -> None:
    """Raises unless the places of a module are one whole, or all of its parts."""
    parts = [base.bindings[home.path].slots[home.slot].part for home in homes]
    if parts in ([None], list(range(len(parts)))):
        return
    named = zip(homes, parts, strict=True)
    told = ", ".join(
        f"{home.path!r} ({'all of it' if part is None else f'part {part}'})"
        for home, part in named
    )
    raise AdapterError(
        f"torch's {module!r} is made of {told}: the rules of `names` need to name one "
        "leaf, or the parts 0, 1, … of which each is a leaf"
    )

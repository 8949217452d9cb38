"""From torch modules to the factors of leaves, and back: what formats share."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np

from .._adapter.factors import LoraFactors
from .._errors import AdapterError, UnsupportedFeatureError
from .._params.given import listed
from .._params.paths import nearest
from .fused import alike, join, promoted, split
from .layout import (
    factor_matrices,
    factors_from,
    magnitudes,
    rope_order,
    sizes,
    window_first,
    window_last,
)
from .modules import TorchModule
from .named_params import Base, Home, check_parts
from .names import Binding
from .stacked import check_fit, stack, stacked_magnitude
from .window import check_read, check_written

Index: TypeAlias = tuple[int, ...]
# The factors of a leaf: at each index along its batch axes, those of each slot.
Pieces: TypeAlias = dict[str, dict[Index, dict[int, TorchModule]]]

# --- reading ---


def factors_of(
    modules: Iterable[TorchModule], base: Base, where: str
) -> dict[str, LoraFactors]:
    """Returns the factors by path, in the order of the params, on the host.

    Args:
        modules: what a file holds, under torch's names of modules or parameters.
        base: the params.
        where: the name of the file, for messages.

    Raises:
        AdapterError: with everything that does not fit the params.
    """
    assembly = Assembly(base)
    for module in modules:
        with assembly.noting():
            assembly.place(module, assembly.homes(module))
    return assembly.factors(where)


class Assembly:
    """The modules of a file on their way to leaves, and everything that does not fit.

    A format that has nothing to add calls `factors_of`.

    Attributes:
        base: the params.
        owners: of the modules that have a place, by name.
        problems: what does not fit, for one error.
    """

    def __init__(self, base: Base) -> None:
        """Begins with nothing."""
        self.base = base
        self.owners: dict[str, str] = {}
        self.problems: list[str] = []
        self._pieces: Pieces = {}

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Keeps what is raised about the adapter inside for the error of `factors`."""
        try:
            yield
        except UnsupportedFeatureError:
            raise
        except AdapterError as error:
            self.problems.append(str(error))

    def homes(self, module: TorchModule) -> list[Home]:
        """Returns the places of a module: one, or those of all its parts.

        Raises:
            AdapterError: if the params have none, or one of another kind.
            UnsupportedFeatureError: if torch computes something else there.
        """
        homes = _homes(module, self.base)
        self.owners[module.name] = module.owner
        self.base.check_use(homes[0].path)
        return homes

    def place(self, module: TorchModule, homes: list[Home]) -> None:
        """Puts a module, or an expert of one, to its places.

        Raises:
            AdapterError: if it does not fit there.
        """
        module.check_ranks()
        path = homes[0].path
        if len(homes) == 1:  # one that is fused in torch has no window
            check_read(self.base, path, module.a.shape[0], bool(module.window))
        if module.window and "same" not in self.base.bindings[path].steps:
            rows = window_first(module.a, module.window)
            module = dataclasses.replace(module, a=rows)
        expert = () if module.expert is None else (module.expert,)
        for home, part in zip(homes, _parts(module, homes, self.base), strict=True):
            if part is not None:
                self._put(home, home.index + expert, part)

    def _put(self, home: Home, index: Index, part: TorchModule) -> None:
        slots = self._pieces.setdefault(home.path, {}).setdefault(index, {})
        if home.slot in slots:
            raise AdapterError(f"{home.path!r} has factors under two names in the file")
        slots[home.slot] = part

    def factors(self, where: str) -> dict[str, LoraFactors]:
        """Returns the factors by path, of all that was placed.

        Raises:
            AdapterError: with all problems.
        """
        adapter = {}
        for path in self.base.leaves:
            if path in self._pieces:
                with self.noting():
                    adapter[path] = _leaf(path, self._pieces[path], self.base)
        if self.problems:
            raise AdapterError(
                f"{where} does not fit the params:\n{listed(self.problems)}"
            )
        return adapter


def _homes(module: TorchModule, base: Base) -> list[Home]:
    name = module.name
    homes = [
        home
        for leaf in ("", ".weight", ".in_proj_weight")
        for home in base.homes(name + leaf)
        if "parameter" not in base.bindings[home.path].steps
    ]
    if not homes:
        known = [n for path in base.bindings for _, n in base.names_of(path)]
        raise AdapterError(
            f"no leaf of the params is torch's {name!r}; the nearest that rules "
            f"name: {nearest(name, known)}"
        )
    check_parts(base, homes, name)
    for home in homes:
        is_table = "embedding" in base.bindings[home.path].steps
        if is_table != module.is_table and len(homes) == 1:
            kinds = ("a kernel", "a table of rows that are looked up")
            raise AdapterError(
                f"{name!r} is {kinds[module.is_table]} in the file and "
                f"{home.path!r} {kinds[is_table]}"
            )
    return homes


def _parts(
    module: TorchModule, homes: list[Home], base: Base
) -> list[TorchModule | None]:
    """Returns the factors for each place of a module that is fused in torch alone."""
    if len(homes) == 1:
        return [module]
    widths = [base.fan_out(home.path, module.a.shape[0]) for home in homes]
    if sum(widths) != module.b.shape[1]:
        leaves = [f"{h.path} {base.shape(h.path)}" for h in homes]
        raise AdapterError(
            f"{leaves} have {widths} outputs, and the module that they are parts of "
            f"{module.b.shape[1]}"
        )
    return split(module, widths)


def _leaf(
    path: str, pieces: Mapping[Index, dict[int, TorchModule]], base: Base
) -> LoraFactors:
    """Returns the factors of a leaf from those at each index and slot."""
    binding, shape = base.bindings[path], base.shape(path)
    first = next(iter(next(iter(pieces.values())).values()))
    axes = base.axes(path, first.a.shape[0])
    fans = axes.fans(shape)
    batch = sizes(shape, axes.batch)
    wholes = [_whole(binding, slots, fans[1]) for slots in pieces.values()]
    at = dict(zip(pieces, promoted(wholes), strict=True))
    order = rope_order(binding, fans[1], sizes(shape, axes.out))
    check_fit(path, shape, fans, batch, at)
    a, b, scaling = stack(at, batch)
    magnitude = stacked_magnitude(path, at, batch)
    if order is not None:
        b = b[..., np.argsort(order)]
        magnitude = None if magnitude is None else magnitude[..., np.argsort(order)]
    if "conv" in binding.steps and len(axes.in_) < 2:
        raise AdapterError(f"{path!r} {shape} is no convolution's kernel")
    return factors_from(a, b, axes, shape, scaling, magnitude)


def _whole(
    binding: Binding, slots: Mapping[int, TorchModule], fan_out: int
) -> TorchModule:
    """Returns the factors of a leaf that is fused in JAX, from those of its slots."""
    count = len(binding.slots)
    if count == 1:
        return slots[0]
    widths = binding.widths(fan_out)
    for number, module in slots.items():
        if module.b.shape[1] != widths[number]:
            raise AdapterError(
                f"{binding.path!r}: part {number} has {module.b.shape[1]} outputs in "
                f"the file and {widths[number]} by the rule"
            )
    return join([slots.get(i) for i in range(count)], widths)


# --- writing ---


def modules_of(factors: Mapping[str, LoraFactors], base: Base) -> list[TorchModule]:
    """Returns the torch modules that an adapter adapts, each with its own factors.

    Of a parameter that packs experts, each expert is one. Of a stack, layers whose
    factors are zero are left out, and padded ranks trimmed: so came those into being
    that a file had nothing for.

    Raises:
        AdapterError: if the names do not fit the axes, or are those of several leaves.
    """
    parts: dict[str, dict[Home, list[TorchModule]]] = {}
    for path, entry in factors.items():
        for home, part in _pieces(path, entry, base):
            parts.setdefault(part.name, {}).setdefault(home, []).append(part)
    for path in factors:
        base.check_use(path)
        check_written(base, path, factors[path].axes)
    return [m for n, places in parts.items() for m in _joined(n, places, factors, base)]


def _pieces(
    path: str, entry: LoraFactors, base: Base
) -> Iterator[tuple[Home, TorchModule]]:
    """Yields the factors of each slot at each index of a leaf; experts one by one."""
    binding, axes = base.bindings[path], entry.axes
    a, b = alike(factor_matrices(entry))
    order = rope_order(binding, b.shape[-1], sizes(entry.kernel_shape, axes.out))
    b = b if order is None else b[..., order]
    norms = magnitudes(entry)
    norms = norms if order is None or norms is None else norms[..., order]
    batch, n = a.shape[:-2], binding.n_fields
    if len(batch) - n != ("experts" in binding.steps and len(batch) > n):
        raise AdapterError(
            f"{path!r} has {len(batch)} batch axes {batch}, and its module "
            f"{binding.slots[0].template!r} counts {n} of them; name a {{field}} for "
            "each in the rule"
        )
    packed, is_table = len(batch) > n, "embedding" in binding.steps
    slots = range(len(binding.slots))
    widths = binding.widths(b.shape[-1]) if len(slots) > 1 else []
    for index in np.ndindex(batch):
        norm = None if norms is None else norms[index]
        layer, expert = index[:n], index[n] if packed else None
        if n and norm is None and not (a[layer].any() or b[layer].any()):
            continue
        names = [_name(binding, number, layer) for number in slots]
        whole = TorchModule(
            names[0], a[index], b[index], entry.scaling, norm,
            is_table=is_table, expert=expert, binding=binding,
        )  # fmt: skip
        whole = whole.trimmed() if n else whole
        parts = split(whole, widths) if widths else [whole]
        for number, part in enumerate(parts):
            if part is None and packed:  # of all experts none may be left out
                zero = {"a": 0 * whole.a, "b": 0 * whole.b[:, : widths[number]]}
                part = dataclasses.replace(whole, magnitude=None, **zero)
            if part is not None:
                part = dataclasses.replace(part, name=names[number]) if number else part
                yield Home(path, number, layer), part


def _name(binding: Binding, slot: int, layer: Index) -> str:
    """Returns torch's name of a module, or of a parameter that is adapted itself."""
    name = binding.parameter(binding.slots[slot].module(layer))
    return name if "experts" in binding.steps else name.rpartition(".")[0]


def _joined(
    name: str,
    places: Mapping[Home, list[TorchModule]],
    factors: Mapping[str, LoraFactors],
    base: Base,
) -> list[TorchModule]:
    """Returns a module as torch has it, of one leaf or of several; experts apart."""
    home = next(iter(places))
    binding, entry = base.bindings[home.path], factors[home.path]
    homes = base.homes(binding.parameter(name))
    check_parts(base, homes, name)
    found = places[home]
    if binding.slots[home.slot].part is not None:
        widths = [base.fan_out(other.path, found[0].a.shape[0]) for other in homes]
        found = [
            join([places[h][e] if h in places else None for h in homes], widths)
            for e in range(max(map(len, places.values())))
        ]
    inputs = sizes(entry.kernel_shape, entry.axes.in_)
    window = binding.window(inputs)
    if window and "same" not in binding.steps:
        found = [dataclasses.replace(m, a=window_last(m.a, inputs)) for m in found]
    return [dataclasses.replace(one, window=window) for one in found]

"""The weights of a model on disk, under the names that an adapter has for them."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from .._adapter.factors import LoraFactors
from .._files.model_files import Weights
from .._params.axes import KernelAxes
from .._torch.model_types import ModelTypes
from .._torch.renames import ERAS, halves, is_packed, packs, part_of_pack, renamer

# Kinds of packed experts that are not (experts, out, in) on disk.
_TURNED = frozenset(("llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"))
# Kinds in which the features of gate and up alternate.
_ALTERNATING = frozenset(("gpt_oss", "openai_privacy_filter"))
# What is changed of a tensor on disk: of some of its rows, and by which entry.
Change: TypeAlias = tuple[Any, Any]
_ALL: Any = ...  # of a tensor without axes, too


@dataclasses.dataclass(frozen=True)
class View:
    """Where a tensor of a module is on disk.

    Attributes:
        pieces: for each expert, or once, the names on disk of what is one after the
            other along its rows.
        rows: which rows of a single piece it is.
        packed: whether there is an axis of experts.
        turned: whether it is `(in, out)`.
    """

    pieces: tuple[tuple[str, ...], ...]
    rows: Any = _ALL
    packed: bool = False
    turned: bool = False

    @property
    def names(self) -> list[str]:
        """The names on disk."""
        return [name for several in self.pieces for name in several]


Views: TypeAlias = dict[str, View]


class NamedWeights(Mapping[str, np.ndarray]):
    """Tensors by the names of modules, read from disk when they are asked for.

    Attributes:
        weights: the tensors by their names on disk.
        added: names on disk of tensors that are not there yet, each with the one whose
            values it has.
        tables: tables that have other rows than on disk, by their names there.
    """

    def __init__(
        self, weights: Weights, types: ModelTypes, wanted: Collection[str] = ()
    ) -> None:
        """Takes the tensors of a folder.

        Args:
            weights: the tensors by their names on disk.
            types: the kinds of the model.
            wanted: what an adapter changes, by its own names of modules and tensors.
                The names are those of the first era that has the most of them.
        """
        self.weights = weights
        self.added: dict[str, str] = {}
        self.tables: dict[str, np.ndarray] = {}
        self._views = _best(weights, types, wanted)

    def add(self, name: str, like: str, on_disk: str) -> None:
        """Adds a tensor with the values of another."""
        self.added[on_disk] = self.on_disk(like)
        self._views[name] = View(((on_disk,),))

    def extend(self, name: str, table: np.ndarray) -> None:
        """Gives a table other rows, in the dtype that it has on disk."""
        own = self.on_disk(name)
        self.tables[own] = np.asarray(table).astype(self.weights.shape(own).dtype)

    def read(self, on_disk: str) -> np.ndarray:
        """Returns a tensor by its name on disk, as it is before a merge."""
        own = self.added.get(on_disk) or on_disk
        return self.tables[own] if own in self.tables else self.weights[own]

    def on_disk(self, name: str) -> str:
        """Returns the name on disk of a tensor that is one there."""
        return self._views[name].names[0]

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a tensor."""
        view = self._views[name]
        if not view.packed:
            (own,) = view.names
            return self.read(own)[view.rows]
        parts = [[self.read(own) for own in several] for several in view.pieces]
        return np.stack([np.concatenate(several) for several in parts])

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self._views)

    def __len__(self) -> int:
        """Returns how many tensors there are."""
        return len(self._views)

    def shape(self, name: str) -> jax.ShapeDtypeStruct:
        """Returns the shape and the dtype of a tensor."""
        view = self._views[name]
        own = self.added.get(view.names[0]) or view.names[0]
        first = self.weights.shape(own)
        if own in self.tables:
            return _struct(first, len(self.tables[own]))
        if not view.packed:
            if view.rows is _ALL:
                return first
            part = np.broadcast_to(np.int8(0), first.shape)[view.rows]
            return jax.ShapeDtypeStruct(part.shape, first.dtype)
        rows = sum(self.weights.shape(own).shape[0] for own in view.pieces[0])
        wide = _struct(first, rows)
        return jax.ShapeDtypeStruct((len(view.pieces), *wide.shape), wide.dtype)

    def is_turned(self, name: str) -> bool:
        """Returns whether a tensor is known to be `(in, out)`."""
        return self._views[name].turned

    def changes(self, entries: Mapping[str, Any]) -> dict[str, list[Change]]:
        """Returns what entries change, by names on disk."""
        found: dict[str, list[Change]] = {}
        for name, entry in entries.items():
            for own, change in self._apart(self._views[name], entry):
                found.setdefault(own, []).append(change)
        return found

    def _apart(self, view: View, entry: Any) -> Iterator[tuple[str, Change]]:
        if not view.packed:
            yield view.names[0], (view.rows, entry)
            return
        for number, names in enumerate(view.pieces):
            end = 0
            for own in names:
                start, end = end, end + self.weights.shape(own).shape[0]
                yield own, (_ALL, _of_expert(entry, number, slice(start, end)))


def _struct(like: jax.ShapeDtypeStruct, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *like.shape[1:]), like.dtype)


def _of_expert(entry: Any, number: int, rows: slice) -> Any:
    """Returns what an entry of packed experts changes of some rows of one."""
    if not isinstance(entry, LoraFactors):
        return entry[number, rows]
    a, b = entry.a[number], entry.b[number]
    if entry.axes.in_ == (1,):  # `a` is at the rows
        return LoraFactors(a[rows], b, KernelAxes((), (0,), (1,)), entry.scaling)
    return LoraFactors(a, b[:, rows], KernelAxes((), (1,), (0,)), entry.scaling)


# --- the names ---


def _best(weights: Weights, types: ModelTypes, wanted: Collection[str]) -> Views:
    """Returns the names of the era that has most of what an adapter changes."""
    found: list[tuple[Views, set[str]]] = []
    for era in ERAS:
        views = _views(weights, types, era)
        there = _there(wanted, views)
        found.append((views, there))
        if len(there) == len(wanted):
            return views
    views, there = max(found, key=lambda pair: len(pair[1]))
    # Single modules may have a name of another era, and so may those of the adapter:
    # where the tensors have the new names, and it has the old ones.
    others: Views = {}
    for other, more in found:
        tensors = by_owner(other)
        for name in more - there:
            others |= {own: other[own] for own in tensors.get(name, [name])}
    for name in wanted:
        if not any(name in more for _, more in found):
            every = [views, *(more for more, _ in found)]
            others |= (
                _renamed(name, types, views)
                or _stacked(name, every, weights)
                or _expert(name, types, every, weights)
            )
    whole = {n for view in others.values() if view.rows is _ALL for n in view.names}
    kept = {n: v for n, v in views.items() if whole.isdisjoint(v.names)}
    return {**kept, **others}


def by_owner(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns names by what they are names in, in their order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def _renamed(name: str, types: ModelTypes, views: Views) -> Views:
    """Returns the tensors of a module, or one tensor, that has a new name on disk."""
    for era in ERAS[1:]:
        new = renamer(types, era)(f"{name}.weight").removesuffix(".weight")
        if new in views:
            return {name: views[new]}
        if new != name and f"{new}.weight" in views:
            own = [f"{new}.{leaf}" for leaf in ("weight", "bias")]
            return {f"{name}{n[len(new) :]}": views[n] for n in own if n in views}
    return {}


def _stacked(name: str, every: Sequence[Views], weights: Weights) -> Views:
    """Returns one of the experts that a module has in one weight, `(experts, …)`.

    So MLX saves them: `up_proj.2` is the third of `up_proj`.
    """
    module, _, number = name.rpartition(".")
    for views in every:
        view = views.get(f"{module}.weight")
        if view is None or view.packed or view.rows is not _ALL:
            continue
        shape = weights.shape(view.names[0]).shape
        if len(shape) == 3 and number in map(str, range(shape[0])):
            return {f"{name}.weight": View(view.pieces, (int(number),))}
    return {}


def _expert(
    name: str, types: ModelTypes, every: Sequence[Views], weights: Weights
) -> Views:
    """Returns the part of a packed parameter that an expert is.

    It is `(out, in)`, or `(in, out)` as it is kept on disk.
    """
    turned = is_in_first(types)
    if turned is None:
        return {}
    for era in ERAS:
        owner, _, part = renamer(types, era)(f"{name}.weight")[:-7].rpartition(".")
        owner, _, number = owner.rpartition(".")
        for parameter, (index, count) in part_of_pack(part).items():
            own = f"{owner}.{parameter}"
            view = next((views[own] for views in every if own in views), None)
            if view is None or view.packed or not number.isdigit():
                continue
            shape = weights.shape(view.names[0]).shape
            n_outputs = shape[2 if turned else 1] if len(shape) == 3 else 0
            if n_outputs and int(number) < shape[0] and not n_outputs % count:
                n = n_outputs // count
                part = slice(index * n, (index + 1) * n)
                if count > 1 and types.kinds & _ALTERNATING:
                    part = slice(index, None, count)
                rows = (slice(None), part) if turned else (part,)
                rows = (int(number), *rows)
                return {f"{name}.weight": View(view.pieces, rows, turned=turned)}
    return {}


def is_in_first(types: ModelTypes) -> bool | None:
    """Returns whether packed experts are `(experts, in, out)` on disk, if it is known.

    Of some kinds PEFT is told otherwise.
    """
    known = types.experts_in_first()
    return True if types.kinds & _TURNED else known


def _views(weights: Weights, types: ModelTypes, era: str) -> Views:
    rename = renamer(types, era)
    on_disk: dict[str, str] = {}
    twice = set()
    for own in weights:
        twice |= {name} if (name := rename(own)) in on_disk else set()
        on_disk[name] = own
    for own in weights:  # what would be two tensors of one name is as it was
        if rename(own) in twice:
            on_disk[own] = own
    views = {name: View(((own,),)) for name, own in on_disk.items()}
    for name, own in on_disk.items():
        if parts := halves(types, era, name):
            del views[name]
            half = weights.shape(own).shape[0] // 2
            views[parts[0]] = View(((own,),), slice(0, half))
            views[parts[1]] = View(((own,),), slice(half, None))
    if is_packed(types, era):
        for name, pieces in packs(on_disk).items():
            own = tuple(tuple(on_disk[n] for n in several) for several in pieces)
            if name not in views and _alike(weights, own):
                for several in pieces:
                    for single in several:
                        del views[single]
                views[name] = View(own, packed=True)
    return views


def _alike(weights: Weights, pieces: Iterable[tuple[str, ...]]) -> bool:
    """Whether experts have the same shapes, and one dtype."""
    shapes = {tuple(weights.shape(n).shape for n in own) for own in pieces}
    dtypes = {weights.shape(n).dtype for own in pieces for n in own}
    return len(shapes) == len(dtypes) == 1 and all(len(s) == 2 for s in shapes.pop())


def _there(wanted: Collection[str], views: Views) -> set[str]:
    owners = {name.rpartition(".")[0] for name in views}
    return {name for name in wanted if name in views or name in owners}

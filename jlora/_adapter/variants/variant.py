"""What jlora knows of a variant of LoRA: the record that each of them fills in."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ..._jax.keys import key_of
from ..._params.axes import KernelAxes, Shape
from ..config import LoraConfig
from ..factors import LoraFactors
from ..initializers import Wanted

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class New:
    """What the arrays of a new entry are made from.

    Attributes:
        path: the path of the leaf.
        config: the config that chose it.
        axes: the roles of its axes; None if it is trained whole.
        shape: its shape.
        rank: the rank of its factors, no larger than the kernel allows; None without.
        seed: the key that `init` was given.
    """

    path: str
    config: LoraConfig
    axes: Any
    shape: Shape
    rank: Any
    seed: jax.Array

    @property
    def key(self) -> jax.Array:
        """A key of the path's own."""
        return key_of(self.seed, self.path)

    def wanted(self, places: tuple[Any, Any] = (None, None)) -> Wanted:
        """Returns what an initialiser of two factors is asked for.

        Args:
            places: the shardings of both on an Explicit mesh.
        """
        config = self.config
        return Wanted(
            self.axes, self.shape, self.rank, config.rank, config.dtype, places
        )


def capped_rank(config: LoraConfig, axes: KernelAxes, shape: Shape) -> int:
    """Returns the rank of the factors that a config gives a kernel.

    No ΔW has a larger rank than the number of features that its kernel maps from or
    to: more columns would train nothing else. The scaling stays that of the rank that
    was asked, so that one learning rate suits all kernels.

    >>> axes = KernelAxes(batch=(0,), in_=(1,), out=(2, 3))
    >>> [capped_rank(LoraConfig(rank=8), axes, (12, 64, 2, n)) for n in (1, 3, 5)]
    [2, 6, 8]
    """
    return min(config.rank, *axes.fans(shape))


def _nothing(*args: Any, **settings: Any) -> None:
    """Returns None: there is nothing to say."""


def _empty(*args: Any, **settings: Any) -> Arrays:
    return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """A kind of entry that an adapter may hold of a leaf, and all that is known of it.

    The program is evaluated with two factors of each kernel, whatever is trained: a
    variant says what is trained, and how it becomes factors (`lowered`). An entry is a
    frozen dataclass that is a pytree. Its arrays are fields; static fields are `axes`,
    with a rank `scaling`, the settings, and what `statics` gives. It has a property
    `kernel_shape`, and with a rank one called `rank`.

    Attributes:
        name: what it is called in `LoraConfig.variant` and in records.
        entry: the class of its entries; `object` for plain arrays.
        shapes: from the roles and the shape of a kernel, a rank and the settings by
            name, the shape of each array by name.
        new: the arrays of a new entry, by name, from a `New` and the leaf; ΔW is 0.
        lowered: an entry and its kernel as the two factors of the same ΔW.
        statics: what else an entry holds that is static, from roles and shape.
        settings: the fields of `LoraConfig` that only this variant has. An entry and a
            record have them under the same names.
        chosen: whether a config asks for it; without it by `LoraConfig.variant`, and
            then records name the variant too. The first of the table that is chosen is
            taken.
        rank: the rank that a config gives a kernel; None if there is no rank.
        misfit: why a kernel of these roles and this shape cannot have it with these
            settings, or None.
        from_leaf: what of a new entry starts from the values of its leaf, in words that
            end before "starts", or None. The leaf that `new` gets is dense then.
        optional: arrays that not every entry has, each with whether a config asks for
            it.
        wide: arrays that are kept in float32 at least, whatever `LoraConfig.dtype` is.
        along: for arrays that are laid out as their kernel is, the axis of the kernel
            that each of their axes follows (None: none), from the roles. Arrays that
            are not named are whole on every device.
        frozen: arrays that an entry holds and that are not trained. `lowered` stops
            their gradients, plans do not count them, and `jlora.optim` leaves them.
        labels: what an array counts as in `jlora.optim`: "a", "b", "magnitude" or
            "full"; by default its own name. That of a frozen one is "frozen".
        has_roles: whether it needs the roles of the axes of a kernel. One that does
            not trains its leaf whole, and its entry is a plain array.
        reads_kernel: whether `lowered` looks at the values of the kernel.
        reads_for: the optional array with which it does, if it does not always.
        leaf: what its leaf is called.
        merged: the adapted kernel, from the kernel and an entry, where it is another
            than the kernel with the factors' ΔW.
        scaled_side: "in" or "out" where an entry is no sum but a scale of that side of
            its kernel, in an array called `scale`, from a config or an entry; else
            None. `lowered` gives the scaled kernel then, and the program is evaluated
            with the scale beside the kernel.
        parts: an entry as factors of parts of its kernel that do not overlap, where it
            is of some parts alone. Adapters of the same parts are added part by part.
        rejoined: an entry with other factors of its parts, of whatever rank.
        origin: for an entry that is one array, in which the change of its kernel is
            linear, the array that changes nothing; from an entry and its leaf, and None
            if that is told by a leaf that is None.
        problem: why an entry does not fit a kernel of a shape, in words that follow
            it, where there is more to say than that shapes differ.
        note: what a table says of an entry beside its rank, or in place of it.
        plural: what its entries are called in messages about files.
        peft: PEFT's own name for it, in whose files it has tensors of its own.
    """

    name: str
    entry: type
    shapes: Callable[..., dict[str, Shape]]
    new: Callable[[New, Any], Arrays]
    lowered: Callable[[Any, Any], LoraFactors]
    _: dataclasses.KW_ONLY
    statics: Callable[[KernelAxes, Shape], Arrays] = _empty
    settings: tuple[str, ...] = ()
    chosen: Callable[[LoraConfig], bool] | None = None
    rank: Callable[[LoraConfig, KernelAxes, Shape], int] | None = capped_rank
    misfit: Callable[..., str | None] = _nothing
    from_leaf: Callable[[LoraConfig], str | None] = _nothing
    optional: Mapping[str, Callable[[LoraConfig], bool]] = dataclasses.field(
        default_factory=dict
    )
    wide: tuple[str, ...] = ()
    along: Callable[[KernelAxes], Mapping[str, tuple[int | None, ...]]] = _empty
    frozen: tuple[str, ...] = ()
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    has_roles: bool = True
    reads_kernel: bool = False
    reads_for: str = ""
    leaf: str = "leaf"
    merged: Callable[[jax.Array, Any], jax.Array] | None = None
    scaled_side: Callable[[Any], str | None] = _nothing
    parts: Callable[[Any], Sequence[LoraFactors]] | None = None
    rejoined: Callable[[Any, Sequence[LoraFactors]], Any] | None = None
    origin: Callable[[Any, Any], Any] | None = None
    problem: Callable[[Any, Shape], str | None] | None = None
    note: Callable[[Any], str] = lambda entry: ""
    plural: str = ""
    peft: str = ""

    @property
    def is_named(self) -> bool:
        """Whether configs and records call it by its name."""
        return self.chosen is None

    def is_chosen(self, config: LoraConfig) -> bool:
        """Returns whether a config asks for it."""
        return self.chosen(config) if self.chosen else config.variant == self.name

    def reads(self, entry: Any) -> bool:
        """Returns whether `lowered` looks at the values of the kernel of an entry."""
        return self.reads_kernel or self.reads_for in self.arrays(entry)

    def is_dora(self, entry: Any) -> bool:
        """Returns whether an entry has DoRA's magnitude, which not every one has."""
        return "magnitude" in self.optional and "magnitude" in self.arrays(entry)

    def has_factors(self, entry: Any) -> bool:
        """Returns whether all that an entry changes is a sum of two factors."""
        is_sum = self.has_roles and self.scaled_side(entry) is None
        return is_sum and not self.is_dora(entry)

    def settings_of(self, owner: Any) -> Arrays:
        """Returns the settings of a config, or of an entry, by name."""
        return {name: getattr(owner, name) for name in self.settings}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arrays that an entry has, or may have."""
        if not self.has_roles:
            return (WHOLE,)
        fields = dataclasses.fields(self.entry)
        return tuple(f.name for f in fields if not f.metadata.get("static"))

    def label(self, name: str) -> str:
        """Returns what the array of a name counts as in `jlora.optim`."""
        return "frozen" if name in self.frozen else self.labels.get(name, name)

    def arrays(self, entry: Any) -> Arrays:
        """Returns the arrays of an entry, by name."""
        if not self.has_roles:
            return {WHOLE: entry}
        found = {name: getattr(entry, name) for name in self.names}
        return {name: array for name, array in found.items() if array is not None}

    def replaced(self, entry: Any, arrays: Mapping[str, Any]) -> Any:
        """Returns an entry with other arrays, by name."""
        if not self.has_roles:
            return arrays[WHOLE]
        return dataclasses.replace(entry, **arrays)

    def built(
        self,
        arrays: Mapping[str, Any],
        axes: Any,
        shape: Shape,
        scaling: float | None,
        settings: Mapping[str, Any],
    ) -> Any:
        """Returns an entry of arrays by name, for a kernel of these roles and shape."""
        if not self.has_roles:
            return arrays[WHOLE]
        static = {**settings, **self.statics(axes, shape)}
        if self.rank is not None:
            static["scaling"] = scaling
        return self.entry(**arrays, axes=axes, **static)


# What the array of a leaf that is trained whole is called, where arrays have names.
WHOLE = "value"

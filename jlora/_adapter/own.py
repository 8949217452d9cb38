"""A variant of one's own, outside of jlora: a class, and its line in the table."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp

from .._params.axes import KernelAxes, Shape
from .factors import LoraFactors, exportable
from .variants import register, variants
from .variants.variant import New, Variant

Static = {"static": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantEntry:
    """What an adapter holds of one kernel, in a variant of one's own.

    A subclass under `jlora.register_variant` annotates its arrays and defines `rank`,
    `shapes` and `lowered`; `new`, `along` and `labels` may stay as they are here.
    jlora evaluates the program with the two factors of `lowered`, whatever is trained.

    Attributes:
        axes: the roles of the kernel's axes, static.
        scaling: alpha/rank (or alpha/√rank), a static Python float.
        kernel_shape: the shape of the kernel, static.
        labels: what an array counts as in `jlora.optim`, by name: "a", "b",
            "magnitude" or "full". Arrays that are not named count as "b" if they are
            called so, and else as "a".
    """

    axes: KernelAxes = dataclasses.field(metadata=Static)
    scaling: float = dataclasses.field(metadata=Static)
    kernel_shape: Shape = dataclasses.field(metadata=Static)
    labels: ClassVar[Mapping[str, str]] = {}

    @property
    def rank(self) -> int:
        """The rank that was asked for, or less: it is told by the arrays' shapes."""
        raise AttributeError(f"{type(self).__name__} defines no `rank`")

    @staticmethod
    def shapes(axes: KernelAxes, shape: Shape, rank: int) -> dict[str, Shape]:
        """Returns the shape of each array by name, for a kernel and a rank."""
        raise AttributeError("a variant defines `shapes`")

    @classmethod
    def new(cls, new: New) -> dict[str, jax.Array]:
        """Returns the arrays of a new entry by name, such that ΔW is zero.

        Without a definition of one's own they are all zero, from which nothing can be
        learned if ΔW is a product of two of them.

        Args:
            new: `key`, `axes`, `shape`, `rank`, `path` and `config` of the kernel.
        """
        shapes = cls.shapes(new.axes, new.shape, new.rank)
        return {n: jnp.zeros(shape, new.config.dtype) for n, shape in shapes.items()}

    def lowered(self) -> LoraFactors:
        """Returns the two factors of the same ΔW: see `factors`.

        It runs once a call, outside of loops, and JAX differentiates it.
        """
        raise AttributeError(f"{type(self).__name__} defines no `lowered`")

    @staticmethod
    def along(axes: KernelAxes) -> Mapping[str, tuple[int | None, ...]]:
        """Returns, by name, the axis of the kernel that each axis of an array follows.

        On a mesh the array is laid out as these are. Arrays that are not named are
        whole on every device.
        """
        return {}

    def factors(self, a: jax.Array, b: jax.Array) -> LoraFactors:
        """Returns factors in the layout that the kernel asks for.

        Args:
            a: `(*batch, inputs, columns)`, or without the batch axes if it is the same
                for all of their indices. Several input axes are one.
            b: `(*batch, columns, outputs)` likewise.

        Raises:
            ValueError: if a shape is another one.
        """
        axes, shape = self.axes, self.kernel_shape
        inputs, outputs = axes.fans(shape)
        batch = tuple(shape[i] for i in axes.batch)
        columns = a.shape[-1]
        wanted = (inputs, columns), (columns, outputs)
        fits = lambda v, ends: v.shape in (ends, (*batch, *ends))
        if not all(map(fits, (a, b), wanted)):
            raise ValueError(
                f"{type(self).__name__} lowers a kernel {shape} of {axes} to a "
                f"{a.shape} and b {b.shape}, expected {wanted[0]} and {wanted[1]}, "
                f"each alone or behind {batch}"
            )
        a, b = (
            jnp.broadcast_to(v, (*batch, *ends)).reshape(to)
            for v, ends, to in zip(
                (a, b), wanted, axes.factor_shapes(shape, columns), strict=True
            )
        )
        return LoraFactors(a, b, axes, self.scaling)


E = TypeVar("E", bound=VariantEntry)


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def register_variant(name: str) -> Callable[[type[E]], type[E]]:
    """Makes a subclass of `VariantEntry` a variant that configs ask for by its name.

    The class becomes a frozen dataclass and a pytree whose leaves are its own annotated
    fields. Register it at the top of a module that is imported before an adapter of it
    is restored. A cell of a notebook that is run again replaces its class.

    Args:
        name: what `LoraConfig(variant=name)` and the records of checkpoints call it.

    Raises:
        TypeError: if the class is no `VariantEntry`, has no arrays, or lacks a method.
        ValueError: if another variant has the name.

    Example:
        One matrix for both sides of square kernels, `ΔW = s·a·diag(d)·aᵀ`:

        >>> import jax, jax.numpy as jnp, jlora
        >>> @jlora.register_variant("symmetric-docs")
        ... class Symmetric(jlora.VariantEntry):
        ...     a: jax.Array
        ...     d: jax.Array
        ...     rank = property(lambda self: self.a.shape[-1])
        ...
        ...     @staticmethod
        ...     def shapes(axes, shape, rank):
        ...         return {"a": (axes.fans(shape)[0], rank), "d": (rank,)}
        ...
        ...     @classmethod
        ...     def new(cls, new):
        ...         shapes = cls.shapes(new.axes, new.shape, new.rank)
        ...         a = jax.random.normal(new.key, shapes["a"])
        ...         return {"a": a, "d": jnp.zeros(shapes["d"])}
        ...
        ...     def lowered(self):
        ...         return self.factors(self.a * self.d[None], self.a.T)
        >>> lora = jlora.lora(
        ...     lambda params, x: x @ params["w"],
        ...     jlora.LoraConfig(rank=2, variant="symmetric-docs"),
        ... )
        >>> params = {"w": jnp.ones((5, 5))}
        >>> adapter = lora.init(jax.random.key(0), params, jnp.ones((3, 5)))
        >>> jax.tree.map(jnp.shape, jax.tree.leaves(adapter))
        [(5, 2), (2,)]
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f'`jlora.register_variant("name")` takes a name, got {name!r}')

    def decorate(cls: type[E]) -> type[E]:
        _check(cls)
        taken = [v for v in variants() if v.name == name]
        old = [v for v in taken if _place(v.entry) == _place(cls)]
        if others := [v.entry.__qualname__ for v in taken if v not in old]:
            raise ValueError(f"the variant {name!r} is {others[0]} already")
        made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        jax.tree_util.register_dataclass(made)
        # A class that is defined again is another one to JAX.
        again = f"#{len(old)}" if old else ""
        exportable(made, f"{_place(made)}{again}")
        register(_variant(name, made))
        return made

    return decorate


def variant_names() -> list[str]:
    """Returns the names that `LoraConfig(variant=...)` takes, one's own among them.

    >>> "lora" in variant_names(), "loha" in variant_names()
    (True, True)
    """
    return ["lora", *dict.fromkeys(v.name for v in variants() if v.is_named)]


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check(cls: type) -> None:
    if not inspect.isclass(cls) or not issubclass(cls, VariantEntry):
        raise TypeError(
            f"`jlora.register_variant` decorates a subclass of `jlora.VariantEntry`, "
            f"got {cls!r}"
        )
    needed = ("rank", "shapes", "lowered")
    lacks = [n for n in needed if getattr(cls, n) is getattr(VariantEntry, n)]
    lacks += [] if inspect.get_annotations(cls) else ["an annotated array"]
    if lacks:
        raise TypeError(f"the variant {cls.__qualname__} lacks {', '.join(lacks)}")


def _variant(name: str, cls: type[VariantEntry]) -> Variant:
    fields = dataclasses.fields(cls)
    names = [f.name for f in fields if not f.metadata.get("static")]
    labels = {n: "b" if n == "b" else "a" for n in names} | dict(cls.labels)
    return Variant(
        name,
        cls,
        cls.shapes,
        lambda new, leaf: cls.new(new),
        lambda entry, kernel: entry.lowered(),
        statics=lambda axes, shape: {"kernel_shape": shape},
        along=cls.along,
        labels=labels,
        note=lambda entry: f" {name}",
    )

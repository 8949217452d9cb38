"""Passes of a group of products whose form is chosen when the program is lowered."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from .._jax.platforms import Bodies, Body, Target, by_platform
from .choice import ByPlatform, form_on
from .group import Form, GroupDims, Operands
from .hopper_kernel import LARGEST
from .hopper_tiles import apart


@dataclasses.dataclass(frozen=True)
class Pass:
    """The forward or the backward pass of a group, hashable.

    Attributes:
        run: takes the form, the group, its operands, and what comes with them; all of
            that but the factors has the rows of `x`.
        dims: the group.
        kind: "product" where deltas are added to products of kernels, so that rows of
            several adapters can be those of one product; "skinny" where there are
            factors alone; "sums" where rows are summed over, so that mapped examples
            are not rows.
    """

    run: Callable[..., list[jax.Array]]
    dims: GroupDims
    kind: Literal["product", "skinny", "sums"]

    def shifted(self) -> "Pass":
        """The same for an `x` with one more axis of rows, first."""
        contract = tuple(i + 1 for i in self.dims.contract)
        dims = dataclasses.replace(self.dims, contract=contract)
        return dataclasses.replace(self, dims=dims)

    def unplaced(self) -> "Pass":
        """The same, that says nothing of how the axes of its products lie."""
        kernels = tuple(one.unplaced() for one in self.dims.kernels)
        dims = dataclasses.replace(self.dims, kernels=kernels)
        return dataclasses.replace(self, dims=dims)


def is_singly(target: Target, kernels: int) -> bool:
    """Whether siblings share no product of their factors, see `_product.forms`."""
    # On Explicit axes types say where all lies: the program stays as it was traced.
    return target.platform == "cpu" and kernels > 1 and not target.typed


def run_lowered(
    one: Pass, by: ByPlatform, operands: Operands, *rest: Any
) -> list[jax.Array]:
    """Runs a pass in the form that suits what the program is lowered for."""
    leaves, tree = jax.tree.flatten((operands, *rest))
    return by_platform(_Bodies(one, by, tree), *leaves)


@dataclasses.dataclass(frozen=True, repr=False)
class _Bodies:
    """What `_jax.platforms.by_platform` asks for."""

    one: Pass
    by: ByPlatform
    tree: Any
    is_typed = False

    def __repr__(self) -> str:
        """Short, for whoever prints a jaxpr."""
        name, count = self.one.run.__name__.strip("_"), len(self.one.dims.kernels)
        return f"<{name} of {count} product{'s' if count > 1 else ''}>"

    @property
    def has_rules(self) -> bool:
        return self.by.has_rules

    def portable(self, *leaves: jax.Array) -> list[jax.Array]:
        return self.in_form("separate", *leaves)

    def on(self, target: Target) -> Body | None:
        form = form_on(self.by, target)
        if form == "separate" and is_singly(target, len(self.one.dims.kernels)):
            form = "singly"
        if form == "separate":
            return None
        # It is lowered as if all axes were Auto, and its results are placed after it.
        plain = dataclasses.replace(self, one=self.one.unplaced())
        return lambda *leaves: plain.in_form(form, *leaves)

    def mapped(self, size: int, axes: Sequence[int | None]) -> Bodies | None:
        """Examples that are mapped are rows, unless factors or kernels are mapped too.

        Then the base product stays one for all, by way of the portable body: the other
        forms put factors into a kernel, but for the grouped one. That body it is, too,
        where the program says how the axes of its product lie, of which it knows no
        more than its own.
        """
        if self.one.kind == "sums" or any(k.placed for k in self.one.dims.kernels):
            return None
        mapped = [i is not None for i in axes]
        operands, *_ = jax.tree.unflatten(self.tree, mapped)
        kernels = jax.tree.leaves(operands.kernels)
        factors = jax.tree.leaves((operands.a, operands.b))
        rows = len(mapped) - len(kernels) - len(factors)
        if any(kernels) or sum(mapped) - sum(factors) < rows or operands.drops:
            return None  # a mask is one of all places, the same for each example
        by = self.by.of_rows(size)
        if not any(factors):
            return dataclasses.replace(self, one=self.one.shifted(), by=by)
        plain = self.one.kind == "product" and not jax.tree.leaves(operands.gates)
        if plain and all(factors):
            return _Grouped(dataclasses.replace(self, by=by), size)
        return None

    def in_form(self, form: Form, *leaves: jax.Array) -> list[jax.Array]:
        """Runs the pass in a form."""
        args = jax.tree.unflatten(self.tree, leaves)
        return self.one.run(form, self.one.dims, *args)


@dataclasses.dataclass(frozen=True, repr=False)
class _Grouped:
    """A pass for several adapters, mapped over all that it takes but kernels.

    Attributes:
        of: the pass of one adapter, with the tokens of all.
        adapters: how many there are.
    """

    of: _Bodies
    adapters: int
    is_typed = False

    def __repr__(self) -> str:
        return f"<{self.of!r} of each of {self.adapters} adapters>"

    @property
    def has_rules(self) -> bool:
        return self.of.has_rules

    def portable(self, *leaves: jax.Array) -> list[jax.Array]:
        operands, *rest = jax.tree.unflatten(self.of.tree, leaves)
        axes = (operands.adapter_axes, *(0 for _ in rest))
        run = lambda *args: self.of.one.run("separate", self.of.one.dims, *args)
        return jax.vmap(run, in_axes=axes)(operands, *rest)

    def on(self, target: Target) -> Body | None:
        return self._grouped if form_on(self.of.by, target) == "fused" else None

    def _grouped(self, *leaves: jax.Array) -> list[jax.Array]:
        operands, *_ = jax.tree.unflatten(self.of.tree, leaves)
        each = self.of.by.tokens // self.adapters
        if sum(operands.ranks) > LARGEST or not apart(*self.of.by.sizes, each):
            return self.portable(*leaves)
        return self.of.in_form("grouped", *leaves)

    def mapped(self, size: int, axes: Sequence[int | None]) -> Bodies | None:
        """`jax.vmap` of the portable body, whatever is mapped once more."""
        return None

"""Passes of a group of products whose form is chosen when the program is lowered."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._jax.platforms import Target, by_platform
from .choice import ByPlatform, form_on
from .group import Form, GroupDims, Operands


@dataclasses.dataclass(frozen=True)
class Pass:
    """The forward or the backward pass of a group, hashable.

    Attributes:
        run: takes the form, the group, its operands, and what comes with them; all of
            that but the factors has the rows of `x`.
        dims: the group.
        sums: whether rows are summed over, so that mapped examples are not rows.
    """

    run: Callable[..., list[jax.Array]]
    dims: GroupDims
    sums: bool = False

    def shifted(self) -> "Pass":
        """The same for an `x` with one more axis of rows, first."""
        contract = tuple(i + 1 for i in self.dims.contract)
        dims = dataclasses.replace(self.dims, contract=contract)
        return dataclasses.replace(self, dims=dims)


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
        return self._in_form("separate", *leaves)

    def on(self, target: Target) -> Callable[..., list[jax.Array]] | None:
        form = form_on(self.by, target)
        if form == "separate":
            return None
        return lambda *leaves: self._in_form(form, *leaves)

    def mapped(self, size: int, axes: Sequence[int | None]) -> "_Bodies | None":
        """Examples that are mapped are rows, unless factors or kernels are mapped too.

        Then the base product stays one for all, by way of the portable body: the other
        forms put factors into a kernel. That body it is, too, where the program says
        how the axes of its product lie, of which it knows no more than its own.
        """
        if self.one.sums or any(k.placed for k in self.one.dims.kernels):
            return None
        mapped = [i is not None for i in axes]
        operands, *_ = jax.tree.unflatten(self.tree, mapped)
        fixed = (operands.kernels, operands.a, operands.b)
        count = len(jax.tree.leaves(fixed))
        if any(jax.tree.leaves(fixed)) or sum(mapped) + count < len(mapped):
            return None
        by = self.by.of_rows(size)
        return dataclasses.replace(self, one=self.one.shifted(), by=by)

    def _in_form(self, form: Form, *leaves: jax.Array) -> list[jax.Array]:
        args = jax.tree.unflatten(self.tree, leaves)
        return self.one.run(form, self.one.dims, *args)

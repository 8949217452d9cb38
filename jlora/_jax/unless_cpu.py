"""Products with one body for CPUs and another one for all else, chosen at lowering."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .platforms import Bodies, Body, Target, by_platform


def unless_cpu(
    run: Callable[..., jax.Array], static: tuple[Any, ...], *args: jax.Array
) -> jax.Array:
    """Returns `run(on_cpu, *static, *args)`, for what the program is lowered for.

    Args:
        run: a function of a module; both results have one type. What it does on CPUs
            is right everywhere: derivatives of it are taken.
        static: what is hashable among its arguments.
        args: the arrays.
    """
    (result,) = by_platform(_Either(run, static), *args)
    return result


@dataclasses.dataclass(frozen=True)
class _Either:
    run: Callable[..., jax.Array]
    static: tuple[Any, ...]
    has_rules = False
    is_typed = True

    def portable(self, *args: jax.Array) -> list[jax.Array]:
        return [self.run(True, *self.static, *args)]

    def on(self, target: Target) -> Body | None:
        if target.platform == "cpu":
            return None
        return lambda *args: [self.run(False, *self.static, *args)]

    def mapped(self, size: int, axes: Sequence[int | None]) -> Bodies:
        return _Mapped(self, size, tuple(axes))


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """`jax.vmap` of either body."""

    of: Bodies
    size: int
    axes: tuple[int | None, ...]
    has_rules = False
    is_typed = True

    def portable(self, *args: jax.Array) -> list[jax.Array]:
        return self._map(self.of.portable)(*args)

    def on(self, target: Target) -> Body | None:
        body = self.of.on(target)
        return None if body is None else self._map(body)

    def mapped(self, size: int, axes: Sequence[int | None]) -> Bodies:
        return _Mapped(self, size, tuple(axes))

    def _map(self, body: Body) -> Body:
        return jax.vmap(body, in_axes=self.axes, axis_size=self.size)

"""`Use`: one way in which a function uses a kernel, with the truth about its axes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

RANK = 2  # differs from the size of every axis that is used
ALPHA = 3.0
Maker = Callable[[jax.Array, Any], jax.Array]


def normal(*shape: int) -> Maker:
    """An input of normal values in the dtype of the case."""
    return lambda key, dtype: jax.random.normal(key, shape, dtype)


def ids(limit: int, *shape: int) -> Maker:
    """An input of row numbers below `limit`."""
    return lambda key, dtype: jax.random.randint(key, shape, 0, limit)


def fixed(*values: int) -> Maker:
    """An input of the given whole numbers; one alone is a scalar."""
    return lambda key, dtype: jnp.asarray(values if len(values) > 1 else values[0])


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The shape of a kernel, and how `a` and `b` make its delta, as an einsum.

    In ``delta``, ``r`` is the rank; letters of both operands are batch axes, letters of
    the first alone in axes, of the second alone out axes: ``"nir,nro->ino"``.
    """

    shape: tuple[int, ...]
    delta: str = "ir,ro->io"

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The axes (batch, in, out), each in the order of the kernel."""
        operands, kernel = self.delta.split("->")
        a, b = (set(letters) for letters in operands.split(","))

        def where(letters: set[str]) -> tuple[int, ...]:
            return tuple(i for i, letter in enumerate(kernel) if letter in letters)

        return where(a & b), where(a - b), where(b - a)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of `a` and `b`."""
        batch, in_, out = (tuple(self.shape[i] for i in axes) for axes in self.axes)
        return (*batch, *in_, rank), (*batch, rank, *out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """A small model `fn(layer, *inputs)` in which the kernels are used in one way.

    Attributes:
        name: Identifies the use in test names.
        fn: Takes the dict of kernels (and extra leaves) and the inputs.
        kernels: The adapted leaves of the layer.
        inputs: Makers of the inputs; float ones take the dtype of the case.
        extra: Shapes of the other leaves of the layer, which are not kernels.
        argnum: The position of params among the arguments of the adapted function.
        reverse: Whether reverse-mode differentiation is defined.
        formed: Whether values of the kernel's shape are expected (depthwise
            convolutions, kernels scaled by an input, uses that materialize).
        loose: Whether the function itself rounds to bfloat16.
        dora: Whether a scale of the outputs can be applied after the use.
        primitive: What an error must name when the kernel can't stay factored.
    """

    name: str
    fn: Callable[..., Any]
    kernels: dict[str, Kernel]
    inputs: tuple[Maker, ...]
    extra: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    argnum: int = 0
    reverse: bool = True
    formed: bool = False
    loose: bool = False
    dora: bool = True
    primitive: str | None = None

    def model(self, params: Any, *inputs: jax.Array) -> Any:
        """The whole model: the use, and a bystander leaf outside of the layer."""
        leaves, tree = jax.tree.flatten(self.fn(params["layer"], *inputs))
        leaves[0] += params["shift"].astype(leaves[0].dtype)
        return tree.unflatten(leaves)

    def positioned(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Moves the params, the first argument of `fn`, to position `argnum`."""
        if self.argnum == 0:
            return fn

        def function(*args: Any) -> Any:
            params = args[self.argnum]
            others = args[: self.argnum] + args[self.argnum + 1 :]
            return fn(params, *others)

        return function

    def arguments(self, params: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the adapted function, in its order."""
        return *inputs[: self.argnum], params, *inputs[self.argnum :]

    def make_params(self, key: jax.Array, dtype: Any) -> dict[str, Any]:
        """Random params; kernels and extra leaves have the given dtype."""
        shapes = {name: kernel.shape for name, kernel in self.kernels.items()}
        shapes |= self.extra
        keys = jax.random.split(key, len(shapes))
        layer = {
            name: 0.3 * jax.random.normal(k, shape, dtype)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        return {"layer": layer, "shift": jnp.asarray(0.25, dtype)}

    def make_inputs(self, key: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
        """Random inputs; float ones have the given dtype."""
        keys = jax.random.split(key, len(self.inputs))
        return tuple(make(k, dtype) for make, k in zip(self.inputs, keys, strict=True))

    @functools.cached_property
    def paths(self) -> dict[str, Kernel]:
        """The kernels by their path in params."""
        return {f"layer/{name}": kernel for name, kernel in self.kernels.items()}


def use(
    name: str,
    fn: Callable[..., Any],
    *inputs: Maker,
    w: tuple[int, ...],
    delta: str = "ir,ro->io",
    **settings: Any,
) -> Use:
    """A use of one kernel ``w``; `fn` takes the kernel itself and the inputs."""
    return Use(
        name=name,
        fn=lambda layer, *args: fn(layer["w"], *args),
        kernels={"w": Kernel(w, delta)},
        inputs=inputs,
        **settings,
    )

"""A frozen value that is made where it is used: how quantised kernels flow.

A `Lazy` holds the arrays that a value is made from and travels through the program in
its place, as a pytree. An operation that uses the value up makes it inside a
`jax.custom_vjp`, once forward and once again backward; the residuals are the arrays
that it is made from, so that no dense kernel lives from one pass to the other.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._errors import UnsupportedFeatureError
from .._jax.versions import equation_scope, rebind
from .axes import Shape
from .quantized import Quantized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """A value that is not made yet.

    Attributes:
        inputs: what it is made from: arrays, and values that are lazy themselves.
        how: what makes it from them.
    """

    inputs: tuple[Any, ...]
    how: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, quantized: Quantized) -> "Lazy":
        """Returns a quantised value as a lazy one."""
        return cls((quantized,), Dequantize())

    @property
    def shape(self) -> Shape:
        """The shape of the value."""
        return self.how.shape(self.inputs)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the value."""
        return self.how.dtype(self.inputs)


@dataclasses.dataclass(frozen=True)
class Dequantize:
    """Makes a value from its quantised arrays."""

    def run(self, inputs: tuple[Any, ...]) -> jax.Array:
        """Returns the value."""
        return inputs[0].dense()

    def shape(self, inputs: tuple[Any, ...]) -> Shape:
        """Returns its shape."""
        return inputs[0].shape

    def dtype(self, inputs: tuple[Any, ...]) -> Any:
        """Returns its dtype."""
        return inputs[0].dtype


@dataclasses.dataclass(frozen=True)
class Applied:
    """Makes one output of an equation from its operands.

    Attributes:
        eqn: the equation.
        output: the number of the output.
        along: the operand whose axes the output has, entry by entry: what moves or
            cuts axes may then be done to that operand instead. None if there is none.
    """

    eqn: Any
    output: int = 0
    along: int | None = None

    def run(self, inputs: tuple[Any, ...]) -> jax.Array:
        """Returns the value."""
        with equation_scope(self.eqn):
            return rebind(self.eqn, [dense(v) for v in inputs])[self.output]

    def shape(self, inputs: tuple[Any, ...]) -> Shape:
        """Returns its shape."""
        if self.along is not None:
            return inputs[self.along].shape
        return tuple(self.eqn.outvars[self.output].aval.shape)

    def dtype(self, inputs: tuple[Any, ...]) -> Any:
        """Returns its dtype."""
        return self.eqn.outvars[self.output].aval.dtype


@dataclasses.dataclass(frozen=True)
class Entry:
    """Takes one entry along the first axis, as a scan does."""

    def run(self, inputs: tuple[Any, ...]) -> jax.Array:
        """Returns the value."""
        value, index = inputs
        return lax.dynamic_index_in_dim(dense(value), index, keepdims=False)

    def shape(self, inputs: tuple[Any, ...]) -> Shape:
        """Returns its shape."""
        return inputs[0].shape[1:]

    def dtype(self, inputs: tuple[Any, ...]) -> Any:
        """Returns its dtype."""
        return inputs[0].dtype


def dense(value: Any) -> Any:
    """Returns a lazy value as an array; anything else is returned as it is."""
    return value.how.run(value.inputs) if isinstance(value, Lazy) else value


def is_lazy(values: Sequence[Any]) -> bool:
    """Returns whether any of the values is lazy."""
    return any(isinstance(value, Lazy) for value in values)


# --- operations that use lazy values up ---


def called(eqn: Any, values: Sequence[Any], derive: str) -> list[Any]:
    """Evaluates an equation on values of which some are lazy.

    Args:
        eqn: the equation.
        values: its operands.
        derive: "custom", or "autodiff" for forward-mode users.
    """
    if not is_lazy(values):
        return rebind(eqn, list(values))
    run = lambda values: rebind(eqn, [dense(v) for v in values])
    if eqn.effects:  # a debug print and the like, of which nothing is differentiated
        return run(values)
    return made_again(run, list(values), derive)


def made_again(run: Callable[[Any], Any], values: Any, derive: str) -> Any:
    """Returns `run(values)`, evaluated anew in the backward pass."""
    if derive == "custom":
        return _called(run, values)
    return jax.checkpoint(run)(values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _called(run: Callable[[Any], Any], values: Any) -> Any:
    return run(values)


class _Residuals(NamedTuple):
    values: Any
    wanted: tuple[tuple[()] | None, ...]


def _forward(run: Callable[[Any], Any], values: Any) -> tuple[Any, _Residuals]:
    values, wanted = primals(values)
    return run(values), _Residuals(values, wanted)


def _backward(
    run: Callable[[Any], Any], residuals: _Residuals, cotangents: Any
) -> tuple[Any]:
    cotangents = [instantiate(ct) for ct in cotangents]
    values, cotangents = kept_apart(residuals.values, cotangents)
    return (pulled(run, values, residuals.wanted, cotangents),)


_called.defvjp(_forward, _backward, symbolic_zeros=True)


def primals(values: Any) -> tuple[Any, tuple[tuple[()] | None, ...]]:
    """Takes the operands of a forward rule with symbolic zeros apart.

    Returns:
        The values, and a marker for each array: () if it is differentiated, else None.
        A marker is part of the tree structure, and so is known in the backward pass.
    """
    is_primal = lambda v: hasattr(v, "perturbed")
    leaves = jax.tree.leaves(values, is_leaf=is_primal)
    arrays = jax.tree.map(lambda v: v.value, values, is_leaf=is_primal)
    return arrays, tuple(() if v.perturbed else None for v in leaves)


def pulled(
    run: Callable[[Any], Any], values: Any, wanted: Sequence[Any], cotangents: Any
) -> Any:
    """Returns the gradients of `run(values)`: None for arrays that are not wanted."""
    leaves, treedef = jax.tree.flatten(values)
    where = [i for i, mark in enumerate(wanted) if mark is not None]

    def of_wanted(arrays: list[jax.Array]) -> Any:
        filled = list(leaves)
        for i, array in zip(where, arrays, strict=True):
            filled[i] = array
        return run(treedef.unflatten(filled))

    _, pull = jax.vjp(of_wanted, [leaves[i] for i in where])
    (found,) = pull(cotangents)
    gradients: list[Any] = [None] * len(leaves)
    for i, gradient in zip(where, found, strict=True):
        gradients[i] = gradient
    return treedef.unflatten(gradients)


def instantiate(cotangent: Any) -> Any:
    """Returns a cotangent as an array; that of an unused output is symbolic."""
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        aval: Any = cotangent
        zeros = np.zeros if aval.dtype == jax.dtypes.float0 else jnp.zeros
        return zeros(aval.shape, aval.dtype)
    return cotangent


def kept_apart(values: Any, cotangents: list[Any]) -> tuple[Any, list[Any]]:
    """Returns both behind a barrier.

    Without it XLA finds that a kernel was made dense before, in the forward pass, and
    keeps that copy until now.
    """
    real = [i for i, ct in enumerate(cotangents) if ct.dtype != jax.dtypes.float0]
    values, held = lax.optimization_barrier((values, [cotangents[i] for i in real]))
    for i, ct in zip(real, held, strict=True):
        cotangents[i] = ct
    return values, cotangents


# --- a quantised kernel is frozen ---


def check_frozen(path: str, quantized: Quantized) -> None:
    """Has the derivative with respect to a quantised kernel raise an error.

    Raises:
        UnsupportedFeatureError: while such a derivative is taken.
    """

    @jax.custom_jvp
    def watched(scale: jax.Array) -> jax.Array:
        return scale

    @functools.partial(watched.defjvp, symbolic_zeros=True)
    def rule(primals: Any, tangents: Any) -> Any:
        if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
            raise UnsupportedFeatureError(
                f"a derivative with respect to the quantised kernel {path!r} "
                f"({quantized.qtype}) was asked for; differentiate with respect to the "
                "adapter alone: `jax.grad(loss)(adapter, params, …)`"
            )
        return primals[0], tangents[0]

    watched(quantized.scale)

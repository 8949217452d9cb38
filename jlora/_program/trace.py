"""Traces any apply function to a jaxpr over every array of every argument."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from .._params.paths import FlatParams, is_array, is_quantized
from .._params.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced call: its jaxpr, and how inputs and outputs are put together.

    Attributes:
        jaxpr: the closed jaxpr over the arrays of all arguments, in tree order.
        inputs: those arrays (abstract or concrete); quantised kernels of the params
            are `Quantized`, and dense in the jaxpr.
        positions: the place among `inputs` of each array of the params, by path.
        rebuild: turns the outputs of the jaxpr into what the function returns.
    """

    jaxpr: Any
    inputs: list[Any]
    positions: dict[str, int]
    rebuild: Callable[[Sequence[Any]], Any]


def _with_quantized(params: FlatParams) -> Any:
    """Returns the params with each quantised kernel as one leaf."""
    pairs = zip(params.paths, params.leaves, strict=True)
    return params.treedef.unflatten(
        [Quantized.of(p, leaf) if is_quantized(leaf) else leaf for p, leaf in pairs]
    )


def _as_seen(leaf: Any) -> Any:
    """Returns what the function sees: of a quantised kernel the dense one."""
    return (
        jax.eval_shape(Quantized.dense, leaf) if isinstance(leaf, Quantized) else leaf
    )


def _named_like(
    fn: Callable[..., Any], count: int, keywords: Collection[str]
) -> Callable[[Any], Any]:
    """Returns a decorator that gives a function the name and signature of `fn`."""
    plain = lambda wrapper: wrapper
    try:
        signature = inspect.signature(fn)
        signature.bind_partial(*[None] * count, **dict.fromkeys(keywords))
    except (TypeError, ValueError):  # a builtin, or what will not take the arguments
        return plain
    # JAX does not tell a keyword from a parameter of its name that is positional only.
    own = signature.parameters.values()
    if any(p.kind is p.POSITIONAL_ONLY and p.name in keywords for p in own):
        return plain
    return functools.wraps(fn, updated=())


def trace(
    fn: Callable[..., Any],
    argnum: int,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    params: FlatParams,
) -> Traced:
    """Traces `fn(*args, **kwargs)` abstractly; `params` is `args[argnum]` flattened."""
    args = [*args[:argnum], _with_quantized(params), *args[argnum + 1 :]]
    is_kernel = lambda node: isinstance(node, Quantized)
    leaves, treedef = jax.tree.flatten((tuple(args), kwargs), is_leaf=is_kernel)
    where = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    results: dict[str, Any] = {}

    # Under the names that the arguments have, for JAX's errors of a traced flag.
    @_named_like(fn, len(args), kwargs)
    def on_arrays(*arrays: Any, **keywords: Any) -> list[Any]:
        filled = list(leaves)
        for i, array in zip(where, jax.tree.leaves((arrays, keywords)), strict=True):
            filled[i] = array
        call_args, call_kwargs = treedef.unflatten(filled)
        out, results["treedef"] = jax.tree.flatten(fn(*call_args, **call_kwargs))
        results["static"] = [None if is_array(leaf) else leaf for leaf in out]
        results["traced"] = [is_array(leaf) for leaf in out]
        return [leaf for leaf in out if is_array(leaf)]

    inputs = [leaves[i] for i in where]
    seen: list[Any] = [None] * len(leaves)
    for i, array in zip(where, inputs, strict=True):
        seen[i] = _as_seen(array)
    call_args, call_kwargs = treedef.unflatten(seen)
    jaxpr = jax.make_jaxpr(on_arrays)(*call_args, **call_kwargs)

    def rebuild(outputs: Sequence[Any]) -> Any:
        arrays = iter(outputs)
        pairs = zip(results["traced"], results["static"], strict=True)
        out = [next(arrays) if traced else leaf for traced, leaf in pairs]
        return results["treedef"].unflatten(out)

    start = len(jax.tree.leaves(tuple(args[:argnum])))
    order = {leaf: place for place, leaf in enumerate(where)}
    positions = {
        path: order[start + i]
        for i, path in enumerate(params.paths)
        if start + i in order
    }
    return Traced(jaxpr, inputs, positions, rebuild)

"""One batch whose examples use different adapters: the body of `Lora.apply_mixed`.

Every example is mapped over by `jax.vmap`, which leaves the base, mapped over by
nothing, one operand of one product. What it gets of the stacked adapter is said in
`_lora.mixed_entries`; what all that takes on a mesh with Explicit axes in
`_lora.mixed_mesh`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._adapter.instead import check_order
from .._adapter.variants import variant_of_entry
from .._algebra.prepared import count_of_either
from .._algebra.stackable import plain_stack
from .._errors import UnsupportedFeatureError
from .._params.given import check_key, some
from .._params.paths import FlatParams, PyTree, is_array
from .mixed_arguments import Arguments, Outputs, split_key
from .mixed_entries import Mixture
from .mixed_mesh import Examples

Axes = Any  # an int, None, or a tree of them that is a prefix of another


def run_mixed(
    apply: Callable[..., Any],
    params: PyTree,
    stacked: Mapping[str, Any],
    index: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dropout_key: jax.Array | None,
    in_axes: Axes,
    out_axes: Axes,
) -> Any:
    """Returns `apply(params, given, args, kwargs, key)` with an adapter per example."""
    check_order(params, stacked, _ORDER)
    count = count_of_either(stacked)
    index = _checked(index, count)
    arguments = Arguments.of(in_axes, args, kwargs, index.shape[0])
    if dropout_key is not None and not hasattr(dropout_key, "ndim"):
        check_key(dropout_key, "lora_dropout_key")
    keys = None if dropout_key is None else split_key(dropout_key, index.shape[0])
    _refuse_dora(stacked)
    plain = {path: plain_stack(entry) for path, entry in stacked.items()}
    call = _Call(apply, params, plain, index, arguments, keys)
    outputs = Outputs(out_axes)
    return outputs.rebuild(_on_any_mesh(call, outputs))


def _refuse_dora(stacked: Mapping[str, Any]) -> None:
    """Raises for magnitudes: the norm of a kernel would be another in each example."""
    found = [
        repr(p)
        for p, entry in stacked.items()
        if variant_of_entry(entry).is_dora(entry)
    ]
    if found:
        raise UnsupportedFeatureError(
            f"{some(found)}: a magnitude (DoRA) scales each kernel by the "
            "norm of its sum: no product of all examples has that. Call `lora.apply("
            "params, jlora.take(stacked, i), ...)` with the examples of adapter i"
        )


_ORDER = (
    "The order is `lora.apply_mixed(params, stacked, index, *args)`, with the adapters "
    "stacked by `jlora.stack`"
)


class _Call(NamedTuple):
    """A call, all arrays of which may be moved to another mesh."""

    apply: Callable[..., Any]  # of params, `Given`, args, kwargs, and a dropout key
    params: PyTree
    stacked: dict[str, Any]
    index: Any
    arguments: "Arguments"
    keys: Any

    @property
    def pairs(self) -> list[tuple[Any, int]]:
        """The arrays that have one entry for each example, with the axis of these."""
        arguments = zip(self.arguments.mapped, self.arguments.mapped_axes, strict=True)
        keys = [] if self.keys is None else [(self.keys, 0)]
        return [*arguments, (self.index, 0), *keys]

    def each(self, move: Callable[[Any, int | None], Any]) -> "_Call":
        """Returns the call with every array moved; those of all examples at None."""
        whole = lambda tree: jax.tree.map(
            lambda v: move(v, None) if is_array(v) else v, tree
        )
        return self._replace(
            params=whole(self.params),
            stacked=whole(self.stacked),
            index=move(self.index, 0),
            arguments=self.arguments.each(move),
            keys=None if self.keys is None else move(self.keys, 0),
        )


def _on_any_mesh(call: _Call, outputs: "Outputs") -> list[jax.Array]:
    """Maps over the examples; on a split mesh if the function names that of theirs."""
    arrays = jax.tree.leaves((call.params, call.stacked))
    arrays += [array for array, _ in call.pairs]
    examples = Examples.of(call.pairs, list(filter(is_array, arrays)))
    if not examples.names:
        return _mapped(call, outputs, examples)
    try:
        return _mapped(call, outputs, examples)
    except ValueError as error:
        try:
            return _mapped_on_split(call, outputs, examples)
        except Exception as other:
            raise error from other


def _mapped(call: _Call, outputs: "Outputs", examples: Examples) -> list[jax.Array]:
    """Returns the outputs of all examples, along axis 0 of each array."""
    mixture = Mixture(
        call.stacked,
        count_of_either(call.stacked),
        FlatParams.of(call.params).by_path(),
        examples,
        call.index.shape[0],
    )

    def one(index: jax.Array, own: Sequence[jax.Array], key: Any) -> list[jax.Array]:
        args, kwargs = call.arguments.of_one(own)
        given = mixture.of_one(index)
        return outputs.strip(call.apply(call.params, given, args, kwargs, key))

    mapped = [examples.laid_out(*pair) for pair in call.pairs]
    keys = None if call.keys is None else mapped.pop()
    index = jnp.asarray(mapped.pop())
    # Out axes are known once `one` has been traced: put where they belong afterwards.
    each = jax.vmap(one, in_axes=(0, call.arguments.mapped_axes, 0))
    return each(index, mapped, keys)


def _mapped_on_split(
    call: _Call, outputs: "Outputs", examples: Examples
) -> list[jax.Array]:
    """The same on a split mesh, which a compiled program alone can turn to."""
    arrays: list[Any] = []
    call.each(lambda array, axis: arrays.append(array))

    @jax.jit
    def run(arrays: list[Any]) -> list[jax.Array]:
        split, rest = examples.split(), iter(arrays)
        with jax.sharding.use_abstract_mesh(split.mesh):
            moved = call.each(lambda _, axis: examples.onto_split(next(rest), axis))
            found = _mapped(moved, outputs, split)
        return [examples.from_split(array) for array in found]

    return run(arrays)


def _checked(index: Any, count: int) -> Any:
    """Returns the indices as an array; concrete ones must be below `count`."""
    index = index if isinstance(index, Tracer | jax.Array) else np.asarray(index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            "`index` is a whole number for each example, of shape (examples,); got "
            f"shape {index.shape} of {index.dtype}. One adapter for all is "
            "`lora.apply(params, jlora.take(stacked, index), ...)`"
        )
    traced = isinstance(index, Tracer)
    if traced or not getattr(index, "is_fully_addressable", True):
        return index
    values = np.asarray(index)
    wrong = [f"{values[i]} for example {i}" for i in np.flatnonzero(values >= count)]
    if wrong:
        raise IndexError(
            f"there are {count} adapters, from 0 (negative is none); got "
            f"{', '.join(wrong)}"
        )
    return index

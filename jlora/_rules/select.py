"""Choices between values of which some carry kernels: each entry comes from one case.

`jax.vmap` turns a `cond` whose predicate is a bool for each example into such choices.
Where the predicate varies along batch axes of the kernels alone, or along one side of
them, the choice is one between factors.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .._jax.sharding import spec_of
from .._jax.versions import explicit_mesh, rebind, source_line
from .._params.axes import Shape, free_axes
from .._params.lazy import dense, is_lazy
from .._product.dropout import more_keys
from .adapted import Adapted, Part, base_of, without_gate
from .lazy_moves import remembered
from .rule import Analysis, ControlFlowRule, Gathered, Run
from .view import Step, Value, any_active, plain


def _analyze_select(
    analysis: Analysis, eqn: Any, values: list[Value], wanted: tuple[bool, ...]
) -> tuple[Step, list[Value]]:
    sizes = enumerate(eqn.invars[0].aval.shape)
    along = frozenset(i for i, n in sizes if n != 1)
    if values[0].along is not None:
        along &= values[0].along
    active = any_active(values)
    views = [view for value in values[1:] for view in value.views]
    # What was formed of a kernel is none any more where features are chosen beside it.
    views = [view for view in views if not (view.formed and active)]
    if not all(analysis.is_one_sided(view, along) for view in views):
        analysis.materialized(eqn, values)
        return Step("materialize"), plain(1, active)
    # A scale of one kernel ends where another is chosen.
    chosen = [view.spread_along(along).chosen_along(along) for view in views]
    output = Value(tuple(dict.fromkeys(chosen)), active)
    return Step("enter", predicate=tuple(sorted(along))), [output]


def _run_select(
    eqn: Any, step: Step, values: list[Any], run: Run
) -> tuple[Sequence[Any], Sequence[Gathered]]:
    with jax.named_scope("jlora"):
        return _select(eqn, step.predicate, values), ()


def _unseen_inputs(eqn: Any) -> str:
    return (
        f"look into {eqn.primitive.name} at {source_line(eqn)}, which uses a target; "
        "leave the target out of the config that it is made with"
    )


def _select(eqn: Any, along: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """Evaluates a `select_n` of plain and adapted cases.

    Args:
        eqn: the equation.
        along: the axes along which the predicate varies.
        values: its operands.
    """
    predicate, cases = dense(values[0]), values[1:]
    (base,) = _chosen_bases(eqn, [predicate, *map(base_of, cases)])
    if not any(isinstance(case, Adapted) for case in cases):
        return [base]
    which = _narrow(predicate, along, base.ndim)
    if _are_alike(cases) and not _is_sided(cases[0], along):
        each = zip(*map(_parts, cases), strict=True)
        parts = [_chosen_part(which, parts) for parts in each]
    else:
        parts = [
            _masked(which, number, part, along, base.shape)
            for number, case in enumerate(cases)
            for part in _parts(case)
        ]
    return [Adapted(base, tuple(parts), _chosen_scale(which, cases))]


def _chosen_bases(eqn: Any, values: list[Any]) -> list[Any]:
    return remembered(eqn, values) if is_lazy(values) else rebind(eqn, values)


def _parts(case: Any) -> tuple[Part, ...]:
    """The parts of a case; factors are chosen with their gates multiplied into them."""
    return tuple(map(without_gate, case.parts)) if isinstance(case, Adapted) else ()


def _narrow(predicate: jax.Array, along: Sequence[int], ndim: int) -> jax.Array:
    """Returns the predicate as an aligned factor of rank one: of size 1 elsewhere."""
    if not predicate.ndim:
        return predicate.reshape((1,) * (ndim + 1))
    others = free_axes(ndim, along)
    if explicit_mesh(predicate) is not None:
        reduce = jnp.any if predicate.dtype == bool else jnp.max
        return reduce(predicate, axis=others, keepdims=True)[..., None]
    for axis in others:
        predicate = lax.slice_in_dim(predicate, 0, 1, axis=axis)
    return predicate[..., None]


def _are_alike(cases: Sequence[Any]) -> bool:
    """Whether all cases have parts of the same kinds, ranks and dtypes."""
    kinds = set()
    for case in cases:
        arrays, treedef = jax.tree.flatten(_parts(case))
        kinds.add((treedef, *((v.dtype, v.ndim, v.shape[-1]) for v in arrays)))
    return len(kinds) == 1


def _is_sided(case: Any, along: Sequence[int]) -> bool:
    """Whether some axes belong to one side of the kernel."""
    has = lambda factor, i: factor.shape[i] != 1
    return any(has(p.a, i) != has(p.b, i) for p in _parts(case) for i in along)


def _chosen_part(which: jax.Array, parts: Sequence[Part]) -> Part:
    """Chooses both factors; with dropout, each choice has a key of its own."""
    first = parts[0]
    key = first.key
    if key is not None and first.dropout is not None:
        key = more_keys(key, first.dropout, which.shape[:-1])
    a, b = (_choose(which, [getattr(p, side) for p in parts]) for side in "ab")
    return dataclasses.replace(first, a=a, b=b, key=key)


def _masked(
    which: jax.Array, number: int, part: Part, along: Sequence[int], shape: Shape
) -> Part:
    """Returns a part that is zero wherever another case is chosen."""
    whole = lambda factor: all(factor.shape[i] == shape[i] for i in along)
    side = "b" if whole(part.b) and not whole(part.a) else "a"
    factor = getattr(part, side)
    chosen = which.astype(jnp.int32) == number
    key = part.key
    if key is not None and part.dropout is not None:
        key = more_keys(key, part.dropout, which.shape[:-1])
    masked = _choose(chosen, [jnp.zeros_like(factor), factor])
    return dataclasses.replace(part, **{side: masked}, key=key)


def _chosen_scale(which: jax.Array, cases: Sequence[Any]) -> jax.Array | None:
    """Chooses the scale; a case without one is scaled by one."""
    scales = [case.scale if isinstance(case, Adapted) else None for case in cases]
    known = [scale for scale in scales if scale is not None]
    if not known:
        return None
    one = jnp.ones_like(known[0])
    return _choose(which, [one if scale is None else scale for scale in scales])


def _choose(which: jax.Array, arrays: Sequence[jax.Array]) -> jax.Array:
    """Returns entries of aligned arrays, all broadcast to one shape."""
    every = [which, *arrays]
    shape = jnp.broadcast_shapes(*(v.shape for v in every))
    place = _place(every)
    axes = tuple(range(len(shape)))
    wide = [lax.broadcast_in_dim(v, shape, axes, out_sharding=place) for v in every]
    return lax.select_n(*wide)


def _place(arrays: Sequence[jax.Array]) -> NamedSharding | None:
    """Returns how the result is laid out on an Explicit mesh, None on others."""
    mesh = explicit_mesh(*arrays)
    if mesh is None:
        return None
    specs = list(zip(*map(spec_of, arrays), strict=True))
    named = [next((entry for entry in axis if entry), None) for axis in specs]
    return NamedSharding(mesh, PartitionSpec(*named))


CONTROL_FLOW = {
    "select_n": ControlFlowRule(_analyze_select, _run_select, uncounted=_unseen_inputs)
}

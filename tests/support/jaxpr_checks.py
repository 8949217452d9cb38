"""Reads a traced program and says whether an adapted kernel was formed in it.

Every value of the program is of one of three kinds. It depends on constants alone;
or it is derived from base leaves and constants without a product (cast, transposed,
sliced, rescaled, dequantised); or it depends on something else: an input, the
adapter, a cotangent. A value that has a kernel's shape and is not derived from the
base is a kernel that was formed: `W + s·a·b` in the forward pass, `dW = xᵀ·dy` in
the backward pass, or the buffer of zeros in which one is added up.

A shape counts up to the order of its axes and up to axes of size one, and joined
axes count too: `(12, 3, 5)` forbids `(12, 15)` and `(5, 36)`. So choose the
dimensions of a test apart, and rank different from all of them.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax.extend.source_info_util import summarize
from releases import is_before

Shape = tuple[int, ...]

EMPTY, CONST, BASE, OTHER = range(4)

# What JAX up to 0.10 puts where the residuals of an untaken branch would be; before
# 0.10.2 it is zeros, see `_fills`, as are cotangents that a `shard_map` has none for.
FILLERS = {"empty", "empty2"}
FILLED_WITH_ZEROS = is_before("jax", "0.10.2")

# These show their first operand otherwise; further operands only say where.
RELABELLING = {
    "all_gather",
    "all_gather_invariant",
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "dynamic_slice",
    "gather",
    "mesh_cast",
    "pvary",
    "reduce_precision",
    "reshape",
    "reshard",
    "rev",
    "sharding_constraint",
    "slice",
    "squeeze",
    "stop_gradient",
    "transpose",
}
# One output per input, each the input itself.
IDENTITIES = {"optimization_barrier"}
# The product of two base leaves is an activation, and no leaf.
PRODUCTS = {
    "conv_general_dilated",
    "dot_general",
    "ragged_dot",
    "ragged_dot_general",
    "scatter-add",
}


def assert_not_materialized(
    closed_jaxpr: jex.ClosedJaxpr,
    base_invar_indices: Iterable[int],
    kernel_shapes: Iterable[Shape],
) -> None:
    """Fails if a value other than the base has the shape of an adapted kernel.

    Args:
        closed_jaxpr: what `jax.make_jaxpr` returns, of the forward pass or of a
            gradient. It is walked through all its inner programs.
        base_invar_indices: the positions of the base leaves among its flat inputs;
            with params as the first argument `range(len(jax.tree.leaves(params)))`.
        kernel_shapes: shapes of the adapted kernels. For a kernel with batch axes
            (layers, experts) pass `slice_shapes(shape, batch)`, which adds the
            shape of one slice.

    Raises:
        AssertionError: naming each value, its primitive and its line.
        ValueError: if a kernel has fewer than two axes longer than one.
    """
    found = materialized(closed_jaxpr, base_invar_indices, kernel_shapes)
    assert not found, "kernels were formed:\n" + "\n".join(found)


def materialized(
    closed_jaxpr: jex.ClosedJaxpr,
    base_invar_indices: Iterable[int],
    kernel_shapes: Iterable[Shape],
) -> list[str]:
    """Returns a line for each value that is a formed kernel; see above."""
    indices = set(base_invar_indices)
    forbidden = {form for shape in kernel_shapes for form in _forms(shape)}
    jaxpr = closed_jaxpr.jaxpr
    kinds = [BASE if i in indices else OTHER for i in range(len(jaxpr.invars))]
    # First pass: a kernel that the model reshapes may be formed in that shape.
    for eqn, outs in _walk(jaxpr, kinds):
        if eqn.primitive.name == "reshape" and outs == [BASE]:
            before, after = _dims(eqn.invars[0].aval), _dims(eqn.outvars[0].aval)
            if before in forbidden and len(after) > 1:
                forbidden.add(after)
    return [
        f"{var.aval.str_short()} from {eqn.primitive.name} at "
        f"{summarize(eqn.source_info)}"
        for eqn, outs in _walk(jaxpr, kinds)
        for var, kind in zip(eqn.outvars, outs, strict=True)
        if kind in (CONST, OTHER) and _dims(var.aval) in forbidden
    ]


def formed_by_size(
    closed_jaxpr: jex.ClosedJaxpr, base_invar_indices: Iterable[int], sizes: set[int]
) -> list[str]:
    """Returns a line for each value of such a size that depends on more than the base.

    Whatever is computed from base leaves and constants alone may have any size, and so
    may a vector. It is for programs whose other values have none of the sizes.
    """
    indices = set(base_invar_indices)
    jaxpr = closed_jaxpr.jaxpr
    kinds = [CONST if i in indices else OTHER for i in range(len(jaxpr.invars))]
    return [
        f"{var.aval.str_short()} from {eqn.primitive.name}"
        for eqn, outs in _walk(jaxpr, kinds)
        for var, kind in zip(eqn.outvars, outs, strict=True)
        if kind == OTHER and len(_dims(var.aval)) > 1
        if math.prod(_dims(var.aval)) in sizes
    ]


def slice_shapes(shape: Shape, batch: Iterable[int] = ()) -> list[Shape]:
    """Returns the shape, and that of one slice of it along its batch axes."""
    batch = set(batch)
    piece = tuple(d for i, d in enumerate(shape) if i not in batch)
    return [shape, piece] if batch else [shape]


def base_indices(*args: Any, base: int = 0) -> range:
    """Returns the flat input positions of argument `base` of a traced function."""
    counts = [len(jax.tree.leaves(arg)) for arg in args]
    start = sum(counts[:base])
    return range(start, start + counts[base])


def _dims(aval: Any) -> Shape:
    return tuple(sorted(d for d in getattr(aval, "shape", ()) if d != 1))


def _forms(shape: Shape) -> set[Shape]:
    """Returns the sorted shape with its axes joined in all ways, two or more left."""
    dims = [d for d in shape if d != 1]
    if len(dims) < 2:
        raise ValueError(f"a kernel of shape {shape} cannot be told from a vector")
    groups = [[math.prod(g) for g in part] for part in _partitions(dims)]
    return {tuple(sorted(group)) for group in groups if len(group) > 1}


def _partitions(items: Sequence[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    for part in _partitions(items[1:]):
        yield [[items[0]], *part]
        for i, group in enumerate(part):
            yield [*part[:i], [items[0], *group], *part[i + 1 :]]


Steps = Generator[tuple[jex.JaxprEqn, list[int]], None, list[int]]


def _walk(jaxpr: jex.Jaxpr, kinds: Sequence[int], filled: bool = False) -> Steps:
    """Yields each equation, inner ones first, with the kinds of its outputs.

    Returns the kinds of the outputs of the program. It is `filled` if it is a branch
    or the body of a `shard_map`, in which zeros are fillers.
    """
    env = dict.fromkeys(jaxpr.constvars, CONST)
    env |= dict(zip(jaxpr.invars, kinds, strict=True))
    read = lambda v: CONST if isinstance(v, jex.Literal) else env[v]
    for eqn in jaxpr.eqns:
        outs = yield from _step(eqn, [read(v) for v in eqn.invars])
        if filled and _fills(eqn, jaxpr):
            outs = [EMPTY]
        yield eqn, outs
        env |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _step(eqn: jex.JaxprEqn, ins: list[int]) -> Steps:
    """Yields the steps inside of an equation and returns the kinds of its outputs."""
    name = eqn.primitive.name
    if name == "scan":
        return (yield from _scan(eqn, ins))
    if name == "while":
        return (yield from _while(eqn, ins))
    if name == "cond":
        branches = [_open(branch) for branch in eqn.params["branches"]]
        outs = []
        for branch in branches:
            outs.append((yield from _walk(branch, ins[1:], FILLED_WITH_ZEROS)))
        return [max(kinds) for kinds in zip(*outs, strict=True)]
    for inner in _inner(eqn):
        if len(inner.invars) == len(ins) and len(inner.outvars) == len(eqn.outvars):
            filled = FILLED_WITH_ZEROS and name == "shard_map"
            return (yield from _walk(inner, ins, filled))
        # An inner program whose inputs cannot be told apart: nothing in it is base.
        yield from _walk(inner, [OTHER] * len(inner.invars))
    return _kinds(eqn, ins)


def _fills(eqn: jex.JaxprEqn, branch: jex.Jaxpr) -> bool:
    """Whether it makes zeros that no equation of a branch reads, but to mark them."""
    if eqn.primitive.name != "broadcast_in_dim":
        return False
    (value, *_), (out,) = eqn.invars, eqn.outvars
    zeros = isinstance(value, jex.Literal) and value.val == 0
    reading = (e for e in branch.eqns if e.primitive.name != "pvary")
    return zeros and not any(out is v for e in reading for v in e.invars)


def _kinds(eqn: jex.JaxprEqn, ins: list[int]) -> list[int]:
    name = eqn.primitive.name
    if name in FILLERS:
        return [EMPTY]
    if name in IDENTITIES:
        return ins
    if name in RELABELLING:
        return [ins[0]] * len(eqn.outvars)
    if name == "select_n":  # which of them is not part of their value
        return [max(ins[1:])]
    kind = max(ins, default=CONST)
    if name in PRODUCTS and kind == BASE:
        kind = OTHER
    return [kind] * len(eqn.outvars)


def _scan(eqn: jex.JaxprEqn, ins: list[int]) -> Steps:
    """Follows a scan; a carry is base only if every step leaves it base."""
    body = _open(eqn.params["jaxpr"])
    # Read from the shapes, for the names of these numbers differ among releases.
    scanned = sum(
        outer.aval.ndim != inner.aval.ndim
        for outer, inner in zip(eqn.invars, body.invars, strict=True)
    )
    carried = sum(
        outer.aval.ndim == inner.aval.ndim
        for outer, inner in zip(eqn.outvars, body.outvars, strict=True)
    )
    consts = len(ins) - scanned - carried
    return (yield from _loop(body, ins, consts, carried))


def _while(eqn: jex.JaxprEqn, ins: list[int]) -> Steps:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carried = len(ins) - n - m
    body, cond = _open(eqn.params["body_jaxpr"]), _open(eqn.params["cond_jaxpr"])
    outs = yield from _loop(body, ins[n:], m, carried)
    yield from _walk(cond, [*ins[:n], *outs])
    return outs


def _loop(body: jex.Jaxpr, ins: list[int], consts: int, carried: int) -> Steps:
    before, carry, after = (
        ins[:consts],
        ins[consts : consts + carried],
        ins[consts + carried :],
    )
    while True:
        outs = _drain(_walk(body, [*before, *carry, *after]))
        wider = [max(k) for k in zip(carry, outs[:carried], strict=True)]
        if wider == carry:
            break
        carry = wider
    return (yield from _walk(body, [*before, *carry, *after]))


def _drain(steps: Steps) -> list[int]:
    """Runs a walk for what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def _inner(eqn: jex.JaxprEqn) -> list[jex.Jaxpr]:
    values = []
    for value in eqn.params.values():
        values.extend(value if isinstance(value, tuple | list) else [value])
    kinds = (jex.Jaxpr, jex.ClosedJaxpr)
    return [_open(value) for value in values if isinstance(value, kinds)]


def _open(jaxpr: Any) -> jex.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr

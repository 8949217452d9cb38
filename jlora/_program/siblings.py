"""Which products are computed together: adapted kernels that contract the same value.

Query, key and value read the same `x`. Where the equations that lead to their kernels
can be evaluated before the first of these products, all are evaluated there, as one
group.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .._jax.versions import is_var
from .._rules.dot_general import dot_dims


def arrange(
    eqns: Sequence[Any], kernels: Mapping[int, int], movable: Callable[[int], bool]
) -> list[tuple[int, ...]]:
    """Returns the order of evaluation, siblings together.

    Args:
        eqns: the equations of a jaxpr.
        kernels: the operand that is a kernel, of each equation that is a product.
        movable: whether an equation may be evaluated earlier than it stands.

    Returns:
        Each equation once, by number: alone, or with those of its group behind it.
    """
    producers = {v: i for i, eqn in enumerate(eqns) for v in eqn.outvars}
    bounds = _bounds(eqns, movable)
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, operand in kernels.items():
        alike[_key(eqns, producers, i, operand)].append(i)
    groups: dict[int, list[int]] = {}
    earlier: dict[int, set[int]] = defaultdict(set)
    for members in alike.values():
        bound = {i: bounds.get(eqns[i].invars[kernels[i]], -1) for i in members}
        for leader, group in _grouped(members, bound):
            groups[leader] = group
            for i in group[1:]:
                kernel = eqns[i].invars[kernels[i]]
                _add_ancestors(eqns, producers, kernel, leader, earlier[leader])
    return _order(len(eqns), groups, earlier)


def _bounds(eqns: Sequence[Any], movable: Callable[[int], bool]) -> dict[Any, int]:
    """Returns the last equation that each value must stay behind.

    One that is not movable, among those that it is computed from.
    """
    bounds: dict[Any, int] = {}
    for i, eqn in enumerate(eqns):
        own = max((bounds.get(v, -1) for v in eqn.invars if is_var(v)), default=-1)
        bounds.update(dict.fromkeys(eqn.outvars, own if movable(i) else i))
    return bounds


def _grouped(
    members: Sequence[int], bound: Mapping[int, int]
) -> Iterator[tuple[int, list[int]]]:
    """Groups products of one input: each behind the first that it can be moved to."""
    waiting = sorted(members, key=lambda i: (bound[i], i))
    taken: set[int] = set()
    start = 0
    for leader in members:
        if leader in taken:
            continue
        group = [leader]
        while start < len(waiting) and bound[waiting[start]] < leader:
            if waiting[start] not in taken and waiting[start] != leader:
                group.append(waiting[start])
            taken.add(waiting[start])
            start += 1
        taken.add(leader)
        yield leader, [leader, *sorted(group[1:])]


def _order(
    count: int, groups: Mapping[int, list[int]], earlier: Mapping[int, set[int]]
) -> list[tuple[int, ...]]:
    done: set[int] = set()
    order: list[tuple[int, ...]] = []
    for i in range(count):
        if i in done:
            continue
        unit = tuple(groups.get(i, [i]))
        first = [(j,) for j in sorted(earlier.get(i, ())) if j not in done]
        order += [*first, unit]
        done.update(*first, unit)
    return order


def _key(
    eqns: Sequence[Any], producers: Mapping[Any, int], index: int, operand: int
) -> Any:
    """What products must have in common to be one group."""
    eqn = eqns[index]
    kernel, x = eqn.invars[operand], eqn.invars[1 - operand]
    _, _, contract, batch = dot_dims(eqn, operand)
    source = _source(eqns, producers, x)
    if source is None:
        return index
    kinds = kernel.aval.dtype, x.aval.dtype, str(eqn.params["precision"])
    return source, contract, batch, kinds


def _source(eqns: Sequence[Any], producers: Mapping[Any, int], var: Any) -> Any:
    """Names a value: layers that cast the same input each have their own variable."""
    if not is_var(var):
        return None
    eqn = eqns[producers[var]] if var in producers else None
    if eqn is not None and eqn.primitive.name == "convert_element_type":
        inner = _source(eqns, producers, eqn.invars[0])
        return inner if inner is None else (inner, eqn.params["new_dtype"])
    return var


def _add_ancestors(
    eqns: Sequence[Any],
    producers: Mapping[Any, int],
    var: Any,
    after: int,
    found: set[int],
) -> None:
    """Adds the equations behind number `after` that a value is computed from."""
    pending = [var]
    while pending:
        index = producers.get(v) if is_var(v := pending.pop()) else None
        if index is None or index < after or index in found:
            continue
        found.add(index)
        pending += eqns[index].invars

"""Which products are computed together: adapted kernels that contract the same value.

Query, key and value read the same `x`. Where the equations that lead to their kernels
can be evaluated before the first of these products, all are evaluated there, as one
group.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ._compat import is_var
from ._products import dot_dims


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
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, operand in kernels.items():
        alike[_key(eqns, producers, i, operand)].append(i)
    groups: dict[int, list[int]] = {}
    earlier: dict[int, set[int]] = defaultdict(set)
    for members in alike.values():
        while members:
            leader, *rest = members
            groups[leader], members = [leader], []
            for i in rest:
                kernel = eqns[i].invars[kernels[i]]
                needed = _ancestors(eqns, producers, kernel, leader)
                if all(map(movable, needed)):
                    groups[leader].append(i)
                    earlier[leader] |= needed
                else:
                    members.append(i)
    return _order(len(eqns), groups, earlier)


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


def _ancestors(
    eqns: Sequence[Any], producers: Mapping[Any, int], var: Any, after: int
) -> set[int]:
    """Returns the equations behind number `after` that a value is computed from."""
    found: set[int] = set()
    pending = [var]
    while pending:
        index = producers.get(v) if is_var(v := pending.pop()) else None
        if index is None or index < after or index in found:
            continue
        found.add(index)
        pending += eqns[index].invars
    return found

"""The frozen kernels of a mixed batch that cannot be left to `jax.vmap`."""

from collections.abc import Collection
from typing import Any

from .._jax.versions import bodies, open_jaxpr
from .._params.axes import KernelAxes
from .._params.paths import is_floating
from .._program.discover import discover, settle
from .._program.trace import Traced
from .._rules import CONSUME
from .program import inputs_known

_RULES = {name: rule for name, rule in CONSUME.items() if rule.maps_kernel}


def shared_kernels(traced: Traced, apart: Collection[str]) -> dict[str, KernelAxes]:
    """Returns the roles of kernels that reach what JAX maps only with its kernel.

    Args:
        traced: the traced call of one example.
        apart: the paths of what is no frozen kernel.
    """
    if not _reaches(traced.jaxpr):
        return {}
    leaves = {path: traced.inputs[place] for path, place in traced.positions.items()}
    shapes = {
        path: tuple(leaf.shape)
        for path, leaf in leaves.items()
        if path not in apart and is_floating(leaf)
    }
    votes = discover(traced.jaxpr, inputs_known(traced, shapes)).votes
    kinds = {rule.kind for rule in _RULES.values()}
    wanted = (path for path, own in votes.items() if kinds & {v.kind for v in own})
    settled = {path: settle(votes[path], shapes[path]) for path in wanted}
    return {path: axes for path, axes in settled.items() if axes is not None}


def _reaches(jaxpr: Any) -> bool:
    """Whether a program has such an operation, at any depth."""
    seen, left = set(), [jaxpr]
    while left:
        opened, _ = open_jaxpr(left.pop())
        if id(opened) in seen:
            continue
        seen.add(id(opened))
        for eqn in opened.eqns:
            if eqn.primitive.name in _RULES:
                return True
            left += bodies(eqn)
    return False

"""The FLOPs of a training step, counted on the traced program.

A product of `n` rows with a kernel `(m, k)` takes 2·n·m·k forward and as much again for
each operand that has a gradient. Of a frozen kernel that is 4·n·m·k, and its factors
add 6·n·r·(m + k); of a trained one it is 6·n·m·k. Only products, convolutions and
ragged products are counted; the body of a `while` loop counts once.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from .._jax.symbolic import are_known, exceeds
from .._jax.versions import bodies, is_literal, open_jaxpr
from .._rules import CONSUME, CONTROL_FLOW


@dataclasses.dataclass(frozen=True)
class Flops:
    """The FLOPs of a step, forward and backward, optimizer not included.

    Attributes:
        step: with the adapter of the plan.
        full: of full fine-tuning.

    Example:
        >>> Flops(step=7, full=10).ratio
        0.7
    """

    step: int
    full: int

    @property
    def ratio(self) -> float:
        """`step / full`; 1 where nothing was counted.

        NaN where it depends on symbolic sizes, of which `step` and `full` then are.
        """
        if not are_known([self.step, self.full]):
            return math.nan
        return self.step / self.full if self.full else 1.0

    def __str__(self) -> str:
        """Returns the step's share in words, or both where sizes are symbolic."""
        if not are_known([self.step, self.full]):
            return f"{self.step} FLOPs, {self.full} of full fine-tuning"
        return f"{self.ratio:.3f} of full fine-tuning's FLOPs"


@dataclasses.dataclass
class _Count:
    kernels: int = 0  # products with a value that depends on the params alone
    others: int = 0


def step_flops(jaxpr: Any, params: Sequence[bool], factors: int) -> Flops:
    """Returns the FLOPs of a step.

    Args:
        jaxpr: the traced forward pass.
        params: which of its inputs are params.
        factors: what the factors add, forward and backward.
    """
    count = _Count()
    _walk(jaxpr, list(params), 1, count)
    both = 3 * count.others
    return Flops(2 * count.kernels + both + factors, 3 * count.kernels + both)


def _walk(jaxpr: Any, params: Sequence[bool], times: int, count: _Count) -> list[bool]:
    """Counts a jaxpr; returns which outputs depend on the params alone."""
    jaxpr, _ = open_jaxpr(jaxpr)
    env = dict(zip(jaxpr.invars, params, strict=True))
    env.update(dict.fromkeys(jaxpr.constvars, True))
    read = lambda v: True if is_literal(v) else env[v]
    for eqn in jaxpr.eqns:
        flags = [read(v) for v in eqn.invars]
        inner = bodies(eqn)
        if inner:
            outs = _enter(eqn, inner, flags, times, count)
        else:
            _add(eqn, flags, times, count)
            outs = [all(flags)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _enter(
    eqn: Any, inner: list[Any], flags: list[bool], times: int, count: _Count
) -> list[bool]:
    """Counts the bodies of an equation, each input a param if it surely is one."""
    no_params = [False] * len(eqn.outvars)
    rule = CONTROL_FLOW.get(eqn.primitive.name)
    if rule is not None and rule.inside is not None:
        each = []
        for body in rule.inside(eqn, flags):
            each.append(_Count())
            _walk(body.jaxpr, body.frozen, times * body.times, each[-1])
        for own in [_dearest(each)] if rule.one_of else each:
            count.kernels += own.kernels
            count.others += own.others
        return no_params
    outs = no_params
    for body in inner:
        n = len(open_jaxpr(body)[0].invars)
        outs = _walk(body, flags if n == len(flags) else [False] * n, times, count)
    return outs if len(outs) == len(eqn.outvars) else no_params


def _dearest(branches: Sequence[_Count]) -> _Count:
    """Returns the branch with the most work."""
    most, *others = branches
    for own in others:
        dearer = exceeds(own.kernels + own.others, most.kernels + most.others)
        most = own if dearer else most
    return most


def _add(eqn: Any, flags: list[bool], times: int, count: _Count) -> None:
    rule = CONSUME.get(eqn.primitive.name)
    if rule is None or all(flags[:2]):
        return
    flops = times * rule.flops(eqn)
    if any(flags[:2]):
        count.kernels += flops
    else:
        count.others += flops

"""Operations that take each value by itself: they keep the axes of a value apart."""

from typing import Any

from .._jax.versions import JIT, open_jaxpr
from . import CARRY

# Those without a rule: of operands of one shape, or of a shape and scalars, to a result
# of that shape.
_WITHOUT_RULE = frozenset(
    "abs acos acosh add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt "
    "ceil clamp complex cos cosh digamma eq erf erf_inv erfc exp exp2 expm1 floor ge "
    "gt imag is_finite le lgamma log log1p logistic lt max min ne nextafter not or pow "
    "real rem round rsqrt select_n sign sin sinh sqrt square tan tanh xor".split()
)

# They look at a whole row, and the axes are what they were.
_ROWWISE = frozenset("cumsum cumprod cummax cummin cumlogsumexp fft sort".split())

# Functions with a derivative of their own, as `jax.nn.relu` is.
_CALLS = frozenset(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))


def is_elementwise(primitive: str) -> bool:
    """Returns whether the operation of this name takes each value by itself."""
    rule = CARRY.get(primitive)
    return primitive in _WITHOUT_RULE if rule is None else rule.entrywise


def keeps_axes(eqn: Any, operand: int) -> bool:
    """Returns whether an operation keeps the axes of an operand, whatever it computes.

    A mask, a rectifier, an exponential; also one with a derivative of its own, where
    all that it does is of this kind.
    """
    shape = eqn.invars[operand].aval.shape
    if any(out.aval.shape != shape for out in eqn.outvars):
        return False
    name = eqn.primitive.name
    if name in _CALLS:
        return _is_simple(eqn, shape)
    return name in _ROWWISE or is_elementwise(name)


def _is_simple(eqn: Any, shape: tuple[int, ...]) -> bool:
    """Returns whether an equation takes values of a shape one by one, and scalars."""
    name = eqn.primitive.name
    if name in _CALLS | set(JIT):
        body = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
        inner = [] if body is None else open_jaxpr(body)[0].eqns
        return body is not None and all(_is_simple(one, shape) for one in inner)
    shapes = {out.aval.shape for out in eqn.outvars}
    # Scalars that are written out, as the zeros of a mask are.
    rule = CARRY.get(name)
    writes_out = rule is not None and rule.repeats is not None
    return (writes_out or is_elementwise(name)) and shapes <= {shape, ()}

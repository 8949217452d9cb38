"""Kernels that are used in a product, and also where no low-rank rule exists.

The error must name this file, for it is the model's source line that is asked for.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from use import Use, normal, use


@jax.custom_vjp
def _opaque(w: Array, x: Array) -> Array:
    return jnp.tanh(x @ w)


_opaque.defvjp(
    lambda w, x: (_opaque(w, x), (w, x)),
    lambda saved, g: (saved[1].T @ (2.0 * g), g @ saved[0].T),
)


def _carry(w: Array, x: Array) -> Array:
    """The kernel itself is the carry of a scan."""
    step = lambda carry, _: ((carry[0] * 0.5, carry[1] + x @ carry[0]), None)
    zero = jnp.zeros((3, 7), x.dtype)
    return lax.scan(step, (w.astype(x.dtype), zero), length=3)[0][1]


def _loop_carry(w: Array, x: Array) -> Array:
    """The kernel itself is the carry of a loop, and changes in it."""
    body = lambda c: (c[0] + 1, c[1] * 0.5, jnp.tanh(x @ c[1]))
    zero = jnp.zeros((3, 7), jnp.promote_types(x.dtype, w.dtype))
    return lax.while_loop(lambda c: c[0] < 2, body, (0, w, zero))[2]


def _formed(
    name: str, fn: Callable[[Array, Array], object], primitive: str, **settings: bool
) -> Use:
    """A use next to a plain product, which makes the leaf a kernel."""
    return use(
        f"formed_{name}",
        lambda w, x: (x @ w, fn(w, x)),
        normal(3, 5),
        w=(5, 7),
        primitive=primitive,
        formed=True,
        **settings,
    )


MATERIALIZING = [
    _formed("cumsum", lambda w, x: x @ jnp.cumsum(w, axis=0), "cumsum"),
    _formed("square", lambda w, x: x @ (w * w), "mul"),
    _formed("tanh", lambda w, x: x @ jnp.tanh(w), "tanh"),
    _formed("sum", lambda w, x: jnp.sum(w), "reduce_sum"),
    _formed("norm", lambda w, x: x @ (w / jnp.linalg.norm(w)), "mul"),
    _formed("where", lambda w, x: x @ jnp.where(w > 0.1, w, 0.0), "gt"),
    _formed("sort", lambda w, x: jnp.sort(w, axis=0), "sort"),
    _formed("reshape", lambda w, x: w.reshape(7, 5) @ x.T, "reshape"),
    _formed("scan_carry", _carry, "scan"),
    _formed("while_carry", _loop_carry, "while", reverse=False),
    _formed("custom_vjp", _opaque, "custom_vjp"),
    _formed("output", lambda w, x: w, "output"),
    _formed("in_jit", lambda w, x: jax.jit(lambda v: jnp.exp(v))(w), "exp"),
    _formed(
        "in_scan",
        lambda w, x: lax.scan(lambda h, _: (h + jnp.abs(w).sum(), None), 0.0, length=3)[
            0
        ],
        "abs",
    ),
    _formed("in_checkpoint", jax.checkpoint(lambda w, x: x @ jnp.sin(w)), "sin"),
]

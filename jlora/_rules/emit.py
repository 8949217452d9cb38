"""Higher-order primitives emitted again with all that the public functions leave out.

`jax.vmap` and `jax.grad` make equations that the public function of a primitive does
not: a loop whose condition is a bool for each example, a checkpoint that is part of a
backward pass. What each parameter becomes:

* `jit`: `name`, `inline`, `keep_unused` are kept; `donated_invars` too, on operands
  without factors; `in_shardings`, `out_shardings`, `in_layouts` and `out_layouts` are
  constraints on frozen values; `ctx_mesh` is that of the equation's context.
  `compiler_options_kvs` is empty: JAX refuses options on an inner jit.
* `remat2`, `checkpoint`: `prevent_cse`, `differentiated` are kept; `policy` is too,
  and saves small `x·a` besides.
* `scan`: `length`, `reverse`, `unroll` are kept; `num_consts`, `num_carry`, `ft_in`,
  `ft_out` say what the operands and the outputs are.
* `while`: the `..._nconsts` say what the operands are; a condition with a bool for each
  example is reduced, see `while_loop`.
* `cond`: `branches_platforms` is kept.
* `shard_map`: `mesh`, `in_specs`, `out_specs`, `check_vma`, `newly_manual_axes` are
  kept.
* `closed_call`, `core_call`, `composite`: the body is evaluated in their place. So the
  `name`, `attributes` and `version` of a composite that a kernel enters are gone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.sharding import explicit_sharding
from .._jax.versions import equation_scope, is_literal, open_jaxpr, rebind, with_layout
from .._params.lazy import Lazy
from .._product.low_rank import keeping
from .adapted import Adapted

# --- jit, checkpoint ---


def jit(eqn: Any, body: Callable[..., Any], own: Sequence[bool]) -> Callable[..., Any]:
    """Returns another body as the function of a `jit` equation.

    Args:
        eqn: the equation.
        body: the body.
        own: the operands that may be donated.
    """
    params = eqn.params

    def constrained(*args: Any) -> list[Any]:
        outputs = body(*_laid_out(args, params["in_shardings"], params["in_layouts"]))
        return _laid_out(outputs, params["out_shardings"], params["out_layouts"])

    constrained.__name__ = constrained.__qualname__ = params["name"]
    donated = zip(params["donated_invars"], own, strict=True)
    return jax.jit(
        constrained,
        inline=params["inline"],
        keep_unused=params["keep_unused"],
        donate_argnums=[i for i, both in enumerate(donated) if all(both)],
    )


def _laid_out(
    values: Sequence[Any], shardings: Sequence[Any], layouts: Sequence[Any]
) -> list[Any]:
    return list(map(_constrain, values, shardings, layouts))


def _constrain(value: Any, sharding: Any, layout: Any) -> Any:
    """Keeps what an inner jit was told of the layout, on frozen values."""
    if isinstance(value, Adapted):
        return value.with_base(_constrain(value.base, sharding, layout))
    if isinstance(value, Lazy):
        return value  # XLA lays it out as its quantised arrays are
    if isinstance(sharding, jax.sharding.Sharding):
        value = lax.with_sharding_constraint(value, sharding)
    return with_layout(value, layout)


def checkpoint(eqn: Any, body: Callable[..., Any]) -> Callable[..., Any]:
    """Returns another body as the function of a checkpoint."""
    params = eqn.params
    again = jax.checkpoint(
        body, prevent_cse=params["prevent_cse"], policy=keeping(params["policy"])
    )
    if not params["differentiated"]:
        return again
    # Part of a backward pass: from here on XLA must not find what is computed twice.
    return lambda *values: _rebound(again, values, eqn.primitive, differentiated=True)


def _rebound(
    fn: Callable[..., Any], values: Sequence[Any], primitive: Any, **changes: Any
) -> Sequence[Any]:
    """Returns `fn(*values)` with other parameters of the equations of a primitive."""
    leaves, treedef = jax.tree.flatten(tuple(values))
    flat = lambda *leaves: fn(*treedef.unflatten(leaves))
    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    jaxpr, consts = open_jaxpr(closed)
    env = dict(zip(jaxpr.invars, leaves, strict=True))
    env.update(zip(jaxpr.constvars, consts, strict=True))
    read = lambda atom: atom.val if is_literal(atom) else env[atom]
    for eqn in jaxpr.eqns:
        if eqn.primitive is primitive:
            eqn = eqn.replace(params={**eqn.params, **changes})
        with equation_scope(eqn):
            outputs = rebind(eqn, list(map(read, eqn.invars)))
        env.update(zip(eqn.outvars, outputs, strict=True))
    return jax.tree.unflatten(jax.tree.structure(shapes), map(read, jaxpr.outvars))


# --- loops, branches ---


def is_mapped(eqn: Any) -> bool:
    """Whether the condition of a `while` gives a bool for each example."""
    condition, _ = open_jaxpr(eqn.params["cond_jaxpr"])
    return bool(condition.outvars[0].aval.shape)


def while_loop(
    eqn: Any,
    condition: Callable[[Any], jax.Array],
    body: Callable[[Any], list[Any]],
    carry: list[Any],
) -> Sequence[Any]:
    """Emits a `while` around another condition and another body.

    Under `jax.vmap` the condition may give a bool for each example. As JAX lowers it,
    the loop goes on while any is true, and examples that are done keep their values.
    """
    if not is_mapped(eqn):
        return lax.while_loop(condition, body, carry)

    def masked(carry: list[Any]) -> list[Any]:
        goes_on = condition(carry)
        pairs = zip(body(carry), carry, strict=True)
        return [_chosen(goes_on, new, old) for new, old in pairs]

    return lax.while_loop(lambda carry: jnp.any(condition(carry)), masked, carry)


def _chosen(mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Chooses entries along the leading axes, which the mask has."""
    leading = tuple(range(mask.ndim))
    place = explicit_sharding(old)
    full = lax.broadcast_in_dim(mask, old.shape, leading, out_sharding=place)
    return lax.select(full, new, old)


def switch(
    eqn: Any,
    index: jax.Array,
    branches: Sequence[Callable[..., Any]],
    operands: Sequence[Any],
) -> Any:
    """Emits a `cond` around other branches, each for the platforms that it was for."""
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        return lax.switch(index, branches, *operands)
    named: dict[str, Any] = {}
    for names, branch in zip(platforms, branches, strict=True):
        # None stands for the default.
        named |= dict.fromkeys(["default"] if names is None else names, branch)
    return lax.platform_dependent(*operands, **named)

"""The ways in which a function is wrapped: jit, loops, branches, devices, derivatives.

A wrapper takes a function `f(*frozen, *inputs)` and the number of frozen operands, and
returns one with the same operands. Around `lora.apply` the frozen ones are params and
adapter; inside of the adapted function they are params alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec

Fn = Callable[..., Any]
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A named wrapper.

    Attributes:
        name: Identifies the wrapper in test names.
        wrap: Takes a function and the number of its frozen operands.
        reverse: Whether reverse-mode differentiation is defined.
        inside_only: Whether it must not be put around `lora.apply`.
        floats: Whether it differentiates with respect to the float inputs.
    """

    name: str
    wrap: Callable[[Fn, int], Fn]
    reverse: bool = True
    inside_only: bool = False
    floats: bool = False


def _stacked(tree: Any) -> Any:
    """Three different inputs for each input."""
    flipped = lambda x: jnp.flip(x.ravel()).reshape(x.shape)
    return jax.tree.map(lambda x: jnp.stack([x, flipped(x), x]), tree)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _nested_jit(f: Fn, frozen: int) -> Fn:
    inner = jax.jit(f)
    twice = lambda *args: jax.tree.map(jnp.add, inner(*args), jax.jit(f)(*args))
    return jax.jit(twice)


def _vmap(f: Fn, frozen: int) -> Fn:
    def wrapped(*args: Any) -> Any:
        axes = (None,) * frozen + (0,) * (len(args) - frozen)
        return jax.vmap(f, axes)(*args[:frozen], *_stacked(args[frozen:]))

    return wrapped


def _checkpoint(policy: str | None, f: Fn, frozen: int) -> Fn:
    return jax.checkpoint(f, policy=policy and getattr(jax.checkpoint_policies, policy))


def _scan(f: Fn, frozen: int) -> Fn:
    """A scan over inputs; the frozen operands are its constants."""

    def wrapped(*args: Any) -> Any:
        step = lambda n, xs: (n + 1, f(*args[:frozen], *xs))
        return lax.scan(step, 0, _stacked(args[frozen:]))[1]

    return wrapped


def _scan_everything(f: Fn, frozen: int) -> Fn:
    """A scan of one step in which all operands are scanned over."""

    def wrapped(*args: Any) -> Any:
        xs = jax.tree.map(lambda x: x[None], args)
        return _first(lax.scan(lambda n, x: (n, f(*x)), 0, xs)[1])

    return wrapped


def _while(f: Fn, frozen: int) -> Fn:
    def wrapped(*args: Any) -> Any:
        zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), f(*args))

        def body(state: tuple[Any, Any]) -> tuple[Any, Any]:
            return state[0] + 1, jax.tree.map(jnp.add, state[1], f(*args))

        return lax.while_loop(lambda state: state[0] < STEPS, body, (0, zeros))[1]

    return wrapped


def _cond(f: Fn, frozen: int) -> Fn:
    def other(*args: Any) -> Any:
        return jax.tree.map(jnp.negative, f(*args))

    return lambda *args: lax.cond(args[0]["shift"] < 1, f, other, *args)


def _switch(f: Fn, frozen: int) -> Fn:
    def zeros(*args: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, f(*args))

    def wrapped(*args: Any) -> Any:
        chosen = (args[0]["shift"] < 1).astype(int)
        return lax.switch(chosen, [zeros, f, zeros], *args)

    return wrapped


@jax.custom_jvp
def _softplus(x: jax.Array) -> jax.Array:
    return jnp.logaddexp(x, jnp.zeros_like(x))


@_softplus.defjvp
def _softplus_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    return _softplus(x), jax.nn.sigmoid(x) * t


@jax.custom_vjp
def _clipped(x: jax.Array) -> jax.Array:
    """The identity with a gradient that is halved."""
    return x


_clipped.defvjp(lambda x: (x, None), lambda _, g: (0.5 * g,))


def _then(after: Fn, f: Fn, frozen: int) -> Fn:
    return lambda *args: jax.tree.map(after, f(*args))


def _printed(f: Fn, frozen: int) -> Fn:
    def wrapped(*args: Any) -> Any:
        out = f(*args)
        jax.debug.callback(lambda *_: None, *jax.tree.leaves(out))
        return out

    return wrapped


def _named(f: Fn, frozen: int) -> Fn:
    def wrapped(*args: Any) -> Any:
        with jax.named_scope("model"):
            return f(*args)

    return wrapped


def _shard_map(average: bool, f: Fn, frozen: int) -> Fn:
    """Data parallelism: each of three devices has its own inputs."""

    def shard(*args: Any) -> Any:
        out = f(*args[:frozen], *_first(args[frozen:]))
        if average:
            return jax.tree.map(lambda y: lax.pmean(y, "data"), out)
        return jax.tree.map(lambda y: y[None], out)

    def wrapped(*args: Any) -> Any:
        mesh = jax.make_mesh(
            (STEPS,), ("data",), (AxisType.Auto,), devices=jax.devices()[:STEPS]
        )
        data, replicated = PartitionSpec("data"), PartitionSpec()
        specs = (replicated,) * frozen + (data,) * (len(args) - frozen)
        sharded = jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=specs,
            out_specs=replicated if average else data,
        )
        return jax.jit(sharded)(*args[:frozen], *_stacked(args[frozen:]))

    return wrapped


def _split(args: tuple[Any, ...], f: Fn, frozen: int) -> tuple[Fn, list[jax.Array]]:
    """A scalar function of the float inputs alone, and these inputs."""
    where = [
        i
        for i, x in enumerate(args)
        if i >= frozen and jnp.issubdtype(x.dtype, jnp.floating)
    ]

    def scalar(floats: list[jax.Array]) -> jax.Array:
        operands = list(args)
        for i, x in zip(where, floats, strict=True):
            operands[i] = x
        out = jax.tree.leaves(f(*operands))
        return sum(jnp.sin(y.astype(jnp.float32)).sum() for y in out)

    return scalar, [args[i] for i in where]


def _grad(f: Fn, frozen: int) -> Fn:
    """The value and its derivatives with respect to the inputs."""

    def wrapped(*args: Any) -> Any:
        scalar, floats = _split(args, f, frozen)
        return jax.value_and_grad(scalar)(floats)

    return wrapped


def _jvp(f: Fn, frozen: int) -> Fn:
    """Forward mode with respect to the inputs."""

    def wrapped(*args: Any) -> Any:
        scalar, floats = _split(args, f, frozen)
        return jax.jvp(scalar, (floats,), (floats,))

    return wrapped


WRAPPERS = [
    Wrapper("identity", lambda f, frozen: f),
    Wrapper("jit", lambda f, frozen: jax.jit(f)),
    Wrapper("nested_jit", _nested_jit),
    Wrapper("vmap", _vmap),
    Wrapper("checkpoint", functools.partial(_checkpoint, None)),
    Wrapper("checkpoint_dots", functools.partial(_checkpoint, "dots_saveable")),
    Wrapper("checkpoint_all", functools.partial(_checkpoint, "everything_saveable")),
    Wrapper("scan", _scan),
    Wrapper("scan_everything", _scan_everything),
    Wrapper("while", _while, reverse=False),
    Wrapper("cond", _cond),
    Wrapper("switch", _switch),
    Wrapper("custom_jvp_after", functools.partial(_then, _softplus)),
    Wrapper("custom_vjp_after", functools.partial(_then, _clipped)),
    Wrapper("debug_callback", _printed),
    Wrapper("named_scope", _named),
    Wrapper("shard_map", functools.partial(_shard_map, False)),
    Wrapper("shard_map_average", functools.partial(_shard_map, True)),
    Wrapper("value_and_grad", _grad, floats=True),
    Wrapper("jvp", _jvp, floats=True, inside_only=True),
    Wrapper("scan_of_checkpoint", lambda f, n: _scan(jax.checkpoint(f), n)),
    Wrapper("jit_of_vmap_of_cond", lambda f, n: jax.jit(_vmap(_cond(f, n), n))),
]

"""Evaluates a small jaxpr with NumPy, for compiling one takes longer than all else.

What is not in the tables is left to JAX, an operation at a time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

Values = list[Any]
_letters = "abcdefghijklmnopqrstuvwxyz"


def evaluate(jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> Values:
    """Returns the outputs of a program, as NumPy arrays."""
    env = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    env |= dict(zip(jaxpr.invars, map(np.asarray, args), strict=True))

    def read(var: Any) -> Any:
        if isinstance(var, jex.Literal):
            return np.asarray(var.val, dtype=var.aval.dtype)
        return env[var]

    for eqn in jaxpr.eqns:
        outs = _step(eqn, [read(v) for v in eqn.invars])
        env |= dict(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def closed(jaxpr: Any, args: Sequence[Any]) -> Values:
    """Evaluates a closed jaxpr, or one without constants."""
    if isinstance(jaxpr, jex.ClosedJaxpr):
        return evaluate(jaxpr.jaxpr, jaxpr.consts, args)
    return evaluate(jaxpr, (), args)


def _step(eqn: jex.JaxprEqn, ins: Values) -> Values:
    name = eqn.primitive.name
    if name in LOOPS:
        return LOOPS[name](eqn, ins)
    if name in OPERATIONS:
        with np.errstate(all="ignore"):
            out = OPERATIONS[name](eqn.params, *ins)
        if out is not NotImplemented:
            return [np.asarray(out, dtype=eqn.outvars[0].aval.dtype)]
    if name == "optimization_barrier":
        return ins
    if name == "split":
        cuts = np.cumsum(eqn.params["sizes"])[:-1]
        return np.split(ins[0], cuts, eqn.params["axis"])
    for value in eqn.params.values():
        inner = value.jaxpr if isinstance(value, jex.ClosedJaxpr) else value
        if isinstance(inner, jex.Jaxpr) and len(inner.invars) == len(ins):
            return closed(value, ins)
    return _left_to_jax(eqn, ins)


def _left_to_jax(eqn: jex.JaxprEqn, ins: Values) -> Values:
    params = eqn.params
    frozen = tuple(sorted(params.items(), key=lambda pair: pair[0]))
    try:
        out = _operation(eqn.primitive, frozen)(*ins)
    except TypeError:  # a parameter that has no hash
        out = eqn.primitive.bind(*map(jnp.asarray, ins), **params)
    return list(map(np.asarray, out if eqn.primitive.multiple_results else [out]))


@functools.cache
def _operation(primitive: Any, params: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(lambda *args: primitive.bind(*args, **dict(params)))


# loops and branches


def _scan(eqn: jex.JaxprEqn, ins: Values) -> Values:
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    scanned = sum(
        outer.aval.ndim != inner.ndim
        for outer, inner in zip(eqn.invars, body.in_avals, strict=True)
    )
    n_carry = sum(
        outer.aval.ndim == inner.ndim
        for outer, inner in zip(eqn.outvars, body.out_avals, strict=True)
    )
    n_const = len(ins) - scanned - n_carry
    consts, carry, xs = (
        ins[:n_const],
        ins[n_const : len(ins) - scanned],
        ins[n_const + n_carry :],
    )
    steps = range(length)
    ys: list[Any] = [None] * length
    for i in reversed(steps) if eqn.params["reverse"] else steps:
        outs = closed(body, [*consts, *carry, *(x[i] for x in xs)])
        carry, ys[i] = outs[:n_carry], outs[n_carry:]
    stacked = [np.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars[n_carry:]]
    for i, row in enumerate(ys):
        for whole, y in zip(stacked, row, strict=True):
            whole[i] = y
    return [*carry, *stacked]


def _while(eqn: jex.JaxprEqn, ins: Values) -> Values:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    of_cond, of_body, carry = ins[:n], ins[n : n + m], ins[n + m :]
    while True:
        (again,) = closed(eqn.params["cond_jaxpr"], [*of_cond, *carry])
        if not again.any():
            return carry
        new = closed(eqn.params["body_jaxpr"], [*of_body, *carry])
        # Under vmap there is a condition for each example, which stops by itself.
        at = lambda x, again=again: again.reshape(
            again.shape + (1,) * (x.ndim - again.ndim)
        )
        carry = [np.where(at(x), x, old) for x, old in zip(new, carry, strict=True)]


def _cond(eqn: jex.JaxprEqn, ins: Values) -> Values:
    branches = eqn.params["branches"]
    return closed(branches[int(np.clip(ins[0], 0, len(branches) - 1))], ins[1:])


LOOPS: dict[str, Callable[[jex.JaxprEqn, Values], Values]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


# operations


def _dot_general(params: Any, x: Any, y: Any) -> Any:
    (contract_x, contract_y), (batch_x, batch_y) = params["dimension_numbers"]
    kind = params["preferred_element_type"] or x.dtype
    wide = np.complex64 if np.iscomplexobj(np.zeros((), kind)) else np.float32
    if not jnp.issubdtype(kind, jnp.inexact):
        wide = kind
    rest_x = [i for i in range(x.ndim) if i not in (*contract_x, *batch_x)]
    rest_y = [i for i in range(y.ndim) if i not in (*contract_y, *batch_y)]
    batch = [x.shape[i] for i in batch_x]
    size = int(np.prod([x.shape[i] for i in contract_x], dtype=int))
    count = lambda z, axes: int(np.prod([z.shape[i] for i in axes], dtype=int))
    left = x.transpose([*batch_x, *rest_x, *contract_x])
    right = y.transpose([*batch_y, *contract_y, *rest_y])
    left = left.reshape([*batch, count(x, rest_x), size]).astype(wide)
    right = right.reshape([*batch, size, count(y, rest_y)]).astype(wide)
    shape = [*batch, *(x.shape[i] for i in rest_x), *(y.shape[i] for i in rest_y)]
    return (left @ right).reshape(shape).astype(kind)


def _broadcast(params: Any, x: Any, *_: Any) -> Any:
    shape, axes = params["shape"], params["broadcast_dimensions"]
    spread = [1] * len(shape)
    for axis, n in zip(axes, x.shape, strict=True):
        spread[axis] = n
    return np.broadcast_to(x.reshape(spread), shape)


def _reshape(params: Any, x: Any, *_: Any) -> Any:
    if params["dimensions"] is not None:  # in which order the axes are read
        x = x.transpose(params["dimensions"])
    return x.reshape(params["new_sizes"])


def _slice(params: Any, x: Any) -> Any:
    strides = params["strides"] or (1,) * x.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return x[tuple(slice(*bound) for bound in bounds)]


def _pad(params: Any, x: Any, value: Any) -> Any:
    config = params["padding_config"]
    sizes = [
        (n - 1) * (i + 1) + 1 if n else 0
        for n, (_, _, i) in zip(x.shape, config, strict=True)
    ]
    whole = np.full(
        [n + max(a, 0) + max(b, 0) for n, (a, b, _) in zip(sizes, config, strict=True)],
        value,
    )
    inner = tuple(
        slice(max(a, 0), max(a, 0) + n, i + 1)
        for n, (a, _, i) in zip(sizes, config, strict=True)
    )
    whole[inner] = x
    kept = tuple(
        slice(max(-a, 0), n - max(-b, 0))
        for n, (a, b, _) in zip(whole.shape, config, strict=True)
    )
    return whole[kept]


def _starts(shape: Sequence[int], sizes: Sequence[int], starts: Any) -> list[int]:
    return [
        int(np.clip(i, 0, n - m)) for i, n, m in zip(starts, shape, sizes, strict=True)
    ]


def _dynamic_slice(params: Any, x: Any, *starts: Any) -> Any:
    sizes = params["slice_sizes"]
    first = _starts(x.shape, sizes, starts)
    return x[tuple(slice(i, i + n) for i, n in zip(first, sizes, strict=True))]


def _dynamic_update_slice(params: Any, x: Any, update: Any, *starts: Any) -> Any:
    first = _starts(x.shape, update.shape, starts)
    out = x.copy()
    out[tuple(slice(i, i + n) for i, n in zip(first, update.shape, strict=True))] = (
        update
    )
    return out


def _iota(params: Any, *_: Any) -> Any:
    shape, axis = params["shape"], params["dimension"]
    spread = [n if i == axis else 1 for i, n in enumerate(shape)]
    return np.broadcast_to(np.arange(shape[axis]).reshape(spread), shape)


def _select(params: Any, which: Any, *cases: Any) -> Any:
    return (
        np.choose(which.astype(int), cases)
        if len(cases) > 2
        else np.where(which, cases[-1], cases[0])
    )


def _div(params: Any, x: Any, y: Any) -> Any:
    return x / y if jnp.issubdtype(x.dtype, jnp.inexact) else NotImplemented


def _convert(params: Any, x: Any) -> Any:
    kind = params["new_dtype"]
    whole = jnp.issubdtype(x.dtype, jnp.inexact) and not jnp.issubdtype(
        kind, jnp.inexact
    )
    if whole and kind != np.bool_:
        return NotImplemented
    if np.iscomplexobj(x) and not jnp.issubdtype(kind, jnp.complexfloating):
        return NotImplemented
    if kind == jnp.float8_e4m3fn:
        return NotImplemented
    return x.astype(kind)


def _wide(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, *args: fn(*args)


def _reduced(fn: Any) -> Callable[..., Any]:
    def reduce(params: Any, x: Any) -> Any:
        if x.dtype == jnp.bfloat16:
            x = x.astype(np.float32)
        return fn(x, axis=tuple(params["axes"]))

    return reduce


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": _wide(np.add),
    "add_any": _wide(np.add),
    "sub": _wide(np.subtract),
    "mul": _wide(np.multiply),
    "div": _div,
    "max": _wide(np.maximum),
    "min": _wide(np.minimum),
    "neg": _wide(np.negative),
    "sin": _wide(np.sin),
    "cos": _wide(np.cos),
    "exp": _wide(np.exp),
    "log": _wide(np.log),
    "tanh": _wide(np.tanh),
    "logistic": _wide(lambda x: 1 / (1 + np.exp(-x))),
    "abs": _wide(np.abs),
    "sign": _wide(np.sign),
    "sqrt": _wide(np.sqrt),
    "square": _wide(np.square),
    "real": _wide(np.real),
    "imag": _wide(np.imag),
    "conj": _wide(np.conj),
    "complex": _wide(lambda x, y: x + 1j * y),
    "integer_pow": lambda params, x: x ** params["y"],
    "and": _wide(np.bitwise_and),
    "or": _wide(np.bitwise_or),
    "xor": _wide(np.bitwise_xor),
    "not": _wide(np.invert),
    "eq": _wide(np.equal),
    "ne": _wide(np.not_equal),
    "lt": _wide(np.less),
    "le": _wide(np.less_equal),
    "gt": _wide(np.greater),
    "ge": _wide(np.greater_equal),
    "copy": _wide(np.array),
    "copy_p": _wide(np.array),
    "is_finite": _wide(np.isfinite),
    "one_minus_square": _wide(lambda x: 1 - x * x),
    "stop_gradient": _wide(np.asarray),
    "select_n": _select,
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": lambda params, x: x.transpose(params["permutation"]),
    "squeeze": lambda params, x: x.squeeze(tuple(params["dimensions"])),
    "rev": lambda params, x: np.flip(x, tuple(params["dimensions"])),
    "slice": _slice,
    "concatenate": lambda params, *xs: np.concatenate(xs, params["dimension"]),
    "pad": _pad,
    "iota": _iota,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "reduce_sum": _reduced(np.sum),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_and": _reduced(np.all),
    "reduce_or": _reduced(np.any),
    "dot_general": _dot_general,
}

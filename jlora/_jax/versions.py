"""Every difference between JAX releases, and every reach below `jax` itself.

Supported: a year of releases, jax 0.8.1 to 0.12. What is used here and is not `jax.*`
proper is `jax.extend`, the door JAX keeps for libraries that transform jaxprs.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import core
from jax.experimental.layout import with_layout_constraint
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal, Var
from jax.sharding import AxisType

from .frames import Owner, Unsure, place

_NAME = "InconclusiveDimensionOperation"
# What older releases have elsewhere (before jax 0.10.1), or under another name.
_errors: Any = jax.errors if hasattr(jax.errors, _NAME) else core
_lax: Any = jax.lax
InconclusiveDimensionOperation: type[Exception] = getattr(_errors, _NAME)

JIT = ("jit", "pjit")
REMAT = ("remat2", "checkpoint")
# Functions with a derivative of their own: no rule of ours may look inside of them.
OWN_DERIVATIVE = ("custom_jvp_call", "custom_vjp_call")

# XLA's CPU compiler of jax 0.10.2 aborts the process ("Check failed: ...
# IsMonotonicWithDim0Major") on a product with batch axes whose small result is
# transposed behind a barrier; `jax.vmap` over adapters makes such axes, unseen.
RANK_FIRST_ON_CPU = jax.__version_info__ >= (0, 12)

# The API of Mosaic GPU that the kernel for Hopper GPUs is written in begins here.
MOSAIC_GPU_SINCE = (0, 10, 2)


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Returns `(jaxpr, consts)` of an open or closed jaxpr.

    jax 0.12 keeps consts in every `Jaxpr`; before, only `ClosedJaxpr` has them.
    """
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def bodies(eqn: JaxprEqn) -> list[Any]:
    """Returns the jaxprs inside of an equation."""
    found = []
    for value in eqn.params.values():
        several = value if isinstance(value, tuple | list) else (value,)
        found += [v for v in several if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    return found


def own_body(eqn: JaxprEqn) -> Any:
    """Returns the jaxpr of a function with a derivative of its own, else None."""
    name, body = eqn.primitive.name, eqn.params.get("call_jaxpr")
    if name not in OWN_DERIVATIVE or body is None:
        return None
    inputs = open_jaxpr(body)[0].invars
    return body if len(inputs) == len(eqn.invars) else None


def operation_name(eqn: JaxprEqn) -> str:
    """Returns the name of an operation, with that of the function it calls."""
    name = eqn.primitive.name
    if name not in OWN_DERIVATIVE:
        return name
    jaxpr, _ = open_jaxpr(eqn.params.get("call_jaxpr"))
    told = getattr(getattr(jaxpr, "debug_info", None), "func_src_info", None)
    return f"{name} of {told.split(' at ')[0]!r}" if told else name


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Returns the number of constants and of carries of a scan equation.

    jax 0.12 replaces `num_consts` and `num_carry` by the tree `ft_in`.
    """
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def shard_map_axes(params: dict[str, Any]) -> Any:
    """Returns the mesh axes that a shard_map equation makes manual.

    They are `manual_axes` in jax 0.8.1.
    """
    return params.get("newly_manual_axes", params.get("manual_axes"))


def is_literal(atom: Any) -> bool:
    """Returns whether an operand of an equation is a literal."""
    return isinstance(atom, Literal)


def is_var(atom: Any) -> bool:
    """Returns whether an operand of an equation is a variable."""
    return isinstance(atom, Var)


@contextlib.contextmanager
def equation_scope(eqn: JaxprEqn) -> Iterator[None]:
    """Restores the source line, name stack and context an equation was traced in."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    traceback = eqn.source_info.traceback
    with source_info_util.user_context(traceback, name_stack=stack), eqn.ctx.manager:
        yield


def rebind(eqn: JaxprEqn, args: list[Any]) -> list[Any]:
    """Evaluates an equation unchanged and returns the list of its outputs."""
    found: Any = eqn.primitive.get_bind_params(eqn.params)
    # Before jax 0.10 a pair: functions that go before the operands, and the params.
    first, params = found if isinstance(found, tuple) else ((), found)
    out = eqn.primitive.bind(*first, *args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def source_line(eqn: JaxprEqn) -> str:
    """Returns `file.py:line` of the model's line that made an equation.

    Where no line is the model's it is `Unsure`: the innermost one of a library above
    JAX, the best that is known.
    """
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback is not None else []
    found = place((frame.file_name, frame.line_num) for frame in frames)
    if found is None:
        return Unsure("unknown line")
    owner, line = found
    return line if owner is Owner.MODEL else Unsure(line)


def with_layout(array: jax.Array, layout: Any) -> jax.Array:
    """Constrains the layout of an array in memory; None leaves it to XLA."""
    return array if layout is None else with_layout_constraint(array, layout)


def staged(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn`, which is traced before it runs, and inlined where it is traced.

    JAX evaluates an eager `shard_map` operation by operation, and refuses a
    `jax.custom_vjp` with symbolic zeros there; a traced one it takes.
    """
    return jax.jit(fn, inline=True)


def in_shard_map() -> bool:
    """Whether this is inside of a `shard_map`, traced or eager."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return AxisType.Manual in (kinds or ())


def explicit_mesh(*arrays: Any) -> Any:
    """Returns the mesh if an array is sharded over Explicit mesh axes, else None."""
    for array in arrays:
        sharding = getattr(jax.typeof(array), "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        if mesh is not None and not mesh.empty and mesh.explicit_axes:
            return mesh
    return None


def manual_axes(array: Any) -> frozenset[str]:
    """Returns the shard_map axes along which `array` varies."""
    kind: Any = jax.typeof(array)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return kind.vma  # before jax 0.10


def shape_within(array: jax.Array, shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns the type of a result that varies along shard_map axes as `array` does.

    Inside of a `shard_map` that checks such types, Pallas asks for it.
    """
    struct: Any = jax.ShapeDtypeStruct
    kind: Any = jax.typeof(array)
    if hasattr(kind, "manual_axis_type"):
        return struct(shape, dtype, manual_axis_type=kind.manual_axis_type)
    return struct(shape, dtype, vma=kind.vma)  # before jax 0.10


def vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Marks `array` as varying along shard_map `axes`; transposes to a psum."""
    missing = tuple(sorted(axes - manual_axes(array)))
    if not missing:
        return array
    if hasattr(_lax, "pcast"):
        return _lax.pcast(array, missing, to="varying")
    return _lax.pvary(array, missing)  # jax 0.8.1


def ragged_dot_general(*args: Any, out_sharding: Any, **options: Any) -> jax.Array:
    """Returns `jax.lax.ragged_dot_general`, laid out as told on an Explicit mesh.

    Before jax 0.10.1 no such product can be traced on an Explicit mesh, nor can that of
    a model: `out_sharding` is None there.
    """
    if out_sharding is not None:
        options["out_sharding"] = out_sharding
    return jax.lax.ragged_dot_general(*args, **options)

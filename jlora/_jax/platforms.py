"""A function whose body is chosen as its program is lowered, for what it will run on.

While a program is traced nothing says what it will run on: it may be exported, compiled
ahead of time, or put on another device of the host. `by_platform` is one equation with
a portable body, which types, derivatives and transforms are those of; the lowering asks
for a better one. `jax.lax.platform_dependent` would trace every body, everywhere.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir, partial_eval
from jax.sharding import AxisType, NamedSharding

Body = Callable[..., list[jax.Array]]
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


class Target(NamedTuple):
    """What a program is lowered for.

    Attributes:
        platform: one of `PLATFORMS`.
        devices: how many share its arrays; one inside of a `shard_map` over all axes.
        rules: whether a partitioning rule of ours is asked: not where no devices are
            assigned yet, nor inside of a `shard_map` over some of the axes alone, nor
            where JAX has other rules than Shardy's, nor in an export, nor on TPUs,
            whose compiler takes none (libtpu 0.0.50).
        exported: whether it is written down by `jax.export`, for any device of its
            platforms and with calls that are kept stable alone.
        typed: whether types say how arrays lie on Explicit axes.
        kind: what JAX calls the kind of device, where one is assigned.
    """

    platform: str
    devices: int = 1
    rules: bool = True
    exported: bool = False
    typed: bool = False
    kind: str = ""

    @classmethod
    def here(cls) -> "Target":
        """What a `jax.jit` without shardings is lowered for."""
        device = jax.devices()[0]
        platform = device.platform
        if platform == "gpu":
            version = device.client.platform_version
            platform = "rocm" if "rocm" in version else "cuda"
        return cls(platform, kind=device.device_kind)

    @classmethod
    def of(cls, platform: str, ctx: mlir.LoweringRuleContext) -> "Target":
        """What a lowering rule is asked for."""
        module: Any = ctx.module_context
        axes = module.axis_context
        exported = module.lowering_parameters.for_export
        typed = any(_is_explicit(one) for one in (*ctx.avals_in, *ctx.avals_out))
        shardy = getattr(jax.config, "jax_use_shardy_partitioner", True)
        rules = shardy and not exported and platform != "tpu"
        placed: Any = getattr(axes, "device_assignment", None) or ()
        kind = placed[0].device_kind if len(placed) else ""
        made = cls(platform, 1, rules, exported, typed, kind)
        if not isinstance(axes, mlir.SPMDAxisContext):
            devices = getattr(axes, "num_devices", 1)
            return made._replace(devices=devices, rules=rules and len(placed) > 0)
        if set(axes.manual_axes) == set(axes.mesh.axis_names):
            return made._replace(rules=False)
        rules = rules and not axes.manual_axes
        return made._replace(devices=axes.mesh.size, rules=rules)


def _is_explicit(aval: Any) -> bool:
    return bool(aval.sharding.mesh.explicit_axes)


class Bodies(Protocol):
    """What can be computed, hashable: programs are cached by it."""

    @property
    def has_rules(self) -> bool:
        """Whether a body is partitioned by a rule of ours: devices are needed then."""
        ...

    @property
    def is_typed(self) -> bool:
        """Whether bodies say how results are laid out on Explicit axes."""
        ...

    def portable(self, *args: jax.Array) -> list[jax.Array]:
        """The body for everything that `on` names none for."""
        ...

    def on(self, target: Target) -> Body | None:
        """Returns the body for a target, of the same types, or None."""
        ...

    def mapped(self, size: int, axes: Sequence[int | None]) -> "Bodies | None":
        """Returns itself with one more axis, first, in these arguments and all results.

        None leaves it to `jax.vmap` and the portable body.
        """
        ...


def by_platform(bodies: Bodies, *args: jax.Array) -> list[jax.Array]:
    """Computes what `bodies` says, by the body that suits what it is lowered for."""
    jaxpr = _portable.trace(bodies, *args).jaxpr
    needs = _needs_devices() if bodies.has_rules else None
    return by_platform_p.bind(*args, jaxpr=jaxpr, bodies=bodies, needs=needs)


@functools.cache
def _needs_devices() -> Any:
    """Returns a program that makes JAX assign devices before it lowers what holds it.

    It does so for the primitives that need it, and looks for them in parameters too. It
    has no door by which ours could be named one of them.
    """
    run = custom_partitioning(lambda x: x)
    run.def_partition(lambda *_: None, sharding_rule="i -> i")
    return jax.make_jaxpr(run)(np.zeros(1, np.float32))


@functools.partial(jax.jit, static_argnums=0)
def _portable(bodies: Bodies, *args: jax.Array) -> list[jax.Array]:
    return bodies.portable(*args)


by_platform_p = Primitive("by_platform")
by_platform_p.multiple_results = True


@by_platform_p.def_abstract_eval
def _types(*_: Any, jaxpr: Any, **__: Any) -> Any:
    return jaxpr.out_avals


@by_platform_p.def_impl
def _eagerly(*args: jax.Array, bodies: Bodies, **_: Any) -> Any:
    if jax.config.jax_disable_jit:  # nothing is lowered then
        return bodies.portable(*args)
    return _compiled(bodies)(*args)


@functools.lru_cache(maxsize=256)
def _compiled(bodies: Bodies) -> Any:
    return jax.jit(functools.partial(by_platform, bodies))


def _lower(
    platform: str, ctx: Any, *args: Any, jaxpr: Any, bodies: Bodies, **_: Any
) -> Any:
    target = Target.of(platform, ctx)
    body = bodies.on(target)
    if body is None:
        body = jaxpr_as_fun(jaxpr)
    elif not bodies.is_typed:
        return _lower_untyped(body, ctx, *args)
    return mlir.lower_fun(body, multiple_results=True)(ctx, *args)


def _lower_untyped(body: Body, ctx: mlir.LoweringRuleContext, *args: Any) -> Any:
    """Lowers a body that knows nothing of Explicit axes, as if they were Auto.

    Its results are laid out as their types say.
    """
    shardings = [aval.sharding for aval in ctx.avals_out]
    meshes = [one.mesh for one in shardings if one.mesh.explicit_axes]
    if not meshes:
        return mlir.lower_fun(body, multiple_results=True)(ctx, *args)
    plain = lambda avals: [ShapedArray(v.shape, v.dtype) for v in avals]
    mesh = meshes[0].update(axis_types=(AxisType.Auto,) * len(meshes[0].axis_names))

    def laid_out(*args: jax.Array) -> list[jax.Array]:
        pairs = zip(body(*args), shardings, strict=True)
        place = lambda one: NamedSharding(mesh, one.spec)
        return [jax.lax.with_sharding_constraint(v, place(one)) for v, one in pairs]

    with jax.sharding.use_abstract_mesh(mesh):
        untyped = ctx.replace(
            avals_in=plain(ctx.avals_in), avals_out=plain(ctx.avals_out)
        )
        return mlir.lower_fun(laid_out, multiple_results=True)(untyped, *args)


for _name in PLATFORMS:
    mlir.register_lowering(
        by_platform_p, functools.partial(_lower, _name), platform=_name
    )


def _batch(args: Any, axes: Any, *, jaxpr: Any, bodies: Bodies, **_: Any) -> Any:
    pairs = list(zip(args, axes, strict=True))
    size = next(x.shape[i] for x, i in pairs if i is not None)
    args = [x if i is None else jnp.moveaxis(x, i, 0) for x, i in pairs]
    axes = tuple(None if i is None else 0 for i in axes)
    deeper = bodies.mapped(size, axes)
    if deeper is not None:
        out = by_platform(deeper, *args)
    else:
        run = jaxpr_as_fun(jaxpr)
        out = jax.vmap(run, in_axes=axes, axis_size=size)(*args)
    return out, [0] * len(out)


batching.primitive_batchers[by_platform_p] = _batch


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    """Derivatives are those of the portable body: second ones alone ask for them."""
    run = jaxpr_as_fun(params["jaxpr"])
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def of_moving(*moved: jax.Array) -> Any:
        new = dict(zip(moving, moved, strict=True))
        return run(*(new.get(i, v) for i, v in enumerate(primals)))

    at = [primals[i] for i in moving]
    _, change = jax.jvp(of_moving, at, [tangents[i] for i in moving])
    return by_platform_p.bind(*primals, **params), change


ad.primitive_jvps[by_platform_p] = _jvp


def _under_remat(
    saveable: Any, unknown: Sequence[bool], present: Sequence[bool], eqn: Any
) -> Any:
    """Its results are saved where the policy would save a product of the body.

    A policy names primitives of JAX and knows none of ours. What it would offload is
    computed again. (The rule's results: the equation of the forward pass, that of the
    backward pass, which outputs are unknown, which are there backward, residuals.)
    """
    n = len(eqn.outvars)
    if any(unknown):
        return None, eqn, [True] * n, [True] * n, _missing(eqn, present)
    cases = (
        saveable(one.primitive, *(v.aval for v in one.invars), **one.params)
        for one in eqn.params["jaxpr"].eqns
    )
    if any(case is True or isinstance(case, _saved()) for case in cases):
        return eqn, None, [False] * n, [False] * n, []
    return eqn, eqn, [False] * n, [True] * n, _missing(eqn, present)


def _missing(eqn: Any, present: Sequence[bool]) -> list[Any]:
    """The variables that an equation of the backward pass reads and has not."""
    pairs = zip(eqn.invars, present, strict=True)
    return [v for v, there in pairs if not there and not hasattr(v, "val")]


@functools.cache
def _saved() -> type:
    """The type by which a policy that can offload says "saved"."""
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["x"],
        names_which_can_be_offloaded=[],
        offload_src="device",
        offload_dst="pinned_host",
    )
    (eqn,) = jax.make_jaxpr(lambda x: checkpoint_name(x, "x"))(1.0).eqns
    return type(policy(eqn.primitive, **eqn.params))


partial_eval.partial_eval_jaxpr_custom_rules[by_platform_p] = _under_remat

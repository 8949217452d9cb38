"""One traced program, whose bodies are chosen for what it is lowered for.

The bodies here are telltales: each computes `scale·x @ y` in a way that shows in the
lowered text. What is right on a platform that is not here is asserted on the text.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora
from jlora._jax.dots import rank_last, wide_dot
from jlora._jax.platforms import PLATFORMS, Target, by_platform
from jlora._jax.versions import RANK_FIRST_ON_CPU

# An operation that no other body has, by which a lowered text is known.
TELLTALES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cuda": (lambda v: jnp.cbrt(v) ** 3, "stablehlo.cbrt"),
    "tpu": (lambda v: jnp.log1p(jnp.expm1(v)), "stablehlo.log_plus_one"),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """The bodies: portable, and with a telltale on some platforms."""

    mappable: bool = False
    has_rules: bool = False
    is_typed: bool = True

    def portable(self, x: jax.Array, y: jax.Array) -> list[jax.Array]:
        return [x @ y, x]

    def on(self, target: Target) -> Callable[..., list[jax.Array]] | None:
        if target.platform not in TELLTALES:
            return None
        around, _ = TELLTALES[target.platform]
        return lambda x, y: [around(x @ y), x]

    def mapped(self, size: int, axes: Sequence[int | None]) -> "Product | None":
        whole = tuple(axes) == (0, None)
        return self if self.mappable and whole else None


def run(x: jax.Array, y: jax.Array, bodies: Any = Product()) -> jax.Array:
    """The first result."""
    return by_platform(bodies, x, y)[0]


def operands() -> tuple[jax.Array, jax.Array]:
    """Two matrices."""
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    return draw(0, 3, 5), draw(1, 5, 4)


def told(fn: Callable[..., Any], *args: Any, platform: str) -> set[str]:
    """Whose telltales are in what is lowered for a platform."""
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return {name for name, (_, word) in TELLTALES.items() if word in text}


# --- what is chosen ---


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("wrapped", [run, jax.checkpoint(run)], ids=["plain", "remat"])
def test_each_platform_has_its_own_body(wrapped: Any, platform: str) -> None:
    expected = {platform} & set(TELLTALES)
    assert told(wrapped, *operands(), platform=platform) == expected


def test_one_export_carries_all() -> None:
    x, y = operands()
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(run), platforms=platforms)(x, y)
    text = exported.mlir_module()
    assert all(word in text for _, word in TELLTALES.values())
    again = jax.export.deserialize(exported.serialize())
    assert_close(again.call(x, y), np.asarray(x) @ np.asarray(y), 1e-6)


def test_an_adapted_program_is_the_same_for_all() -> None:
    """Its jaxpr names no platform, and each lowered text has no other's orientation."""
    params = {"w": jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((8192, 2048), jnp.bfloat16)
    lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig(rank=16))
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    loss = lambda a, p, x: jnp.sum(lora.apply(p, a, x).astype(jnp.float32))
    traced = jax.jit(jax.grad(loss)).trace(adapter, params, x)
    texts = {
        name: traced.lower(lowering_platforms=(name,)).as_text() for name in PLATFORMS
    }
    widened = "tensor<8192x2048xf32>"  # a CPU's products of 16 bits in 32
    for name, text in texts.items():
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert any(widened in line.split("->")[0] for line in products) == (
            name == "cpu"
        )


@pytest.mark.parametrize("product", ["wide_dot", "rank_last"])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("rows", [7, 5000])
def test_wide_results_of_narrow_operands(product: str, mapped: bool, rows: int) -> None:
    """The CPU's runtime has no such products inside of loops: it widens operands.

    Of many rows it has the rank first, where that compiles.
    """
    wide: Any = wide_dot if product == "wide_dot" else rank_last
    one = lambda a, b: wide(a, b, ((0,), (0,)), ((), ()), jnp.float32, None)
    fn = jax.vmap(one) if mapped else one
    lead = (2,) if mapped else ()
    draw = lambda i, *s: jax.random.normal(jax.random.key(i), lead + s, jnp.bfloat16)
    a, b = draw(0, rows, 3), draw(1, rows, 5)
    looped = lambda a, b: jax.lax.scan(lambda c, _: (c, fn(a, b)), 0, None, length=2)
    found = jax.jit(looped)(a, b)[1][1]
    a64, b64 = (np.asarray(v, np.float64) for v in (a, b))
    expected = np.swapaxes(a64, -1, -2) @ b64
    if product == "rank_last":
        expected = np.swapaxes(expected, -1, -2)
    assert_close(found, expected.astype(np.float32), 1e-5)
    turned = product == "rank_last" and rows > 7 and RANK_FIRST_ON_CPU
    for platform in PLATFORMS:
        lowered = jax.jit(fn).trace(a, b).lower(lowering_platforms=(platform,))
        text = lowered.as_text()
        lines = [s for s in text.splitlines() if "dot_general" in s]
        kinds = {"bf16" in line.split("->")[0].split(":")[-1] for line in lines}
        assert kinds == {platform != "cpu"}
        assert ("optimization_barrier" in text) == (turned and platform == "cpu")


# --- transforms ---


def test_eager_values() -> None:
    x, y = operands()
    assert_close(run(x, y), np.asarray(x) @ np.asarray(y), 1e-6)


@pytest.mark.parametrize("bodies", [Product(), Product(mappable=True)], ids=str)
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, 1)])
def test_vmap(axes: Any, bodies: Product) -> None:
    sizes = [3, 5], [5, 4]
    args = []
    for i, (size, axis) in enumerate(zip(sizes, axes, strict=True)):
        shape = size if axis is None else [*size[:axis], 2, *size[axis:]]
        args.append(jax.random.normal(jax.random.key(i), shape))
    mapped = jax.vmap(lambda x, y: run(x, y, bodies), in_axes=axes)
    expected = jax.vmap(jnp.matmul, in_axes=axes)(*args)
    assert_close(jax.jit(mapped)(*args), np.asarray(expected), 1e-6)
    kept = bodies.mappable and axes == (0, None)
    assert told(mapped, *args, platform="tpu") == ({"tpu"} if kept else set())


@pytest.mark.parametrize("moving", [(0,), (1,), (0, 1)])
def test_derivatives_are_those_of_the_portable_body(moving: tuple[int, ...]) -> None:
    loss = lambda fn: lambda x, y: jnp.sum(jnp.sin(fn(x, y)))
    args = operands()
    ours, theirs = loss(run), loss(jnp.matmul)
    for transform in (jax.grad, jax.hessian):
        found = jax.jit(transform(ours, moving))(*args)
        expected = jax.tree.map(np.asarray, transform(theirs, moving)(*args))
        assert_close(found, expected, 1e-5)
    push = lambda fn: jax.jvp(fn, args, tuple(2 * v for v in args))
    assert_close(push(run), jax.tree.map(np.asarray, push(jnp.matmul)), 1e-6)


POLICIES = {
    "nothing": (jax.checkpoint_policies.nothing_saveable, 2),
    "everything": (jax.checkpoint_policies.everything_saveable, 1),
    "dots": (jax.checkpoint_policies.dots_saveable, 1),
    "unbatched dots": (jax.checkpoint_policies.dots_with_no_batch_dims_saveable, 1),
    "names": (jax.checkpoint_policies.save_only_these_names("a"), 2),
    "offloaded names": (
        jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=["a"],
            names_which_can_be_offloaded=[],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        2,
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_remat_policies_see_the_products_inside(policy: str) -> None:
    """The product runs once where its result is saved, else twice: as `x @ y` does."""
    given, times = POLICIES[policy]

    def loss(fn: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        block = jax.checkpoint(lambda x, y: jnp.sin(fn(x, y)), policy=given)
        return jnp.sum(block(x, y))

    def forward(fn: Any) -> int:
        grad = jax.grad(lambda x, y: loss(fn, x, y))
        names = [str(e.primitive) for e in _flat(jax.make_jaxpr(grad)(*operands()))]
        return names.count("by_platform") or names.count("dot_general") - 1

    assert forward(run) == forward(jnp.matmul) == times
    found = jax.jit(jax.grad(lambda x, y: loss(run, x, y)))(*operands())
    expected = jax.grad(lambda x, y: loss(jnp.matmul, x, y))(*operands())
    assert_close(found, np.asarray(expected), 1e-6)


def _flat(jaxpr: Any) -> list[Any]:
    """All equations but those inside of `by_platform`, without what nothing reads."""
    found = []
    for eqn in jaxpr.eqns:
        found.append(eqn)
        inner = eqn.params.get("jaxpr")
        if inner is not None and eqn.primitive.name != "by_platform":
            found += _flat(getattr(inner, "jaxpr", inner))
    return found


# --- meshes ---


def mesh_of(*kinds: AxisType) -> jax.sharding.Mesh:
    """Two axes of eight devices."""
    return jax.make_mesh((2, 4), ("i", "j"), axis_types=kinds)


EACH = {
    "auto": (AxisType.Auto, AxisType.Auto),
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "both": (AxisType.Explicit, AxisType.Auto),
}


class Elsewhere(Product):
    """The body of a platform, on the one that is here."""

    def on(self, target: Target) -> Callable[..., list[jax.Array]] | None:
        return super().on(target._replace(platform="tpu"))


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("kinds", EACH)
def test_results_are_laid_out_as_their_types_say(kinds: str, typed: bool) -> None:
    x = jax.random.normal(jax.random.key(0), (8, 5))
    y = jax.random.normal(jax.random.key(1), (5, 4))
    mesh = mesh_of(*EACH[kinds])
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, P("i")))
        whole = jax.device_put(y, NamedSharding(mesh, P()))
        found = jax.jit(lambda x, y: run(x, y, Elsewhere(is_typed=typed)))(
            placed, whole
        )
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P("i")), 2)
    assert_close(found, np.asarray(x) @ np.asarray(y), 1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("names", [{"i", "j"}, {"i"}], ids=["all axes", "one axis"])
def test_inside_of_shard_map(names: set[str], kind: AxisType) -> None:
    x = jax.random.normal(jax.random.key(0), (8, 5))
    y = jax.random.normal(jax.random.key(1), (5, 4))
    mesh = mesh_of(kind, kind)
    body = lambda x, y: run(x, y, Elsewhere())
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"), axis_names=names
    )
    with jax.set_mesh(mesh):
        found = jax.jit(mapped)(jax.device_put(x, P("i")), y)
    assert_close(found, np.asarray(x) @ np.asarray(y), 1e-6)

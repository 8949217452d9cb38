"""Mixed batches of experts that are ragged products, adapted and frozen.

JAX maps such a product over examples only where its kernel is mapped too.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import bodies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close
from quant_case import made_dense
from releases import since

import jlora
from jlora._jax.platforms import Target

pytestmark = pytest.mark.usefixtures("fast_compile")
Tree = dict[str, Any]
NONE = -1


def numbers(shapes: Any, seed: int) -> Any:
    random = np.random.default_rng(seed)
    number = lambda shape: jnp.asarray(0.5 * random.normal(size=shape), jnp.float32)
    return jax.tree.map(number, shapes, is_leaf=lambda v: isinstance(v, tuple))


# --- adapted ---


def experts(params: Tree, x: jax.Array) -> jax.Array:
    """Two ragged products; each example routes its rows, and drops the last of them."""
    chosen = jnp.argmax(x @ params["router"], axis=-1)[0]
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen[:-1], length=3)
    rows = x[0][order]
    h = jnp.tanh(jax.lax.ragged_dot(rows, params["up"], sizes))
    return jax.lax.ragged_dot(h, params["down"], sizes)[None]


MOE = {"router": (5, 3), "up": (3, 5, 8), "down": (3, 8, 6)}


def of_experts(prepared: bool = False) -> tuple[Any, ...]:
    """A mixed batch of experts; and each example alone, by merged kernels."""
    lora = jlora.lora(experts, jlora.LoraConfig("up|down", rank=2, alpha=3.0))
    params, x = numbers(MOE, 0), numbers((6, 7, 5), 1)
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params, x[:1])
    adapters = [
        jax.tree.map(lambda v, i=i: numbers(v.shape, 3 + i), shapes) for i in range(3)
    ]
    index = [2, 0, NONE, 1, 1, 2]

    def mixed(stacked: Any, x: jax.Array) -> jax.Array:
        stacked = jlora.prepare(stacked) if prepared else stacked
        return lora.apply_mixed(params, stacked, jnp.asarray(index), x)

    def alone(adapters: list[Any], x: jax.Array) -> jax.Array:
        merged = [*(jlora.merge(params, one) for one in adapters), params]
        rows = [experts(merged[w], x[i : i + 1]) for i, w in enumerate(index)]
        return jnp.concatenate(rows)

    return mixed, alone, adapters, x


@pytest.mark.parametrize("prepared", [False, True])
def test_values_and_gradients_of_experts(prepared: bool) -> None:
    mixed, alone, adapters, x = of_experts(prepared)
    stacked = jlora.stack(adapters)
    assert_close(jax.jit(mixed)(stacked, x), alone(adapters, x), 1e-5)
    assert_close(mixed(stacked, x), alone(adapters, x), 1e-5)  # not compiled
    weights = numbers((6, 7, 6), 9)
    loss = lambda run: lambda a, x: jnp.sum(run(a, x) * weights)
    found, of_x = jax.jit(jax.grad(loss(mixed), (0, 1)))(stacked, x)
    expected = jax.jit(jax.grad(loss(alone), (0, 1)))(adapters, x)
    assert_close((jlora.unstack(found), of_x), expected, 1e-4)


def test_the_kernels_of_experts_have_no_copy() -> None:
    mixed, _, adapters, x = of_experts()
    program = jax.make_jaxpr(mixed)(jlora.stack(adapters), x)
    products = [
        [v.aval.shape for v in eqn.invars]
        for eqn in bodies(program.jaxpr, Target("cpu"))
        if eqn.primitive.name == "ragged_dot_general"
    ]
    # The base and both factors, side by side of rank 3 · 2, of two kernels.
    base, factors = [(3, 5, 8), (3, 8, 6)], [(3, 5, 6), (3, 6, 8), (3, 8, 6), (3, 6, 6)]
    assert sorted(kernel for _, kernel, _ in products) == sorted([*base, *factors])
    assert {rows[0] for rows, *_ in products} == {6 * 7}


def scanned_experts(params: Tree, x: jax.Array) -> jax.Array:
    """Layers of experts under remat, each row back in its place."""

    @jax.checkpoint
    def layer(x: jax.Array, w: Tree) -> tuple[jax.Array, None]:
        chosen = jnp.argmax(x[0] @ w["router"], axis=-1)
        order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=3)
        h = jnp.tanh(jax.lax.ragged_dot(x[0][order], w["up"], sizes))
        y = jax.lax.ragged_dot(h, w["down"], sizes)[jnp.argsort(order)]
        return x + y[None], None

    return jax.lax.scan(layer, x, params)[0]


@pytest.mark.parametrize("where", ["auto", "shard_map"])
def test_layers_of_experts(where: str) -> None:
    lora = jlora.lora(scanned_experts, jlora.LoraConfig("up|down", rank=2, alpha=3.0))
    shapes = {"router": (2, 5, 3), "up": (2, 3, 5, 8), "down": (2, 3, 8, 5)}
    params, x = numbers(shapes, 0), numbers((8, 7, 5), 1)
    fresh = jax.eval_shape(lora.init, jax.random.key(0), params, x[:1])
    adapters = [
        jax.tree.map(lambda v, i=i: numbers(v.shape, 3 + i), fresh) for i in range(3)
    ]
    index = [2, 0, NONE, 1, 1, 2, 0, NONE]
    merged = [*(jlora.merge(params, one) for one in adapters), params]
    rows = [scanned_experts(merged[w], x[i : i + 1]) for i, w in enumerate(index)]
    run, which, placed = lora.apply_mixed, jnp.asarray(index), params
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    if where == "shard_map":
        specs = P(), P(), P("data"), P("data")
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("data"))
    else:
        place = lambda *spec: NamedSharding(mesh, P(*spec))
        places = {"router": place(), "up": place(None, None, None, "model")}
        places |= {"down": place(None, None, "model")}
        placed = jax.device_put(params, places)
        x, which = jax.device_put((x, which), place("data"))
    found = jax.jit(run)(placed, jlora.stack(adapters), which, x)
    assert_close(jax.device_get(found), jnp.concatenate(rows), 1e-5)


def test_jax_cannot_map_a_ragged_product_over_kernels_alone() -> None:
    """When it can, this fails: then take `_rules/ragged_examples.py` away."""
    x, sizes = jnp.ones((4, 3)), jnp.array([1, 3])
    with pytest.raises(NotImplementedError, match="ragged_dot"):
        jax.vmap(lambda x: jax.lax.ragged_dot(x, jnp.ones((2, 3, 6)), sizes))(x[None])


# --- frozen ---

INDEX = [2, 0, NONE, 1, 1, 2]
SHAPES = {"w": (5, 5), "router": (5, 3), "up": (3, 5, 8), "down": (3, 8, 5)}
Model = Callable[[Tree, jax.Array], jax.Array]


def routed(params: Tree, x: jax.Array) -> jax.Array:
    """A product whose kernel is adapted, and experts of which none is."""
    x = jnp.tanh(x @ params["w"])
    chosen = jnp.argmax(x[0] @ params["router"], axis=-1)
    order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=3)
    h = jnp.tanh(jax.lax.ragged_dot(x[0][order], params["up"], sizes))
    y = jax.lax.ragged_dot(h, params["down"], sizes)
    return y[jnp.argsort(order)][None]


def moved(params: Tree, x: jax.Array) -> jax.Array:
    """With kernels that are cast, turned, scaled and cut on their way."""
    up = jnp.concatenate([params["up"], params["up"][:1]]).astype(jnp.bfloat16)
    down = jnp.swapaxes(jnp.swapaxes(params["down"], 1, 2) * 1.5, 1, 2)
    return routed({**params, "up": up[:3].astype(jnp.float32), "down": down}, x)


def elsewhere(params: Tree, x: jax.Array) -> jax.Array:
    """With kernels that are products and squares elsewhere."""
    beside = (x @ params["up"][0]) @ params["down"][1]
    return routed(params, x) + beside + jnp.mean(params["up"] ** 2)


def layers(params: Tree, x: jax.Array) -> jax.Array:
    """A scan over layers with frozen experts, the product adapted once for all."""
    stack = {name: jnp.stack([params[name], params[name]]) for name in ("up", "down")}
    layer = lambda x, own: (x + routed({**params, **own}, x), None)
    return jax.lax.scan(layer, x, stack)[0]


def inside(params: Tree, x: jax.Array) -> jax.Array:
    """In a loop and a branch of the program that take nothing adapted."""
    x, frozen = jnp.tanh(x @ params["w"]), {**params, "w": jnp.eye(5)}
    step = lambda i, x: routed(frozen, x)
    return jax.lax.fori_loop(
        0, 2, lambda i, x: jax.lax.cond(i < 1, step, lambda i, x: x, i, x), x
    )


def decided(params: Tree, x: jax.Array) -> jax.Array:
    """In a branch that each example decides."""
    run, skip = lambda x: routed(params, x), lambda x: x
    return jax.lax.cond(jnp.sum(x) > 0, run, skip, x)


FROZEN: dict[str, Model] = {
    "as it is": routed,
    "moved": moved,
    "elsewhere": elsewhere,
    "layers": layers,
    "inside": inside,
    "decided": decided,
    "jit": lambda params, x: jax.jit(routed)(params, x),
    "remat": lambda params, x: jax.checkpoint(routed)(params, x),
}


def of_frozen(fn: Model, params: Tree, target: str = "w") -> tuple[Any, ...]:
    """A mixed batch of which experts are frozen; and each example by merged kernels."""
    lora, x = jlora.lora(fn, jlora.LoraConfig(target, rank=2, alpha=3.0)), X
    fresh = jax.eval_shape(lora.init, jax.random.key(0), params, x[:1])
    adapters = [
        jax.tree.map(lambda v, i=i: numbers(v.shape, 3 + i), fresh) for i in range(3)
    ]
    mixed = lambda stacked, x: lora.apply_mixed(params, stacked, jnp.array(INDEX), x)

    def alone(adapters: list[Any], x: jax.Array) -> jax.Array:
        merged = [*(jlora.merge(params, one) for one in adapters), params]
        rows = [fn(merged[w], x[i : i + 1]) for i, w in enumerate(INDEX)]
        return jnp.concatenate(rows)

    return mixed, alone, adapters


def check_gradients(mixed: Any, alone: Any, adapters: Any, x: jax.Array) -> None:
    """Values, and gradients by adapters and inputs, are those of merged kernels."""
    stacked = jlora.stack(adapters)
    expected = alone(adapters, x)
    assert_close(jax.jit(mixed)(stacked, x), expected, 1e-5)
    weights = numbers(expected.shape, 9)
    loss = lambda run: lambda a, x: jnp.sum(run(a, x) * weights)
    found, of_x = jax.jit(jax.grad(loss(mixed), (0, 1)))(stacked, x)
    wanted = jax.jit(jax.grad(loss(alone), (0, 1)))(adapters, x)
    assert_close((jlora.unstack(found), of_x), wanted, 1e-4)


PARAMS, X = numbers(SHAPES, 0), numbers((6, 7, 5), 1)


@pytest.mark.parametrize("target", ["w", "w|up"])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_experts(name: str, target: str) -> None:
    if name in ("elsewhere", "moved") and target != "w":
        pytest.skip("it has uses that factors have no rule for")
    check_gradients(*of_frozen(FROZEN[name], PARAMS, target), X)


@pytest.mark.parametrize("target", ["w", "w|up"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_experts(kind: str, target: str) -> None:
    params = jlora.quantize(PARAMS, "up|down", kind)
    mixed, _, adapters = of_frozen(routed, params, target)
    _, alone, _ = of_frozen(routed, made_dense(params), target)
    check_gradients(mixed, alone, adapters, X)


def test_rows_that_all_examples_share() -> None:
    """Nothing that goes into the product of experts is one for each example."""
    rows, sizes = numbers((7, 5), 2), jnp.array([2, 1, 4])

    def shared(params: Tree, x: jax.Array) -> jax.Array:
        y = jax.lax.ragged_dot(rows, params["up"], sizes)
        return x @ params["w"] + y[None, :, :5]

    check_gradients(*of_frozen(shared, PARAMS, "w|up"), X)


def test_frozen_experts_are_one_product_for_all_examples() -> None:
    mixed, _, adapters = of_frozen(routed, PARAMS)
    program = jax.make_jaxpr(mixed)(jlora.stack(adapters), X)
    products = [
        tuple(v.aval.shape for v in eqn.invars)
        for eqn in bodies(program.jaxpr, Target("cpu"))
        if eqn.primitive.name == "ragged_dot_general"
    ]
    assert products == [((42, 5), (3, 5, 8), (3,)), ((42, 8), (3, 8, 5), (3,))]


def test_what_cannot_be_mapped_is_said() -> None:
    relu = lambda params, x: routed({**params, "up": jax.nn.relu(params["up"])}, x)
    mixed, _, adapters = of_frozen(relu, PARAMS)
    told = "cannot map an operation.*ragged_dot.*computed from others.*jlora.take"
    with pytest.raises(jlora.UnsupportedFeatureError, match=told):
        mixed(jlora.stack(adapters), X)


@since("jax", "0.10.1", "no ragged product on Explicit meshes at all")
def test_explicit_axes_are_refused() -> None:
    sizes = jnp.array([3, 0, 4])
    ragged = lambda x, w: jax.lax.ragged_dot(x[0], w, sizes, out_sharding=P())[None]
    model = lambda params, x: ragged(x @ params["w"], params["up"])
    mesh = jax.make_mesh((2,), ("i",), (AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        mixed, _, adapters = of_frozen(model, PARAMS)
        x = jax.device_put(X, P("i"))
        with pytest.raises(jlora.UnsupportedFeatureError, match=r"'up'.*Explicit"):
            mixed(jlora.stack(adapters), x)


def test_an_error_of_the_function_is_its_own() -> None:
    def unfinished(params: Tree, x: jax.Array) -> jax.Array:
        raise NotImplementedError("later")

    config = jlora.LoraConfig("w", rank=2)
    fresh = jlora.lora(routed, config).init(jax.random.key(0), PARAMS, X[:1])
    index = jnp.zeros(6, jnp.int32)
    with pytest.raises(NotImplementedError, match="later"):
        jlora.lora(unfinished, config).apply_mixed(
            PARAMS, jlora.stack([fresh]), index, X
        )

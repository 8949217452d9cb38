"""Memory and compilations of a training step, read from programs and counted.

What a step may hold: the base once, as an argument; the adapter, and the moments of the
adapter, in buffers that are used again. What it may cost: one compilation.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora
import jlora.optim as jo

pytestmark = pytest.mark.usefixtures("fast_compile")
Tree = Any
Problem = SimpleNamespace
LR = 1e-2
# Each leaf with its sharding on a mesh, and for a kernel the einsum of its delta.
LEAVES = {
    "layers": ((2, 16, 16), P(None, "fsdp", "tensor"), "lir,lro->lio"),
    "heads": ((16, 8, 4), P("fsdp", "tensor"), "ir,rhk->ihk"),
    "bias": ((8, 4), P("tensor"), None),
    "out": ((32, 24), P("tensor", "fsdp"), "ir,ro->io"),
}
# The optimizer, and the arrays that it keeps for each one of the adapter.
OPTIMIZERS = {
    "sgd": (optax.sgd(LR), 0),
    "momentum": (optax.sgd(LR, momentum=0.9), 1),
    "adam": (optax.adam(LR), 2),
    "adamw": (optax.adamw(LR, weight_decay=0.1, mask=jo.decay_mask), 2),
    "clip_adam": (optax.chain(optax.clip_by_global_norm(0.1), optax.adam(LR)), 2),
    "lora_plus": (jo.lora_plus(optax.adam, LR), 2),
    "multi_steps": (optax.MultiSteps(optax.adam(LR), 4).gradient_transformation(), 3),
    "ema": (optax.chain(optax.adam(LR), optax.ema(0.9)), 3),
}
each_optimizer = pytest.mark.parametrize("name", list(OPTIMIZERS))
each_place = pytest.mark.parametrize("place", ["device", "mesh"])


def model(params: Tree, x: jax.Array, *, remat: Any = None) -> jax.Array:
    """Two scanned layers, a kernel of two output axes, and a bias."""
    layer = lambda h, w: (jnp.tanh(h @ w), None)
    layer = layer if remat is None else jax.checkpoint(layer, policy=remat)
    x, _ = lax.scan(layer, x, params["layers"])
    heads = jnp.einsum("nd,dhk->nhk", x, params["heads"]) + params["bias"][None]
    return jnp.tanh(heads).reshape(x.shape[0], -1) @ params["out"]


def adapt(fn: Callable[..., Any] = model, dtype: Any = jnp.float32) -> jlora.Lora:
    low = jlora.LoraConfig("layers|heads|out", rank=3, alpha=6, dtype=dtype)
    return jlora.lora(fn, [low, jlora.LoraConfig("bias", full=True, dtype=dtype)])


LORA = adapt()


def materialized(params: Tree, adapter: Tree) -> Tree:
    """Params with W + 2·a·b in place of each kernel W, and the bias of the adapter."""
    formed = {"bias": adapter["bias"]}
    for name, (_, _, delta) in LEAVES.items():
        if delta is not None:
            a, b = adapter[name].a, adapter[name].b
            formed[name] = params[name] + 2.0 * jnp.einsum(delta, a, b)
    return formed


def loss_of(apply: Callable[..., Any]) -> Callable[..., jax.Array]:
    def loss(adapter: Tree, params: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((apply(params, adapter, x) - y) ** 2)

    return loss


def reference(params: Tree, adapter: Tree, x: jax.Array) -> jax.Array:
    return model(materialized(params, adapter), x)


@pytest.fixture
def problem(request: pytest.FixtureRequest) -> Problem:
    """Params, an adapter of random numbers, and data, all on the first device."""
    rng = np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype) / 2
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {name: array(*shape) for name, (shape, _, _) in LEAVES.items()}
    x, y = array(8, 16), array(8, 24)
    adapter = jax.eval_shape(LORA.init, jax.random.key(0), params, x)
    drawn = jax.tree.map(draw, (params, adapter, x, y))
    # As Orbax returns arrays: committed. Those that are not are compiled for apart.
    params, adapter, x, y = jax.device_put(drawn, jax.devices()[0])
    return Problem(params=params, adapter=adapter, x=x, y=y)


def on_mesh(problem: Problem) -> Problem:
    """The problem on eight devices, the adapter where `jlora.shardings` puts it."""
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=auto)
    specs = {name: spec for name, (_, spec, _) in LEAVES.items()}
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put(problem.params, places)
    adapter = jax.device_put(problem.adapter, jlora.shardings(params, problem.adapter))
    x, y = jax.device_put((problem.x, problem.y), NamedSharding(mesh, P("fsdp")))
    return Problem(params=params, adapter=adapter, x=x, y=y)


def put(problem: Problem, place: str) -> Problem:
    return on_mesh(problem) if place == "mesh" else problem


def shardings_in(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def init_state(tx: Any, adapter: Tree) -> Tree:
    """The state of an optimizer, where `jlora.state_shardings` puts it."""
    places = jlora.state_shardings(tx, adapter, shardings_in(adapter))
    return jax.device_put(tx.init(adapter), places)


def step_of(tx: Any, apply: Callable[..., Any] = LORA.apply) -> Callable[..., Any]:
    """A training step; it takes and gives adapter and state first."""

    def step(adapter: Tree, state: Tree, *args: Tree) -> tuple[Tree, Tree, jax.Array]:
        value, grads = jax.value_and_grad(loss_of(apply))(adapter, *args)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    return step


def bits(tree: Tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def bytes_of(tree: Tree) -> int:
    """The bytes of the arrays of a tree, its scalars left out."""
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.ndim
    )


# What is differentiated and optimized is the adapter.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_gradients_have_the_tree_of_the_adapter(
    problem: Problem, dtype: str, base: str
) -> None:
    cast = lambda tree: jax.tree.map(lambda x: x.astype(base), tree)
    params, x, y = cast((problem.params, problem.x, problem.y))
    lora = adapt(dtype=dtype)
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    grads = jax.eval_shape(jax.grad(loss_of(lora.apply)), adapter, params, x, y)
    assert grads == adapter
    assert {leaf.dtype.name for leaf in jax.tree.leaves(grads)} == {dtype}


@each_optimizer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_moments_of_the_adapter_and_nothing_else(
    problem: Problem, name: str, dtype: str
) -> None:
    tx, moments = OPTIMIZERS[name]
    adapter = jax.tree.map(lambda leaf: leaf.astype(dtype), problem.adapter)
    state = jax.eval_shape(tx.init, adapter)
    shapes = Counter(leaf.shape for leaf in jax.tree.leaves(adapter))
    found = Counter(leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape)
    assert found == Counter({shape: moments * n for shape, n in shapes.items()})
    if name != "multi_steps":  # which sums in float32 whatever it sums
        assert bytes_of(state) == moments * bytes_of(adapter)


# The base is an argument.


@pytest.fixture
def no_constants() -> Iterator[None]:
    """Makes a warning, which is an error here, of each byte of captured constants.

    At zero JAX would warn of none, too.
    """
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 1)
    yield
    jax.config.update("jax_captured_constants_warn_bytes", before)


def captured(f: Callable[..., Any], *args: Tree) -> list[Any]:
    """The arrays that a function takes from elsewhere, as its jaxpr has them."""
    return [const for const in jax.make_jaxpr(f)(*args).consts if np.ndim(const)]


@each_optimizer
@pytest.mark.usefixtures("no_constants")
def test_a_step_captures_no_constants(problem: Problem, name: str) -> None:
    tx, _ = OPTIMIZERS[name]
    state = jax.eval_shape(tx.init, problem.adapter)
    args = problem.adapter, state, problem.params, problem.x, problem.y
    jax.jit(step_of(tx)).lower(*args)
    assert not captured(step_of(tx), *args)


@pytest.mark.usefixtures("no_constants")
def test_a_base_that_is_closed_over_is_a_constant(problem: Problem) -> None:
    """The tests above can fail."""
    apply = lambda _, adapter, x: LORA.apply(problem.params, adapter, x)
    step = step_of(optax.sgd(LR), apply)
    args = problem.adapter, optax.sgd(LR).init(None), {}, problem.x, problem.y
    with pytest.warns(UserWarning, match="constants were captured"):
        jax.jit(step).lower(*args)
    shapes = {const.shape for const in captured(step, *args)}
    assert {shape for shape, _, delta in LEAVES.values() if delta} <= shapes


# One compilation.


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The compilations by XLA, as they come."""
    found: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def saved_and_restored(path: Path, tree: Tree) -> Tree:
    """What Orbax gives back for the shapes and shardings of a tree."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "saved", tree)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        return checkpointer.restore(path / "saved", like)


@each_place
@pytest.mark.parametrize("pinned", [True, False])
def test_one_compilation_for_all_steps_and_all_adapters(
    problem: Problem,
    place: str,
    pinned: bool,
    compilations: list[str],
    tmp_path: Path,
) -> None:
    """Five steps, five of another adapter of these shapes, and five of a restored one.

    With shardings that are pinned (`out_shardings`), and with those that XLA gives.
    """
    here, (tx, _) = put(problem, place), OPTIMIZERS["adamw"]
    runs = [(here.adapter, init_state(tx, here.adapter))]
    other = jax.tree.map(lambda leaf: -leaf, here.adapter)
    other = jax.device_put(other, shardings_in(here.adapter))
    runs.append((other, init_state(tx, other)))
    runs.append(saved_and_restored(tmp_path, runs[0]))
    assert bits(runs[2]) == bits(runs[0])
    places = (*shardings_in(runs[0]), None) if pinned else None
    step = jax.jit(step_of(tx), out_shardings=places)
    compilations.clear()
    for trained in runs:
        for _ in range(5):
            *trained, _ = step(*trained, here.params, here.x, here.y)
    assert len(compilations) == 1
    # XLA writes P("x") for P("x", None): equal, but an entry of its own in the cache.
    assert step._cache_size() == 1


def test_an_adapter_of_another_rank_is_another_program(
    problem: Problem, compilations: list[str]
) -> None:
    """The count above can fail."""
    low = jlora.LoraConfig("layers|heads|out", rank=4, alpha=8)
    lora = jlora.lora(model, [low, jlora.LoraConfig("bias", full=True)])
    wider = lora.init(jax.random.key(0), problem.params, problem.x)
    apply = jax.jit(LORA.apply)
    compilations.clear()
    apply(problem.params, problem.adapter, problem.x)
    apply(problem.params, wider, problem.x)
    assert len(compilations) == apply._cache_size() == 2


# What is trained is updated in place.


@each_place
@pytest.mark.parametrize("name", ["adamw", "momentum", "lora_plus", "multi_steps"])
def test_donated_adapter_and_state_are_updated_in_place(
    problem: Problem, place: str, name: str
) -> None:
    """All of their bytes on a device; one that could not be used would be a warning."""
    here, (tx, _) = put(problem, place), OPTIMIZERS[name]
    trained = here.adapter, init_state(tx, here.adapter)
    rest = here.params, here.x, here.y
    step = jax.jit(step_of(tx), donate_argnums=(0, 1))
    analysis = step.lower(*trained, *rest).compile().memory_analysis()
    plan = LORA.plan(here.params, here.x)
    memory = plan.memory(optimizer=tx)
    assert analysis.alias_size_in_bytes == memory.factors + memory.optimizer
    given = jax.tree.leaves(trained)
    for _ in range(5):
        *trained, _ = step(*trained, *rest)
    assert all(leaf.is_deleted() for leaf in given)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((trained, rest)))


@each_place
def test_what_is_not_donated_is_not_updated_in_place(
    problem: Problem, place: str
) -> None:
    """The test above can fail."""
    here, (tx, _) = put(problem, place), OPTIMIZERS["adamw"]
    args = here.adapter, init_state(tx, here.adapter), here.params, here.x, here.y
    step = jax.jit(step_of(tx))
    assert step.lower(*args).compile().memory_analysis().alias_size_in_bytes == 0
    step(*args)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(args))


# The base stays as it is.


@each_place
@each_optimizer
def test_the_base_keeps_every_bit(problem: Problem, place: str, name: str) -> None:
    here, (tx, _) = put(problem, place), OPTIMIZERS[name]
    before, start = bits(here.params), bits(here.adapter)
    trained = here.adapter, init_state(tx, here.adapter)
    step = jax.jit(step_of(tx), donate_argnums=(0, 1))
    values = []
    for _ in range(20):
        *trained, value = step(*trained, here.params, here.x, here.y)
        values.append(float(value))
    assert bits(here.params) == before
    assert all(x != y for x, y in zip(bits(trained[0]), start, strict=True))
    assert values[-1] < values[0]


@each_place
@each_optimizer
@pytest.mark.slow
def test_the_base_keeps_every_bit_in_one_tree(
    problem: Problem, place: str, name: str
) -> None:
    """The whole tree is differentiated, updated by `freeze_base`, and donated."""
    here, (inner, _) = put(problem, place), OPTIMIZERS[name]
    before, start = bits(here.params), bits(here.adapter)
    tx = jo.freeze_base(inner)
    tree = {"params": here.params, "lora": here.adapter}
    apply = lambda _, tree, x: LORA.apply(tree["params"], tree["lora"], x)
    step = jax.jit(step_of(tx, apply), donate_argnums=(0, 1))
    trained = tree, init_state(tx, tree)
    for _ in range(20):
        *trained, _ = step(*trained, {}, here.x, here.y)
    assert bits(trained[0]["params"]) == before
    assert all(x != y for x, y in zip(bits(trained[0]["lora"]), start, strict=True))


# Accumulated and recomputed gradients are those of the materialized kernels.


def expected_grads(problem: Problem) -> Tree:
    args = problem.adapter, problem.params, problem.x, problem.y
    return jax.jit(jax.grad(loss_of(reference)))(*args)


def in_parts(array: jax.Array, parts: int) -> jax.Array:
    """A batch as microbatches: (rows, ...) as (parts, rows / parts, ...)."""
    return array.reshape(parts, -1, *array.shape[1:])


@each_place
def test_multi_steps_take_the_step_of_the_whole_batch(
    problem: Problem, place: str
) -> None:
    """Three of four microbatches move nothing, and the fourth by the mean gradient."""
    here, start = put(problem, place), problem.adapter
    tx = optax.MultiSteps(optax.sgd(1.0), 4)
    trained = here.adapter, tx.init(here.adapter)
    step = jax.jit(step_of(tx))
    for i, (x, y) in enumerate(
        zip(in_parts(here.x, 4), in_parts(here.y, 4), strict=True)
    ):
        assert bits(trained[0]) == bits(start), f"moved after {i} microbatches"
        *trained, _ = step(*trained, here.params, x, y)
    moved = jax.tree.map(lambda before, after: before - after, here.adapter, trained[0])
    assert_close(moved, expected_grads(problem), 1e-4)


@each_place
@pytest.mark.parametrize("parts", [2, 4])
def test_a_scan_over_microbatches_sums_their_gradients(
    problem: Problem, place: str, parts: int
) -> None:
    here, grad = put(problem, place), jax.grad(loss_of(LORA.apply))

    @jax.jit
    def accumulated(adapter: Tree, params: Tree, x: jax.Array, y: jax.Array) -> Tree:
        def add(total: Tree, part: Tree) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, total, grad(adapter, params, *part)), None

        zeros = jax.tree.map(jnp.zeros_like, adapter)
        batches = in_parts(x, parts), in_parts(y, parts)
        total, _ = lax.scan(add, zeros, batches)
        return jax.tree.map(lambda leaf: leaf / parts, total)

    found = accumulated(here.adapter, here.params, here.x, here.y)
    assert_close(found, expected_grads(problem), 1e-4)


POLICIES = [
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
]


@each_place
@pytest.mark.parametrize("where", ["layers", "whole"])
@pytest.mark.parametrize("policy", POLICIES)
def test_checkpointing_keeps_the_gradients(
    problem: Problem, place: str, where: str, policy: str
) -> None:
    """Of the body of the scan inside of the model, and around the adapted model."""
    here, remat = put(problem, place), getattr(jax.checkpoint_policies, policy)
    apply = adapt(partial(model, remat=remat)).apply
    if where == "whole":
        apply = jax.checkpoint(LORA.apply, policy=remat)
    args = here.adapter, here.params, here.x, here.y
    found = jax.jit(jax.grad(loss_of(apply)))(*args)
    assert_close(found, expected_grads(problem), 1e-4)


@pytest.mark.parametrize("where", ["layers", "whole"])
def test_policies_decide_what_is_computed_again(problem: Problem, where: str) -> None:
    """The more is kept, the fewer floating-point operations."""

    def flops(policy: str) -> float:
        remat = getattr(jax.checkpoint_policies, policy)
        apply = adapt(partial(model, remat=remat)).apply
        if where == "whole":
            apply = jax.checkpoint(LORA.apply, policy=remat)
        args = problem.adapter, problem.params, problem.x, problem.y
        compiled = jax.jit(jax.grad(loss_of(apply))).lower(*args).compile()
        return compiled.cost_analysis()["flops"]

    nothing, _, _, everything = map(flops, POLICIES)
    assert nothing > everything

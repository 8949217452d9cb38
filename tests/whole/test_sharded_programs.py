"""What sharded training moves between devices, read from the compiled programs.

A stack of decoder blocks under FSDP, tensor parallelism and both, scanned and unrolled,
on Auto and on Explicit meshes of eight devices. The measure is the frozen floor, the
gradient of plain `fn` with respect to its input: what it gathers and reduces to go
forward and backward through the frozen kernels is allowed, and besides that only
reductions of the size of a factor, or of `x·a`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import GRADIENTS, VALUES, randomized
from hlo import collectives, cost
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P
from jaxpr_checks import assert_not_materialized, base_indices
from oracle import assert_close
from placed import at, compiled, placed

import jlora
from jlora import KernelAxes

LAYERS, BATCH, TIME, HIDDEN, HEADS, HEAD, MLP, RANK = 2, 16, 5, 64, 8, 10, 96, 3
KERNELS = {
    "q": (HIDDEN, HEADS, HEAD),
    "k": (HIDDEN, HEADS, HEAD),
    "v": (HIDDEN, HEADS, HEAD),
    "o": (HEADS, HEAD, HIDDEN),
    "gate": (HIDDEN, MLP),
    "up": (HIDDEN, MLP),
    "down": (MLP, HIDDEN),
}
AXES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}
ROLES = {
    "q": ("embed", "heads", None),
    "k": ("embed", "heads", None),
    "v": ("embed", "heads", None),
    "o": ("heads", None, "embed"),
    "gate": ("embed", "mlp"),
    "up": ("embed", "mlp"),
    "down": ("mlp", "embed"),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A mesh, and how the model runs on it."""

    sizes: dict[str, int]
    kind: AxisType
    scan: bool

    @property
    def mesh(self) -> Mesh:
        names = tuple(self.sizes)
        return jax.make_mesh(
            tuple(self.sizes.values()), names, (self.kind,) * len(names)
        )

    def spec(self, *roles: str | None) -> PartitionSpec:
        """The spec of an array with these roles; axes that the mesh lacks are whole."""
        known = {role: AXES[role] for role in AXES if AXES[role] in self.sizes}
        return P(*(known.get(role) if role else None for role in roles))

    @property
    def rows(self) -> Any:
        """What the batch is sharded over."""
        return tuple(n for n in ("data", "fsdp") if n in self.sizes) or None

    def specs(self) -> Any:
        """The specs of the params."""
        each = {name: self.spec(*roles) for name, roles in ROLES.items()}
        if self.scan:
            return {name: P(None, *spec) for name, spec in each.items()}
        return {f"layer_{i}": each for i in range(LAYERS)}


LAYOUTS = {
    "fsdp": {"fsdp": 8},
    "tensor": {"data": 2, "tensor": 4},
    "fsdp_tensor": {"fsdp": 4, "tensor": 2},
}
SETUPS = {
    f"{name}-{kind.name}-{'scan' if scan else 'unrolled'}": Setup(sizes, kind, scan)
    for name, sizes in LAYOUTS.items()
    for kind in (AxisType.Auto, AxisType.Explicit)
    for scan in (True, False)
}
each_setup = pytest.mark.parametrize("setup", SETUPS.values(), ids=list(SETUPS))


def block(p: Any, x: jax.Array, setup: Setup) -> jax.Array:
    """One layer; `x` is (batch, time, hidden)."""
    product = partial(_product, setup)
    normed = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
    q, k, v = (product("btd,dhk->bthk", normed, p[n], n, "heads", None) for n in "qkv")
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(HEAD)
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
    x = x + product("bthk,hkd->btd", mixed, p["o"], "o", None)
    gate, up = (product("btd,df->btf", x, p[n], n, "mlp") for n in ("gate", "up"))
    return x + product("btf,fd->btd", jax.nn.silu(gate) * up, p["down"], "down", None)


def _product(
    setup: Setup, spec: str, x: jax.Array, w: jax.Array, name: str, *out: str | None
) -> jax.Array:
    """A product whose result is sharded over its rows and by the roles of `out`."""
    placed = P(setup.rows, None, *setup.spec(*out))
    if setup.kind == AxisType.Auto:
        return lax.with_sharding_constraint(jnp.einsum(spec, x, w), placed)
    # On an Explicit mesh FSDP is spelled out: the kernel is gathered before its use.
    roles = (None if role == "embed" else role for role in ROLES[name])
    whole = jax.sharding.reshard(w, setup.spec(*roles))
    return jnp.einsum(spec, x, whole, out_sharding=placed)


def model(params: Any, x: jax.Array, setup: Setup) -> jax.Array:
    """The stack of blocks."""
    if setup.scan:
        return lax.scan(lambda h, p: (block(p, h, setup), None), x, params)[0]
    for i in range(LAYERS):
        x = block(params[f"layer_{i}"], x, setup)
    return x


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model on a mesh, its arguments and an adapter with `b` ≠ 0, all in place."""

    setup: Setup
    lora: jlora.Lora
    params: Any
    x: jax.Array
    adapter: Any
    placed: Any

    def compiled_grad(self) -> Any:
        """The gradient of the adapter, compiled."""

        def loss(adapter: Any, params: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(self.lora.apply(params, adapter, x) ** 2) / x.size

        out = (None, self.placed)
        step = jax.jit(jax.value_and_grad(loss), out_shardings=out)
        return step.lower(self.adapter, self.params, self.x).compile()

    def compiled_floor(self) -> Any:
        """The gradient of the input through the frozen base, compiled."""

        def loss(x: jax.Array, params: Any) -> jax.Array:
            return jnp.sum(model(params, x, self.setup) ** 2) / x.size

        step = jax.jit(jax.value_and_grad(loss))
        return step.lower(self.x, self.params).compile()

    def allowed(self) -> int:
        """The most values that a collective of the adapter may move."""
        factor = max(leaf.size for leaf in jax.tree.leaves(self.adapter))
        # The factors of three siblings, and their x·a, travel together.
        return max(factor, 3 * HIDDEN * RANK, 3 * BATCH * TIME * RANK)


def stacked() -> tuple[Any, Any, Any]:
    """Params and adapter with a leading layer axis, and the input, on the host."""
    key = iter(jax.random.split(jax.random.key(0), 99))
    draw = lambda shape: np.asarray(jax.random.normal(next(key), shape)) / 6
    params = {name: draw((LAYERS, *shape)) for name, shape in KERNELS.items()}
    return params, draw((BATCH, TIME, HIDDEN)), key


def unstack(adapter: Any) -> Any:
    """The adapter of the unrolled model from that of the scanned one."""
    layers = {}
    for i in range(LAYERS):
        for name, stack in adapter.items():
            in_, out = (
                tuple(k - 1 for k in g) for g in (stack.axes.in_, stack.axes.out)
            )
            own = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
            axes = KernelAxes((), in_, out)
            layers[f"layer_{i}/{name}"] = dataclasses.replace(own, axes=axes)
    return layers


CONFIG = jlora.LoraConfig(rank=RANK, alpha=2.0 * RANK)
ONE = Setup({"data": 1}, AxisType.Auto, scan=True)


@pytest.fixture(scope="module")
def truth() -> Any:
    """Stacked params, input and adapter, and value and gradients on one device."""
    params, x, key = stacked()
    with jax.set_mesh(ONE.mesh):
        lora = jlora.lora(partial(model, setup=ONE), CONFIG)
        adapter = randomized(lora.init(next(key), params, x), next(key))

        def loss(adapter: Any) -> jax.Array:
            out = model(jlora.merge(params, adapter), x, ONE)
            return jnp.sum(out**2) / x.size

        value, grads = jax.jit(jax.value_and_grad(loss))(adapter)
    return params, x, *jax.tree.map(np.asarray, (adapter, value, grads))


def make(setup: Setup, truth: Any, **policy: Any) -> Problem:
    """The problem on the mesh of `setup`, which must be set."""
    params, x, adapter, _, _ = truth
    if not setup.scan:
        take = lambda i: {name: w[i] for name, w in params.items()}
        params = {f"layer_{i}": take(i) for i in range(LAYERS)}
        adapter = unstack(adapter)
    on_mesh = lambda spec: NamedSharding(setup.mesh, spec)
    specs = jax.tree.map(on_mesh, setup.specs(), is_leaf=lambda n: isinstance(n, P))
    params = jax.device_put(params, specs)
    x = jax.device_put(x, on_mesh(P(setup.rows)))
    lora = jlora.lora(partial(model, setup=setup), CONFIG)
    abstract = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    placed = jlora.shardings(params, abstract, **policy)
    return Problem(setup, lora, params, x, jax.device_put(adapter, placed), placed)


POLICIES = {"inherit": {}, "replicate": {"replicate": True}, "spread": {"spread": True}}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@each_setup
@pytest.mark.slow
def test_only_factors_travel_besides_what_the_base_does(
    setup: Setup, policy: Any, truth: Any
) -> None:
    with jax.set_mesh(setup.mesh):
        problem = make(setup, truth, **policy)
        floor = collectives(problem.compiled_floor())
        step = problem.compiled_grad()
        value, grads = step(problem.adapter, problem.params, problem.x)
    parts = setup.sizes.get("tensor", 1)
    limit = problem.allowed()
    assert limit < min(map(np.prod, KERNELS.values())) // parts  # a kernel is seen
    extra = {k: n for k, n in (collectives(step) - floor).items() if k[1] > limit}
    assert not extra, f"not in the frozen floor {dict(floor)}: {extra}"
    assert jax.tree.map(lambda g: g.sharding, grads) == problem.placed
    *_, expected, wanted = truth
    wanted = wanted if setup.scan else unstack(wanted)
    assert_close(np.asarray(value), expected, VALUES["float32"])
    assert_close(jax.tree.map(np.asarray, grads), wanted, GRADIENTS["float32"])


@each_setup
def test_each_factor_is_made_where_it_lives(setup: Setup, truth: Any) -> None:
    """No device holds more of a sharded factor than its own part, not even its bits."""
    with jax.set_mesh(setup.mesh):
        problem = make(setup, truth)
        init = jax.jit(problem.lora.init, out_shardings=problem.placed)
        compiled = init.lower(jax.random.key(0), problem.params, problem.x).compile()
        made = compiled(jax.random.key(0), problem.params, problem.x)
        alone = problem.lora.init(jax.random.key(0), problem.params, problem.x)
    assert jax.tree.map(lambda leaf: leaf.sharding, made) == problem.placed
    assert not collectives(compiled)
    jax.tree.map(np.testing.assert_array_equal, made, alone)
    sharded = [m for m in jax.tree.leaves(made) if not m.is_fully_replicated]
    formed = {f"[{','.join(map(str, leaf.shape))}]" for leaf in sharded}
    assert not [text for text in formed if text in compiled.as_text()]


def test_a_formed_kernel_would_be_seen(truth: Any) -> None:
    """The measure itself: gradients through `W + ΔW` reduce values of kernel shape."""
    setup = SETUPS["fsdp-Auto-unrolled"]
    with jax.set_mesh(setup.mesh):
        problem = make(setup, truth)
        floor = collectives(problem.compiled_floor())

        def loss(adapter: Any, params: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(model(jlora.merge(params, adapter), x, setup) ** 2)

        step = jax.jit(jax.grad(loss))
        formed = step.lower(problem.adapter, problem.params, problem.x).compile()
    limit = problem.allowed()
    assert floor["all-gather", MLP * HIDDEN] >= 2 * LAYERS  # forward and dx
    assert [key for key in collectives(formed) - floor if key[1] > limit]


# --- the whole step under shard_map: the user's own collectives, jlora inside ---


MAPPED = {"up": P(None, "tensor"), "down": P("tensor", None)}


def megatron(params: Any, x: jax.Array, *, mapped: bool = True) -> jax.Array:
    """Columns, then rows with a sum over the devices; on pieces, or on whole arrays."""
    y = jnp.tanh(x @ params["up"]) @ params["down"]
    return lax.psum(y, "tensor") if mapped else y


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_factors_take_the_specs_of_their_kernel_under_shard_map(
    where: str, kind: AxisType, truth: Any, getkey
) -> None:
    """With the gradient taken inside of shard_map (summed over the data) or outside."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (kind, kind))
    shapes = {"up": (HIDDEN, MLP), "down": (MLP, HIDDEN)}
    params = {n: jax.random.normal(getkey(), s) / 9 for n, s in shapes.items()}
    x = jax.random.normal(getkey(), (10, HIDDEN))
    alone = jlora.lora(partial(megatron, mapped=False), CONFIG)
    adapter = randomized(alone.init(getkey(), params, x), getkey())
    placed = jlora.shardings(MAPPED, adapter, mesh=mesh)
    specs = jax.tree.map(lambda sharding: sharding.spec, placed)
    lora = jlora.lora(megatron, CONFIG)

    def loss(adapter: Any, params: Any, x: jax.Array) -> jax.Array:
        return lax.psum(jnp.sum(lora.apply(params, adapter, x) ** 2), "data")

    in_specs = (specs, MAPPED, P("data"))
    if where == "inside":
        step = jax.shard_map(
            jax.grad(loss), mesh=mesh, in_specs=in_specs, out_specs=specs
        )
    else:
        step = jax.grad(
            jax.shard_map(loss, mesh=mesh, in_specs=in_specs, out_specs=P())
        )
    expected = jax.grad(
        lambda adapter: jnp.sum(
            megatron(jlora.merge(params, adapter), x, mapped=False) ** 2
        )
    )(adapter)
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        on_mesh = {name: put(w, MAPPED[name]) for name, w in params.items()}
        args = jax.device_put(adapter, placed), on_mesh, put(x, P("data"))
        program = jax.make_jaxpr(step)(*args)
        grads = jax.jit(step)(*args)
    assert_close(jax.tree.map(np.asarray, grads), expected, GRADIENTS["float32"])
    pieces = [(HIDDEN, MLP // 4), (MLP // 4, HIDDEN)]
    assert_not_materialized(program, base_indices(*args, base=1), pieces)


@pytest.mark.parametrize("tokens", [8, 256, 4096])
@pytest.mark.parametrize(
    "layout", [("i", None), (None, "j"), ("i", "j")], ids=["fsdp", "tp", "both"]
)
def test_few_tokens_travel_where_the_base_lets_them(
    layout: tuple[Any, Any], tokens: int
) -> None:
    """A kernel that the base leaves in place, as for a few tokens, is not gathered.

    Nor is `x·a` summed over devices by itself where `x·W` is.
    """
    d, wide, rank = 512, 2048, 8
    mesh = jax.make_mesh((2, 4), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    place = lambda *spec: NamedSharding(mesh, P(*spec))
    params = {
        "up": placed((d, wide), place(*layout)),
        "down": placed((wide, d), place(*layout[::-1])),
    }
    x = placed((tokens, d), place("i"))
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    lora = jlora.lora(fn, jlora.LoraConfig(rank=rank, alpha=12.0))
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    adapter = at(adapter, jlora.shardings(params, adapter))
    base = collectives(compiled(fn, params, x))
    own = collectives(compiled(lora.apply, params, adapter, x))
    factors = 4 * (wide + d + tokens) * rank
    assert cost(own) <= 1.1 * cost(base) + factors, (own, base)
    if layout == (None, "j"):
        assert own == base
    sums = lambda moves: sum(n for (kind, _), n in moves.items() if "reduce" in kind)
    assert sums(own) <= max(sums(base), 2)  # one for each kernel at most

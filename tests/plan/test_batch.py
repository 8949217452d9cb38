"""`LoraConfig(batch=...)`: axes with factors of their own, though no program tells."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import check_gradients, check_half, make_case
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close, random_like, reference, weighted_sum
from use import ALPHA, RANK, Use
from uses_batch import BATCHED
from wrappers import WRAPPERS

import jlora
import jlora.checkpoint

pytestmark = pytest.mark.usefixtures("fast_compile")
HALF = jnp.bfloat16
NAMED = {use.name: (use, batch) for use, batch in BATCHED}
each_use = pytest.mark.parametrize(
    "use, batch", [pytest.param(*pair, id=pair[0].name) for pair in BATCHED]
)
OWN = jlora.KernelAxes((0,), (1,), (2,))
SHARED = jlora.KernelAxes((), (1,), (0, 2))


def dense(params: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("td,edf->tef", x, params["w"])


def ragged(params: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, params["w"], sizes)


def config(**settings: Any) -> jlora.LoraConfig:
    return jlora.LoraConfig("w", rank=RANK, alpha=ALPHA, **settings)


def experts(getkey: Any, axes: jlora.KernelAxes = OWN) -> tuple[Any, Any, jax.Array]:
    """Params, an adapter with these roles, and an input."""
    params = {"w": jax.random.normal(getkey(), (4, 5, 7))}
    a, b = (
        jax.random.normal(getkey(), shape)
        for shape in axes.factor_shapes((4, 5, 7), RANK)
    )
    adapter = {"w": jlora.LoraFactors(a, b, axes, ALPHA / RANK)}
    return params, adapter, jax.random.normal(getkey(), (3, 5))


def formed(params: Any, adapter: Any) -> Any:
    """Params with W + ΔW, by an einsum over the roles."""
    axes, letters = adapter["w"].axes, "edf"
    of = lambda which: "".join(letters[i] for i in which)
    spec = f"{of(axes.batch)}{of(axes.in_)}r,{of(axes.batch)}r{of(axes.out)}->edf"
    a, b = adapter["w"].a, adapter["w"].b
    change = jnp.einsum(spec, a, b, precision="highest")
    return {"w": params["w"] + ALPHA / RANK * change}


# --- evaluation ---


@each_use
def test_the_roles_are_those_that_the_config_names(use: Use, batch: Any, getkey):
    params, inputs = use.make_params(getkey(), HALF), use.make_inputs(getkey(), HALF)
    case = make_case(use, getkey, variant={"batch": batch})
    plan = case.lora.plan(params, *inputs)
    found = {t.path: (t.axes.batch, t.axes.in_, t.axes.out) for t in plan.targets}
    assert found == {path: kernel.axes for path, kernel in use.paths.items()}
    for path, kernel in use.paths.items():
        factors = case.adapter[path]
        shapes = (factors.a.shape, factors.b.shape)
        assert shapes == kernel.factor_shapes(RANK)


@each_use
@pytest.mark.parametrize("backward", ["custom", "autodiff"])
def test_values_and_gradients(use: Use, batch: Any, backward: Any, getkey):
    case = make_case(use, getkey, variant={"batch": batch}, backward=backward)
    check_gradients(case, case.lora.apply, reference(use))


@each_use
def test_bfloat16(use: Use, batch: Any, getkey):
    case = make_case(use, getkey, variant={"batch": batch}, x_dtype=HALF, w_dtype=HALF)
    check_half(case, jax.jit(case.lora.apply), reference(use))


@pytest.mark.parametrize("name", ["outputs", "inputs", "layers_of_a_scan", "gated"])
@pytest.mark.parametrize("x_dtype, w_dtype", [(HALF, jnp.float32), (HALF, HALF)])
def test_half_gradients(name: str, x_dtype: Any, w_dtype: Any, getkey):
    use, batch = NAMED[name]
    case = make_case(
        use, getkey, variant={"batch": batch}, x_dtype=x_dtype, w_dtype=w_dtype
    )
    check_gradients(case, case.lora.apply, reference(use))
    for entry in case.adapter.values():
        assert entry.a.dtype == jnp.float32


@pytest.mark.parametrize("name", ["outputs", "inputs", "gated"])
@pytest.mark.parametrize(
    "wrapper", [w for w in WRAPPERS if w.reverse], ids=lambda wrapper: wrapper.name
)
def test_inside_of_wrappers(name: str, wrapper: Any, getkey):
    use, batch = NAMED[name]
    fn = wrapper.wrap(use.model, 1)
    case = make_case(use, getkey, fn=fn, variant={"batch": batch})
    check_gradients(case, case.lora.apply, reference(use, fn))


@pytest.mark.parametrize(
    "name", ["outputs", "heads_in_the_middle", "two_axes", "layers_of_a_scan"]
)
def test_dora(name: str, getkey):
    use, batch = NAMED[name]
    case = make_case(use, getkey, variant={"batch": batch, "dora": True})
    check_gradients(case, case.lora.apply, reference(use))


def test_norms_of_experts_that_are_summed_fit_neither_side(getkey):
    use, batch = NAMED["inputs"]
    told = "batch 0, in 1, out 2, where the program has in 0 and 1, out 2.*DoRA"
    with pytest.raises(jlora.TargetError, match=told):
        make_case(use, getkey, variant={"batch": batch, "dora": True})


def test_second_derivatives_and_adapters_under_vmap(getkey):
    params, adapter, x = experts(getkey)
    lora = jlora.lora(dense, config(batch=0))
    applied = lambda adapter: jnp.tanh(lora.apply(params, adapter, x)).sum()
    wanted = lambda adapter: jnp.tanh(dense(formed(params, adapter), x)).sum()

    def curved(f: Any) -> Any:
        square = lambda adapter: sum(
            (g**2).sum() for g in jax.tree.leaves(jax.grad(f)(adapter))
        )
        return jax.jit(jax.grad(square))(adapter)

    assert_close(curved(applied), curved(wanted), 1e-4)
    several = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), adapter)
    found = jax.vmap(lambda adapter: lora.apply(params, adapter, x))(several)
    each = [
        dense(formed(params, jax.tree.map(lambda v, i=i: v[i], several)), x)
        for i in range(2)
    ]
    assert_close(found, jnp.stack(each), 1e-5)
    doubled = jax.tree.map(lambda v: 2 * v, adapter)
    stacked, index = jlora.stack([adapter, doubled]), jnp.array([1, 0, 1])
    mixed = lora.apply_mixed(params, stacked, index, x)
    assert_close(mixed, jnp.stack([each[i][j] for j, i in enumerate(index)]), 1e-5)


# --- meshes ---


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    devices = jax.devices()[:4]
    return jax.make_mesh((2, 2), ("data", "model"), (kind, kind), devices=devices)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "spec", [P("model"), P(None, "model"), P(None, None, "model"), P(), P("data")]
)
@pytest.mark.parametrize("equation", ["td,edf->tef", "ted,edf->tf"])
def test_on_meshes(equation: str, spec: P, kind: AxisType, getkey):
    shape = (8, 6) if equation.startswith("td") else (8, 4, 6)
    rows = P("data") if "data" not in spec else P()
    out = P() if kind == AxisType.Explicit else None
    product = lambda params, x, out: jnp.einsum(
        equation, x, params["w"], out_sharding=out
    )
    params = {"w": jax.random.normal(getkey(), (4, 6, 10))}
    x = jax.random.normal(getkey(), shape)
    lora = jlora.lora(lambda p, x: product(p, x, out), config(batch=0))
    a, b = (jax.random.normal(getkey(), s) for s in OWN.factor_shapes((4, 6, 10), RANK))
    adapter = {"w": jlora.LoraFactors(a, b, OWN, ALPHA / RANK)}
    plain = lambda params, x: product(params, x, None)
    weights = random_like(jax.eval_shape(plain, params, x), 0)

    def grads(f: Any, *args: Any) -> Any:
        def loss(adapter: Any, params: Any, x: Any, weights: Any) -> Any:
            out = f(params, adapter, x)
            return weighted_sum(out, weights), out

        return jax.jit(jax.grad(loss, (0, 2), has_aux=True))(*args)

    expected = grads(
        lambda p, a, x: plain(formed(p, a), x), adapter, params, x, weights
    )
    mesh = mesh_of(kind)
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        params, x, weights = (
            {"w": put(params["w"], spec)},
            put(x, rows),
            put(weights, P()),
        )
        places = jlora.shardings(params, adapter)
        found = grads(lora.apply, jax.device_put(adapter, places), params, x, weights)
    entries = lambda spec: (*spec, None, None)[:2]
    assert entries(places["w"].a.spec) == entries(spec)
    assert_close(found, expected, 1e-4)


# --- what else follows from the roles ---


def test_the_plan_says_it(getkey):
    params, _, x = experts(getkey)
    lora = jlora.lora(dense, config(batch=-3), contraction="merged")
    plan = lora.plan(params, x)
    assert "batch 0 in 1 out 2 (batch=0 by config)" in str(plan)
    # A branch of its own, which is never merged into the kernel.
    assert [use.form for use in plan.targets[0].uses] == ["separate"]
    assert plan.trainable == 4 * RANK * (5 + 7)
    # x·a is of 3×4×5 multiplications, and h·b of 3×4×7, for each rank.
    assert plan.targets[0].uses[0].factor_flops == 6 * 3 * 4 * (5 + 7)
    assert (
        "config" not in str(jlora.lora(dense, config()).plan(params, x)).split("\n")[2]
    )


def test_experts_start_apart_and_change_nothing(getkey):
    params, _, x = experts(getkey)
    lora = jlora.lora(dense, config(batch=0))
    adapter = lora.init(getkey(), params, x)
    assert_close(lora.apply(params, adapter, x), dense(params, x), 0.0)
    a = np.asarray(adapter["w"].a)
    assert all(not np.allclose(a[0], other) for other in a[1:])


def test_dropout_is_on_the_shared_input(getkey):
    """With `a` and `b` the identity the branch gives its own input."""
    params, x = {"w": jnp.zeros((3, 6, 6))}, jax.random.normal(getkey(), (50, 6))
    own = jlora.LoraConfig("w", rank=6, alpha=6.0, dropout=0.25, batch=0)
    for equation, where in (("td,edf->tef", None), ("ted,edf->tf", 1)):
        model = lambda p, x, e=equation: jnp.einsum(e, x, p["w"])
        given = x if where is None else jnp.stack([x, 0 * x, 0 * x], 1)
        lora = jlora.lora(model, own)
        eye = lambda v: jnp.broadcast_to(jnp.eye(6), v.shape)
        adapter = jax.tree.map(eye, lora.init(getkey(), params, given))
        found = lora.apply(params, adapter, given, lora_dropout_key=jax.random.key(5))
        found = found[:, 0] if where is None else found
        kept = np.isclose(found, x / 0.75, rtol=1e-5)
        assert np.all(kept | (np.asarray(found) == 0))
        assert abs(kept.mean() - 0.75) < 0.1


def test_merge_delta_and_algebra(getkey):
    params, adapter, x = experts(getkey)
    lora = jlora.lora(dense, config(batch=0))
    wanted = formed(params, adapter)
    assert_close(jlora.merge(params, adapter), wanted, 1e-6)
    assert_close(jlora.delta(adapter["w"]), wanted["w"] - params["w"], 1e-5)
    other = jax.tree.map(lambda v: 0.5 * v[::-1], adapter)
    both = jlora.add(adapter, other)
    change = jlora.delta(adapter["w"]) + jlora.delta(other["w"])
    assert_close(jlora.delta(both["w"]), change, 1e-5)
    assert_close(
        lora.apply(params, both, x), dense({"w": params["w"] + change}, x), 1e-5
    )
    taken = jlora.take(jlora.stack([adapter, other]), 1)
    assert taken["w"].axes == OWN
    assert_close(taken, other, 0.0)


def test_a_checkpoint_keeps_it(getkey, tmp_path: Path):
    params, adapter, x = experts(getkey)
    own = config(batch=(-3,))
    jlora.checkpoint.save(tmp_path / "one", adapter, config=own, base=params)
    record = jlora.checkpoint.describe(tmp_path / "one")
    assert record.config == own and record.config.batch == (-3,)
    found = jlora.checkpoint.restore(tmp_path / "one", base=params)
    assert found["w"].axes == OWN
    lora = jlora.lora(dense, record.config)
    assert_close(lora.apply(params, found, x), dense(formed(params, adapter), x), 1e-5)


def test_inputs_of_experts_are_their_own(getkey):
    params, _, x = experts(getkey)
    stats = jlora.lora(dense, config(batch=0)).inputs(params, x)["w"]
    assert_close(stats.moment, jnp.broadcast_to(x.T @ x, (4, 5, 5)), 1e-5)
    assert stats.rows.tolist() == [3, 3, 3, 3]
    summed = lambda p, x: jnp.einsum("ted,edf->tf", x, p["w"])
    x = jax.random.normal(getkey(), (3, 4, 5))
    lora = jlora.lora(summed, config(batch=0))
    stats = lora.inputs(params, x)["w"]
    assert_close(stats.moment, jnp.einsum("tei,tej->eij", x, x), 1e-5)
    assert stats.rows.tolist() == [3, 3, 3, 3]
    # The transposed use has no inputs of the kernel.
    turned = lambda p, y: jnp.einsum("tef,edf->td", y, p["w"])
    y = jax.random.normal(getkey(), (3, 4, 7))
    lora = jlora.lora(
        lambda p, x, y: dense(p, x).sum() + turned(p, y).sum(), config(batch=0)
    )
    stats = lora.inputs(params, x[:, 0], y)["w"]
    assert_close(stats.moment, jnp.broadcast_to(x[:, 0].T @ x[:, 0], (4, 5, 5)), 1e-5)


# --- adapters with other roles than the program ---


@pytest.mark.parametrize(
    "axes", [OWN, SHARED, jlora.KernelAxes((), (0, 1), (2,))], ids=str
)
@pytest.mark.parametrize("dora", [False, True])
def test_any_roles_in_a_ragged_program(axes: Any, dora: bool, getkey):
    params, adapter, _ = experts(getkey, axes)
    x, sizes = jax.random.normal(getkey(), (9, 5)), jnp.array([3, 0, 4, 2])
    wanted = formed(params, adapter)
    if dora:
        keep = axes.in_
        norm = jnp.sqrt((wanted["w"] ** 2).sum(keep, keepdims=True))
        magnitude = 1.5 + jax.random.uniform(getkey(), axes.magnitude_shape((4, 5, 7)))
        scale = jnp.expand_dims(magnitude, keep) / norm
        adapter["w"] = dataclasses.replace(adapter["w"], magnitude=magnitude)
        wanted = {"w": wanted["w"] * jax.lax.stop_gradient(scale)}
    lora = jlora.lora(ragged, config())
    found = lora.apply(params, adapter, x, sizes)
    assert_close(found, ragged(wanted, x, sizes), 1e-5)
    if dora:
        return
    loss = lambda f: lambda adapter, x: (f(adapter, x) ** 2).sum()
    applied = loss(lambda adapter, x: lora.apply(params, adapter, x, sizes))
    plain = loss(lambda adapter, x: ragged(formed(params, adapter), x, sizes))
    differentiate = lambda f: jax.jit(jax.grad(f, (0, 1)))(adapter, x)
    assert_close(differentiate(applied), differentiate(plain), 1e-4)


@pytest.mark.parametrize("axes", [OWN, SHARED], ids=str)
def test_any_roles_in_a_dense_program(axes: Any, getkey):
    params, adapter, x = experts(getkey, axes)
    for own in (config(), config(batch=0)):
        found = jlora.lora(dense, own).apply(params, adapter, x)
        assert_close(found, dense(formed(params, adapter), x), 1e-5)


def joined(params: Any, x: jax.Array) -> jax.Array:
    """One product with all experts side by side: a batch axis cannot be joined."""
    return x @ params["w"].transpose(1, 0, 2).reshape(5, 28)


def test_roles_that_cannot_be_evaluated_are_told(getkey):
    params, adapter, x = experts(getkey)
    told = (
        r"'w' \(4, 5, 7\): factors with the roles batch 0, in 1, out 2, where the "
        r"program has in 1, out 0 and 2, cannot be evaluated in reshape at "
        r"test_batch.py:\d+"
    )
    lora = jlora.lora(joined, config())
    with pytest.raises(jlora.AdapterError, match=told):
        lora.apply(params, adapter, x)
    with pytest.raises(jlora.TargetError, match=f"`LoraConfig.batch`.*\n{told}"):
        jlora.lora(joined, config(batch=0)).plan(params, x)
    allowed = jlora.lora(joined, config(), materialize="allow")
    found = allowed.apply(params, adapter, x)
    assert_close(found, joined(formed(params, adapter), x), 1e-5)
    # Where no roles would do it is the operation that has no rule.
    hidden = jlora.lora(
        lambda p, x: dense(p, x).sum() + jnp.tanh(p["w"]).sum(), config()
    )
    with pytest.raises(jlora.MaterializationError, match="tanh"):
        hidden.apply(params, adapter, x)


def test_turned_roles_in_a_ragged_program_are_told(getkey):
    axes = jlora.KernelAxes((2,), (1,), (0,))
    params, adapter, _ = experts(getkey, axes)
    x, sizes = jax.random.normal(getkey(), (9, 5)), jnp.array([3, 0, 4, 2])
    told = "batch 2, in 1, out 0, where the program has batch 0, in 1, out 2"
    with pytest.raises(jlora.AdapterError, match=f"{told}.*ragged_dot"):
        jlora.lora(ragged, config()).apply(params, adapter, x, sizes)


# --- configs ---


@pytest.mark.parametrize(
    "batch, told",
    [
        (1, "no input axis but axis 1, along which the program contracts"),
        ((0, 2), r"no output axis but the axes \(0, 2\), which the program keeps"),
        ((0, 1), "no input axis but axis 1, along which the program contracts"),
        (3, r"has 3 axes, and `batch` names \[3\]"),
        (-4, r"has 3 axes, and `batch` names \[-4\]"),
    ],
)
def test_axes_that_are_none_of_the_kernel(batch: Any, told: str, getkey):
    params, _, x = experts(getkey)
    with pytest.raises(jlora.TargetError, match=rf"'w' \(4, 5, 7\) .*{told}") as error:
        jlora.lora(dense, config(batch=batch)).plan(params, x)
    assert str(error.value).count("'w'") == 1


def test_every_kernel_that_a_config_adapts_needs_the_axis(getkey):
    params, _, x = experts(getkey)
    params |= {"head": jnp.ones((7, 3)), "gate": jnp.ones((5, 6))}

    def model(params: Any, x: jax.Array) -> jax.Array:
        return (dense(params, x) @ params["head"]).sum() + (x @ params["gate"]).sum()

    with pytest.raises(jlora.TargetError) as error:
        jlora.lora(model, jlora.LoraConfig(rank=2, batch=0)).plan(params, x)
    assert re.findall(r"^'(\w+)'", str(error.value), re.MULTILINE) == ["gate", "head"]
    configs = [config(batch=0), jlora.LoraConfig(rank=2)]
    plan = jlora.lora(model, configs).plan(params, x)
    assert {t.path: t.axes.batch for t in plan.targets} == {
        "gate": (),
        "head": (),
        "w": (0,),
    }


@pytest.mark.parametrize(
    "batch, kind",
    [("0", TypeError), (True, TypeError), (0.0, TypeError), ([1.5], TypeError),
     ((), ValueError), ((1, 1), ValueError)],
)  # fmt: skip
def test_what_is_no_axis_is_an_error(batch: Any, kind: Any):
    with pytest.raises(kind, match=r"`LoraConfig\.batch`"):
        config(batch=batch)
    with pytest.raises(ValueError, match=r"`LoraConfig\.batch` goes with"):
        config(batch=0, full=True)
    with pytest.raises(ValueError, match=r"`LoraConfig\.batch` goes with"):
        config(batch=0, rows=[1])


def test_configs_are_plain_values():
    for batch in (0, [0, -2], (1,), None):
        own = config(batch=batch)
        assert own == jlora.LoraConfig.from_dict(own.to_dict())
        assert hash(own) == hash(jlora.LoraConfig.from_dict(own.to_dict()))
    assert config(batch=0) == config(batch=[0]) != config()
    assert config(batch=0).batch_axes == (0,) and config().batch_axes == ()


def test_values_of_a_linen_ensemble(getkey):
    nn = pytest.importorskip("flax.linen")

    class Member(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3, name="down")(nn.gelu(nn.Dense(7, name="up")(x)))

    ensemble = nn.vmap(
        Member,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=4,
    )()
    x = jax.random.normal(getkey(), (6, 5))
    variables = ensemble.init(getkey(), x)
    own = jlora.LoraConfig("(up|down)/kernel", rank=RANK, alpha=ALPHA, batch=0)
    lora = jlora.lora(ensemble.apply, own)
    adapter = lora.init(getkey(), variables, x)
    draw = lambda v: jax.random.normal(getkey(), v.shape)
    adapter = jax.tree.map(draw, adapter)
    assert {p: e.axes for p, e in adapter.items()} == {
        "params/up/kernel": OWN,
        "params/down/kernel": OWN,
    }
    change = lambda e: ALPHA / RANK * jnp.einsum("eir,ero->eio", e.a, e.b)
    layers = {
        name: {
            **layer,
            "kernel": layer["kernel"] + change(adapter[f"params/{name}/kernel"]),
        }
        for name, layer in variables["params"].items()
    }
    member = lambda layers: Member().apply({"params": layers}, x)
    found = lora.apply(variables, adapter, x)
    assert_close(found, jax.vmap(member)(layers), 1e-5)

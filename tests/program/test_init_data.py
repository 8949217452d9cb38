"""`lora.inputs` against Jacobians and captured inputs; EVA, CorDA and LoRA-GA on it.

A function that is linear in its kernel has `∂y/∂W[i, o] = x[i]` for each of its rows:
so `Σ_y J[y, i, o]·J[y, j, o]`, for any `o`, is the second moment of the inputs,
whatever the operation. Where a model is not linear its inputs are computed by hand.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import adapt
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from use import ALPHA, Use
from uses import USES

import jlora
from jlora._params.input_stats import projection

Key = Callable[[], jax.Array]
Tree = dict[str, Any]
Array = np.ndarray
NAMED = {use.name: use for use in USES}


@pytest.fixture(autouse=True)
def _fast(fast_compile: None) -> None:
    """Much is compiled here and little run."""


# the statistics, use by use

LINEAR = """
matmul_many_axes matmul_left_vector dense_general_two_in_two_out
dense_general_batch_in_the_middle dense_general_two_batch einsum_in_axes_swapped
cond_both_branches argnum
reshape_splits_both reshape_transpose_reshape slice_in scale_negative
scale_number reverse_in
lookup_two_axes lookup_clip lookup_fill_nan lookup_negative one_hot
conv_1d_ncw conv_2d_strided conv_2d_odd_layout conv_2d_lhs_dilation conv_2d_groups
conv_2d_depthwise conv_transpose_kernel
experts_einsum experts_vmap_second_axis index_traced
""".split()
# How many groups of channels have a patch of their own as input, pooled in one moment.
GROUPS = {"conv_2d_groups": 3, "conv_2d_depthwise": 5}


def moments_by_jacobian(use: Use, params: Tree, inputs: Any) -> Array:
    """The second moments of the only kernel of a use, `(slices, in, in)`."""
    ((name, kernel),) = use.kernels.items()

    def outputs(w: jax.Array) -> jax.Array:
        leaves = jax.tree.leaves(use.fn({**params["layer"], name: w}, *inputs))
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

    w = params["layer"][name]
    jacobian = np.nan_to_num(np.asarray(jax.jit(jax.jacfwd(outputs))(w), np.float64))
    batch, in_, out = kernel.axes
    order = [0, *(1 + i for i in (*batch, *in_, *out))]
    slices = int(np.prod([w.shape[i] for i in batch], initial=1))
    n_in = int(np.prod([w.shape[i] for i in in_]))
    jacobian = jacobian.transpose(order).reshape(len(jacobian), slices, n_in, -1)
    each = np.einsum("ybio,ybjo->obij", jacobian, jacobian)
    if use.name not in GROUPS:
        alike = np.broadcast_to(each[:1], each.shape)
        np.testing.assert_allclose(each, alike, atol=1e-4)
    return GROUPS.get(use.name, 1) * each.mean(0)


@pytest.mark.parametrize(
    "name",
    [
        name if i % 2 else pytest.param(name, marks=pytest.mark.slow)
        for i, name in enumerate(LINEAR)
    ],
)
def test_moments_are_those_of_the_jacobian(name: str, getkey: Key) -> None:
    use = NAMED[name]
    params = use.make_params(getkey(), jnp.float32)
    inputs = use.make_inputs(getkey(), jnp.float32)
    lora = adapt(use, use.model)
    ((path, _),) = use.paths.items()
    stats = gather(lora)(*use.arguments(params, inputs))[path]
    wanted = moments_by_jacobian(use, params, inputs)
    # Sums of hundreds of squares in float32: a few units in the last place.
    found = stats.moment.reshape(wanted.shape)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-4)


# the statistics of models that are not linear, by hand


def adapted(fn: Any, *targets: str, rank: int = 2, **settings: Any) -> jlora.Lora:
    """A function with some kernels adapted."""
    config = jlora.LoraConfig(targets or None, rank=rank, alpha=ALPHA)
    return jlora.lora(fn, config, **settings)


def gather(lora: jlora.Lora, sketch: int | None = None) -> Any:
    """Compiles `lora.inputs`."""
    return jax.jit(functools.partial(lora.inputs, lora_sketch=sketch))


def moment(*rows: Any) -> Array:
    """The second moment of some inputs, in float64."""
    flat = [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in rows]
    return sum(x.T @ x for x in flat)


def close(actual: Any, wanted: Any) -> None:
    """Equal within float32."""
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


def stack_inputs(params: Tree, h: Any) -> tuple[list[Any], list[Any]]:
    """What goes into both kernels of each layer of `_stack`."""
    ups, downs = [], []
    for up, down in zip(params["up"], params["down"], strict=True):
        inner = jnp.tanh(h @ up)
        ups.append(h)
        downs.append(inner)
        h = h + inner @ down
    return ups, downs


def _stack(params: Tree, h: jax.Array, remat: bool = True) -> jax.Array:
    """Scanned layers in a remat; its output has no derivative."""

    def layer(h: jax.Array, pair: Tree) -> tuple[jax.Array, None]:
        return h + jnp.tanh(h @ pair["up"]) @ pair["down"], None

    body = jax.checkpoint(layer) if remat else layer
    h, _ = jax.lax.scan(body, h, {k: params[k] for k in ("up", "down")})
    return jnp.argmax(jax.lax.stop_gradient(h), axis=-1)


@pytest.fixture
def stack(getkey: Key) -> tuple[Tree, jax.Array]:
    """Params of three layers and an input."""
    draw = lambda *shape: 0.5 * jax.random.normal(getkey(), shape)
    return {"up": draw(3, 5, 7), "down": draw(3, 7, 5)}, draw(2, 4, 5)


def test_scanned_layers_of_a_model_without_a_derivative(stack: Any) -> None:
    params, x = stack
    stats = gather(adapted(_stack))(params, x)
    ups, downs = stack_inputs(params, x)
    for i in range(3):
        close(stats["up"].moment[i], moment(ups[i]))
        close(stats["down"].moment[i], moment(downs[i]))
    assert stats["up"].rows.tolist() == [8, 8, 8] == stats["down"].rows.tolist()


def test_shared_kernels_add_up_over_steps_and_uses(getkey: Key) -> None:
    """A recurrent kernel in a scan, in a while loop with a traced end, and outside."""
    w, u = (0.5 * jax.random.normal(getkey(), s) for s in ((5, 5), (5, 3)))
    x, steps = jax.random.normal(getkey(), (4, 2, 5)), 3

    def fn(p: Tree, x: jax.Array, steps: Any) -> jax.Array:
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ p["w"]), None), 0 * x[0], x)
        h = jax.lax.fori_loop(0, steps, lambda _, h: jnp.tanh(h @ p["w"]), h)
        h @ p["w"]  # whose result nobody needs
        return jax.lax.cond(
            h.sum() > 1e6, lambda h: h @ p["u"], lambda h: (h @ p["w"]) @ p["u"], h
        )

    stats = gather(adapted(fn))({"w": w, "u": u}, x, steps)
    h, inputs = 0 * x[0], []
    for one in x:
        inputs.append(h)
        h = jnp.tanh(one + h @ w)
    for _ in range(steps):
        inputs.append(h)
        h = jnp.tanh(h @ w)
    inputs.append(h)
    close(stats["w"].moment, moment(*inputs))
    assert int(stats["w"].rows) == 2 * len(inputs)
    close(stats["u"].moment, moment(h @ w))
    assert int(stats["u"].rows) == 2


def test_a_tied_table_counts_its_lookups_alone(getkey: Key) -> None:
    table = jax.random.normal(getkey(), (6, 4))
    fn = lambda p, ids: jnp.tanh(p["table"][ids]) @ p["table"].T
    ids = jnp.array([[1, 5, 1], [0, 1, 5]])
    stats = gather(adapted(fn, "table"))({"table": table}, ids)["table"]
    close(stats.moment, np.diag([1, 3, 0, 0, 0, 2]))
    assert int(stats.rows) == 6


def test_rows_of_convolutions_experts_and_slices(getkey: Key) -> None:
    def fn(p: Tree, x: jax.Array, sizes: jax.Array) -> Any:
        image = x[:, :, None] * jnp.ones((1, 1, 2))
        numbers = ("NWC", "WIO", "NWC")
        conv = lambda w: jax.lax.conv_general_dilated(
            image, w, (1,), "VALID", dimension_numbers=numbers
        )
        half = x[:, :2] @ (0.5 * p["halved"])[:2]
        return conv(p["conv"]), half, jax.lax.ragged_dot(x, p["experts"], sizes)

    shapes = {"conv": (3, 2, 7), "halved": (5, 7), "experts": (3, 5, 7)}
    params = {k: jax.random.normal(getkey(), s) for k, s in shapes.items()}
    x, sizes = jax.random.normal(getkey(), (6, 5)), jnp.array([2, 0, 3])
    stats = gather(adapted(fn))(params, x, sizes)
    assert int(stats["conv"].rows) == 6 * 3
    assert stats["experts"].rows.tolist() == [2, 0, 3]
    close(stats["experts"].moment[2], moment(x[2:5]))
    # Half of the input's size enters the kernel, and three channels are not used.
    assert int(stats["halved"].rows) == 6
    wanted = np.zeros((5, 5))
    wanted[:2, :2] = moment(x[:, :2] / 2)
    close(stats["halved"].moment, wanted)


def test_moments_of_bfloat16_inputs_are_float32(getkey: Key) -> None:
    x = jax.random.normal(getkey(), (300, 5), jnp.bfloat16)
    params = {"w": jnp.ones((5, 7), jnp.bfloat16)}
    stats = gather(adapted(lambda p, x: x @ p["w"]))(params, x)["w"]
    assert stats.moment.dtype == jnp.float32
    close(stats.moment, moment(x))


def test_batches_are_added(stack: Any) -> None:
    params, x = stack
    inputs = gather(adapted(_stack))
    parts = [inputs(params, half) for half in (x[:1], x[1:])]
    added, whole = jax.tree.map(jnp.add, *parts), inputs(params, x)
    jax.tree.map(close, added, whole)


def test_a_sketch_is_the_moment_times_a_fixed_projection(stack: Any) -> None:
    params, x = stack
    lora = adapted(_stack)
    whole, sketch = gather(lora)(params, x), gather(lora, 4)(params, x)
    for path, size in (("up", 5), ("down", 7)):
        assert sketch[path].moment.shape == (3, size, 4)
        omega = projection(path, size, 4)
        close(omega.T @ omega, np.eye(4))
        close(whole[path].moment @ omega, sketch[path].moment)
        assert (sketch[path].rows == whole[path].rows).all()
    assert gather(lora, 9)(params, x)["up"].moment.shape == (3, 5, 5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh_the_sums_are_reduced(kind: Any, stack: Any) -> None:
    params, x = stack
    params = {"up": params["up"][:, :4, :6], "down": params["down"][:, :6, :4]}
    x = x.reshape(8, 5)[:, :4]
    mesh = jax.make_mesh((4, 2), ("data", "model"), (kind, kind))
    lora = adapted(functools.partial(_loop, auto=kind == AxisType.Auto))
    put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))
    with jax.set_mesh(mesh):
        placed = {
            "up": put(params["up"], None, None, "model"),
            "down": put(params["down"], None, "model"),
        }
        stats = gather(lora)(placed, put(x, "data"))
    wanted = gather(adapted(_loop))(params, x)
    jax.tree.map(close, jax.device_get(stats), wanted)


def _loop(params: Tree, h: jax.Array, auto: bool = True) -> jax.Array:
    """Scanned layers, with the sums of an Explicit mesh."""
    out = None if auto else P("data")

    def layer(h: jax.Array, pair: Tree) -> tuple[jax.Array, None]:
        inner = jnp.tanh(h @ pair["up"])
        return h + jnp.einsum("bi,io->bo", inner, pair["down"], out_sharding=out), None

    return jax.lax.scan(layer, h, params)[0]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("check", [True, False])
def test_inside_of_a_shard_map(check: bool, kind: Any, getkey: Key) -> None:
    """Rows over one axis of the mesh, the outputs of one kernel over the other."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), (kind,) * 2)
    fn = jax.shard_map(
        lambda p, x: (x @ p["w"], x @ p["v"]),
        mesh=mesh,
        in_specs=({"w": P(None, "model"), "v": P()}, P("data")),
        out_specs=(P("data", "model"), P("data")),
        check_vma=check,
    )
    x, params = jax.random.normal(getkey(), (6, 5)), {"w": jnp.ones((5, 4))}
    params["v"] = jnp.ones((5, 3))
    lora = adapted(fn)
    put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))
    placed = {"w": put(params["w"], None, "model"), "v": put(params["v"])}
    with jax.set_mesh(mesh):
        if not check:
            with pytest.raises(jlora.UnsupportedFeatureError, match="check_vma=False"):
                gather(lora)(placed, put(x, "data"))
            return
        found = jax.device_get(gather(lora)(placed, put(x, "data")))
    for stats in found.values():
        close(stats.moment, moment(x))
        assert int(stats.rows) == 6


# EVA


def spans(one: Any, other: Any) -> None:
    """Both matrices have the same orthonormal column space."""
    one, other = (np.asarray(v, np.float64) for v in (one, other))
    close(one.T @ one, np.eye(one.shape[1]))
    np.testing.assert_allclose(one @ one.T, other @ other.T, atol=1e-4)


def test_eva_spans_the_top_singular_vectors_of_the_inputs(stack: Any) -> None:
    params, x = stack
    lora = adapted(_stack)
    adapter = lora.init(jax.random.key(0), params, x)
    new = jlora.eva(adapter, gather(lora)(params, x), rho=1)
    for path, inputs in zip(("up", "down"), stack_inputs(params, x), strict=True):
        assert not new[path].b.any() and new[path].scaling == adapter[path].scaling
        for i, rows in enumerate(inputs):
            _, _, vt = np.linalg.svd(np.asarray(rows).reshape(8, -1))
            spans(new[path].a[i], vt[:2].T)


def test_eva_from_a_sketch_is_nearly_the_same(getkey: Key) -> None:
    scales = 2.0 ** -jnp.arange(20)
    x = jax.random.normal(getkey(), (60, 20)) * scales[None]
    params = {"w": jnp.ones((20, 9))}
    lora = adapted(lambda p, x: x @ p["w"], rank=3)
    adapter = lora.init(getkey(), params, x)
    sketched = jlora.eva(adapter, gather(lora, 12)(params, x), rho=1)
    _, _, vt = np.linalg.svd(np.asarray(x))
    spans(sketched["w"].a, vt[:3].T)


def test_eva_shares_the_budget_by_explained_variance(getkey: Key) -> None:
    """The input of one kernel has one direction, that of the other many."""
    thin = jax.random.normal(getkey(), (9, 1)) @ jax.random.normal(getkey(), (1, 6))
    wide = jax.random.normal(getkey(), (9, 6))
    fn = lambda p, x, y: (x @ p["thin"], y @ p["wide"])
    params = {"thin": jnp.ones((6, 8)), "wide": jnp.ones((6, 8))}
    lora = adapted(fn, rank=3)
    adapter = lora.init(getkey(), params, thin, wide)
    stats = gather(lora)(params, thin, wide)
    ranks = lambda rho: {
        p: e.rank for p, e in jlora.eva(adapter, stats, rho=rho).items()
    }
    assert ranks(1) == {"thin": 3, "wide": 3}
    assert ranks(5 / 3) == {"thin": 1, "wide": 5}
    stats["thin"] = jax.tree.map(jnp.zeros_like, stats["thin"])
    assert ranks(2) == {"wide": 6}
    new = jlora.eva(adapter, stats, rho=2)
    close(lora.apply(params, new, thin, wide)[1], wide @ params["wide"])


def test_the_budget_of_a_stack_is_that_of_its_slices(getkey: Key) -> None:
    fn = lambda p, x, y: (jnp.einsum("li,lio->lo", x, p["stack"]), y @ p["one"])
    params = {"stack": jnp.ones((4, 6, 8)), "one": jnp.ones((6, 8))}
    lora = adapted(fn, rank=2)
    x, y = jnp.ones((4, 6)), jax.random.normal(getkey(), (9, 6))
    adapter = lora.init(getkey(), params, x, y)
    new = jlora.eva(adapter, gather(lora)(params, x, y), rho=2)
    assert new["one"].rank == 4 and new["stack"].rank == 1
    total = lambda adapter: 4 * adapter["stack"].rank + adapter["one"].rank
    assert total(new) <= total(adapter)


# CorDA


@pytest.mark.parametrize("mode", ["knowledge", "instruction"])
def test_corda_is_its_formula_and_moves_the_base(mode: Any, stack: Any) -> None:
    params, x = stack
    fn = lambda p, x: _loop(p, x.reshape(8, 5))
    lora = adapted(fn)
    adapter = lora.init(jax.random.key(0), params, x)
    stats = gather(lora)(params, x)
    rest, new = jlora.corda(params, adapter, stats, mode=mode)
    for path in ("up", "down"):
        for i in range(3):
            c = np.asarray(stats[path].moment[i], np.float64)
            c += 0.01 * np.trace(c) / len(c) * np.eye(len(c))
            u, s, vt = np.linalg.svd(c @ params[path][i], full_matrices=False)
            part = slice(None, 2) if mode == "instruction" else slice(-2, None)
            low = np.linalg.solve(c, (u[:, part] * s[part]) @ vt[part])
            got = jlora.delta(new[path])[i]
            np.testing.assert_allclose(got, low, atol=1e-4)
    np.testing.assert_allclose(lora.apply(rest, new, x), fn(params, x), atol=1e-4)
    assert (rest["up"] != params["up"]).any()


# LoRA-GA


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_is_its_formula_and_moves_the_base(direction: Any, stack: Any) -> None:
    params, x = stack
    fn = lambda p, x: _loop(p, x.reshape(8, 5))
    lora = adapted(fn)
    adapter = lora.init(jax.random.key(0), params, x)
    grads = jax.jit(jax.grad(lambda p: (fn(p, x) ** 2).mean()))(params)
    rest, new = jlora.lora_ga(params, adapter, grads, direction=direction, gamma=25.0)
    order = {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1])}
    of_a, of_b = order.get(direction, ([1, 3], [0, 2]))
    for path in ("up", "down"):
        size = params[path].shape[-1] ** 0.25 / 5
        for i in range(3):
            u, _, vt = np.linalg.svd(np.asarray(grads[path][i], np.float64))
            a, b = np.asarray(new[path].a[i]) / size, np.asarray(new[path].b[i]) / size
            overlap = np.abs(np.sum(a * u[:, of_a], axis=0))
            np.testing.assert_allclose(overlap, 1, atol=1e-3)
            overlap = np.abs(np.sum(b * vt[of_b], axis=1))
            np.testing.assert_allclose(overlap, 1, atol=1e-3)
    np.testing.assert_allclose(lora.apply(rest, new, x), fn(params, x), atol=1e-4)
    assert (rest["up"] != params["up"]).any()


# errors


def test_what_does_not_fit_is_named(stack: Any) -> None:
    params, x = stack
    lora = adapted(_stack)
    adapter, stats = lora.init(jax.random.key(0), params, x), gather(lora)(params, x)
    with pytest.raises(jlora.AdapterError, match="'down' has no statistics"):
        jlora.eva(adapter, {"up": stats["up"]})
    swapped = {"up": stats["down"], "down": stats["up"]}
    with pytest.raises(jlora.AdapterError, match=r"'up' needs a moment \(3, 5, 5\)"):
        jlora.corda(params, adapter, swapped)
    sketch = gather(lora, 4)(params, x)
    with pytest.raises(jlora.AdapterError, match="'up' has a sketch"):
        jlora.corda(params, adapter, sketch)
    with pytest.raises(jlora.AdapterError, match=r"'down' .* gradient \(3, 7, 5\)"):
        jlora.lora_ga(params, adapter, {"up": params["up"]})
    wide = adapted(_stack, rank=3).init(jax.random.key(0), params, x)
    narrow = {path: w[..., :2] for path, w in params.items()}
    wide = {p: dataclasses.replace(e, b=e.b[..., :2]) for p, e in wide.items()}
    with pytest.raises(
        jlora.AdapterError, match="rank of 3; give it a rank of at most 2"
    ):
        jlora.lora_ga(narrow, wide, narrow)
    bad: Any = jlora
    for call, name in (
        (lambda: bad.eva(adapter, stats, rho=0.5), "rho"),
        (lambda: bad.corda(params, adapter, stats, mode="x"), "mode"),
        (lambda: bad.corda(params, adapter, stats, damping=0), "damping"),
        (lambda: bad.lora_ga(params, adapter, params, direction="x"), "direction"),
        (lambda: bad.lora_ga(params, adapter, params, gamma=0), "gamma"),
        (lambda: lora.inputs(params, x, lora_sketch=0), "lora_sketch"),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            call()


def in_shard_map(u: jax.Array, x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[:2])
    specs = {"in_specs": (P(), P("d")), "out_specs": P("d")}
    product = lambda u, x: jnp.tanh(x @ u)
    return jax.shard_map(product, mesh=mesh, check_vma=False, **specs)(u, x)


def in_mapped_loop(u: jax.Array, x: jax.Array) -> jax.Array:
    grown = lambda row: jnp.abs(row) + 1 + jnp.tanh(row @ u) ** 2
    loop = lambda row: jax.lax.while_loop(lambda s: s.sum() < 30, grown, row)
    return jax.vmap(loop)(x)


def in_select(u: jax.Array, x: jax.Array) -> jax.Array:
    return x @ jnp.where(jnp.arange(8)[:, None] > 3, u, 0.0)


@pytest.mark.parametrize("hidden", [in_shard_map, in_mapped_loop, in_select])
def test_a_frozen_quantised_kernel_may_be_where_no_target_may(hidden: Any, getkey):
    """It has no inputs to count: what a target is refused for is not its business."""
    pytest.importorskip("qwix")
    params = {n: jax.random.normal(getkey(), (8, 8)) for n in ("u", "w")}
    x = jax.random.normal(getkey(), (4, 8))
    lora = jlora.lora(
        lambda p, x: hidden(p["u"], x) @ p["w"], jlora.LoraConfig("w", rank=2)
    )
    base = jlora.quantize(params, "u", "int8")
    zero = jlora.LoraFactors(
        jnp.zeros((8, 1)), jnp.zeros((1, 8)), jlora.KernelAxes((), (0,), (1,)), 1.0
    )
    dense = jlora.merge(base, {"u": zero}, dequantize=True)
    h = hidden(dense["u"], x)
    moment = lora.inputs(base, x)["w"].moment
    np.testing.assert_allclose(moment, h.T @ h, rtol=1e-5, atol=1e-4)

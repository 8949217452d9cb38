"""DoRA of slices of a kernel, of layers of a stack, and of shards in a shard_map.

The reference is in NumPy: each output that has a magnitude is `m · v / ‖v‖` with
`v = W + ΔW` over all inputs, and each other output is as it was.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora
import jlora.checkpoint
import jlora.peft

pytestmark = pytest.mark.usefixtures("fast_compile")
RANK, ALPHA = 2, 3.0
SCALING = ALPHA / RANK
SLICES = ((0, 3), (5, 12))
LAYERS = (1, 3)
SHAPE = (4, 6, 3, 4)  # layers, inputs, and two output axes


def stack(params: Any, x: jax.Array) -> jax.Array:
    layer = lambda x, w: (x, jnp.tanh(jnp.einsum("ni,iho->nho", x, w)))
    return jax.lax.scan(layer, x, params["w"])[1]


KINDS = {"slices": {"slices": SLICES}, "layers": {"layers": LAYERS}}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, getkey: Any) -> tuple[jlora.Lora, Any, Any, jax.Array]:
    """Params, an input, and an adapter none of whose arrays is as it begins."""
    params = {"w": jax.random.normal(getkey(), SHAPE)}
    x = jax.random.normal(getkey(), (5, SHAPE[1]))
    config = jlora.LoraConfig("w", rank=RANK, alpha=ALPHA, dora=True, **KINDS[kind])
    lora = jlora.lora(stack, config)
    entry = lora.init(getkey(), params, x)["w"]
    stretch = jax.random.uniform(getkey(), entry.magnitude.shape, minval=0.5)
    entry = dataclasses.replace(
        entry,
        b=jax.random.normal(getkey(), entry.b.shape),
        magnitude=entry.magnitude * stretch,
    )
    return lora, params, {"w": entry}, x


def materialized(kind: str, w: Any, entry: Any, np: Any = np) -> Any:
    """The adapted stack, layer by layer; `np` is NumPy, or JAX's for gradients."""
    layers = []
    for i in range(SHAPE[0]):
        flat = w[i].reshape(SHAPE[1], -1)
        blocks, start = [], 0
        if kind == "layers":
            if i in LAYERS:
                j = LAYERS.index(i)
                b, m = entry.b[j].reshape(RANK, -1), entry.magnitude[j].reshape(-1)
                flat = decomposed(flat + SCALING * (entry.a[j] @ b), m, np)
            layers.append(flat.reshape(SHAPE[1:]))
            continue
        done = 0
        for s, (first, stop) in enumerate(SLICES):
            own = slice(start, start + stop - first)
            a = entry.a[i][:, s * RANK : (s + 1) * RANK]
            total = flat[:, first:stop] + SCALING * (a @ entry.b[i][:, own])
            blocks += [flat[:, done:first]]
            blocks += [decomposed(total, entry.magnitude[i][own], np)]
            start, done = own.stop, stop
        flat = np.concatenate([*blocks, flat[:, done:]], axis=1)
        layers.append(flat.reshape(SHAPE[1:]))
    return np.stack(layers)


def decomposed(total: Any, magnitude: Any, np: Any) -> Any:
    norm = np.sqrt(np.sum(total**2, axis=0, keepdims=True))
    norm = jax.lax.stop_gradient(norm) if np is jnp else norm
    return magnitude[None] * total / norm


@each_kind
def test_outputs_and_gradients_are_those_of_the_materialized_kernel(
    kind: str, getkey: Any
) -> None:
    lora, params, adapter, x = make(kind, getkey)
    double = jax.tree.map(lambda v: np.asarray(v, np.float64), adapter["w"])
    wanted = materialized(kind, np.asarray(params["w"], np.float64), double)
    merged = jlora.merge(params, adapter)["w"]
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-5)
    untouched = [0, 2] if kind == "layers" else np.s_[:]
    flat = lambda v: np.asarray(v).reshape(*SHAPE[:2], -1)
    kept = flat(merged)[untouched], flat(params["w"])[untouched]
    if kind == "slices":
        kept = tuple(v[..., 3:5] for v in kept)
    np.testing.assert_array_equal(*kept)

    def loss(outputs: Any) -> jax.Array:
        return jnp.sum(jnp.sin(outputs) ** 2)

    def reference(entry: Any) -> jax.Array:
        return loss(stack({"w": materialized(kind, params["w"], entry, jnp)}, x))

    actual = lambda adapter: loss(lora.apply(params, adapter, x))
    value, grads = jax.jit(jax.value_and_grad(actual))(adapter)
    expected, wanted_grads = jax.jit(jax.value_and_grad(reference))(adapter["w"])
    assert_close(value, expected, 1e-5)
    assert_close(grads["w"], wanted_grads, 1e-4)
    assert float(jnp.abs(grads["w"].magnitude).min()) > 0


@each_kind
def test_it_begins_at_the_base_and_is_counted_stored_and_restored(
    kind: str, getkey: Any, tmp_path: Path
) -> None:
    lora, params, adapter, x = make(kind, getkey)
    fresh = lora.init(getkey(), params, x)
    assert_close(lora.apply(params, fresh, x), stack(params, x), 1e-6)
    plan = lora.plan(params, x)
    assert plan.trainable == sum(v.size for v in jax.tree.leaves(fresh))
    assert "dora" in str(plan)
    config = lora.configs[0]
    jlora.checkpoint.save(tmp_path / "a", adapter, config=config, base=params)
    restored = jlora.checkpoint.restore(tmp_path / "a", base=params)
    assert_close(restored, adapter, 0.0)
    plain = dataclasses.replace(config, dora=False)
    with pytest.raises(jlora.AdapterError, match="dora=True"):
        jlora.checkpoint.save(tmp_path / "b", adapter, config=plain, base=params)
    bare = jlora.lora(stack, plain).init(getkey(), params, x)
    assert bare["w"].magnitude is None
    with pytest.raises(jlora.UnsupportedFeatureError, match=f"{kind} with a magn.*'w'"):
        jlora.peft.save(tmp_path / "p", plan, adapter, config)
    with pytest.raises(ValueError, match=r"factors.lowered\(kernel\)"):
        adapter["w"].lowered()


@each_kind
@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh(kind: str, axes: AxisType, getkey: Any) -> None:
    """The last axis is an output axis, whose parts the slices cut across."""
    lora, params, adapter, x = make(kind, getkey)
    wanted = lora.apply(params, adapter, x)
    mesh = jax.make_mesh((2, 4), ("data", "model"), (axes, axes))
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P(None, "data", None, "model"))
        if axes is AxisType.Explicit:  # a product over cut inputs has to be told there
            place = NamedSharding(mesh, P(None, None, None, "model"))
        placed = {"w": jax.device_put(params["w"], place)}
        sharded = jax.device_put(adapter, jlora.shardings(placed, adapter))
        whole = jax.device_put(x, NamedSharding(mesh, P()))
        found = jax.jit(lora.apply)(placed, sharded, whole)
        fresh = jax.jit(lora.init)(jax.random.key(1), placed, whole)
        np.testing.assert_allclose(
            lora.apply(placed, fresh, whole), stack(placed, whole), 1e-5, 1e-6
        )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_is_trained_whole_has_no_dora() -> None:
    for whole in ({"rows": [1]}, {"full": True}):
        with pytest.raises(ValueError, match="trained whole has its norms with it"):
            jlora.LoraConfig("w", dora=True, **whole)
    with pytest.raises(ValueError, match=r"one of \['dora', 'variant'\] at a time"):
        jlora.LoraConfig("w", dora=True, variant="loha")


# --- shards ---

MODEL = lambda params, x: x @ params["w"]
CONFIG = jlora.LoraConfig("w", rank=RANK, alpha=ALPHA, dora=True)
MESH = jax.make_mesh((4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4])


def whole(getkey: Any) -> tuple[Any, Any, jax.Array]:
    """Params (12, 8), an adapter of them, and an input."""
    params = {"w": jax.random.normal(getkey(), (12, 8))}
    x = jax.random.normal(getkey(), (5, 12))
    adapter = jlora.lora(MODEL, CONFIG).init(getkey(), params, x)
    draw = lambda v: v + jax.random.uniform(getkey(), v.shape)
    return params, jax.tree.map(draw, adapter), x


def summed(y: jax.Array) -> jax.Array:
    return jax.lax.psum(y, "model")


def gathered(kernel: jax.Array) -> jax.Array:
    return jax.lax.all_gather(kernel, "model", tiled=True)


def specs_of(w: P) -> Any:
    first, last = (*w, None, None)[:2]
    axes = jlora.KernelAxes((), (0,), (1,))
    return {"w": jlora.LoraFactors(P(first), P(None, last), axes, SCALING, P(last))}


ROWS, COLUMNS = P("model"), P(None, "model")
SHARDED = {
    "inputs": (ROWS, P(None, "model"), P(), {"w": "model"}),
    "outputs": (COLUMNS, P(), P(None, "model"), None),
    "outputs, told": (COLUMNS, P(), P(None, "model"), {".*": ()}),
    "gathered": (ROWS, P(), P("model"), {"w": ()}),
}


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("name", SHARDED)
def test_shards_are_those_of_the_whole(name: str, checked: bool, getkey: Any) -> None:
    """Outputs, and with types of what varies the gradient of the adapter too."""
    params, adapter, x = whole(getkey)
    w, x_spec, out, told = SHARDED[name]
    lora = jlora.lora(MODEL, CONFIG)

    def body(params: Any, adapter: Any, x: jax.Array) -> jax.Array:
        if name == "gathered":
            a = gathered(adapter["w"].a)
            adapter = {"w": dataclasses.replace(adapter["w"], a=a)}
            y = lora.apply(
                {"w": gathered(params["w"])}, adapter, x, lora_input_shards=told
            )
            return y[None]
        y = lora.apply(params, adapter, x, lora_input_shards=told)
        return summed(y) if name == "inputs" else y

    mapped = jax.shard_map(
        body,
        mesh=MESH,
        in_specs=({"w": w}, specs_of(w), x_spec),
        out_specs=out,
        check_vma=checked,
    )
    wanted = lora.apply(params, adapter, x)
    found = jax.jit(mapped)(params, adapter, x)
    if name == "gathered":
        for one in found:
            np.testing.assert_allclose(one, wanted, rtol=2e-5, atol=2e-5)
        return
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    merged = np.asarray(jlora.merge(params, adapter)["w"], np.float64)
    np.testing.assert_allclose(found, x @ merged, rtol=2e-4, atol=2e-4)
    if checked:
        loss = lambda f: lambda adapter: jnp.sum(jnp.sin(f(params, adapter, x)))
        gradients = [jax.jit(jax.grad(loss(f)))(adapter) for f in (mapped, lora.apply)]
        assert_close(*gradients, 2e-5)


def test_whether_inputs_are_cut_must_be_said(getkey: Any) -> None:
    params, adapter, x = whole(getkey)

    def run(told: Any, config: jlora.LoraConfig = CONFIG) -> Any:
        lora = jlora.lora(MODEL, config)
        call = lambda p, a, x: summed(lora.apply(p, a, x, lora_input_shards=told))
        specs = ({"w": ROWS}, specs_of(ROWS), P(None, "model"))
        return jax.shard_map(call, mesh=MESH, in_specs=specs, out_specs=P())(
            params, adapter, x
        )

    with pytest.raises(jlora.UnsupportedFeatureError) as error:
        run(None)
    for part in ("'w'", "(3, 8)", "['model']", '`lora_input_shards={"w": "model"}`'):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"'v' names no kernel with DoRA.*\['w'\]"):
        run({"v": "model"})
    with pytest.raises(ValueError, match=r"'w' is the same along \['data'\]"):
        run({"w": ("model", "data")})
    with pytest.raises(TypeError, match="a mapping from patterns"):
        run("model")
    with pytest.raises(TypeError, match=re.escape("a tuple of names, got {'w': 3}")):
        run({"w": 3})


@each_kind
def test_parts_of_a_shard_are_refused(kind: str, getkey: Any) -> None:
    lora, params, adapter, x = make(kind, getkey)
    leaves = jax.tree.map(lambda _: P(), adapter)
    inputs = dataclasses.replace(leaves["w"], a=P(None, "model"))
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    mapped = jax.shard_map(
        lora.apply,
        mesh=mesh,
        in_specs=({"w": P(None, "model")}, {"w": inputs}, P(None, "model")),
        out_specs=P("model"),
    )
    with pytest.raises(jlora.UnsupportedFeatureError, match=r"'w' has .*\['model'\]"):
        mapped(params, adapter, x)


def test_an_optimizer_takes_a_step_on_shards(getkey: Any) -> None:
    """The loss of row-parallel DoRA falls as that of the whole kernel does."""
    params, adapter, x = whole(getkey)
    lora, tx = jlora.lora(MODEL, CONFIG), optax.sgd(1e-2)
    told = {"w": "model"}
    call = lambda p, a, x: summed(lora.apply(p, a, x, lora_input_shards=told))
    specs = ({"w": ROWS}, specs_of(ROWS), P(None, "model"))
    mapped = jax.shard_map(call, mesh=MESH, in_specs=specs, out_specs=P())

    def after(f: Any) -> Any:
        grads = jax.grad(lambda a: jnp.mean(f(params, a, x) ** 2))(adapter)
        updates, _ = tx.update(grads, tx.init(adapter))
        return optax.apply_updates(adapter, updates)

    assert_close(jax.jit(after, static_argnums=0)(mapped), after(lora.apply), 1e-5)

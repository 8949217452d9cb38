"""LoRA's relatives beside the equations of their papers, on kernels of any axes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import Case, adapt, check_gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close
from relatives import RELATIVES, delta, filled, reference, uniform
from use import ALPHA, RANK, Kernel
from uses import USES

import jlora
import jlora.checkpoint
import jlora.optim
import jlora.peft
from jlora._adapter.variants.vectors import random_sides

pytestmark = pytest.mark.usefixtures("fast_compile")
NAMED = {use.name: use for use in USES}
CHOSEN = ("matmul_left", "dense_general_two_batch", "conv_2d_groups_nchw", "tied")
# These take longest; each of them meets half of the variants.
PAIRS = [(name, use) for name in RELATIVES for use in CHOSEN]
PAIRS += [("lora_fa", "experts_ragged"), ("lora_xs", "scan_stack")]
PAIRS += [("vera", "scan_stack"), ("lokr", "experts_ragged")]
each = pytest.mark.parametrize("name", RELATIVES)


def made(name: str, use_name: str, key: jax.Array) -> Case:
    """A use with random values in all that is trained."""
    use, keys = NAMED[use_name], jax.random.split(key, 4)
    lora = adapt(use, use.model, variant={"variant": name})
    params = use.make_params(keys[0], jnp.float32)
    inputs = use.make_inputs(keys[1], jnp.float32)
    adapter = lora.init(keys[2], *use.arguments(params, inputs))
    return Case(use, lora, params, filled(adapter, keys[3]), inputs)


@pytest.mark.parametrize("name, use_name", PAIRS)
def test_values_and_gradients_are_those_of_the_equation(
    name: str, use_name: str, getkey: Any
) -> None:
    case = made(name, use_name, getkey())
    check_gradients(case, case.lora.apply, reference(name, case.use))


@each
def test_merged_and_changing_nothing_at_first(name: str, getkey: Any) -> None:
    case = made(name, "dense_general_two_batch", getkey())
    merged = jlora.merge(case.params, case.adapter)["layer"]["w"]
    change = delta(name, case.use.kernels["w"], case.adapter["layer/w"])
    assert_close(merged, case.params["layer"]["w"] + change, 1e-6)
    new = case.lora.init(getkey(), case.params, *case.inputs)
    same = jlora.merge(case.params, new)["layer"]["w"]
    assert np.array_equal(same, case.params["layer"]["w"])
    loss = lambda new: jnp.sin(case.lora.apply(case.params, new, *case.inputs)).sum()
    moved = jax.tree.leaves(jax.grad(loss)(new))
    assert any(np.abs(leaf).max() > 0 for leaf in moved)


LAYOUTS = [(P("data", "model"), {}), (P("model"), {"spread": True})]
LAYOUTS += [(P(None, "model"), {"replicate": True})]


@pytest.mark.parametrize("spec, settings", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@each
def test_sharded(
    name: str, kind: AxisType, spec: P, settings: dict[str, bool], getkey: Any
) -> None:
    """A step on a mesh gives what it gives on one device."""
    keys = jax.random.split(getkey(), 4)
    params = {"w": jax.random.normal(keys[0], (8, 12))}
    x = jax.random.normal(keys[1], (6, 8))
    config = jlora.LoraConfig("w", rank=RANK, alpha=ALPHA, variant=name)
    lora = jlora.lora(lambda params, x: x @ params["w"], config)
    adapter = filled(lora.init(keys[2], params, x), keys[3])
    loss = lambda adapter, params, x: jnp.sin(lora.apply(params, adapter, x)).sum()
    expected = jax.value_and_grad(loss)(adapter, params, x)
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind, kind))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, spec))
        own = jax.device_put(adapter, jlora.shardings(placed, adapter, **settings))
        rows = jax.device_put(x, NamedSharding(mesh, P("data")))
        actual = jax.jit(jax.value_and_grad(loss))(own, placed, rows)
        merged = jlora.merge(placed, own)["w"]
        assert merged.sharding == placed["w"].sharding
        new = jax.jit(lora.init)(keys[2], placed, rows)
    assert_close(jax.device_get(actual), jax.device_get(expected), 1e-5)
    alone = jlora.merge(params, adapter)["w"]
    assert_close(jax.device_get(merged), jax.device_get(alone), 1e-6)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(new) == shapes(adapter)


# What needs more of the kernel than a part of it tells.
WHOLE = {"vera", "lokr"}


@each
def test_a_part_of_a_kernel_inside_of_a_shard_map(name: str, getkey: Any) -> None:
    """Each device has some of the outputs, and what belongs to them of the entry."""
    keys = jax.random.split(getkey(), 4)
    params = {"w": jax.random.normal(keys[0], (8, 12))}
    x = jax.random.normal(keys[1], (6, 8))
    config = jlora.LoraConfig("w", rank=RANK, alpha=ALPHA, variant=name)
    lora = jlora.lora(lambda params, x: x @ params["w"], config)
    adapter = filled(lora.init(keys[2], params, x), keys[3])
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4])
    where = {"w": P(None, "model")}
    places = jlora.shardings(where, adapter, mesh=mesh)
    specs = where, jax.tree.map(lambda place: place.spec, places), P()
    out = P(None, "model")
    parts = jax.shard_map(lora.apply, mesh=mesh, in_specs=specs, out_specs=out)
    if name in WHOLE:
        with pytest.raises(jlora.AdapterError, match=r"'w' \(8, 3\)"):
            jax.jit(parts)(params, adapter, x)
    else:
        expected = lora.apply(params, adapter, x)
        assert_close(jax.jit(parts)(params, adapter, x), expected, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@each
def test_a_checkpoint_and_a_peft_file_have_the_same_change(
    name: str, dtype: Any, tmp_path: Any, getkey: Any
) -> None:
    keys = jax.random.split(getkey(), 4)
    params = {"layer": {"w": jax.random.normal(keys[0], (8, 12))}}
    x = jax.random.normal(keys[1], (6, 8))
    config = jlora.LoraConfig(
        "w", rank=RANK, alpha=ALPHA, variant=name, dtype=dtype, rslora=True
    )
    lora = jlora.lora(lambda params, x: x @ params["layer"]["w"], config)
    adapter = filled(lora.init(keys[2], params, x), keys[3])
    adapter = jax.tree.map(lambda v: v.astype(dtype), adapter)
    jlora.checkpoint.save(tmp_path / "own", adapter, config=config, base=params)
    found = jlora.checkpoint.restore(tmp_path / "own", base=params)
    assert jax.tree.structure(found) == jax.tree.structure(adapter)
    for one, other in zip(*map(jax.tree.leaves, (found, adapter)), strict=True):
        assert one.dtype == dtype and np.array_equal(one, other)
    plan = lora.plan(params, x)
    jlora.peft.save(tmp_path / "peft", plan, adapter, lora.configs)
    _, plain = jlora.peft.load(tmp_path / "peft", plan)
    merged = [jlora.merge(params, one)["layer"]["w"] for one in (adapter, plain)]
    assert_close(*merged, 1e-5 if dtype == jnp.float32 else 1e-2)


def test_masks_know_what_is_frozen_by_its_name_in_a_state() -> None:
    """As the `nnx.State` of an adapter's variables has it: mappings for entries."""
    state = {"lora": {"w": {"frozen_a": 1.0, "b": 2.0}, "v": {"a": 3.0, "b": 4.0}}}
    mask = jlora.optim.trainable_mask(state)["lora"]
    assert mask["w"] == {"frozen_a": False, "b": True}
    assert mask["v"] == {"a": True, "b": True}
    base = {"lora": {"q": 1.0}, "params": {"w": {"frozen_a": 1.0, "b": 2.0}}}
    assert not any(jax.tree.leaves(jlora.optim.trainable_mask(base)["params"]))


# --- LoRA-FA ---


def test_lora_fa_needs_an_input_side_that_is_not_zero(getkey: Any) -> None:
    config = jlora.LoraConfig("w", variant="lora_fa", init="zero_a")
    lora = jlora.lora(lambda params, x: x @ params["w"], config)
    with pytest.raises(ValueError, match=r"'w': .*lora_fa.* nothing would be trained"):
        lora.init(getkey(), {"w": jnp.ones((4, 5))}, jnp.ones((3, 4)))


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian", "orthogonal"])
def test_lora_fa_starts_as_lora_does(init: str, getkey: Any) -> None:
    key, params = getkey(), {"w": jnp.ones((9, 7))}
    entries = []
    for name in ("lora", "lora_fa"):
        config = jlora.LoraConfig("w", rank=2, init=init, variant=name)
        lora = jlora.lora(lambda params, x: x @ params["w"], config)
        entries.append(lora.init(key, params, jnp.ones((3, 9)))["w"])
    assert np.array_equal(entries[0].a, entries[1].frozen_a)
    assert np.array_equal(entries[0].b, entries[1].b)


def test_lora_fa_keeps_no_inputs(getkey: Any) -> None:
    """Of what goes into a frozen kernel in a stack `x·a` is kept, and not `x`."""
    wide, layers, rows = 64, 6, 32
    params = {"w": jax.random.normal(getkey(), (layers, wide, wide)) / 8}
    x = jnp.ones((rows, wide))

    def model(params: Any, x: Any) -> Any:
        layer = lambda x, w: (x @ w, None)  # linear: nothing else is kept
        return jax.lax.scan(layer, x, params["w"])[0]

    kept = []
    for name in ("lora", "lora_fa"):
        lora = jlora.lora(model, jlora.LoraConfig("w", rank=2, variant=name))
        adapter = lora.init(getkey(), params, x)
        loss = lambda adapter, lora=lora: jnp.sin(lora.apply(params, adapter, x)).sum()
        step = jax.jit(jax.grad(loss)).lower(adapter).compile()
        kept.append(step.memory_analysis().temp_size_in_bytes)
    assert kept[0] - kept[1] > 0.8 * layers * rows * wide * 4


# --- LoRA-XS ---


@pytest.mark.parametrize("use_name", ["dense_general_two_batch", "conv_2d"])
def test_lora_xs_has_the_largest_singular_vectors(use_name: str, getkey: Any) -> None:
    case = made("lora_xs", use_name, getkey())
    kernel: Kernel = case.use.kernels["w"]
    entry, (batch, in_, out) = case.adapter["layer/w"], kernel.axes
    one = dataclasses.replace(
        entry, core=jnp.broadcast_to(jnp.eye(RANK), entry.core.shape)
    )
    best = np.asarray(delta("lora_xs", kernel, one)) / (ALPHA / RANK)
    w = np.asarray(case.params["layer"]["w"], np.float64)
    fan_out = int(np.prod([kernel.shape[i] for i in out]))
    lead = [kernel.shape[i] for i in batch]
    matrix = lambda v: v.transpose(*batch, *in_, *out).reshape(*lead, -1, fan_out)
    u, s, vt = np.linalg.svd(matrix(w), full_matrices=False)
    cut = u[..., :RANK] * s[..., None, :RANK] @ vt[..., :RANK, :]
    np.testing.assert_allclose(matrix(best), cut, atol=1e-5)
    b = np.asarray(entry.frozen_b).reshape(*lead, RANK, fan_out)
    eye = np.broadcast_to(np.eye(RANK), (*lead, RANK, RANK))
    np.testing.assert_allclose(b @ b.swapaxes(-1, -2), eye, atol=1e-5)
    a = np.asarray(entry.frozen_a).reshape(*lead, -1, RANK)
    np.testing.assert_allclose(np.linalg.norm(a, axis=-2), s[..., :RANK], rtol=1e-5)
    (target,) = case.lora.plan(case.params, *case.inputs).targets
    assert target.trainable == int(np.prod(lead)) * RANK**2


def test_lora_xs_needs_the_values_of_its_kernel(getkey: Any) -> None:
    lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig(variant="lora_xs"))
    shapes = {"w": jax.ShapeDtypeStruct((4, 5), jnp.float32)}
    with pytest.raises(jlora.TargetError, match=r"singular vectors .* as arrays"):
        lora.init(getkey(), shapes, jnp.ones((3, 4)))


# --- VeRA ---


def test_vera_has_the_same_matrices_whatever_is_asked_of_them(getkey: Any) -> None:
    """A part of them is the part of a larger one, in every kernel and each layer."""
    config = jlora.LoraConfig("q|v", rank=16, variant="vera", projection_seed=7)
    model = lambda p, x: (
        x @ p["q"],
        jnp.einsum("lni,lio->lno", x[None, :, :5], p["v"]),
    )
    params = {"q": jnp.ones((9, 3)), "v": jnp.ones((1, 5, 8))}
    lora, x = jlora.lora(model, config), jnp.ones((4, 9))
    one, other = lora.init(getkey(), params, x).values()
    plan = lora.plan(params, x)
    assert [target.trainable for target in plan.targets] == [16 + 3, 16 + 8]
    (a, b), (c, d) = one.projections(), other.projections()
    assert (a.shape, b.shape) == ((9, 16), (16, 3))
    scale = np.sqrt(5 / 9)
    np.testing.assert_allclose(a[:5] / scale, c, rtol=1e-6)
    assert np.array_equal(b, d[:, :3])
    assert np.abs(np.corrcoef(np.ravel(a[:3]), np.ravel(b.T))[0, 1]) < 0.5
    unlike = dataclasses.replace(one, projection_seed=8).projections()
    assert all(np.abs(x - y).max() > 0.1 for x, y in zip((a, b), unlike, strict=True))


def test_vera_draws_uniform_values_the_same_for_ever() -> None:
    values = np.asarray(random_sides(3, 400, 600, 128)[0])
    rows, columns = np.indices((2, 3))
    assert np.array_equal(values[:2, :3], uniform(3, rows, columns))
    kept = [-0.7223888635635376, -0.22520864009857178]
    kept += [-0.5235919952392578, 0.9817591905593872]
    assert np.ravel(random_sides(0, 2, 2, 2)[0]).tolist() == kept
    assert abs(values.mean()) < 0.01 and abs(values.var() - 1 / 3) < 0.01
    assert values.min() >= -1 and values.max() < 1
    spectrum = np.linalg.svd(values * np.sqrt(3 / 400), compute_uv=False)
    edges = 1 - np.sqrt(128 / 400), 1 + np.sqrt(128 / 400)  # Marchenko and Pastur
    np.testing.assert_allclose((spectrum.min(), spectrum.max()), edges, atol=0.05)


# --- LoKr ---

KERNELS = {
    "ni,io->no": ((4, 12), (12, 20)),
    "nj,jo->no": ((4, 20), (20, 12)),
    "bni,bio->bno": ((3, 4, 12), (3, 12, 20)),
    "nij,ijhd->nhd": ((4, 2, 6), (2, 6, 5, 4)),
}


@pytest.mark.parametrize("factor", [-1, 2, 5])
@pytest.mark.parametrize("equation", KERNELS)
def test_lokr_is_a_kronecker_product(equation: str, factor: int, getkey: Any) -> None:
    rows, shape = KERNELS[equation]
    x, params = jax.random.normal(getkey(), rows), {"w": jnp.zeros(shape)}
    model = lambda params, x: jnp.einsum(equation, x, params["w"])
    config = jlora.LoraConfig(
        "w", rank=RANK, alpha=ALPHA, variant="lokr", decompose_factor=factor
    )
    lora = jlora.lora(model, config)
    adapter = filled(lora.init(getkey(), params, x), getkey())
    entry = adapter["w"]
    parts = [np.asarray(v, np.float64) for v in (entry.c, entry.a, entry.b)]
    parts = zip(*parts, strict=True) if len(shape) == 3 else [parts]
    change = np.stack([np.kron(c, a @ b) for c, a, b in parts]).reshape(shape)
    dense = {"w": jnp.asarray(ALPHA / RANK * change, jnp.float32)}
    assert_close(lora.apply(params, adapter, x), model(dense, x), 1e-5)
    assert_close(jlora.merge(params, adapter), dense, 1e-6)
    assert entry.lowered().rank == RANK * min(entry.c.shape[-2:])


@pytest.mark.parametrize("contraction", ["merged", "factored"])
def test_lokr_under_another_contraction(contraction: str, getkey: Any) -> None:
    x, params = jnp.ones((3, 12)), {"w": jax.random.normal(getkey(), (12, 20))}
    config = jlora.LoraConfig("w", rank=4, variant="lokr")
    model = lambda params, x: x @ params["w"]
    lora = jlora.lora(model, config, contraction=contraction)
    adapter = filled(lora.init(getkey(), params, x), getkey())
    expected = model(jlora.merge(params, adapter), x)
    assert_close(lora.apply(params, adapter, x), expected, 1e-5)


def test_the_plan_says_what_lokr_costs() -> None:
    params = {"w": jnp.ones((64, 256)), "v": jnp.ones((256, 36))}
    model = lambda params, x: x @ params["w"] @ params["v"]
    config = jlora.LoraConfig(rank=4, variant="lokr")
    table = jlora.lora(model, config).plan(params, jnp.ones((3, 64))).table(width=None)
    assert "4 lokr, 32 as two factors  " in table
    assert "4 lokr, 24 as two factors" in table
    config = jlora.LoraConfig(rank=8, variant="lokr")
    table = jlora.lora(model, config).plan(params, jnp.ones((3, 64))).table(width=None)
    assert "64 as two factors, more than the kernel's work" in table


def test_settings_belong_to_their_variant() -> None:
    model = lambda params, x: x @ params["w"]
    for settings, match in (
        ({"projection_seed": 1}, "`variant='vera'`, and the config has 'lora'"),
        ({"decompose_factor": 4, "variant": "vera"}, "goes with `variant='lokr'`"),
    ):
        with pytest.raises(ValueError, match=match):
            jlora.lora(model, jlora.LoraConfig(**settings))
    for settings, error in (
        ({"projection_seed": -1}, ValueError),
        ({"projection_seed": 2**32}, ValueError),
        ({"projection_seed": 1.0}, TypeError),
        ({"decompose_factor": 0}, ValueError),
        ({"decompose_factor": True}, TypeError),
    ):
        with pytest.raises(error, match=next(iter(settings))):
            jlora.LoraConfig(variant="lokr", **settings)

"""`_product.few_kernel`: adapted products of few rows in one kernel for GPUs.

It is interpreted here, and where it is chosen is asked of the choice.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import randomized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from releases import since

import jlora
from jlora._jax.platforms import Target
from jlora._product import (
    alone,
    choice,
    few_kernel,
    forms,
    gpu_probe,
    hopper_tiles,
    lowered,
)
from jlora._product.few_kernel import Linear, adapted_products, divides

pytestmark = pytest.mark.usefixtures("fast_compile")

BF16, D = jnp.bfloat16, 256
GPU = Target("cuda")
ONE = choice.ByPlatform("filled", 64, True, 64, 2048, 5632)
needs_its_api = since("jax", "0.10.2", "kernels for Hopper GPUs begin there")


def drawn(rng: np.random.Generator, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def wide(value: Any) -> np.ndarray:
    return np.asarray(value, np.float32)


def linears_of(
    x: jax.Array, ranks: tuple[int, ...], scalings: tuple[float, ...], way: str
) -> tuple[list[Linear], list[np.ndarray]]:
    """Kernels of several widths with their factors, and what comes out by NumPy.

    `s·x·a` is "given", "made", or made and then "gated": none, all or half of a row.
    """
    rng, linears, expected = np.random.default_rng(0), [], []
    for i, (rank, scaling) in enumerate(zip(ranks, scalings, strict=True)):
        columns = 128 * (i + 1)
        w = drawn(rng, x.shape[1], columns, dtype=x.dtype) / 16
        a, b = drawn(rng, x.shape[1], rank) / 16, drawn(rng, rank, columns)
        h = (scaling * wide(x) @ wide(a.astype(x.dtype))).astype(x.dtype)
        one = Linear(w, a, None, b)
        if way == "given":
            one = one._replace(a=None, h=jnp.asarray(h))
        if way == "gated":
            gate = np.float32(rng.integers(0, 2, h.shape))
            one, h = one._replace(gate=jnp.asarray(gate)), h * gate.astype(h.dtype)
        linears.append(one)
        delta = wide(h) @ wide(b.astype(x.dtype))
        expected.append(wide(x) @ wide(w) + delta)
    return linears, expected


@pytest.mark.parametrize("processors", [1, 8, 132])
@pytest.mark.parametrize("way", ["made", "gated", "given"])
@pytest.mark.parametrize("ranks", [(16,), (3, 16, 20), (128, 1)], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 33, 64])
def test_it_is_the_sum(
    rows: int,
    ranks: tuple[int, ...],
    way: str,
    processors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one processor a reduction is whole, with many it is cut; with eight blocks
    are narrower where a rank is large.
    """
    monkeypatch.setattr(few_kernel, "processors", lambda: processors)
    jax.clear_caches()
    x = drawn(np.random.default_rng(rows), rows, 4 * D, dtype=BF16)
    scalings = (2.0, 0.5, 1.5)[: len(ranks)]
    linears, expected = linears_of(x, ranks, scalings, way)
    found = adapted_products(x, linears, scalings, interpret=True)
    for one, right in zip(found, expected, strict=True):
        assert one.dtype == BF16
        largest = np.abs(right).max()
        np.testing.assert_allclose(wide(one), right, rtol=2**-7, atol=largest * 2**-8)


@pytest.mark.parametrize("rank", [64, 160, 256])
def test_a_given_product_may_have_any_rank(rank: int) -> None:
    """Adapters side by side: more than one product takes in."""
    x = drawn(np.random.default_rng(0), 8, D, dtype=jnp.float16)
    linears, (expected,) = linears_of(x, (rank,), (1.0,), "given")
    (found,) = adapted_products(x, linears, (1.0,), interpret=True)
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(wide(found), expected, rtol=2**-9, atol=2e-2)


@pytest.mark.parametrize("rows", [8, 64])
def test_a_row_that_is_no_number_stays_alone(rows: int) -> None:
    """The last row stands in for rows that are not there, and its own is right."""
    x = drawn(np.random.default_rng(0), rows, D, dtype=BF16).at[-1].set(jnp.nan)
    linears, (expected,) = linears_of(x, (5,), (1.0,), "made")
    (found,) = adapted_products(x, linears, (1.0,), interpret=True)
    assert np.isnan(wide(found)[-1]).all()
    np.testing.assert_allclose(wide(found)[:-1], expected[:-1], rtol=2**-6, atol=0.1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 128), True), ((96, 128), False), ((64, 192), False), ((0, 128), False)],
    ids=str,
)
def test_what_divides_into_blocks(size: tuple[int, int], expected: bool) -> None:
    assert divides(*size) is expected


# --- where it is chosen ---


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every GPU is a Hopper, and its kernels have been tried."""
    for module in (gpu_probe, choice):
        monkeypatch.setattr(module, "fault", lambda *_: None)
    monkeypatch.setattr(hopper_tiles, "processors", lambda: 132)


@pytest.mark.parametrize(
    ("by", "target", "expected"),
    [
        (ONE, GPU, "few"),
        (ONE._replace(tokens=1), GPU, "few"),
        (ONE._replace(tokens=65), GPU, "separate"),
        (ONE._replace(tokens=0), GPU, "separate"),
        (ONE._replace(few=0), GPU, "separate"),
        (ONE.of_rows(2), GPU, "separate"),
        (ONE._replace(tokens=8).of_rows(8), GPU, "few"),
        (ONE, GPU._replace(devices=2), "ruled_few"),
        (ONE._replace(few=16), GPU._replace(devices=2), "ruled"),
        (ONE._replace(summed=False), GPU._replace(devices=2), "separate"),
        (ONE, GPU._replace(devices=2, typed=True), "separate"),
        (ONE, GPU._replace(devices=2, rules=False), "separate"),
        (ONE, GPU._replace(exported=True), "separate"),
        (ONE, Target("rocm"), "separate"),
        (ONE, Target("cpu"), "separate"),
        (ONE, Target("tpu"), "separate"),
    ],
    ids=str,
)
def test_it_is_taken_for_few_rows_on_gpus(
    by: choice.ByPlatform, target: Target, expected: str, trusted: None
) -> None:
    assert choice.form_on(by, target) == expected


def test_it_is_not_where_it_was_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    told = lambda kernel="sum": "it differs" if kernel == "few" else None
    for module in (gpu_probe, choice):
        monkeypatch.setattr(module, "fault", told)
    monkeypatch.setattr(Target, "here", lambda: GPU)
    assert choice.form_on(ONE, GPU) == "separate"
    assert choice.without_kernel(ONE) == "it differs"


@pytest.mark.parametrize(
    ("case", "settings", "expected"),
    [
        ({}, {}, "few"),
        ({}, {"contraction": "auto"}, "few"),
        ({}, {"contraction": "fused"}, "few"),
        ({}, {"contraction": "factored"}, "separate"),
        ({"dtype": jnp.float32}, {}, "separate"),
        ({"columns": 576}, {}, "separate"),
        ({"columns": 384}, {}, "separate"),
        ({"columns": 384}, {"contraction": "fused"}, "few"),
        ({"rows": 65}, {}, "separate"),
    ],
    ids=str,
)
def test_plans_say_where_it_is_taken(
    case: dict[str, Any],
    settings: dict[str, Any],
    expected: str,
    trusted: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Target, "here", lambda: GPU)
    sizes = {"dtype": BF16, "rows": 8, "columns": 512} | case
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, sizes["dtype"])
    params, x = {"w": struct(512, sizes["columns"])}, struct(sizes["rows"], 512)
    lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig(rank=4), **settings)
    (target,) = lora.plan(params, x).targets
    assert target.uses[0].form == expected


def scanned(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]


def looped(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 3, lambda _, x: x @ params["w"], x)


def mapped(params: Any, x: jax.Array) -> jax.Array:
    """Types are checked: the kernel is cast to vary as rows do, and stays in place."""
    mesh = jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P(), P("d")), "out_specs": P("d")}
    return jax.shard_map(lambda w, x: x @ w, mesh=mesh, **specs)(params["w"], x)


KERNELS: dict[str, tuple[Any, tuple[int, ...], Any, str]] = {
    "whole": (lambda p, x: x @ p["w"], (512, 512), BF16, "few"),
    "reshaped": (lambda p, x: x @ p["w"].reshape(512, -1), (512, 4, 128), BF16, "few"),
    "heads": (
        lambda p, x: jnp.einsum("ti,ihd->thd", x, p["w"]),
        (512, 4, 128),
        BF16,
        "few",
    ),
    "in a jit": (jax.jit(lambda p, x: x @ p["w"]), (512, 512), BF16, "few"),
    "turned": (lambda p, x: x @ p["w"].T, (512, 512), BF16, "separate"),
    "cast": (lambda p, x: x @ p["w"].astype(BF16), (512, 512), jnp.float32, "separate"),
    "a part": (lambda p, x: x @ p["w"][:, :512], (512, 1024), BF16, "separate"),
    "of a scan": (scanned, (3, 512, 512), BF16, "separate"),
    "in a loop": (looped, (512, 512), BF16, "few"),
    "in a shard_map": (mapped, (512, 512), BF16, "few"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_it_is_for_kernels_as_they_lie(
    name: str, trusted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another kernel would be copied for it at each token."""
    monkeypatch.setattr(Target, "here", lambda: GPU)
    fn, shape, dtype, expected = KERNELS[name]
    params = {"w": jax.ShapeDtypeStruct(shape, dtype)}
    lora = jlora.lora(fn, jlora.LoraConfig(rank=4))

    def form(rows: int) -> str:
        x = jax.ShapeDtypeStruct((rows, 512), BF16)
        (target,) = lora.plan(params, x).targets
        return target.uses[0].form

    assert form(8) == expected
    assert form(64) == ("separate" if name == "in a loop" else expected)


# --- the form ---


class Taken(list[int]):
    """How many kernels each group had, and the last one of them all."""

    last: Linear


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Taken]:
    """Groups of few rows take it, interpreted."""
    calls = Taken()

    def interpreted(x: jax.Array, linears: Any, scalings: Any) -> Any:
        calls.append(len(linears))
        calls.last = linears[-1]
        return adapted_products(x, linears, scalings, interpret=True)

    as_on_gpu = lambda target: target._replace(platform="cuda")
    form_on = choice.form_on
    on = lambda by, target: form_on(by, as_on_gpu(target))
    monkeypatch.setattr(lowered, "form_on", on)
    monkeypatch.setattr(choice, "runs_on", lambda _, kernel: kernel == "few")
    monkeypatch.setattr(choice, "_LEAST_FUSED", 1)
    for module in (alone, forms):
        monkeypatch.setattr(module, "adapted_products", interpreted)
    jax.clear_caches()
    yield calls
    jax.clear_caches()


def model(params: Any, x: jax.Array) -> jax.Array:
    """Siblings with heads, one of them narrower, and a product behind them."""
    q = jnp.einsum("...d,dhe->...he", x, params["q"])
    gate, up = x @ params["gate"], x @ params["up"]
    h = jnp.tanh(gate) * up + q.reshape(*q.shape[:-2], -1)
    return jnp.tanh(h) @ params["down"]


def model_params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"q": (D, 4, 64), "gate": (D, D), "up": (D, D), "down": (D, 128)}
    return {n: drawn(rng, *s, dtype=BF16) / 16 for n, s in shapes.items()}


def configs(**ranks: int) -> list[jlora.LoraConfig]:
    return [jlora.LoraConfig(n, rank=r, alpha=2.0 * r) for n, r in ranks.items()]


def initialized(lora: jlora.Lora, params: Any, x: Any, seed: int = 0) -> Any:
    key = jax.random.key(seed)
    return randomized(lora.init(key, params, x), key)


CASES = {
    "one rank": configs(q=4, gate=4, up=4, down=4),
    "several ranks": configs(q=3, gate=16, up=5, down=20),
    "a large one": configs(q=4, gate=48, up=4, down=4),
}


def near(found: Any, expected: Any, bound: float = 2e-2) -> None:
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert one.shape == other.shape
        error = np.linalg.norm(wide(one) - wide(other)) / np.linalg.norm(wide(other))
        assert error < bound


def merged(params: Any, adapter: Any, x: jax.Array) -> jax.Array:
    """The model with materialized kernels, in float32."""
    params, x = jax.tree.map(lambda v: v.astype(jnp.float32), (params, x))
    return model(jlora.merge(params, adapter), x)


@pytest.mark.parametrize("x_shape", [(D,), (8, D), (4, 1, D)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_adapted_products(case: str, x_shape: tuple[int, ...], taken: Taken) -> None:
    params = model_params()
    x = drawn(np.random.default_rng(1), *x_shape, dtype=BF16)
    lora = jlora.lora(model, CASES[case])
    adapter = initialized(lora, params, x)
    found = lora.apply(params, adapter, x)
    assert found.dtype == BF16
    near(found, merged(params, adapter, x))
    assert sorted(taken) == [1, 3]


def test_gradients_are_those_of_the_separate_form(taken: Taken) -> None:
    params, x = model_params(), drawn(np.random.default_rng(1), 8, D, dtype=BF16)
    lora = jlora.lora(model, CASES["several ranks"])
    adapter = initialized(lora, params, x)
    loss = lambda run: lambda *args: jnp.sum(run(*args).astype(jnp.float32) ** 2)
    found = jax.jit(jax.grad(loss(lora.apply), (1, 2)))(params, adapter, x)
    expected = jax.grad(loss(merged), (1, 2))(params, adapter, x)
    near(found, expected, bound=4e-2)
    assert sorted(taken) == [1, 3]


@pytest.mark.parametrize(
    ("prepared", "rows", "dtype"),
    [
        (False, 16, BF16),
        (True, 16, BF16),
        (True, 20, BF16),
        (True, 16, jnp.float32),
    ],
)
def test_examples_of_a_mixed_batch_are_rows(
    prepared: bool, rows: int, dtype: Any, taken: Taken
) -> None:
    """All adapters side by side: `x·a` goes through gates, in the kernel or before."""
    params, x = model_params(), drawn(np.random.default_rng(1), rows, D, dtype=BF16)
    # Of the last group the joined rank is 3·20.
    lora = jlora.lora(model, CASES["several ranks"])
    each = [initialized(lora, params, x, seed) for seed in range(3)]
    each = [jax.tree.map(lambda v: v.astype(dtype), one) for one in each]
    stacked, index = jlora.stack(each), jnp.arange(rows) % 4 - 1
    given = jlora.prepare(stacked) if prepared else stacked
    found = jax.jit(lora.apply_mixed)(params, given, index, x)
    expected = [
        merged(params, {} if i < 0 else each[i], one)
        for i, one in zip(index, x, strict=True)
    ]
    near(found, jnp.stack(expected))
    assert sorted(taken) == [1, 3]
    in_kernel = rows == 16 and dtype == BF16
    assert (taken.last.gate is not None, taken.last.h is None) == (in_kernel, in_kernel)


def test_an_adapter_that_is_no_number_stays_in_its_rows(taken: Taken) -> None:
    params, x = model_params(), drawn(np.random.default_rng(1), 8, D, dtype=BF16)
    lora = jlora.lora(model, CASES["several ranks"])
    each = [initialized(lora, params, x, seed) for seed in range(2)]
    each = [jax.tree.map(lambda v: v.astype(BF16), one) for one in each]
    broken = jax.tree.map(lambda v: v.at[0, 0].set(jnp.nan), each[1])
    run, index = jax.jit(lora.apply_mixed), jnp.arange(8) % 2
    sound = run(params, jlora.stack(each), index, x)
    found = run(params, jlora.stack([each[0], broken]), index, x)
    assert taken.last.gate is not None
    np.testing.assert_array_equal(wide(found)[::2], wide(sound)[::2])
    assert np.isnan(wide(found)[1::2]).all()


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_each_device_of_a_shard_map_has_few_rows(kind: str, taken: Taken) -> None:
    """Pallas interprets no loop there while types are checked: see the next test."""
    params, x = model_params(), drawn(np.random.default_rng(1), 32, D, dtype=BF16)
    lora = jlora.lora(model, CASES["several ranks"])
    adapter = initialized(lora, params, x)
    mesh = mesh_of_four(kind)
    specs = {"in_specs": (P(), P(), P("d")), "out_specs": P("d")}
    run = jax.shard_map(lora.apply, mesh=mesh, check_vma=False, **specs)
    rows = jax.device_put(x, NamedSharding(mesh, P("d")))
    near(jax.jit(run)(params, adapter, rows), merged(params, adapter, x))
    assert sorted(taken) == [1, 3]


PLACES = {
    "rows": ({}, P("d")),
    "fsdp": (dict.fromkeys(("q", "gate", "up", "down"), P("d")), P("d")),
    "tensor": (
        dict.fromkeys(("q", "gate", "up"), P(None, "d")) | {"down": P("d")},
        P(),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PLACES)
def test_each_device_of_an_auto_mesh_takes_it_for_its_part(
    name: str, case: str, taken: Taken
) -> None:
    """Half a kernel divides into blocks here; of a large rank XLA computes it."""
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,))
    place = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    places, rows = PLACES[name]
    params, x = model_params(), drawn(np.random.default_rng(1), 8, D, dtype=BF16)
    lora = jlora.lora(model, CASES[case])
    adapter = initialized(lora, params, x)
    expected = merged(params, adapter, x)
    held = {name: place(w, places.get(name, P())) for name, w in params.items()}
    factors = jax.device_put(adapter, jlora.shardings(held, adapter, mesh=mesh))
    found = jax.jit(lora.apply)(held, factors, place(x, rows))
    near(found, expected)
    # Each is traced for its type, and then for the part of a device.
    assert taken == [1] * 2 * (3 if case == "a large one" else 4)


@needs_its_api
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("given", [False, True])
def test_types_say_along_which_axes_of_a_shard_map_it_varies(
    given: bool, kind: str
) -> None:
    """Pallas asks for it; the program is traced alone. Each device has its own."""
    whole = jax.ShapeDtypeStruct
    width = 4 if given else D
    small = whole((4 * 8 if given else 4 * D, width), BF16)
    one = Linear(whole((4 * D, 128), BF16), small, None, whole((4 * width, 128), BF16))
    one = one._replace(a=None, h=small) if given else one
    mesh = mesh_of_four(kind)
    place = lambda v: whole(v.shape, v.dtype, sharding=NamedSharding(mesh, P("d")))
    args = jax.tree.map(place, (whole((4 * 8, D), BF16), [one]))
    run = lambda x, linears: adapted_products(x, linears, (1.0,))
    each = jax.shard_map(run, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    (found,) = jax.jit(each).trace(*args).out_info
    assert found.shape == (4 * 8, 128) and found.dtype == BF16


def mesh_of_four(kind: str) -> jax.sharding.Mesh:
    kinds = (getattr(jax.sharding.AxisType, kind),)
    return jax.make_mesh((4,), ("d",), axis_types=kinds)


def test_quantised_kernels_go_without_it(taken: Taken) -> None:
    params, x = model_params(), drawn(np.random.default_rng(1), 8, D, dtype=BF16)
    lora = jlora.lora(model, CASES["one rank"])
    adapter = initialized(lora, params, x)
    small = jlora.quantize(params, ".*", "int8")
    jax.block_until_ready(lora.apply(small, adapter, x))
    assert not taken


# --- the probe ---


class Gpu:
    """A device that the probe finds."""

    compute_capability, core_count = "9.0", 4


@needs_its_api
@pytest.mark.parametrize("error", [0.0, 1.0])
def test_it_is_tried_before_it_is_trusted(
    error: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(x: Any, linears: Any, scalings: Any) -> Any:
        ys = adapted_products(x, linears, scalings, interpret=True)
        return [y.at[0, 5].add(error) for y in ys]

    monkeypatch.setattr(gpu_probe, "local_gpu", Gpu)
    monkeypatch.setattr(gpu_probe.jax, "device_put", lambda tree, _: tree)
    monkeypatch.setattr(gpu_probe, "adapted_products", run)
    gpu_probe._tried.cache_clear()
    found = gpu_probe.fault("few")
    gpu_probe._tried.cache_clear()
    assert found == (None if error == 0 else "it computes something else")
    assert ("without its kernel 'few'" in caplog.text) is (error != 0)

"""The kernel of the fused form, and where it is chosen.

It runs on Hopper GPUs alone. On a CPU it is interpreted, where the release of JAX has
an interpreter for it, and lowered for a GPU, which counts its shared memory. What the
form computes from it is tested in `test_products.py`.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import randomized
from jax.experimental.pallas import mosaic_gpu as plgpu
from releases import since

import jlora
from jlora._jax.platforms import Target
from jlora._product import choice, gpu_probe, hopper_kernel, hopper_tiles, lowered
from jlora._product.hopper_kernel import sum_of_products
from jlora._product.hopper_tiles import TILES, Tile, tile_of

pytestmark = pytest.mark.usefixtures("fast_compile")

BF16 = jnp.bfloat16
N, D, K = 512, 256, 384
each_side = pytest.mark.parametrize("turned", [False, True])
each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t[0]}x{t[1]}")
needs_its_api = since("jax", "0.10.2", "the API of Mosaic GPU was another one")


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs kernels for GPUs on the CPU; two processors share the tiles."""
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip(f"jax {jax.__version__} has no interpreter for such kernels")
    for module in (hopper_kernel, hopper_tiles):
        monkeypatch.setattr(module, "processors", lambda: 2)
    with plgpu.force_gpu_interpret_mode():
        yield


def operands(
    n: int,
    depths: tuple[int, ...],
    columns: int,
    rank: int,
    turned: bool,
    dtype: Any = BF16,
) -> tuple[Any, ...]:
    """Random operands, the delta as large as the sum of the base products."""
    kernels = [(columns, d) if turned else (d, columns) for d in depths]
    shapes = [*((n, d) for d in depths), *kernels, (n, rank), (rank, columns)]
    keys = jax.random.split(jax.random.key(n + rank), len(shapes))
    pairs = zip(keys, shapes, strict=True)
    *both, h, b = (jax.random.normal(k, s, jnp.float32) for k, s in pairs)
    *both, h, b = (v.astype(dtype) for v in (*both, h, (sum(depths) / rank) ** 0.5 * b))
    return both[: len(depths)], both[len(depths) :], h, b


def in_double(turned: bool, xs: Any, ws: Any, h: Any, b: Any) -> np.ndarray:
    """The same by NumPy, in float64."""
    xs, ws, h, b = jax.tree.map(lambda v: np.asarray(v, np.float64), (xs, ws, h, b))
    pairs = zip(xs, ws, strict=True)
    return sum((x @ (w.T if turned else w) for x, w in pairs), h @ b)


# --- the kernel ---


@each_side
@pytest.mark.parametrize(
    ("tile", "rank"),
    [*((TILES[0], r) for r in (1, 16, 24, 64, 65, 130))]
    + [(tile, rank) for tile in TILES[1:] for rank in (24, 65)],
    ids=str,
)
@pytest.mark.parametrize(
    "shape", [(256, (128,), 384), (512, (384,), 128), (256, (128, 256, 384), 384)]
)
def test_it_is_rounded_once(
    shape: tuple[Any, ...], rank: int, tile: Tile, turned: bool, interpreter: None
) -> None:
    args = operands(*shape, rank, turned)
    run = jax.jit(functools.partial(sum_of_products, turned=turned, tile=tile))
    found, expected = np.asarray(run(*args), np.float64), in_double(turned, *args)
    assert run(*args).dtype == BF16
    # Half a unit in the last of eight bits, and the order of sums in float32.
    assert np.all(np.abs(found - expected) <= 2.0**-8 * np.abs(expected) + 1e-4)


@each_side
@pytest.mark.parametrize("rank", [16, 24, 64])
@pytest.mark.parametrize("each", [64, 128, 192, 256])
def test_adapters_with_rows_of_their_own(
    each: int, rank: int, turned: bool, interpreter: None
) -> None:
    """A tile takes the `b` of its adapter, and what another one holds is not its."""
    count = 4
    xs, ws, h, _ = operands(count * each, (128, 256), 256, rank, turned)
    b = jax.random.normal(jax.random.key(each), (count, rank, 256), jnp.float32)
    b = b.astype(BF16).at[2].set(jnp.nan)
    run = jax.jit(functools.partial(sum_of_products, turned=turned))
    found = np.asarray(run(xs, ws, h, b), np.float64).reshape(count, each, 256)
    assert np.isnan(found[2]).all()
    for i in (0, 1, 3):
        own = slice(i * each, (i + 1) * each)
        expected = in_double(turned, [x[own] for x in xs], ws, h[own], b[i])
        bound = 2.0**-8 * np.abs(expected) + 1e-4
        assert np.all(np.abs(found[i] - expected) <= bound)


def test_float16(interpreter: None) -> None:
    args = operands(256, (128,), 128, 16, False, jnp.float16)
    found, expected = jax.jit(sum_of_products)(*args), in_double(False, *args)
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found, expected, rtol=2.0**-10, atol=1e-3)


@needs_its_api
@each_side
@each_tile
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("shape", [(256, (128,), 128), (8192, (2048, 512, 512), 5632)])
def test_it_lowers_for_gpus(
    shape: tuple[Any, ...], rank: int, tile: Tile, turned: bool
) -> None:
    args = jax.eval_shape(lambda: operands(*shape, rank, turned))
    run = jax.jit(functools.partial(sum_of_products, turned=turned, tile=tile))
    program = run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("mosaic_gpu") >= 1
    assert "dot_general" not in program


# --- where it is chosen ---

HOPPER = Target("cuda")


def product(params: Any, x: jax.Array) -> jax.Array:
    """A model of one product."""
    return x @ params["w"]


def shapes(dtype: Any = BF16, n: int = N, k: int = K) -> tuple[Any, Any]:
    """Shapes of its params and its input."""
    struct = jax.ShapeDtypeStruct
    return {"w": struct((D, k), dtype)}, struct((n, D), dtype)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every GPU is such a one, and products are large enough; plans are for it."""
    for module in (gpu_probe, choice):
        monkeypatch.setattr(module, "fault", lambda *_: None)
    monkeypatch.setattr(hopper_tiles, "processors", lambda: 16)
    monkeypatch.setattr(choice, "_LEAST_EXTENDED", 1)
    monkeypatch.setattr(choice, "_LEAST_FUSED", 1)
    monkeypatch.setattr(Target, "here", lambda: HOPPER)
    jax.clear_caches()


def form_of(
    fn: Any, params: Any, x: Any, target: Target | None = None, **settings: Any
) -> str:
    """The form of the one product of a function, as the plan has it."""
    lora = jlora.lora(fn, jlora.LoraConfig(rank=4), **settings)
    (one,) = lora.plan(params, x).targets
    (use,) = one.uses
    if target is None or not isinstance(use.chosen, choice.ByPlatform):
        return use.form
    return choice.form_on(use.chosen, target)


@pytest.mark.parametrize("processors", [8, 16, 24])
def test_it_is_taken_where_it_fills_the_gpu(
    processors: int, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward four blocks of 256 by 128, or sixteen that cost more than a quarter."""
    monkeypatch.setattr(hopper_tiles, "processors", lambda: processors)
    expected = "fused" if processors <= 16 else "extended"
    assert form_of(product, *shapes()) == expected
    assert form_of(product, *shapes(), contraction="auto") == expected
    assert form_of(product, *shapes(), contraction="fused") == "fused"
    assert form_of(product, *shapes(), contraction="factored") == "extended"
    merged = form_of(product, *shapes(jnp.float32, n=4 * N), contraction="auto")
    assert merged == "merged"


def test_in_a_loop_it_is_taken_earlier(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There other products copy the kernel first."""

    def scanned(params: Any, x: jax.Array) -> jax.Array:
        step = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(step, x, params["w"])[0]

    struct, x = jax.ShapeDtypeStruct, shapes()[1]
    params = {"w": struct((3, D, D), BF16)}
    for processors, expected in ((24, "fused"), (128, "extended")):
        monkeypatch.setattr(hopper_tiles, "processors", lambda n=processors: n)
        assert form_of(scanned, params, x) == expected
        assert form_of(product, *shapes(k=D)) == "extended"


@pytest.mark.parametrize(
    ("rows", "columns", "each", "expected"),
    [
        (8192, 2048, 8192, (128, 128)),
        (1024, 2048, 1024, (64, 128)),
        (512, 2048, 512, (64, 64)),
        (512, 5632, 512, (128, 128)),
        (512, 5632, 64, (64, 128)),
        (8192 + 128, 2048, 8192 + 128, (64, 128)),
        (512, 2048 + 64, 512, (64, 64)),
        (512 + 64, 2048, 512 + 64, None),
        (512, 2048, 32, None),
        (0, 2048, 0, None),
    ],
)
def test_tiles_leave_few_processors_idle(
    rows: int,
    columns: int,
    each: int,
    expected: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fastest of those that were measured on an H200, of those that divide."""
    monkeypatch.setattr(hopper_tiles, "processors", lambda: 132)
    tile = tile_of(rows, columns, each)
    assert tile is None if expected is None else tile and tile[:2] == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target("cpu"), "separate"),
        (Target("tpu"), "separate"),
        (Target("rocm"), "extended"),
        (Target("cuda"), "fused"),
        (Target("cuda", exported=True), "extended"),
        (Target("cuda", devices=2), "ruled"),
        (Target("cuda", devices=2, rules=False), "separate"),
        (Target("cuda", devices=2, typed=True), "separate"),
        (Target("tpu", devices=2), "separate"),
    ],
    ids=str,
)
def test_it_is_taken_for_what_a_program_is_lowered_for(
    target: Target, expected: str, hopper: None
) -> None:
    assert form_of(product, *shapes(), target) == expected


def test_on_a_mesh_each_device_must_be_filled(hopper: None) -> None:
    """Twice the rows for two devices; the rule of a partition must be asked."""
    twice, two = shapes(n=2 * N), Target("cuda", devices=2)
    assert form_of(product, *twice, two) == "partitioned"
    assert form_of(product, *twice, two._replace(rules=False)) == "separate"
    assert form_of(product, *twice, two._replace(devices=4)) == "ruled"


@pytest.mark.parametrize(
    "case",
    [
        shapes(jnp.float32),
        shapes(n=N + 64),
        shapes(k=K + 64),
        shapes(n=0),
        ({"w": shapes(BF16)[0]["w"]}, shapes(jnp.float32)[1]),
    ],
    ids=["float32", "rows", "columns", "no rows", "mixed"],
)
def test_it_is_not_where_the_kernel_does_not_fit(case: Any, hopper: None) -> None:
    assert form_of(product, *case, contraction="fused") in ("extended", "separate")


def test_it_is_not_where_the_result_is_wider(hopper: None) -> None:
    wide = lambda p, x: jnp.matmul(x, p["w"], preferred_element_type=jnp.float32)
    assert form_of(wide, *shapes(), contraction="fused") == "extended"


@needs_its_api
def test_examples_that_are_mapped_are_rows(hopper: None) -> None:
    """One example does not fill the GPU; eight in one product do."""
    config = jlora.LoraConfig(rank=4)
    lora = jlora.lora(product, config)
    params, x = shapes(n=N // 4)
    adapter = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    assert form_of(product, params, x) == "separate"
    many = jax.ShapeDtypeStruct((8, *x.shape), x.dtype)
    step = jax.jit(jax.vmap(lora.apply, (None, None, 0)))
    program = step.trace(params, adapter, many).lower(lowering_platforms=("cuda",))
    assert program.as_text().count("@mosaic_gpu") == 1


@pytest.mark.parametrize("here", [Target("cuda"), Target("cpu")], ids=str)
def test_the_plan_says_why_it_is_not(
    here: Target, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, where it would be taken, and once for all products."""
    told = "the GPU has compute capability 8.0, and it is for 9.0"
    monkeypatch.setattr(Target, "here", lambda: here)

    def lines(case: Any, **settings: Any) -> list[str]:
        config = jlora.LoraConfig(rank=4)
        plan = jlora.lora(product, config, **settings).plan(*case)
        return [line for line in str(plan).splitlines() if "Hopper" in line]

    assert not lines(shapes())
    for module in (gpu_probe, choice):
        monkeypatch.setattr(module, "fault", lambda *_: told)
    line = f"without the kernel for Hopper GPUs: {told}"
    assert lines(shapes()) == ([line] if here.platform == "cuda" else [])
    assert not lines(shapes(), contraction="factored")
    assert not lines(shapes(k=K + 64))


# --- the probe ---


class Gpu:
    """A device that the probe finds."""

    compute_capability: str | None = "9.0"
    core_count = 4
    found: "Gpu | None"


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Such a device, and nothing moved to it."""
    gpu = Gpu()
    gpu.found = gpu
    monkeypatch.setattr(gpu_probe, "local_gpu", lambda: gpu.found)
    monkeypatch.setattr(gpu_probe.jax, "device_put", lambda tree, _: tree)
    gpu_probe._tried.cache_clear()
    yield gpu
    gpu_probe._tried.cache_clear()


def stand_in(error: float) -> Any:
    """A sum of products by NumPy's rules, with an error in one element."""

    def run(xs: Any, ws: Any, h: Any, b: Any, *, turned: bool, tile: Tile) -> jax.Array:
        assert tile in TILES
        (x,), (w,) = xs, ws
        wide = {"preferred_element_type": jnp.float32}
        b = b.reshape(-1, *b.shape[-2:])  # one of each adapter
        delta = jnp.matmul(h.reshape(len(b), -1, h.shape[1]), b, **wide)
        y = jnp.matmul(x, w.T if turned else w, **wide)
        y += delta.reshape(y.shape)
        return y.at[3, 5].add(error).astype(x.dtype)

    return run


@needs_its_api
def test_a_kernel_that_computes_what_it_should_is_trusted_once(
    probed: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_probe, "sum_of_products", stand_in(0.0))
    assert gpu_probe.fault() is None
    assert gpu_probe.runs_on(HOPPER)
    monkeypatch.setattr(gpu_probe, "sum_of_products", stand_in(1.0))
    assert gpu_probe.fault() is None  # the verdict is remembered


@needs_its_api
def test_a_kernel_with_one_wrong_number_is_not_trusted(
    probed: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(gpu_probe, "sum_of_products", stand_in(1.0))
    assert gpu_probe.fault() == "it computes something else"
    assert "does without its kernel" in caplog.text
    assert not gpu_probe.runs_on(HOPPER)


@needs_its_api
def test_a_release_with_another_api_does_without_it(
    probed: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(plgpu, "nd_loop")
    told = gpu_probe.fault()
    assert told is not None and "nd_loop" in told


def test_an_older_release_does_without_it(
    probed: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told which release it needs, and nothing is compiled."""
    monkeypatch.setattr(gpu_probe, "sum_of_products", None)
    monkeypatch.setattr(gpu_probe, "MOSAIC_GPU_SINCE", (99, 1))
    assert gpu_probe.fault() == f"it needs jax 99.1, and this is {jax.__version__}"
    assert not gpu_probe.runs_on(HOPPER)


@needs_its_api
def test_the_probe_sees_no_trace_and_no_mesh(
    probed: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked while a program is lowered, under a mesh and within a trace."""
    monkeypatch.setattr(gpu_probe, "sum_of_products", stand_in(0.0))
    kind = (jax.sharding.AxisType.Explicit,)
    verdicts = []

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        verdicts.append(gpu_probe.fault())
        return x

    with jax.set_mesh(jax.make_mesh((8,), ("i",), axis_types=kind)):
        traced(jnp.ones(8))
    assert verdicts == [None]


@pytest.mark.parametrize("capability", ["8.0", "10.0", None])
def test_it_is_not_on_other_devices(capability: str | None, probed: Gpu) -> None:
    probed.compute_capability = capability
    assert str(capability) in str(gpu_probe.fault())
    probed.found = None
    assert gpu_probe.fault() == "there is no GPU"


# --- the form with its kernel ---


def siblings(params: Any, x: jax.Array) -> jax.Array:
    """A loss of two products of `x`, and of one more after a nonlinearity."""
    q, k = x @ params["q"], x @ params["k"]
    y = jnp.tanh(q[:, :D]) @ params["o"] + k
    return jnp.sum(jnp.tanh(y.astype(jnp.float32)) ** 2)


def of_siblings(rank: int) -> tuple[Any, ...]:
    """Their gradient function, params, adapter and input."""
    sizes = {"q": (D, K), "k": (D, 128), "o": (D, 128)}
    keys = dict(zip(sizes, jax.random.split(jax.random.key(0), 3), strict=True))
    params = {n: jax.random.normal(keys[n], s) / D**0.5 for n, s in sizes.items()}
    x = jax.random.normal(jax.random.key(1), (256, D))
    params, x = jax.tree.map(lambda v: v.astype(BF16), (params, x))
    config = jlora.LoraConfig(rank=rank, alpha=3.0)
    lora = jlora.lora(siblings, config, contraction="fused")
    adapter = lora.init(jax.random.key(2), params, x)
    adapter = randomized(adapter, jax.random.key(3))
    assert {u.form for t in lora.plan(params, x).targets for u in t.uses} == {"fused"}
    return jax.jit(jax.grad(lora.apply, argnums=(1, 2))), params, adapter, x


def test_values_and_gradients(
    hopper: None, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted, beside the formed kernel.

    The interpreter has effects, which a body that is chosen at lowering may not have.
    """
    openly = lambda bodies, *args: bodies.on(HOPPER)(*args)
    monkeypatch.setattr(lowered, "by_platform", openly)
    step, params, adapter, x = of_siblings(rank=5)
    found = step(params, adapter, x)
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), params)
    formed = lambda adapter, x: siblings(jlora.merge(wide, adapter), x)
    expected = jax.grad(formed, argnums=(0, 1))(adapter, x.astype(jnp.float32))
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for ours, theirs in pairs:
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert np.linalg.norm(ours - theirs) < 2e-2 * np.linalg.norm(theirs)


@needs_its_api
@pytest.mark.parametrize("rank", [5, 70])
def test_siblings_are_one_sum_backward(rank: int, hopper: None) -> None:
    """Three products forward; backward one for the two of `x`, one for the other."""
    step, *args = of_siblings(rank)
    program = step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@mosaic_gpu") == 3 + 2


@needs_its_api
def test_many_siblings_are_several_sums(hopper: None) -> None:
    many = {f"w{i}": jax.ShapeDtypeStruct((D, 128), BF16) for i in range(9)}
    x = jax.ShapeDtypeStruct((256, D), BF16)
    fn = lambda p, x: sum(jnp.sum(jnp.tanh(x @ w)) for w in p.values())
    lora = jlora.lora(fn, jlora.LoraConfig(rank=2), contraction="fused")
    adapter = jax.eval_shape(lora.init, jax.random.key(0), many, x)
    step = jax.jit(jax.grad(lora.apply, argnums=(1, 2)))
    program = step.trace(many, adapter, x).lower(lowering_platforms=("cuda",))
    assert program.as_text().count("@mosaic_gpu") == 9 + 2


def test_a_group_is_chosen_for_by_its_largest_kernel(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of q, k and v where there are fewer keys and values than queries."""
    monkeypatch.setattr(choice, "_LEAST_EXTENDED", 256)
    fn = lambda p, x: (x @ p["q"], x @ p["k"])

    def forms(k: int, contraction: str) -> set[str]:
        struct = lambda *shape: jax.ShapeDtypeStruct(shape, BF16)
        params, x = {"q": struct(D, K), "k": struct(D, k)}, struct(N, D)
        lora = jlora.lora(fn, jlora.LoraConfig(rank=4), contraction=contraction)
        return {u.form for t in lora.plan(params, x).targets for u in t.uses}

    assert forms(128, "fast") == {"fused"}
    assert forms(120, "fast") == {"extended"}  # does not divide into tiles
    assert forms(128, "factored") == {"extended"}
    monkeypatch.setattr(choice, "_LEAST_EXTENDED", 257)
    assert forms(128, "factored") == {"separate"}

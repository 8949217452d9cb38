"""Choosing the rank: spectra, effective ranks, and AdaLoRA's allocation."""

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapters import AXES, SHAPES, assert_near, make
from factored import as_matrix, factored_kernels, factors_of, formed, singular_values
from hypothesis import Phase, given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import adalora

pytestmark = pytest.mark.usefixtures("fast_compile")
laws = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
)
seeds = st.integers(0, 2**31)
spectra = st.lists(st.floats(0, 10), min_size=1, max_size=6).map(
    lambda values: np.array(sorted(values, reverse=True))
)
HEAD = "head/kernel"


# --- spectra ---


@laws
@given(factored_kernels(), st.sampled_from([-1.7, 0.25, 3.0]), seeds)
def test_a_spectrum_is_that_of_the_formed_delta(kernel, scaling, seed):
    host = jax.tree.map(np.asarray, factors_of(kernel, scaling, seed))
    found, wanted = jlora.spectrum({"w": host})["w"], singular_values(host)
    assert found.shape == (*host.a.shape[: len(host.axes.batch)], host.rank)
    assert found.dtype == np.float64
    both = min(host.rank, wanted.shape[-1])
    np.testing.assert_allclose(found[..., :both], wanted[..., :both], atol=1e-9)
    np.testing.assert_allclose(found[..., both:], 0, atol=1e-9)


def test_a_spectrum_on_a_device_is_jitted_and_float32() -> None:
    for x in (make(0), make(0, rank=9)):
        for found in (jlora.spectrum(x), jax.jit(jlora.spectrum)(x)):
            for path, values in found.items():
                wanted = singular_values(x[path])[..., : x[path].rank]
                assert values.dtype == jnp.float32
                assert values.shape[-1] == x[path].rank
                assert_near(values[..., : wanted.shape[-1]], wanted)


@laws
@given(spectra, st.floats(0.05, 1.0))
def test_the_effective_rank_is_the_least_that_holds_the_energy(values, energy):
    rank = int(jlora.effective_rank(values, energy))
    kept = [float(jlora.energy_kept(values, k)) for k in range(len(values) + 1)]
    if values[0] == 0:
        assert rank == 0 and kept == [1.0] * (len(values) + 1)
        return
    total = (values / values[0]) @ (values / values[0])
    exact = [((values[:k] / values[0]) ** 2).sum() / total for k in range(len(kept))]
    np.testing.assert_allclose(kept, exact, atol=1e-12)
    assert rank >= 1 and kept[rank] >= energy - 1e-9
    assert kept[rank - 1] < energy + 1e-9


@laws
@given(spectra)
def test_the_other_ranks_are_their_formulas(values):
    stable, entropy = jlora.stable_rank(values), jlora.entropy_rank(values)
    if values[0] == 0:
        assert (stable, entropy) == (0, 0)
        return
    relative = values / values[0]
    p = relative[relative > 0] / relative.sum()
    np.testing.assert_allclose(stable, (relative**2).sum(), rtol=1e-9)
    np.testing.assert_allclose(entropy, np.prod(p**-p), rtol=1e-9)
    assert 1 - 1e-9 <= min(stable, entropy) <= max(stable, entropy) < len(values) + 1e-9


def test_ranks_are_of_each_slice_and_alike_on_a_device() -> None:
    values = np.array([[4.0, 3.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    on_device = jnp.asarray(values, jnp.float32)
    assert jlora.effective_rank(values, 0.9).tolist() == [2, 0, 3]
    for ranked in (
        jlora.effective_rank,
        jlora.stable_rank,
        jlora.entropy_rank,
        lambda values: jlora.energy_kept(values, 1),
    ):
        assert_near(jax.jit(ranked)(on_device), np.asarray(ranked(values), np.float64))
    tiny = jnp.array([3e-30, 4e-30], jnp.float32)[::-1]
    assert float(jlora.stable_rank(tiny)) == pytest.approx(25 / 16)


def test_what_truncation_loses_is_what_the_spectrum_says() -> None:
    x = make(0, rank=4)
    small, spectrum = jlora.truncate(x, 2), jlora.spectrum(x)
    for path in x:
        error = as_matrix(formed(x[path]) - formed(small[path]), AXES[path])
        whole = as_matrix(formed(x[path]), AXES[path])
        lost = (error**2).sum((-2, -1)) / (whole**2).sum((-2, -1))
        assert_near(jlora.energy_kept(spectrum[path], 2), 1 - lost)


@pytest.mark.parametrize("energy", [0.0, 1.01, float("nan")])
def test_an_energy_is_a_share(energy: float) -> None:
    with pytest.raises(ValueError, match="share of the squared singular values"):
        jlora.effective_rank(np.ones(3), energy)


# --- triplets ---


def with_head(adapter: Any) -> Any:
    """An adapter, and a leaf that is trained whole."""
    return adapter | {HEAD: jnp.ones((7, 2))}


def test_new_triplets_are_orthonormal_and_change_nothing() -> None:
    svd = adalora.init(jax.random.key(0), with_head(make(0)))
    assert svd[HEAD].shape == (7, 2)
    np.testing.assert_allclose(adalora.orthogonality_penalty(svd), 0, atol=1e-9)
    adapter = adalora.to_factors(svd)
    for path, shape in SHAPES.items():
        np.testing.assert_array_equal(jlora.delta(adapter[path]), np.zeros(shape))
        assert adapter[path].scaling == 1.5
    other = adalora.init(jax.random.key(0), {"conv": make(0)["conv"]})
    np.testing.assert_array_equal(other["conv"].p, svd["conv"].p)
    p, q = np.asarray(svd["conv"].p), np.asarray(svd["conv"].q)
    # no axis of inputs or outputs is singled out, as it would be by an SVD of zero
    assert np.abs(p).max() < 0.95 and np.abs(q).max() < 0.95


def test_triplets_of_a_trained_adapter_have_its_delta() -> None:
    x = with_head(make(0))
    svd = adalora.from_factors(x)
    back = adalora.to_factors(svd)
    np.testing.assert_allclose(adalora.orthogonality_penalty(svd), 0, atol=1e-9)
    assert svd[HEAD] is x[HEAD] and back[HEAD] is x[HEAD]
    for path in SHAPES:
        assert_near(formed(back[path]), formed(x[path]))
        assert_near(1.5 * svd[path].values, singular_values(x[path])[..., :3])


def random_svd(seed: int) -> Any:
    """Triplets that are not orthonormal, with values of both signs."""
    random = np.random.default_rng(seed)
    svd = adalora.init(jax.random.key(seed), make(seed))
    new = lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype)
    return jax.tree.map(new, svd)


def sides(entry: Any) -> tuple[np.ndarray, np.ndarray]:
    """`p` and `q` as matrices, with the batch axes in front, in float64."""
    n, rank = len(entry.axes.batch), entry.values.shape[-1]
    p, q = np.asarray(entry.p, np.float64), np.asarray(entry.q, np.float64)
    return p.reshape(*p.shape[:n], -1, rank), q.reshape(*q.shape[: n + 1], -1)


def test_the_penalty_is_equation_4() -> None:
    svd, wanted = random_svd(0), 0.0
    for entry in svd.values():
        p, q = sides(entry)
        wanted += ((np.swapaxes(p, -1, -2) @ p - np.eye(3)) ** 2).sum()
        wanted += ((q @ np.swapaxes(q, -1, -2) - np.eye(3)) ** 2).sum()
    found = adalora.orthogonality_penalty(with_head(svd))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_delta_of_triplets_is_equation_3() -> None:
    svd = random_svd(0)
    for path, factors in adalora.to_factors(svd).items():
        p, q = sides(svd[path])
        wanted = 1.5 * p @ (np.asarray(svd[path].values)[..., None] * q)
        assert_near(as_matrix(formed(factors), AXES[path]), wanted)


# --- importance ---


def test_importance_is_equations_7_to_11() -> None:
    state = adalora.start(with_head(random_svd(0)))
    average: Any = {path: [0.0] * 3 for path in SHAPES}
    spread: Any = {path: [0.0] * 3 for path in SHAPES}
    step = jax.jit(
        lambda *x: adalora.update(*x, sensitivity_decay=0.8, uncertainty_decay=0.7)
    )
    for i in range(1, 4):
        svd, grads = random_svd(i), random_svd(10 + i)
        state = step(state, with_head(svd), with_head(grads))
        for path in SHAPES:
            parts = zip(
                (*sides(svd[path]), svd[path].values),
                (*sides(grads[path]), grads[path].values),
                strict=True,
            )
            for k, (w, grad) in enumerate(parts):
                now = np.abs(np.asarray(w, np.float64) * np.asarray(grad))
                average[path][k] = 0.8 * average[path][k] + 0.2 * now
                apart = np.abs(now - average[path][k])
                spread[path][k] = 0.7 * spread[path][k] + 0.3 * apart
    found = adalora.scores(state)
    assert set(found) == set(SHAPES)
    for path in SHAPES:
        p, q, values = (i * u for i, u in zip(average[path], spread[path], strict=True))
        assert_near(found[path], values + p.mean(axis=-2) + q.mean(axis=-1))


def test_a_step_may_reuse_the_importance_from_the_start() -> None:
    svd = random_svd(0)
    step = jax.jit(lambda state: adalora.update(state, svd, svd), donate_argnums=0)
    state = step(adalora.start(svd))
    assert all(jnp.any(v != 0) for v in jax.tree.leaves(step(state)))


def test_a_budget_keeps_exactly_the_highest_scores() -> None:
    random = np.random.default_rng(0)
    scores = {"v": random.normal(size=(3, 2)), "w": random.normal(size=4)}
    on_device = {path: jnp.asarray(s, jnp.float32) for path, s in scores.items()}
    allocate = jax.jit(adalora.allocate)
    flat = np.concatenate([s.ravel() for s in scores.values()])
    for budget in (0, 1, 4, 10, 12):
        kept = allocate(on_device, budget)
        least = np.sort(flat)[::-1][:budget][-1:]
        for path, s in scores.items():
            assert kept[path].shape == s.shape
            np.testing.assert_array_equal(kept[path], s >= (*least, np.inf)[0])
    ties = adalora.allocate({"v": jnp.zeros(3), "w": jnp.zeros(2)}, 4)
    assert sum(int(k.sum()) for k in ties.values()) == 4
    assert adalora.allocate({}, 3) == {}


def test_the_budget_falls_as_in_peft() -> None:
    def peft(step: int) -> int:  # RankAllocator.budget_schedule
        if step <= 20:
            return 48
        if step > 100 - 30:
            return 12
        left = 1 - (step - 20) / (100 - 30 - 20)
        return int((48 - 12) * (left**3) + 12)

    given: Any = {"first": 48, "last": 12, "warmup": 20, "cooldown": 30, "steps": 100}
    sizes = [adalora.budget(step, **given) for step in range(110)]
    assert sizes == [peft(step) for step in range(110)]
    traced = jax.jit(lambda step: adalora.budget(step, **given))(jnp.arange(110))
    assert traced.dtype == jnp.int32
    assert np.abs(np.asarray(traced) - sizes).max() <= 1  # float32 at an edge
    with pytest.raises(ValueError, match="below steps"):
        adalora.budget(1, **given | {"warmup": 70})
    with pytest.raises(ValueError, match="falls from first to last"):
        adalora.budget(1, **given | {"last": 50})
    with pytest.raises(ValueError, match=r"update\(uncertainty_decay=\.\.\.\)"):
        adalora.update(adalora.start({}), {}, {}, uncertainty_decay=1.0)


# --- masks and pruning ---


def some_kept() -> dict[str, np.ndarray]:
    """A mask that keeps 2, 1 and 3 triplets of a stack, 1 of the dense kernel."""
    stack = np.array([[True, False, True], [False, False, True], [True] * 3])
    dense = np.array([False, True, False])
    return {"layer/w": dense, "layer/stack": stack, "conv": np.zeros(3, bool)}


def test_pruning_drops_what_is_masked_and_changes_nothing_else() -> None:
    svd, kept = random_svd(0), some_kept()
    masked = adalora.masked(with_head(svd), kept)
    for path in SHAPES:
        values = np.asarray(svd[path].values)
        np.testing.assert_array_equal(
            masked[path].values, np.where(kept[path], values, 0)
        )
        np.testing.assert_array_equal(masked[path].p, svd[path].p)
    for pruned in (adalora.prune(masked), adalora.prune(with_head(svd), kept)):
        assert set(pruned) == {"layer/w", "layer/stack", HEAD}
        assert (pruned["layer/w"].rank, pruned["layer/stack"].rank) == (1, 3)
        for path in ("layer/w", "layer/stack"):
            assert_near(formed(pruned[path]), formed(adalora.to_factors(masked)[path]))
        a, b = (np.asarray(x) for x in jax.tree.leaves(pruned["layer/w"]))
        p, q = sides(svd["layer/w"])
        ratio = np.linalg.norm(p[:, 1]) / np.linalg.norm(q[1])
        assert np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(ratio, rel=1e-5)


def test_masks_have_the_paths_of_the_triplets() -> None:
    svd, kept = random_svd(0), some_kept()
    del kept["conv"]
    for call in (adalora.masked, adalora.prune):
        with pytest.raises(jlora.AdapterError, match=r"\['conv'\] is in one"):
            call(svd, kept)
    with pytest.raises(TypeError, match=r"rank of '.*' would depend"):
        jax.jit(adalora.prune)(svd)
    with pytest.raises(jlora.AdapterError, match=r"'layer/w' has rank 6 and sides"):
        adalora.init(jax.random.key(0), make(0, rank=6))
    for call in (adalora.from_factors, lambda x: adalora.init(jax.random.key(0), x)):
        with pytest.raises(jlora.UnsupportedFeatureError, match="'rows' is of type"):
            call(make(0) | {"rows": "of a table"})


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_triplets_live_on_a_mesh(kind: AxisType) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    specs = P("x", "y", None), P("x", None, "y")
    axes = jlora.KernelAxes((0,), (1,), (2,))
    random = np.random.default_rng(0)
    place = lambda shape, spec: jax.device_put(
        jnp.asarray(random.normal(size=shape), jnp.float32), NamedSharding(mesh, spec)
    )
    shapes = axes.factor_shapes((2, 4, 6), 3)
    arrays = [place(shape, spec) for shape, spec in zip(shapes, specs, strict=True)]
    x = {"w": jlora.LoraFactors(*arrays, axes, 1.5)}
    svd = adalora.from_factors(x)
    assert_near(formed(adalora.to_factors(svd)["w"]), formed(x["w"]))

    @jax.jit
    def step(svd: Any) -> Any:
        grads = jax.grad(adalora.orthogonality_penalty)(svd)
        grads = jax.tree.map(lambda g: g + 1, grads)
        state = adalora.update(adalora.start(svd), svd, grads)
        return adalora.masked(svd, adalora.allocate(adalora.scores(state), 4))

    found = step(svd)
    if kind is AxisType.Explicit:
        assert tuple(found["w"].p.sharding.spec) == tuple(specs[0])
        new = adalora.init(jax.random.key(0), x)["w"]
        assert tuple(new.q.sharding.spec) == tuple(specs[1])
    pruned = adalora.prune(found)["w"]
    assert (np.asarray(found["w"].values) != 0).sum() == 4 and pruned.rank < 4
    assert_near(formed(pruned), formed(adalora.to_factors(found)["w"]))


# --- the whole ---


def test_the_budget_goes_where_the_rank_is() -> None:
    """Two layers whose true updates have rank 1 and rank 4 share five triplets."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    fn = lambda params, x: (x @ params["one"], x @ params["four"])
    params = {"one": normal(9, 8), "four": normal(9, 7)}
    turned = lambda *shape: jnp.linalg.qr(normal(*shape)).Q
    values = jnp.array([[4.0, 3.5, 3.0, 2.5]])
    update = {
        "one": 4 * turned(9, 1) @ turned(8, 1).T,
        "four": values * turned(9, 4) @ turned(7, 4).T,
    }
    x = normal(64, 9)
    wanted = fn(jax.tree.map(jnp.add, params, update), x)
    lora = jlora.lora(fn, jlora.LoraConfig(rank=5, alpha=5.0))
    svd = adalora.init(jax.random.key(1), lora.init(jax.random.key(0), params, x))
    tx, steps = optax.adam(0.02), 1000
    plan: Any = {"first": 10, "last": 5, "warmup": 300, "cooldown": 300, "steps": steps}

    def loss(svd: Any) -> jax.Array:
        out = lora.apply(params, adalora.to_factors(svd), x)
        errors = [((o - w) ** 2).mean() for o, w in zip(out, wanted, strict=True)]
        return sum(errors, 0.1 * adalora.orthogonality_penalty(svd))

    def step(carry: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        svd, opt, state = carry
        error, grads = jax.value_and_grad(loss)(svd)
        updates, opt = tx.update(grads, opt)
        new = adalora.update(state, svd, grads)
        svd = optax.apply_updates(svd, updates)
        cooling = i >= plan["steps"] - plan["cooldown"]
        state = jax.tree.map(lambda a, b: jnp.where(cooling, a, b), state, new)
        kept = adalora.allocate(adalora.scores(state), adalora.budget(i, **plan))
        return (adalora.masked(svd, kept), opt, state), error

    carry = svd, tx.init(svd), adalora.start(svd)
    (svd, _, _), errors = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps)))(
        carry
    )
    adapter = adalora.prune(svd)
    assert {path: f.rank for path, f in adapter.items()} == {"one": 1, "four": 4}
    assert errors[-1] < 1e-3 * errors[0]
    for path, true in update.items():
        np.testing.assert_allclose(jlora.delta(adapter[path]), true, atol=0.1)
    out, merged = lora.apply(params, adapter, x), fn(jlora.merge(params, adapter), x)
    for found, expected in zip(out, merged, strict=True):
        assert_near(found, np.asarray(expected, np.float64))


@pytest.mark.parametrize("rank", [np.int64(3), np.uint8(3), 3])
def test_ranks_of_a_sweep_may_be_numpys(rank: int) -> None:
    config = jlora.LoraConfig("w", rank=rank)
    assert type(config.rank) is int and config == jlora.LoraConfig("w", rank=3)


@pytest.mark.parametrize("rank", [3.0, True, np.float32(3), "3", None])
def test_ranks_that_are_no_integers(rank: object) -> None:
    with pytest.raises(TypeError, match="must be an int"):
        jlora.LoraConfig("w", rank=rank)  # pyright: ignore[reportArgumentType]

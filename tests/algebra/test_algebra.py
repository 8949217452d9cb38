"""scale, add, subtract, truncate: laws of the deltas, which NumPy forms in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import factored
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import AXES, SHAPES, assert_near, make
from factored import as_matrix, factored_kernels, formed, singular_values
from hypothesis import Phase, given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")
laws = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
)
seeds = st.integers(0, 2**31)
scalings = st.sampled_from([0.25, 1.0, 1.7, 3.0])
ranks = st.integers(1, 3)


def of_rank(kernel: Any, rank: int) -> Any:
    """The drawn kernel with factors of another rank."""
    *names, size = kernel
    return (*names, size | {"r": rank})


def factors_of(kernel: Any, scaling: float, seed: int) -> Any:
    """Factors on the host, where nothing is compiled."""
    return jax.tree.map(np.asarray, factored.factors_of(kernel, scaling, seed))


# --- laws ---


@laws
@given(factored_kernels(), ranks, scalings, scalings, seeds)
def test_the_delta_of_a_sum_is_the_sum_of_the_deltas(kernel, rank, s1, s2, seed):
    x = factors_of(kernel, s1, seed)
    y = factors_of(of_rank(kernel, rank), s2, seed + 1)
    total = jlora.add({"w": x}, {"w": y})["w"]
    assert total.rank == x.rank + y.rank
    assert total.scaling == (s1 if s1 == s2 else 1.0)
    assert_near(formed(total), formed(x) + formed(y))
    less = jlora.subtract({"w": x}, {"w": y})["w"]
    assert less.scaling == total.scaling
    assert_near(
        formed(less), formed(x) - formed(y), np.abs(formed(x)) + np.abs(formed(y))
    )


@laws
@given(factored_kernels(), scalings, scalings, seeds)
def test_sums_commute_and_associate(kernel, s1, s2, seed):
    x, y, z = (
        {"w": factors_of(kernel, s, seed + i)} for i, s in enumerate((s1, s2, 1.0))
    )
    total = formed(jlora.add(x, y, z)["w"])
    assert_near(formed(jlora.add(z, jlora.add(y, x))["w"]), total)
    assert_near(formed(jlora.add(jlora.add(x, y), z)["w"]), total)


@laws
@given(factored_kernels(), scalings, seeds)
def test_what_is_taken_from_itself_is_zero(kernel, scaling, seed):
    x = {"w": factors_of(kernel, scaling, seed)}
    gone = formed(jlora.subtract(x, x)["w"])
    assert_near(gone, np.zeros(gone.shape), formed(x["w"]))


@laws
@given(factored_kernels(), scalings, st.floats(-4, 4), seeds)
def test_scaling_distributes_over_sums(kernel, scaling, factor, seed):
    x = {"w": factors_of(kernel, scaling, seed)}
    y = {"w": factors_of(kernel, 0.5, seed + 1)}
    assert_near(formed(jlora.scale(x, factor)["w"]), factor * formed(x["w"]))
    total = jlora.add(jlora.scale(x, factor), jlora.scale(y, factor))
    both = jlora.scale(jlora.add(x, y), factor)
    assert_near(formed(total["w"]), factor * (formed(x["w"]) + formed(y["w"])))
    assert_near(formed(both["w"]), formed(total["w"]))


@settings(laws, max_examples=4)
@given(factored_kernels(), scalings, scalings, seeds)
def test_merging_a_sum_is_merging_twice(kernel, s1, s2, seed):
    x, y = (factors_of(kernel, s, seed + i) for i, s in enumerate((s1, s2)))
    params = {"w": np.random.default_rng(seed).normal(size=x.kernel_shape)}
    params = {"w": jnp.asarray(params["w"], jnp.float32)}
    once = jlora.merge(params, jlora.add({"w": x}, {"w": y}))
    twice = jlora.merge(jlora.merge(params, {"w": x}), {"w": y})
    assert_near(once["w"], np.asarray(twice["w"]))


@laws
@given(factored_kernels(), scalings, ranks, seeds)
def test_a_truncation_is_the_best_of_its_rank(kernel, scaling, rank, seed):
    x = factors_of(of_rank(kernel, 4), scaling, seed)
    values = singular_values(x)
    small = jlora.truncate({"w": x}, rank)["w"]
    assert small.rank == min(rank, 4, values.shape[-1])
    assert (small.scaling, small.axes) == (x.scaling, x.axes)
    error = as_matrix(formed(x) - formed(small), x.axes)
    largest = values.max()
    left = np.linalg.norm(error, axis=(-2, -1))
    wanted = np.linalg.norm(values[..., rank:], axis=-1)
    np.testing.assert_allclose(left, wanted, rtol=0, atol=1e-5 * largest)
    spectral = np.linalg.norm(error, 2, axis=(-2, -1))
    wanted = np.append(values, 0 * values[..., :1], -1)[..., small.rank]
    np.testing.assert_allclose(spectral, wanted, rtol=0, atol=1e-5 * largest)


@laws
@given(factored_kernels(), scalings, seeds)
def test_a_truncation_to_the_full_rank_changes_no_delta(kernel, scaling, seed):
    x = factors_of(of_rank(kernel, 3), scaling, seed)
    assert_near(formed(jlora.truncate({"w": x}, 3)["w"]), formed(x))
    assert_near(formed(jlora.truncate({"w": x}, energy=1.0)["w"]), formed(x))


# --- scale ---


def test_a_traced_factor_scales_b_and_compiles_once() -> None:
    x, compiled = make(0), []

    @jax.jit
    def scaled(adapter: Any, factor: Any) -> Any:
        compiled.append(1)
        return jlora.scale(adapter, factor)

    for factor in (0.5, -2.0):
        found = scaled(x, factor)
        for path in x:
            assert found[path].scaling == x[path].scaling
            assert_near(formed(found[path]), factor * formed(x[path]))
    assert len(compiled) == 1


@pytest.mark.parametrize("array", [jnp.float32, jnp.bfloat16, np.array])
def test_a_factor_near_1_is_not_lost_in_half_precision(array: Any) -> None:
    factor = array(1.001) if array is not jnp.bfloat16 else array(0.625)
    x = make(0, dtype=jnp.bfloat16)
    found = jlora.scale(x, factor)["conv"]
    assert (found.a.dtype, found.b.dtype) == (jnp.bfloat16, jnp.float32)
    assert_near(formed(found), float(factor) * formed(x["conv"]))


def test_a_number_changes_the_scaling_and_no_array() -> None:
    x = make(0)
    for factor in (2, -0.5, np.float32(0.25), np.float64(3)):
        found = jlora.scale(x, factor)["conv"]
        assert type(found.scaling) is float and found.scaling == 1.5 * factor
        assert found.a is x["conv"].a and found.b is x["conv"].b


@pytest.mark.parametrize("factor", [float("nan"), "2", jnp.ones(3), jnp.array(True)])
def test_what_is_no_number_scales_nothing(factor: Any) -> None:
    with pytest.raises(ValueError, match=r"jlora\.scale\(factor=\.\.\.\)` must be a"):
        jlora.scale(make(0), factor)


# --- add ---


def test_paths_of_one_adapter_alone_stay_as_they_are() -> None:
    x, y = make(0), make(1)
    del x["conv"], y["layer/w"]
    total = jlora.add(x, y)
    assert list(total) == ["layer/w", "layer/stack", "conv"]
    assert total["layer/w"] is x["layer/w"] and total["conv"] is y["conv"]
    less = jlora.subtract(x, y)
    assert_near(formed(less["conv"]), -formed(y["conv"]))


def test_scalings_are_folded_without_a_loss_in_half_precision() -> None:
    x, y = make(0, scaling=1.7, dtype=jnp.bfloat16), make(1, dtype=jnp.bfloat16)
    same = jlora.add(x, x)["conv"]
    assert (same.b.dtype, same.scaling) == (jnp.bfloat16, 1.7)
    total = jlora.add(x, y)["conv"]
    assert (total.a.dtype, total.b.dtype) == (jnp.bfloat16, jnp.float32)
    assert_near(formed(total), formed(x["conv"]) + formed(y["conv"]))
    mixed = jlora.add(make(0), make(1, dtype=jnp.bfloat16))["conv"]
    assert mixed.a.dtype == mixed.b.dtype == jnp.float32


def test_the_function_of_a_sum_is_that_of_both_deltas(getkey: Any) -> None:
    fn = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"]
    params = {"w": jnp.ones((5, 7)) / 5, "v": jnp.ones((7, 3)) / 7}
    x = jax.random.normal(getkey(), (2, 5))
    adapters = []
    for rank in (2, 3):
        lora = jlora.lora(fn, jlora.LoraConfig(rank=rank, alpha=1.5))
        adapter = lora.init(getkey(), params, x)
        random = lambda f: dataclasses.replace(
            f, b=jax.random.normal(getkey(), f.b.shape)
        )
        adapters.append({path: random(factors) for path, factors in adapter.items()})
    sums = {p: params[p] + sum(formed(y[p]) for y in adapters) for p in params}
    out = lora.apply(params, jlora.add(*adapters), x)
    assert_near(out, np.tanh(np.asarray(x) @ sums["w"]) @ sums["v"])


def test_unlike_kernels_are_named_together() -> None:
    x, y = make(0), make(1)
    turned = jlora.KernelAxes((), (1,), (0,))
    w, stack = x["layer/w"], x["layer/stack"]
    y["layer/w"] = jlora.LoraFactors(jnp.ones((7, 2)), jnp.ones((2, 5)), turned, 1.0)
    y["layer/stack"] = dataclasses.replace(stack, a=jnp.ones((3, 8, 3)))
    assert y["layer/w"].kernel_shape == w.kernel_shape
    with pytest.raises(jlora.AdapterError, match=r"add` got unlike") as told:
        jlora.add(x, y)
    assert "'layer/w'" in str(told.value) and "(3, 8, 2, 6)" in str(told.value)
    assert "'conv'" not in str(told.value)


CALLS: dict[str, Callable[[Any], Any]] = {
    "scale": lambda x: jlora.scale(x, 2.0),
    "add": lambda x: jlora.add(make(0), x),
    "subtract": lambda x: jlora.subtract(make(0), x),
    "truncate": lambda x: jlora.truncate(x, 1),
    "combine": lambda x: jlora.combine([make(0), x], [1, 1]),
    "spectrum": jlora.spectrum,
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_pair_of_factors_is_refused_by_name(name: str) -> None:
    conv = make(0)["conv"]
    x = make(1) | {
        "head": jnp.ones((5, 2)),
        "conv": dataclasses.replace(conv, magnitude=jnp.ones(1)),
        "rows": "of a table",
    }
    with pytest.raises(jlora.UnsupportedFeatureError) as told:
        CALLS[name](x)
    lines = str(told.value).splitlines()
    assert f"`jlora.{name}`" in lines[0] and len(lines) == 4
    for part in ("'head' (5, 2) is trained whole", "'conv' has a magn", "'rows' is of"):
        assert part in str(told.value)
    with pytest.raises(TypeError, match=rf"jlora\.{name}` takes"):
        CALLS[name]([1])


def test_nothing_has_no_sum() -> None:
    with pytest.raises(ValueError, match="needs at least one adapter"):
        jlora.add()


# --- truncate ---


def test_factors_of_a_truncation_are_balanced() -> None:
    for path, small in jlora.truncate(make(0), 2).items():
        n_batch = len(AXES[path].batch)
        a = np.asarray(small.a, np.float64)
        a = a.reshape(*a.shape[:n_batch], -1, 2)
        b = np.asarray(small.b, np.float64)
        b = b.reshape(*b.shape[: n_batch + 1], -1)
        values = singular_values(make(0)[path])[..., :2] / small.scaling
        wanted = values[..., None] * np.eye(2)
        assert_near(np.swapaxes(a, -1, -2) @ a, wanted)
        assert_near(b @ np.swapaxes(b, -1, -2), wanted)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_the_rank_of_an_energy_is_the_least_that_all_slices_need(energy: float) -> None:
    x = make(0, rank=4)
    for path, small in jlora.truncate(x, energy=energy).items():
        squares = singular_values(x[path]) ** 2
        shares = np.cumsum(squares, -1) / squares.sum(-1, keepdims=True)
        needed = (shares < energy * (1 - 1e-7)).sum(-1).max() + 1
        assert small.rank == min(needed, 4)


def test_a_delta_of_zero_keeps_a_rank_of_one() -> None:
    zero = {p: dataclasses.replace(f, b=0 * f.b) for p, f in make(0).items()}
    for path, small in jlora.truncate(zero, energy=0.9).items():
        assert small.rank == 1
        np.testing.assert_array_equal(jlora.delta(small), np.zeros(SHAPES[path]))


def test_truncation_is_jitted_by_rank_but_not_by_energy() -> None:
    x = make(0)
    assert_close(
        jax.jit(lambda x: jlora.delta(jlora.truncate(x, 2)["conv"]))(x),
        jlora.delta(jlora.truncate(x, 2)["conv"]),
        1e-5,
    )
    with pytest.raises(TypeError, match=r"rank of '.*' would depend"):
        jax.jit(lambda x: jlora.truncate(x, energy=0.9))(x)


def test_truncation_keeps_dtypes_and_the_side_of_the_host() -> None:
    half = jlora.truncate(make(0, dtype=jnp.bfloat16), 2)["conv"]
    assert half.a.dtype == half.b.dtype == jnp.bfloat16
    host = jax.tree.map(np.asarray, make(0))
    small = jlora.truncate(host, 2)["conv"]
    assert isinstance(small.a, np.ndarray) and small.a.dtype == np.float32
    assert_near(formed(small), formed(jlora.truncate(make(0), 2)["conv"]))


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "either `rank` or `energy`"),
        ({"rank": 2, "energy": 0.9}, "either `rank` or `energy`"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 1.5}, "must be an int"),
        ({"energy": 1.5}, "at most 1"),
    ],
)
def test_a_rank_or_an_energy_is_needed(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        jlora.truncate(make(0), **given)


# --- meshes ---


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_adapters_on_a_mesh_stay_there(kind: AxisType) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))
    axes = jlora.KernelAxes((0,), (1, 2), (3,))
    specs = P("x", "y", None, None), P("x", None, "y")
    shapes = axes.factor_shapes((2, 4, 3, 6), 3)

    def place(seed: int) -> tuple[Any, Any]:
        random = np.random.default_rng(seed)
        arrays = [jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes]
        pairs = zip(arrays, specs, strict=True)
        laid = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in pairs]
        on_one, on_all = (jlora.LoraFactors(*v, axes, 1.5) for v in (arrays, laid))
        return {"w": on_one}, {"w": on_all}

    (x, x_laid), (y, y_laid) = place(0), place(1)
    prune = {"method": "magnitude_prune", "density": 0.5}
    ties = {"method": "dare_ties", "density": 0.5, "key": jax.random.key(0)}

    def calls(x: Any, y: Any) -> Any:
        return {
            "truncate": jlora.truncate(x, 2),
            "add": jlora.add(x, jlora.scale(y, 2.0)),
            "prune": jlora.combine([x, y], [1.0, -0.5], **prune),
            "ties": jlora.combine([x, y], [1.0, -0.5], **ties),
        }

    wanted, found = jax.jit(calls)(x, y), jax.jit(calls)(x_laid, y_laid)
    for name, adapter in found.items():
        assert_near(formed(adapter["w"]), formed(wanted[name]["w"]))
        if kind is AxisType.Explicit:
            for factor, spec in zip(
                (adapter["w"].a, adapter["w"].b), specs, strict=True
            ):
                assert tuple(factor.sharding.spec) == tuple(spec)
    eager = jlora.truncate(x_laid, 2)["w"]
    assert_near(formed(eager), formed(wanted["truncate"]["w"]))
    assert_near(jlora.spectrum(x_laid)["w"], singular_values(x["w"])[:, :3])

"""`combine`: exact sums, and PEFT's methods against a reference in NumPy and PEFT."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import AXES, assert_near, make
from factored import formed
from paths import ORACLE
from torch_python import oracle_python

import jlora
from jlora._jax.keys import key_of

pytestmark = pytest.mark.usefixtures("fast_compile")
WORKER = ORACLE / "combine_adapters.py"
ROUGH = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
WEIGHTS = (0.7, -1.3, 0.4)
SCALINGS = (1.5, 0.5, 2.0)
KEY = jax.random.key(7)


def options(method: str) -> dict[str, Any]:
    """What a method needs beside the weights."""
    density = {} if method == "linear" else {"density": 0.6}
    return density | ({"key": KEY} if "dare" in method else {})


def adapters() -> list[Any]:
    """Three adapters of equal ranks and of different scalings."""
    found = [make(i, scaling=scaling) for i, scaling in enumerate(SCALINGS)]
    del found[1]["conv"]
    return found


# --- the reference ---


def mask(path: str, side: str, number: int, shape: Any, density: float) -> np.ndarray:
    """What the documented key of an adapter draws."""
    key = jax.random.fold_in(key_of(KEY, f"{path}/{side}"), number)
    return np.asarray(jax.random.bernoulli(key, density, shape))


def largest(t: np.ndarray, density: float) -> np.ndarray:
    """The int(density·n) largest values, the others zero."""
    kept = np.zeros(t.size)
    kept[np.argsort(-np.abs(t).ravel())[: int(density * t.size)]] = 1
    return t * kept.reshape(t.shape)


def merged(ts: Sequence[np.ndarray], ws: Sequence[float], sign: str) -> np.ndarray:
    """Position by position, as the papers say it; no election if `sign` is empty."""
    out = np.zeros(ts[0].shape)
    for where in np.ndindex(*out.shape):
        values = np.array([t[where] for t in ts])
        terms = np.array(ws) * values
        if not sign:
            out[where] = terms.sum()
            continue
        votes = values if sign == "total" else np.sign(values)
        elected = 1 if votes.sum() >= 0 else -1
        agree = np.sign(values) == elected
        out[where] = terms[agree].sum() / max(agree.sum(), 1)
    return out


def reference(method: str, found: list[Any], path: str, sign: str = "total") -> Any:
    """The factors `a` and `b` of one path, slice by slice."""
    own = {i: x[path] for i, x in enumerate(found) if path in x}
    sides = []
    for side in "ab":
        tensors = []
        for i, factors in own.items():
            t = np.asarray(getattr(factors, side), np.float64)
            if "dare" in method:
                t = t * mask(path, side, i, t.shape, 0.6) / 0.6
            elif method != "linear":
                slices = t if AXES[path].batch else [t]
                t = np.stack([largest(x, 0.6) for x in slices]).reshape(t.shape)
            tensors.append(t)
        products = [WEIGHTS[i] * f.scaling for i, f in own.items()]
        roots = [abs(p) ** 0.5 * (np.sign(p) if side == "a" else 1) for p in products]
        sides.append(merged(tensors, roots, sign if "ties" in method else ""))
    return sides


# --- sums ---


def test_a_sum_is_that_of_the_weighted_deltas() -> None:
    found = [make(i, 2 + i, s) for i, s in enumerate(SCALINGS)]
    total = jlora.combine(found, WEIGHTS)
    traced = jax.jit(jlora.combine)(found, jnp.asarray(WEIGHTS))
    for path in found[0]:
        parts = [w * formed(x[path]) for w, x in zip(WEIGHTS, found, strict=True)]
        assert total[path].rank == 2 + 3 + 4
        assert_near(formed(total[path]), sum(parts))
        assert_near(formed(traced[path]), sum(parts))
    one = jlora.combine([found[0]] * 2, [0.5, 0.5])["conv"]
    assert one.scaling == 0.75


def test_linear_is_no_sum_of_deltas() -> None:
    x, y = make(0), make(1)
    rough = jlora.combine([x, y], [1.0, 1.0], method="linear")["conv"]
    a, b = x["conv"].a + y["conv"].a, x["conv"].b + y["conv"].b
    assert_near(formed(rough), 1.5 * np.tensordot(a, np.asarray(b, np.float64), 1))
    off = formed(rough) - formed(x["conv"]) - formed(y["conv"])
    assert np.abs(off).max() > 1
    # of one adapter alone it is that adapter, with the sign that the weight has
    for weight in (1.0, -0.5):
        alone = jlora.combine([x], [weight], method="linear")["conv"]
        assert_near(formed(alone), weight * formed(x["conv"]))


def test_a_sum_of_half_precision_is_exact_with_weights_of_any_kind() -> None:
    found = [make(i, dtype=jnp.bfloat16) for i in range(3)]
    wanted = sum(w * formed(x["conv"]) for w, x in zip(WEIGHTS, found, strict=True))
    for weights in (WEIGHTS, np.asarray(WEIGHTS), jnp.asarray(WEIGHTS)):
        assert_near(formed(jlora.combine(found, weights)["conv"]), wanted)


# --- the rough methods ---


@pytest.mark.parametrize("method", ROUGH)
def test_a_method_is_its_reference(method: str) -> None:
    found = adapters()
    combined = jlora.combine(found, WEIGHTS, method=method, **options(method))
    traced = jax.jit(
        lambda x, w: jlora.combine(x, w, method=method, **options(method))
    )(found, jnp.asarray(WEIGHTS))
    assert set(combined) == set(AXES)
    for path, factors in combined.items():
        a, b = reference(method, found, path)
        assert factors.scaling == 1.0 and factors.axes == AXES[path]
        for result in (factors, traced[path]):
            assert_near(result.a, a)
            assert_near(result.b, b)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_signs_are_also_elected_by_number(method: str) -> None:
    found = adapters()
    given = options(method) | {"majority": "frequency"}
    factors = jlora.combine(found, WEIGHTS, method=method, **given)["layer/stack"]
    a, b = reference(method, found, "layer/stack", "frequency")
    assert_near(factors.a, a)
    assert_near(factors.b, b)
    total, _ = reference(method, found, "layer/stack")
    assert np.abs(total - a).max() > 0.1


def test_masks_are_of_path_factor_and_adapter() -> None:
    x = {p: make(0)["layer/w"] for p in ("one", "two")}
    given: Any = {"method": "dare_linear", "density": 0.5, "key": KEY}
    found = jlora.combine([x, x], [1.0, 0.0], **given)
    other = jlora.combine([x, x], [0.0, 1.0], **given)
    kept = {
        (np.asarray(f.a) != 0).tobytes() for f in (*found.values(), *other.values())
    }
    assert len(kept) == 4
    alone = jlora.combine([{"one": x["one"]}] * 2, [1.0, 0.0], **given)
    np.testing.assert_array_equal(alone["one"].a, found["one"].a)


def test_dropping_keeps_the_mean() -> None:
    x = {"w": make(0)["layer/w"]}

    @jax.jit
    @jax.vmap
    def dropped(key: jax.Array) -> jax.Array:
        rough = jlora.combine([x], [1.0], method="dare_linear", density=0.5, key=key)
        return rough["w"].a

    mean = dropped(jax.random.split(KEY, 4000)).mean(axis=0)
    wanted = np.sqrt(1.5) * np.asarray(x["w"].a)
    np.testing.assert_allclose(mean, wanted, atol=0.1)


def test_a_density_of_one_drops_nothing() -> None:
    found = adapters()
    for method in ("magnitude_prune", "dare_linear"):
        given: Any = options(method) | {"density": 1}
        whole = jlora.combine(found, WEIGHTS, method=method, **given)["layer/w"]
        linear = jlora.combine(found, WEIGHTS, method="linear")["layer/w"]
        assert_near(whole.a, np.asarray(linear.a))


def test_the_dtype_of_the_factors_stays() -> None:
    found = [make(0, dtype=jnp.bfloat16), make(1, dtype=jnp.bfloat16)]
    rough = jlora.combine(found, [1, 1], method="ties", density=0.5)["conv"]
    assert rough.a.dtype == rough.b.dtype == jnp.bfloat16


# --- arguments ---


@pytest.mark.parametrize(
    "weights, given, said",
    [
        ([1], {}, "2 adapters and 1 weights"),
        ([1, float("inf")], {}, r"weights=\.\.\.\)\[1\]` must be a finite number"),
        ([1, 1], {"method": "svd"}, r"must be one of \('sum', 'linear'"),
        ([1, 1], {"density": 0.5}, "takes no `density`"),
        ([1, 1], {"method": "linear", "key": KEY}, "takes no `key`"),
        ([1, 1], {"method": "ties"}, "needs `density`"),
        ([1, 1], {"method": "dare_ties", "density": 0.5}, "needs `key`"),
        ([1, 1], {"method": "ties", "density": 0.0}, "above 0"),
        ([1, 1], {"majority": "frequency"}, "alone"),
        ([1, 1], {"method": "ties", "density": 1, "majority": "x"}, "majority"),
    ],
)
def test_arguments_are_checked(weights: Any, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        jlora.combine([make(0), make(1)], weights, **given)


def test_adapters_are_a_sequence_and_ranks_equal() -> None:
    with pytest.raises(TypeError, match="a sequence of adapters; got one mapping"):
        jlora.combine(make(0), [1])  # type: ignore[arg-type]
    x, y = make(0), make(1) | {"conv": make(1, rank=2)["conv"]}
    with pytest.raises(jlora.AdapterError, match="'conv' has rank 3 in 0, 2 in 1") as e:
        jlora.combine([x, y], [1, 1], method="linear")
    assert "layer/w" not in str(e.value)


# --- PEFT ---


@pytest.mark.oracle
def test_peft_combines_to_the_same_factors(tmp_path: Path) -> None:

    python = oracle_python()
    found = [{"w": x["layer/w"]} for x in adapters()]
    arrays = {}
    for i, x in enumerate(found):
        for side in "ab":
            factor = np.asarray(getattr(x["w"], side))
            arrays[f"{side}{i}"] = factor
            arrays[f"mask/{side}{i}"] = mask("w", side, i, factor.shape, 0.6)
    np.savez(tmp_path / "given.npz", **arrays)
    asked = {"weights": WEIGHTS, "scalings": SCALINGS, "density": 0.6, "methods": ROUGH}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [python, str(WORKER), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = np.load(tmp_path / "found.npz")
    for method in ROUGH:
        ours = jlora.combine(found, WEIGHTS, method=method, **options(method))["w"]
        assert_near(ours.a, told[f"{method}/a"])
        assert_near(ours.b, told[f"{method}/b"])
    assert_near(
        formed(jlora.combine(found, WEIGHTS)["w"]), told["cat/a"] @ told["cat/b"]
    )
    best = jlora.truncate(jlora.combine(found, WEIGHTS), 3)["w"]
    assert_near(formed(best), told["svd/a"] @ told["svd/b"])

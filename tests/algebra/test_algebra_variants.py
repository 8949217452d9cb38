"""Every operation of the algebra on every kind of entry: exact, or refused by name.

What an entry changes is written down in NumPy, in float64; what an operation returns is
merged, and compared with the kernel that the changes say.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relatives import RELATIVES
from variant_of_tests import OwnFactors

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")
ROWS, COLUMNS, COUNT = 6, 7, 3
SLICES, PICKED, TAKEN = ((0, 2), (3, 7)), (0, 2), (1, 4)
assert OwnFactors  # registers "own"

# --- kinds, and what each of them adds to its kernel ---

DENSE: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "slices": {"slices": SLICES},
    "slices_dora": {"slices": SLICES, "dora": True},
    "rows": {"rows": TAKEN},
    "full": {"full": True},
    "ia3_out": {"variant": "ia3"},
    "ia3_in": {"variant": "ia3", "scale_side": "in"},
    **{n: {"variant": n} for n in ("loha", "lora_fa", "lora_xs", "vera", "lokr")},
    "own": {"variant": "own"},
}
STACK: dict[str, dict[str, Any]] = {
    "layers": {"layers": PICKED},
    "layers_dora": {"layers": PICKED, "dora": True},
    "stack": {},
}
KINDS = [*DENSE, *STACK]
DORA = {"dora", "slices_dora", "layers_dora"}
SCALES = {"ia3_out", "ia3_in"}


def product(params: Any, x: Any) -> Any:
    return x @ params["w"]


def lookup(params: Any, x: Any) -> Any:
    return params["w"][jnp.ones(x.shape[:-1], int)] + 0 * x[..., :1]


def scanned(params: Any, x: Any) -> Any:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def model_of(kind: str) -> Callable[..., Any]:
    return scanned if kind in STACK else lookup if kind == "rows" else product


def random(seed: int, *shape: int) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32)


@functools.cache
def params_of(kind: str) -> Any:
    square = (COUNT, ROWS, ROWS) if kind in STACK else (ROWS, COLUMNS)
    return {"w": random(0, *square)}


@functools.cache
def lora_of(kind: str) -> jlora.Lora:
    own = (DENSE | STACK)[kind]
    return jlora.lora(model_of(kind), jlora.LoraConfig("w", rank=3, alpha=4.5, **own))


@functools.cache
def adapter_of(kind: str, seed: int) -> Any:
    """An adapter none of whose arrays is zero."""
    new = lora_of(kind).init(jax.random.key(0), params_of(kind), random(1, 4, ROWS))
    leaves, treedef = jax.tree.flatten(new)
    noise = [0.3 * random(seed + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    pairs = zip(leaves, noise, strict=True)
    return treedef.unflatten([leaf + one for leaf, one in pairs])


def wide(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


def change(kind: str, entry: Any) -> np.ndarray:
    """What an entry adds to its kernel, by the equation of its kind."""
    kernel = wide(params_of(kind)["w"])
    if kind == "full":
        return wide(entry) - kernel
    if kind in SCALES:
        one = wide(entry.scale) - 1
        return kernel * (one[:, None] if kind == "ia3_in" else one)
    total = np.zeros(kernel.shape)
    if kind == "rows":
        total[list(TAKEN)] = wide(entry.values) - kernel[list(TAKEN)]
        return total
    if kind in RELATIVES:
        return entry.scaling * wide(RELATIVES[kind](entry, *kernel.shape))
    a, b = wide(entry.a), wide(entry.b)
    if kind == "loha":
        return entry.scaling * (a @ b) * (wide(entry.a2) @ wide(entry.b2))
    if kind == "own":
        return entry.scaling * (a * wide(entry.d)) @ b
    if kind == "slices":
        (first, second), (third, last) = SLICES
        cut, rank = second - first, a.shape[-1] // 2
        total[:, first:second] = a[:, :rank] @ b[:, :cut]
        total[:, third:last] = a[:, rank:] @ b[:, cut:]
    elif kind == "layers":
        total[list(PICKED)] = a @ b
    else:
        total = a @ b
    return entry.scaling * total


# --- operations ---


def best(kind: str, whole: np.ndarray) -> np.ndarray:
    """The nearest change of rank 2: of each slice, each layer, or of the kernel."""
    if kind == "slices":
        parts = [slice(first, stop) for first, stop in SLICES]
        found = np.zeros(whole.shape)
        for part in parts:
            found[:, part] = best("lora", whole[:, part])
        return found
    u, s, v = np.linalg.svd(whole, full_matrices=False)
    return (u[..., :2] * s[..., None, :2]) @ v[..., :2, :]


Op = tuple[Callable[..., Any], Callable[..., np.ndarray]]
# From two adapters and the params; and from the changes of both.
SUMS: dict[str, Op] = {
    "scale": (lambda x, y, p: jlora.scale(x, -0.5, params=p), lambda _, x, y: -0.5 * x),
    "scale_by_array": (
        lambda x, y, p: jlora.scale(x, jnp.float32(0.25), params=p),
        lambda _, x, y: 0.25 * x,
    ),
    "add": (lambda x, y, p: jlora.add(x, y, params=p), lambda _, x, y: x + y),
    "subtract": (lambda x, y, p: jlora.subtract(x, y, params=p), lambda _, x, y: x - y),
    "less_nothing": (
        lambda x, y, p: jlora.subtract({}, x, params=p),
        lambda _, x, y: -x,
    ),
    "combine": (
        lambda x, y, p: jlora.combine([x, y], [0.25, -2], params=p),
        lambda _, x, y: 0.25 * x - 2 * y,
    ),
}
# Of one adapter, "linear" multiplies both factors by the root of the weight.
FACTORS: dict[str, Op] = {
    "linear": (
        lambda x, y, p: jlora.combine([x], [0.5], method="linear", params=p),
        lambda _, x, y: 0.5 * x,
    ),
    "truncate": (
        lambda x, y, p: jlora.truncate(x, 2, params=p),
        lambda kind, x, y: best(kind, x),
    ),
    "truncate_energy": (
        lambda x, y, p: jlora.truncate(x, energy=1.0, params=p),
        lambda _, x, y: x,
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def refusal(name: str, kind: str) -> str | None:
    """What is said of a kind that an operation has no meaning for, if so."""
    if kind in DORA:
        return r"'w' has a magnitude \(DoRA\), which scales W too"
    if name in SUMS:
        return None
    if kind in SCALES:
        return r"'w' is a scale of its kernel \(ia3\), no sum of W and two factors"
    return (
        r"'w' \(6, 7\) is trained whole and has no factors" if kind == "full" else None
    )


def merged(kind: str, adapter: Any) -> np.ndarray:
    return wide(jlora.merge(params_of(kind), adapter)["w"])


@each_kind
@pytest.mark.parametrize("name", [*SUMS, *FACTORS])
def test_an_operation_is_exact_or_refused(name: str, kind: str) -> None:
    run, expected = (SUMS | FACTORS)[name]
    x, y, params = adapter_of(kind, 10), adapter_of(kind, 20), params_of(kind)
    if told := refusal(name, kind):
        with pytest.raises(jlora.UnsupportedFeatureError, match=told):
            run(x, y, params)
        return
    found = run(x, y, params)
    total = expected(kind, *(change(kind, one["w"]) for one in (x, y)))
    np.testing.assert_allclose(
        merged(kind, found), wide(params["w"]) + total, rtol=0, atol=3e-5
    )
    if name != "truncate_energy":
        traced = jax.eval_shape(run, x, y, params)
        assert jax.tree.structure(traced) == jax.tree.structure(found)


@each_kind
def test_a_spectrum_is_that_of_the_change(kind: str) -> None:
    x, params = adapter_of(kind, 10), params_of(kind)
    if told := refusal("spectrum", kind):
        with pytest.raises(jlora.UnsupportedFeatureError, match=told):
            jlora.spectrum(x, params=params)
        return
    found = wide(jlora.spectrum(x, params=params)["w"])
    values = np.linalg.svd(change(kind, x["w"]), compute_uv=False)
    kept = min(found.shape[-1], values.shape[-1])
    np.testing.assert_allclose(found[..., :kept], values[..., :kept], atol=3e-5)
    assert np.abs(found[..., kept:]).max(initial=0) < 3e-5


@each_kind
def test_triplets_are_those_of_the_change(kind: str) -> None:
    x, tool = adapter_of(kind, 10), jlora.adalora
    if told := refusal("triplets", kind) if kind != "full" else None:
        with pytest.raises(jlora.UnsupportedFeatureError, match=told):
            tool.from_factors(x, params=params_of(kind))
        return
    again = tool.to_factors(tool.from_factors(x, params=params_of(kind)))
    np.testing.assert_allclose(merged(kind, again), merged(kind, x), atol=3e-5)


STAY = {"slices", "layers", "rows", "full", *SCALES}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DORA])
def test_what_has_parts_or_an_origin_stays_what_it_is(kind: str) -> None:
    """All else becomes plain factors, but for a number, which is a scaling."""
    x, y, params = adapter_of(kind, 10), adapter_of(kind, 20), params_of(kind)
    entry = type(x["w"])
    total = jlora.add(x, y, params=params)["w"]
    assert type(total) is (entry if kind in STAY else jlora.LoraFactors)
    assert type(jlora.scale(x, 3.0, params=params)["w"]) is entry
    if hasattr(x["w"], "scaling"):
        assert jlora.scale(x, 3.0)["w"].scaling == 3 * x["w"].scaling
    if kind in {"slices", "layers"}:
        assert total.rank == 2 * x["w"].rank


@pytest.mark.parametrize("kind", ["rows", "full"])
def test_what_is_counted_from_the_base_asks_for_it(kind: str) -> None:
    x = adapter_of(kind, 10)
    for run, _ in SUMS.values():
        with pytest.raises(jlora.UnsupportedFeatureError, match="give `params=`"):
            run(x, x, None)
    other = {"v": params_of(kind)["w"]}
    with pytest.raises(jlora.AdapterError, match="'w' is no path of the params"):
        jlora.add(x, x, params=other)


def test_entries_of_different_kinds_are_added_as_factors() -> None:
    kinds = ["lora", "slices", "rows", "loha", "lora_fa", "vera", "lokr", "own"]
    adapters = [adapter_of(kind, 10) for kind in kinds]
    total = jlora.add(*adapters, params=params_of("lora"))
    assert isinstance(total["w"], jlora.LoraFactors)
    wanted = sum(change(k, x["w"]) for k, x in zip(kinds, adapters, strict=True))
    found = merged("lora", total) - wide(params_of("lora")["w"])
    np.testing.assert_allclose(found, wanted, atol=3e-5)
    layers, stack = adapter_of("layers", 10), adapter_of("stack", 10)
    found = merged("stack", jlora.add(layers, stack)) - wide(params_of("stack")["w"])
    wanted = change("layers", layers["w"]) + change("stack", stack["w"])
    np.testing.assert_allclose(found, wanted, atol=3e-5)


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ("ia3_out", "lora", "'w' is ia3 out in 0, lora in 1, of which there is no sum"),
        ("ia3_out", "ia3_in", "'w' is ia3 out in 0, ia3 in in 1"),
        (
            "full",
            "lora",
            r"'w' is of a kernel \(6, 7\) with None in 0, \(6, 7\) wi",
        ),
    ],
)
def test_kinds_without_a_sum_are_told_apart(one: str, other: str, told: str) -> None:
    adapters = adapter_of(one, 10), adapter_of(other, 10)
    with pytest.raises(jlora.AdapterError, match=told):
        jlora.add(*adapters, params=params_of("lora"))


# --- several as one ---


@each_kind
def test_a_stack_gives_each_back(kind: str) -> None:
    """Alike, they stay what they are, and `jax.vmap` maps over them."""
    each = [adapter_of(kind, seed) for seed in (10, 20)]
    stacked = jlora.stack(each)
    assert type(stacked["w"]) is type(each[0]["w"])
    for i, one in enumerate(each):
        jax.tree.map(np.testing.assert_array_equal, jlora.take(stacked, i), one)
    swapped = jlora.put(stacked, 0, each[1])
    jax.tree.map(np.testing.assert_array_equal, jlora.take(swapped, 0), each[1])
    lora, params, x = lora_of(kind), params_of(kind), random(1, 4, ROWS)
    rows = jax.vmap(lora.apply, (None, 0, None))(params, stacked, x)
    for row, one in zip(rows, each, strict=True):
        np.testing.assert_allclose(row, lora.apply(params, one, x), atol=1e-5)


NO_NOTHING = DORA | {"rows", "full"}


@each_kind
def test_a_stack_where_one_lacks_the_path(kind: str) -> None:
    x = adapter_of(kind, 10)
    if kind in NO_NOTHING:
        with pytest.raises(jlora.AdapterError, match=r"'w' is trained .* is not in 1"):
            jlora.stack([x, {}])
        return
    stacked = jlora.stack([x, {}])
    wanted = wide(params_of(kind)["w"])
    np.testing.assert_allclose(merged(kind, jlora.take(stacked, 1)), wanted, atol=1e-6)
    wanted = wanted + change(kind, x["w"])
    np.testing.assert_allclose(merged(kind, jlora.take(stacked, 0)), wanted, atol=3e-5)
    emptied = jlora.put(stacked, 0, {})
    none = merged(kind, jlora.take(emptied, 0))
    np.testing.assert_allclose(none, params_of(kind)["w"], atol=1e-6)


def test_different_kinds_are_stacked_as_factors() -> None:
    kinds = ["lora", "slices", "loha", "lora_fa", "lora_xs", "vera", "lokr", "own"]
    stacked = jlora.stack([adapter_of(kind, 10) for kind in kinds])
    assert isinstance(stacked["w"], jlora.LoraFactors)
    for i, kind in enumerate(kinds):
        wanted = merged(kind, adapter_of(kind, 10))
        found = merged(kind, jlora.take(stacked, i))
        np.testing.assert_allclose(found, wanted, atol=3e-5)
    new = jlora.put(stacked, 0, adapter_of("vera", 20))
    wanted = merged("vera", adapter_of("vera", 20))
    np.testing.assert_allclose(merged("lora", jlora.take(new, 0)), wanted, atol=3e-5)
    for kind in ("dora", "ia3_out"):
        told = re.escape("adapter 1 ") + ("lora .*of DoRA" if kind == "dora" else "ia3")
        with pytest.raises(jlora.AdapterError, match=told):
            jlora.stack([adapter_of("lora", 10), adapter_of(kind, 10)])


@each_kind
def test_a_mixed_batch_of_any_kind(kind: str) -> None:
    each = [adapter_of(kind, seed) for seed in (10, 20)]
    lora, params, x = lora_of(kind), params_of(kind), random(3, 3, 4, ROWS)
    index = jnp.array([1, -1, 0])
    stacked = jlora.stack(each)
    if kind in DORA:
        with pytest.raises(jlora.UnsupportedFeatureError, match="'w': a magnitude"):
            lora.apply_mixed(params, stacked, index, x)
        return
    plain = model_of(kind)(params, x[1])
    wanted = lora.apply(params, each[1], x[0]), plain, lora.apply(params, each[0], x[2])
    for given in (stacked, jlora.prepare(stacked)):
        found = lora.apply_mixed(params, given, index, x)
        np.testing.assert_allclose(found, jnp.stack(wanted), atol=2e-5)

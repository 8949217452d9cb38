"""Kernels that map fewer features than the rank: the rank is capped, the scale is not.

The scaling is `alpha / rank` of the rank that was asked, written out here, and the
reference forms `W + ΔW` by einsums.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import GRADIENTS, VALUES, randomized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from narrow import KINDS, NARROW, PARAMS, RANKS, X, encoder, formed, leaf, make
from oracle import assert_close, random_like, reference, weighted_sum
from use import ALPHA, RANK, Kernel, Use
from uses import USES

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")
ASKED = 4096  # more than any kernel here maps
SAME_SCALING = ALPHA / RANK * ASKED
Tree = dict[str, Any]


def most(kernel: Kernel) -> int:
    """The largest rank that a kernel has."""
    _, in_, out = kernel.axes
    size = lambda axes: math.prod(kernel.shape[i] for i in axes)
    return min(size(in_), size(out))


# --- every use of a kernel ---


@pytest.mark.parametrize("use", USES, ids=lambda use: use.name)
def test_every_use_of_a_kernel_with_all_the_rank_it_has(use: Use, getkey: Any):
    config = jlora.LoraConfig(list(use.paths), rank=ASKED, alpha=SAME_SCALING)
    lora = jlora.lora(use.positioned(use.model), config, argnum=use.argnum)
    params = use.make_params(getkey(), jnp.float32)
    inputs = use.make_inputs(getkey(), jnp.float32)
    adapter = lora.init(getkey(), *use.arguments(params, inputs))
    for name, kernel in use.kernels.items():
        factors = adapter[f"layer/{name}"]
        shapes = (factors.a.shape, factors.b.shape)
        assert shapes == kernel.factor_shapes(most(kernel))
        assert factors.scaling == ALPHA / RANK
    adapter = randomized(adapter, getkey())
    formed = reference(use)
    expected = formed(params, adapter, *inputs)
    actual = jax.jit(lora.apply)(params, adapter, *inputs)
    coarse = "bfloat16" if use.loose else "float32"
    # Of all columns together the sums are longer than elsewhere.
    assert_close(actual, expected, 2 * VALUES[coarse])
    if use.reverse:
        weights = random_like(expected, 0)
        loss = lambda fn: lambda p: weighted_sum(fn(params, p, *inputs), weights)
        actual = jax.jit(jax.grad(loss(lora.apply)))(adapter)
        assert_close(actual, jax.grad(loss(formed))(adapter), 2 * GRADIENTS[coarse])


# --- a model with narrow kernels of every kind ---


@pytest.mark.parametrize("target", [None, ".*"])
def test_the_default_config_adapts_an_ordinary_model(target: Any):
    lora, adapter = make(target)
    wanted = {p: r for p, r in RANKS.items() if p != "types" or target}
    assert {path: entry.rank for path, entry in adapter.items()} == wanted
    assert {entry.scaling for entry in adapter.values()} == {16.0 / 8}
    left = {u.path: u.reason for u in lora.plan(PARAMS, X, KINDS).unusable}
    assert set(left) == {"types"} - set(wanted)


def test_the_plan_tells_the_rank_and_counts_by_it():
    lora, adapter = make()
    plan = lora.plan(PARAMS, X, KINDS)
    cells = {line.split()[0]: line for line in str(plan).splitlines()[2:9]}
    for path, rank in RANKS.items():
        told = f" {rank} of 8 " if rank < 8 else " 8 "
        assert told in cells[path] and (rank < 8) == (" of 8" in cells[path])
    assert "2 of 8" in plan._repr_html_()
    own = {target.path: target for target in plan.targets}
    assert {p: t.rank for p, t in own.items()} == RANKS
    sizes = {p: sum(v.size for v in jax.tree.leaves(e)) for p, e in adapter.items()}
    assert {p: t.trainable for p, t in own.items()} == sizes
    # A kernel (m, k) and n rows: 4·n·m·k are the base's, 6·n·r·(m + k) the factors'.
    wide = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=9))
    plan = wide.plan({"w": jnp.ones((7, 2))}, jnp.ones((5, 7)))
    assert plan.flops.step == 4 * 5 * 7 * 2 + 6 * 5 * 2 * (7 + 2)


@pytest.mark.parametrize(
    "kind", [None, AxisType.Auto, AxisType.Explicit], ids=["none", "auto", "explicit"]
)
def test_values_and_gradients_on_every_mesh(kind: Any):
    _, adapter = make(alpha=24.0)
    adapter = randomized(adapter, jax.random.key(7))
    whole = lambda adapter: encoder(formed(PARAMS, adapter, 3.0), X, KINDS)
    expected = whole(adapter)
    weights = random_like(expected, 0)
    wanted = jax.grad(lambda p: weighted_sum(whole(p), weights))(adapter)
    if kind is None:
        lora, _ = make(alpha=24.0)
        run = lambda p: lora.apply(PARAMS, p, X, KINDS)
        actual = jax.jit(run)(adapter)
        grads = jax.jit(jax.grad(lambda p: weighted_sum(run(p), weights)))(adapter)
    else:
        actual, grads = _sharded(kind, adapter, weights)
    assert_close(actual, expected, VALUES["float32"])
    assert_close(grads, wanted, GRADIENTS["float32"])


def _sharded(kind: AxisType, adapter: Tree, weights: Any) -> tuple[Any, Any]:
    """Outputs and gradients with kernels and factors laid out on a mesh (2, 2)."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    put = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
    out = P("data") if kind is AxisType.Explicit else None
    with jax.set_mesh(mesh):
        place = lambda path, w: put(
            w, NARROW[jax.tree_util.keystr(path, simple=True, separator="/")][1]
        )
        params = jax.tree.map_with_path(place, PARAMS)
        x, kinds, weights = put(X, P("data")), put(KINDS, P("data")), put(weights, P())
        model = lambda params, x, kinds: encoder(params, x, kinds, out)
        lora = jlora.lora(model, jlora.LoraConfig(".*", alpha=24.0))
        fresh = lora.init(jax.random.key(0), params, x, kinds)
        places = jlora.shardings(params, fresh)
        adapter = jax.tree.map(jax.device_put, adapter, places)
        run = lambda p: lora.apply(params, p, x, kinds)
        grad = jax.jit(jax.grad(lambda p: weighted_sum(run(p), weights)))
        return jax.jit(run)(adapter), grad(adapter)


# --- what else a config says ---


def test_rank_stabilised_scalings_are_of_the_rank_that_was_asked():
    _, adapter = make(rslora=True, rank=6, alpha=5.0)
    assert {e.scaling for e in adapter.values()} == {5.0 / math.sqrt(6)}


@pytest.mark.parametrize("init", ["kaiming_uniform", "gaussian", "zero_a"])
def test_values_are_drawn_as_for_the_rank_that_was_asked(init: str):
    """A narrow kernel's factors are of the same size as a wide one's."""
    stds, fn = [], lambda params, x: x @ params["w"]
    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=8, init=init))
    for width in (1, 3, 2000):
        shape = (width, 2000) if init == "zero_a" else (2000, width)
        params, x = {"w": jnp.ones(shape)}, jnp.ones((1, shape[0]))
        entry = lora.init(jax.random.key(0), params, x)["w"]
        assert jnp.abs(jlora.delta(entry)).max() == 0
        stds.append(float((entry.b if init == "zero_a" else entry.a).std()))
    np.testing.assert_allclose(stds[:2], stds[2], rtol=0.1)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_an_orthogonal_start_of_every_rank(width: int):
    """ΔW is zero, and no more of both factors than an odd rank needs."""
    params = {"w": jnp.ones((4, 30, width))}
    fn = lambda p, x: jnp.einsum("li,lio->lo", x, p["w"])
    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=8, init="orthogonal"))
    entry = lora.init(jax.random.key(0), params, jnp.ones((4, 30)))["w"]
    assert (entry.a.shape, entry.b.shape) == ((4, 30, width), (4, width, width))
    assert jnp.abs(jlora.delta(entry)).max() < 1e-7
    for i in range(4):
        assert np.linalg.matrix_rank(entry.a[i]) == (width + 1) // 2
        assert np.linalg.matrix_rank(entry.b[i]) == width // 2


def test_dora_of_narrow_kernels():
    lora, adapter = make("blocks|head|value", dora=True, alpha=24.0)
    assert_close(lora.apply(PARAMS, adapter, X, KINDS), encoder(PARAMS, X, KINDS), 1e-5)
    adapter = randomized(adapter, jax.random.key(7))
    new = formed(PARAMS, adapter, 3.0)
    for path, entry in adapter.items():
        total = leaf(new, path)
        norm = jnp.linalg.norm(total, axis=-2, keepdims=True)
        where, _, name = path.rpartition("/")
        tree = new[where] if where else new
        tree[name] = entry.magnitude[..., None, :] * total / norm
    assert_close(lora.apply(PARAMS, adapter, X, KINDS), encoder(new, X, KINDS), 2e-5)


@pytest.mark.parametrize("rank, kept", [(2, 2), (3, 3), (8, 3)])
def test_slices_have_the_rank_of_the_smallest(rank: int, kept: int):
    slices = [(0, 8), (11, 14)]
    config = jlora.LoraConfig("w", rank=rank, alpha=12.0, slices=slices)
    lora = jlora.lora(lambda p, x: x @ p["w"], config)
    params, x = {"w": jnp.ones((5, 14))}, jnp.ones((4, 5))
    entry = lora.init(jax.random.key(0), params, x)["w"]
    assert (entry.a.shape, entry.b.shape) == ((5, 2 * kept), (kept, 11))
    assert (entry.rank, entry.scaling) == (kept, 12.0 / rank)
    told = f" {kept} of {rank} × 2 slices" if kept < rank else f" {rank} × 2 slices"
    assert told in str(lora.plan(params, x))
    entry = dataclasses.replace(
        entry, b=jax.random.normal(jax.random.key(1), (kept, 11))
    )
    b = np.zeros((2 * kept, 14), np.float32)
    b[:kept, :8], b[kept:, 11:] = entry.b[:, :8], entry.b[:, 8:]
    expected = x @ (params["w"] + 12.0 / rank * entry.a @ b)
    assert_close(lora.apply(params, {"w": entry}, x), expected, 1e-5)


# --- empty leaves ---


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 5)])
@pytest.mark.parametrize("traced", [True, False])
def test_an_empty_leaf_is_no_target(shape: tuple[int, ...], traced: bool):
    params = {"kernel": jnp.ones((5, 1)), "none": {"kernel": jnp.ones(shape)}}

    def fn(params: Any, x: jax.Array) -> Any:
        return x @ params["kernel"], jnp.sum(params["none"]["kernel"])

    args = (params, jnp.ones((2, 5))) if traced else (params,)
    for target in (".*", None):
        plan = jlora.lora(fn, jlora.LoraConfig(target)).plan(*args)
        assert [t.path for t in plan.targets] == ["kernel"]
        assert [u.reason for u in plan.unusable] == ["is empty"]
    for full in (True, False):
        lora = jlora.lora(fn, jlora.LoraConfig("none", full=full))
        with pytest.raises(jlora.TargetError, match=r"'none/kernel' \(.*\) is empty"):
            lora.plan(*args)

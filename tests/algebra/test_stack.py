"""`jlora.stack`: padding, scalings, offenders; and many adapters trained at once."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxpr_checks import assert_not_materialized
from oracle import assert_close

import jlora
from jlora import AdapterError, KernelAxes, LoraFactors

pytestmark = pytest.mark.usefixtures("fast_compile")
Tree = dict[str, Any]
# A kernel of each kind, and its roles; layers and experts are batch axes.
KINDS = {
    "dense": ((5, 7), KernelAxes((), (0,), (1,))),
    "heads": ((3, 5, 7, 11), KernelAxes((), (0, 2), (1, 3))),
    "conv": ((3, 4, 5, 7), KernelAxes((), (0, 1, 2), (3,))),
    "layers": ((4, 5, 7), KernelAxes((0,), (1,), (2,))),
    "experts": ((5, 4, 7), KernelAxes((1,), (0,), (2,))),
}


def factors(
    kind: str, rank: int, scaling: float = 1.5, seed: int = 0, dtype: Any = jnp.float32
) -> LoraFactors:
    shape, axes = KINDS[kind]
    random = np.random.default_rng((seed, rank))
    number = lambda shape: jnp.asarray(random.normal(size=shape), dtype)
    a, b = axes.factor_shapes(shape, rank)
    return LoraFactors(number(a), number(b), axes, scaling)


def true_delta(entry: LoraFactors) -> np.ndarray:
    """ΔW in double precision, by the letters of its roles."""
    batch, in_, out = (
        "".join("abcdefgh"[i] for i in group)
        for group in (entry.axes.batch, entry.axes.in_, entry.axes.out)
    )
    kernel = "".join(sorted(batch + in_ + out))
    a, b = np.asarray(entry.a, np.float64), np.asarray(entry.b, np.float64)
    return entry.scaling * np.einsum(f"{batch}{in_}z,{batch}z{out}->{kernel}", a, b)


# --- padding and scalings ---


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_keeps_its_delta(kind: str) -> None:
    each = [factors(kind, rank, seed=i) for i, rank in enumerate((2, 6, 1))]
    stacked = jlora.stack([{"w": entry} for entry in each])["w"]
    a, b = KINDS[kind][1].factor_shapes(KINDS[kind][0], 6)
    assert (stacked.a.shape, stacked.b.shape) == ((3, *a), (3, *b))
    assert (stacked.axes, stacked.scaling) == (KINDS[kind][1], 1.5)
    for i, entry in enumerate(each):
        one = jlora.take({"w": stacked}, i)["w"]
        np.testing.assert_array_equal(true_delta(one), true_delta(entry))


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    ranks=st.lists(st.none() | st.integers(1, 5), min_size=1, max_size=4).filter(any),
    scalings=st.lists(
        st.sampled_from([0.0, 0.3, 1.0, 2.0, -1.5]), min_size=4, max_size=4
    ),
    extra=st.integers(0, 2),
)
def test_stack_and_back(kind: str, ranks: Any, scalings: Any, extra: int) -> None:
    """Any ranks, scalings and lacking paths: the deltas are the same to rounding."""
    each: list[Tree] = [
        {} if rank is None else {"w": factors(kind, rank, s, i)}
        for i, (rank, s) in enumerate(zip(ranks, scalings, strict=False))
    ]
    wanted = max(filter(None, ranks)) + extra
    back = jlora.unstack(jlora.stack(each, rank=wanted))
    assert {one["w"].rank for one in back} == {wanted}
    assert len({one["w"].scaling for one in back}) == 1
    for one, entry in zip(back, each, strict=True):
        expected = true_delta(entry["w"]) if entry else np.zeros(KINDS[kind][0])
        np.testing.assert_allclose(true_delta(one["w"]), expected, atol=1e-5)


def test_a_scaling_that_differs_goes_into_b() -> None:
    each = [{"w": factors("dense", 2, s, i)} for i, s in enumerate((2.0, 0.5, 0.6))]
    stacked = jlora.stack(each)["w"]
    assert stacked.scaling == 2.0
    for i, ratio in enumerate((1.0, 0.25, 0.3)):
        np.testing.assert_array_equal(stacked.a[i], each[i]["w"].a)
        np.testing.assert_allclose(stacked.b[i], ratio * each[i]["w"].b, rtol=1e-7)
    # Of a power of two nothing is lost.
    np.testing.assert_array_equal(stacked.b[1], 0.25 * each[1]["w"].b)


def test_trimming_takes_the_padding_back() -> None:
    bias = lambda i: jnp.full(7, 1.0 * i)
    each: list[Tree] = [
        {"w": factors("layers", 2), "bias": bias(0)},
        {"w": factors("layers", 4), "v": factors("dense", 3), "bias": bias(1)},
    ]
    # A column that only a uses is no padding: b starts at zero.
    fresh = dataclasses.replace(each[0]["w"], b=jnp.zeros_like(each[0]["w"].b))
    each.append({"w": fresh, "bias": bias(2)})
    # A column of zeros that is not at the end is no padding either.
    gap = jnp.zeros((4, 5, 2)).at[..., 1].set(1)
    each.append({"w": dataclasses.replace(fresh, a=gap), "bias": bias(3)})
    stacked = jlora.stack(each, rank=5)
    back = jlora.unstack(stacked, trim=True)
    assert jax.tree.structure(back) == jax.tree.structure(each)
    jax.tree.map(np.testing.assert_array_equal, back, each)
    with pytest.raises(TypeError, match="outside of"):
        jax.jit(lambda s: jlora.unstack(s, trim=True))(stacked)


def test_dtypes_are_promoted() -> None:
    half = factors("dense", 2, dtype=jnp.bfloat16)
    stacked = jlora.stack([{"w": half}, {"w": factors("dense", 3)}])["w"]
    assert (stacked.a.dtype, stacked.b.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_array_equal(stacked.a[0, :, :2], half.a.astype(jnp.float32))
    both = jlora.stack([{"w": half}, {"w": half}])["w"]
    assert both.a.dtype == both.b.dtype == jnp.bfloat16


def test_it_can_be_traced_and_takes_numpy() -> None:
    each = [{"w": factors("heads", rank)} for rank in (2, 3)]
    abstract = jax.eval_shape(jlora.stack, each)
    eager = jlora.stack(jax.tree.map(np.asarray, each))
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, eager)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(jlora.stack)(each), eager)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shardings_are_kept(axis_type: AxisType) -> None:
    mesh = jax.make_mesh((4,), ("model",), (axis_type,))
    axes = KernelAxes((), (0,), (1,))
    put = lambda shape, *spec: jax.device_put(
        jnp.ones(shape), NamedSharding(mesh, P(*spec))
    )
    entry = lambda rank: LoraFactors(
        put((5, rank), None, None), put((rank, 8), None, "model"), axes, 2.0
    )
    with jax.set_mesh(mesh):
        stacked = jlora.stack([{"w": entry(2)}, {}, {"w": entry(3)}])
        again = jlora.put(stacked, 1, {"w": entry(1)})
        one = jlora.take(again, 1)
    for tree in (stacked, again):
        assert tree["w"].b.sharding.spec[2] == "model"
    np.testing.assert_array_equal(one["w"].b, np.eye(3)[:, :1] * np.ones((1, 8)))


# --- one of them ---


def test_a_traced_index_out_of_range_gives_nans() -> None:
    bias = [jnp.full(3, 1.0 * i) for i in range(3)]
    entries = [factors("dense", 2, seed=i) for i in range(3)]
    stacked = jlora.stack(
        [{"w": w, "bias": v} for w, v in zip(entries, bias, strict=True)]
    )
    taken = jax.jit(jlora.take)
    for i in range(3):
        one = taken(stacked, i)
        np.testing.assert_array_equal(one["w"].a, entries[i].a)
        np.testing.assert_array_equal(one["bias"], bias[i])
    for i in (-1, 3):
        one = taken(stacked, i)
        assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(one))
        with pytest.raises(IndexError, match=f"there are 3 adapters.* index {i}"):
            jlora.take(stacked, i)
    with pytest.raises(TypeError, match="one whole number"):
        jlora.take(stacked, jnp.ones(2, int))


def test_put_replaces_one_and_compiles_once() -> None:
    each = [
        {"w": factors("layers", r, seed=r), "v": factors("dense", r)} for r in (2, 4)
    ]
    stacked = jlora.stack(each)
    write = jax.jit(jlora.put)
    new = factors("layers", 3, scaling=3.0, seed=9)
    for i in range(2):
        found = write(stacked, i, {"w": new})
        assert jax.tree.structure(found) == jax.tree.structure(stacked)
        one, other = jlora.take(found, i), jlora.take(found, 1 - i)
        np.testing.assert_allclose(true_delta(one["w"]), true_delta(new), rtol=1e-6)
        assert not jnp.any(one["v"].a) and not jnp.any(one["v"].b)
        jax.tree.map(np.testing.assert_array_equal, other, jlora.take(stacked, 1 - i))
    assert write._cache_size() == 1
    for i in (-1, 2):
        found = write(stacked, i, {"w": new})
        jax.tree.map(np.testing.assert_array_equal, found, stacked)
        with pytest.raises(IndexError, match="there are 2 adapters"):
            jlora.put(stacked, i, {"w": new})


# --- what cannot be stacked ---


def test_all_offenders_are_named() -> None:
    whole, w = jnp.ones(7), factors("dense", 2)
    broken = dataclasses.replace(w, b=jnp.ones((3, 7)))
    each: list[Tree] = [
        {"kind": w, "shape": w, "roles": w, "lacks": whole, "rank": broken, "fine": w},
        {
            "kind": whole,
            "shape": factors("layers", 2),
            "roles": LoraFactors(
                jnp.ones((7, 2)), jnp.ones((2, 5)), KernelAxes((), (1,), (0,)), 1.0
            ),
            "rank": w,
        },
    ]
    with pytest.raises(AdapterError) as caught:
        jlora.stack(each)
    text = str(caught.value)
    for words in (
        r"'kind': adapter 0 has factors of a kernel \(5, 7\).* adapter 1 an array",
        r"'shape': .*adapter 1 factors of a kernel \(4, 5, 7\)",
        r"'roles': .*in_=\(0,\).*in_=\(1,\)",
        r"'lacks' is trained whole by adapter 0 and is not in 1; give .* params",
        r"'rank': adapter 0 has a \(5, 2\) and b \(3, 7\), which are no factors",
    ):
        assert re.search(words, text), words
    assert "fine" not in text


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([], TypeError, "a list of adapters"),
        ({"w": factors("dense", 2)}, TypeError, "a list of adapters.*got a dict"),
        ([{}, {}], AdapterError, "empty"),
        ([{"w": "text"}], jlora.UnsupportedFeatureError, "'w' holds a str"),
    ],
)
def test_what_is_no_list_of_adapters(given: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        jlora.stack(given)


def test_a_magnitude_is_refused_not_dropped() -> None:
    plain = factors("dense", 2)
    dora = dataclasses.replace(plain, magnitude=jnp.ones(7))
    for call in (
        lambda: jlora.stack([{"w": plain}, {"w": dora}]),
        lambda: jlora.put(jlora.stack([{"w": plain}]), 0, {"w": dora}),
    ):
        with pytest.raises(AdapterError, match=r"'w': .* has factors .* of DoRA\)"):
            call()
    with pytest.raises(AdapterError, match=r"'w' has arrays .* and \(7,\)"):
        jlora.take({"w": dora}, 0)


def test_a_rank_that_is_too_small() -> None:
    each = [{"w": factors("dense", 2), "v": factors("dense", 4)}] * 2
    with pytest.raises(AdapterError, match="'v' has rank 4 in adapter 0, asked 3"):
        jlora.stack(each, rank=3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        jlora.stack(each, rank=0)


def test_what_has_no_place_in_the_stack() -> None:
    whole = jnp.ones(7)
    stacked = jlora.stack([{"w": factors("dense", 2), "bias": whole}] * 2)
    new = {"w": factors("dense", 3), "W": factors("dense", 1)}
    with pytest.raises(AdapterError) as caught:
        jlora.put(stacked, 0, new)
    for words in (
        "'W' is not in the stack",
        "rank 3, the stack 2",
        "'bias' is trained",
    ):
        assert words in str(caught.value)
    with pytest.raises(AdapterError, match=r"'w': the stack has .*\(5, 7\).*\(4, 5"):
        jlora.put(stacked, 0, {"w": factors("layers", 2), "bias": whole})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"w": factors("dense", 2)}, r"'w' has arrays \(5, 2\) and \(2, 7\)"),
        ({"bias": jnp.float32(1)}, r"'bias' has arrays \(\)"),
        (
            {"v": jnp.ones((2, 7)), "bias": jnp.ones((3, 7))},
            "'v' has 2.*\n'bias' has 3",
        ),
        ({}, "empty"),
    ],
)
def test_what_is_no_stacked_adapter(given: Any, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        jlora.take(given, 0)


# --- training many at once ---

DIM, MLP, OUT, LAYERS, IMAGE = 12, 22, 6, 4, (3, 8, 8, 2)
RANKS, RATES, SCALING = (2, 5, 3), (1e-2, 3e-2, 2e-3), 1.5


def network(params: Tree, image: jax.Array) -> jax.Array:
    """A convolution, scanned layers of two kernels, and a head with a bias."""
    x = lax.conv_general_dilated(
        image,
        params["conv"],
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jnp.tanh(x.mean((1, 2)))

    def layer(x: jax.Array, w: Tree) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["head"] + params["bias"][None]


SHAPES = {
    "conv": (3, 3, 2, DIM),
    "layers": {"up": (LAYERS, DIM, MLP), "down": (LAYERS, MLP, DIM)},
    "head": (DIM, OUT),
    "bias": (OUT,),
}


def example_params() -> Tree:
    random = np.random.default_rng(0)
    number = lambda shape: jnp.asarray(0.3 * random.normal(size=shape), jnp.float32)
    return jax.tree.map(number, SHAPES, is_leaf=lambda v: isinstance(v, tuple))


def lora_of(rank: int) -> jlora.Lora:
    whole = jlora.LoraConfig("bias", full=True)
    config = jlora.LoraConfig(rank=rank, alpha=SCALING * rank)
    return jlora.lora(network, [whole, config])


def squared_error(adapter: Tree, params: Tree, batch: Tree) -> jax.Array:
    out = lora_of(1).apply(params, adapter, batch["image"])
    return jnp.mean((out - batch["wanted"]) ** 2)


def batch_of(seed: int) -> Tree:
    random = np.random.default_rng(seed)
    number = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    return {"image": number(*IMAGE), "wanted": number(IMAGE[0], OUT)}


def adam() -> Any:
    chained = lambda learning_rate: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=0.1)
    )
    return optax.inject_hyperparams(chained)(learning_rate=0.0)


def with_rate(state: Any, rate: Any) -> Any:
    return state._replace(hyperparams={"learning_rate": rate})


def make_step(tx: Any) -> Callable[..., Any]:
    def step(adapter: Tree, state: Any, params: Tree, batch: Tree) -> Any:
        loss, grads = jax.value_and_grad(squared_error)(adapter, params, batch)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    return step


def fresh_adapters(params: Tree) -> list[Tree]:
    """One of each rank, from seeds of their own; the third adapts no convolution."""
    image = batch_of(0)["image"]
    each = [
        lora_of(rank).init(jax.random.key(i), params, image)
        for i, rank in enumerate(RANKS)
    ]
    del each[2]["conv"]
    return each


def train_apart(steps: int) -> tuple[list[Tree], np.ndarray]:
    params, tx = example_params(), adam()
    step, ends, losses = jax.jit(make_step(tx)), [], []
    for i, adapter in enumerate(fresh_adapters(params)):
        state = with_rate(tx.init(adapter), jnp.float32(RATES[i]))
        for t in range(steps):
            adapter, state, loss = step(adapter, state, params, batch_of(10 * i + t))
            losses.append(float(loss))
        ends.append(adapter)
    return ends, np.reshape(losses, (len(RANKS), steps))


def train_together(steps: int, axis: int) -> tuple[Tree, np.ndarray]:
    """With the axis of adapters in front, or behind the first one of each array."""
    params, tx = example_params(), adam()
    adapters = jlora.stack(fresh_adapters(params))
    state = with_rate(jax.vmap(tx.init)(adapters), jnp.asarray(RATES))
    place = lambda leaf: min(axis, leaf.ndim - 1)
    moved = lambda leaf: jnp.moveaxis(leaf, 0, place(leaf))
    adapters, state = jax.tree.map(moved, (adapters, state))
    axes = jax.tree.map(place, (adapters, state))
    mapped = jax.vmap(make_step(tx), (*axes, None, 0), (*axes, 0))
    step, losses = jax.jit(mapped), []
    for t in range(steps):
        batches = [batch_of(10 * i + t) for i in range(len(RANKS))]
        batch = jax.tree.map(lambda *x: jnp.stack(x), *batches)
        adapters, state, loss = step(adapters, state, params, batch)
        losses.append(loss)
    back = lambda leaf: jnp.moveaxis(leaf, place(leaf), 0)
    return jax.tree.map(back, adapters), np.stack(losses, 1)


@pytest.mark.parametrize("axis", [0, 1])
def test_training_together_is_training_apart(axis: int) -> None:
    """Ranks, seeds, data and learning rates differ; Adam, clipping and decay."""
    apart, losses_apart = train_apart(6)
    adapters, losses = train_together(6, axis)
    np.testing.assert_allclose(losses, losses_apart, rtol=1e-5)
    assert (losses[:, -1] < losses[:, 0]).any()
    # Trimmed, for the padding has stayed zero; and the path that was lacking, too.
    together = jlora.unstack(adapters, trim=True)
    for one, other in zip(together, apart, strict=True):
        assert_close(one, other, 1e-3)
    assert "conv" not in together[2]


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.adamw(0.1)], ids=["sgd", "adamw"])
def test_padding_stays_zero(tx: Any) -> None:
    params = example_params()
    adapters = jlora.stack(fresh_adapters(params), rank=7)
    step = jax.jit(jax.vmap(make_step(tx), (0, 0, None, None)))
    state = jax.vmap(tx.init)(adapters)
    for t in range(3):
        adapters, state, _ = step(adapters, state, params, batch_of(t))
    for path in ("conv", "head", "layers/up"):
        for i, rank in enumerate(RANKS):
            rank = 0 if (path, i) == ("conv", 2) else rank
            a, b = adapters[path].a[i], adapters[path].b[i]
            b = jnp.moveaxis(b, 1 if path == "layers/up" else 0, -1)
            assert not jnp.any(a[..., rank:]) and not jnp.any(b[..., rank:])
            assert rank == 0 or jnp.all(
                jnp.any(b[..., :rank] != 0, axis=range(b.ndim - 1))
            )


def test_a_scaling_folded_into_b_changes_its_steps() -> None:
    """What the docstring says of SGD; and that a moves as before."""
    params, batch = example_params(), batch_of(1)
    key = jax.random.key(0)
    one = {"head": lora_of(3).init(key, params, batch["image"])["head"]}
    other = {"head": dataclasses.replace(one["head"], scaling=4 * SCALING)}
    tx = optax.sgd(0.1)
    step = make_step(tx)
    stacked = jlora.stack([one, other])
    vmapped = jax.jit(jax.vmap(step, (0, 0, None, None)))
    together, _, _ = vmapped(stacked, jax.vmap(tx.init)(stacked), params, batch)
    apart, _, _ = jax.jit(step)(other, tx.init(other), params, batch)
    moved = true_delta(jlora.take(together, 1)["head"])
    np.testing.assert_allclose(16 * moved, true_delta(apart["head"]), rtol=1e-4)


def trained_step() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    params = example_params()
    adapters = jlora.stack(fresh_adapters(params))
    gradient = jax.vmap(jax.value_and_grad(squared_error), in_axes=(0, None, 0))
    batches = [batch_of(i) for i in range(len(RANKS))]
    return gradient, (adapters, params, jax.tree.map(lambda *x: jnp.stack(x), *batches))


KERNELS = {
    "conv": "convolution",
    "layers/up": "dot_general",
    "layers/down": "dot_general",
    "head": "dot_general",
}


def test_each_base_product_stays_one() -> None:
    """In StableHLO: each kernel enters one product forward and one for `dx`, as in a
    single adapter's step, and is never a batched operand."""
    gradient, args = trained_step()
    text = jax.jit(gradient).lower(*args).as_text()
    for path, op in KERNELS.items():
        shape = kernel_shape(path)
        lines = [line for line in text.splitlines() if f"stablehlo.{op}" in line]
        name = "x".join(map(str, shape)) + "xf32"
        using = [
            line for line in lines if f"tensor<{name}>" in line.partition(" -> ")[0]
        ]
        # The images are data: nothing asks for the gradient below the convolution.
        assert len(using) == (1 if path == "conv" else 2), (path, using)
        assert not any("batching_dims" in line for line in using)


def test_no_kernel_is_held_per_adapter() -> None:
    gradient, args = trained_step()
    n = len(RANKS)
    compiled = jax.jit(gradient).lower(*args).compile().as_text()
    for path in KERNELS:
        sizes = sorted((n, *kernel_shape(path)))
        shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled)
        found = {s for s in shapes if sorted(map(int, s.split(","))) == sizes}
        assert not found, path
    program = jax.make_jaxpr(lambda params, *rest: gradient(rest[0], params, rest[1]))(
        args[1], args[0], args[2]
    )
    shapes = [kernel_shape(path) for path in KERNELS]
    shapes += [(n, *shape) for shape in shapes]
    assert_not_materialized(program, range(len(jax.tree.leaves(args[1]))), shapes)


def kernel_shape(path: str) -> tuple[int, ...]:
    """What a product sees of a kernel: of a stack, one layer."""
    first, _, second = path.partition("/")
    return SHAPES[first][second][1:] if second else SHAPES[first]

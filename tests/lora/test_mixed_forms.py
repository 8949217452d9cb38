"""The two forms of `Lora.apply_mixed`: factors side by side, and gathered ones."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora
from jlora._lora import mixed_entries

pytestmark = pytest.mark.usefixtures("fast_compile")
Tree = dict[str, Any]
IN, MID, OUT, RANK, LAYERS, ADAPTERS = 10, 14, 6, 3, 2, 4
INDEX = [2, -1, 0, 3, 3, 1, -2, 0]
EXAMPLES, ROWS = len(INDEX), 2
FORMS = ("side by side", "gathered", "prepared", "prepared, gathered")


@pytest.fixture(params=FORMS)
def form(request, monkeypatch) -> str:
    """Each form, whatever would be cheaper."""
    pays = "gathered" not in request.param
    monkeypatch.setattr(mixed_entries, "joining_pays", lambda *_, **__: pays)
    return request.param


def mixed(lora: jlora.Lora, form: str) -> Callable[..., Any]:
    """`lora.apply_mixed`, of the stack as it is or prepared."""

    def run(params: Tree, stacked: Any, *args: Any, **kwargs: Any) -> Any:
        if form.startswith("prepared"):
            stacked = jlora.prepare(stacked)
        return lora.apply_mixed(params, stacked, *args, **kwargs)

    return run


def model(params: Tree, x: jax.Array) -> jax.Array:
    """Siblings, scanned layers, an einsum of three axes, and a transposed use."""
    x = jnp.tanh(x @ params["q"]) * (x @ params["v"])
    step = lambda x, w: (x + jnp.tanh(x @ w), None)
    x, _ = jax.lax.scan(step, x, params["layers"])
    return jnp.einsum("btm,mhk->bthk", x, params["out"]), x @ params["v"].T


SHAPES = {
    "q": (IN, MID),
    "v": (IN, MID),
    "layers": (LAYERS, MID, MID),
    "out": (MID, 2, OUT),
}


def numbers(shapes: Any, seed: int, dtype: Any = jnp.float32) -> Any:
    random = np.random.default_rng(seed)
    number = lambda shape: jnp.asarray(0.4 * random.normal(size=shape), dtype)
    return jax.tree.map(number, shapes, is_leaf=lambda v: isinstance(v, tuple))


def filled(lora: Any, seed: int, *args: Any) -> Any:
    shapes = jax.eval_shape(lora.init, jax.random.key(0), *args)
    return jax.tree.map(lambda v: numbers(v.shape, seed, v.dtype), shapes)


CONFIG = jlora.LoraConfig(".*", rank=RANK, alpha=5.0)
LORA = jlora.lora(model, CONFIG)
PARAMS = numbers(SHAPES, 0)
X = numbers((EXAMPLES, ROWS, IN), 1)
ADAPTERS_OF = [filled(LORA, 2 + i, PARAMS, X[:1]) for i in range(ADAPTERS)]
STACKED = jlora.stack(ADAPTERS_OF)


def truth(fn: Any, adapters: list[Any], params: Tree, x: jax.Array) -> Any:
    """Each example by merged kernels of its own."""
    merged = [*(jlora.merge(params, one) for one in adapters), params]
    which = jnp.asarray([i if i >= 0 else len(adapters) for i in INDEX])
    own = jax.tree.map(lambda *each: jnp.stack(each)[which], *merged)
    return jax.vmap(lambda p, x: jax.tree.map(lambda y: y[0], fn(p, x[None])))(own, x)


one_by_one = jax.jit(functools.partial(truth, model))


WEIGHTS = numbers([jnp.shape(y) for y in model(PARAMS, X)], 9)


def summed(outputs: Any) -> jax.Array:
    return sum(jnp.sum(y * w) for y, w in zip(outputs, WEIGHTS, strict=True))


def test_outputs_and_gradients_are_those_of_each_adapter(form: str) -> None:
    of_stack = lambda s, p, x: summed(mixed(LORA, form)(p, s, jnp.asarray(INDEX), x))
    by_merging = lambda a, p, x: summed(one_by_one(a, p, x))
    found = jax.jit(mixed(LORA, form))(PARAMS, STACKED, jnp.asarray(INDEX), X)
    assert_close(found, one_by_one(ADAPTERS_OF, PARAMS, X), 1e-5)
    of_all = jax.jit(jax.grad(of_stack, (0, 1, 2)))(STACKED, PARAMS, X)
    expected = jax.jit(jax.grad(by_merging, (0, 1, 2)))(ADAPTERS_OF, PARAMS, X)
    assert_close(jlora.unstack(of_all[0]), expected[0], 1e-4)
    assert_close(of_all[1:], expected[1:], 1e-4)


SETTINGS = [
    {"contraction": "factored"},
    {"contraction": "merged"},
    {"contraction": "auto"},
    {"contraction": "fused"},
    {"backward": "autodiff"},
    {"backward": "autodiff", "contraction": "merged"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_contraction(form: str, settings: Any) -> None:
    lora = jlora.lora(model, CONFIG, **settings)
    index = jnp.asarray(INDEX)
    run = lambda lora: jax.jit(
        jax.value_and_grad(lambda s: summed(mixed(lora, form)(PARAMS, s, index, X)))
    )(STACKED)
    assert_close(run(lora), run(LORA), 1e-4)


def shapes_in(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of all values of a program and of those inside of it."""
    found = set()
    for eqn in jaxpr.eqns:
        found |= {v.aval.shape for v in eqn.outvars}
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            found |= shapes_in(inner) if hasattr(inner, "eqns") else set()
    return found


def copies_in(shapes: Any) -> set[tuple[int, ...]]:
    """Those that are a factor for each example, of one adapter or of all."""
    own = {v.shape[1:] for v in jax.tree.leaves(STACKED)}
    ranks = {RANK, RANK * ADAPTERS}
    bare = lambda shape: tuple(sorted(n for n in shape if n != 1 and n not in ranks))
    factors = {bare(shape) for shape in own}
    return {
        shape
        for shape in shapes
        if shape[:1] == (EXAMPLES,)
        and {*shape[1:]} & ranks
        and bare(shape[1:]) in factors
    }


def test_side_by_side_no_example_has_a_copy_of_factors(form: str) -> None:
    args = (PARAMS, STACKED, jnp.asarray(INDEX), X)
    program = jax.make_jaxpr(mixed(LORA, form))(*args)
    copies = copies_in(shapes_in(program.jaxpr))
    text = jax.jit(mixed(LORA, form)).lower(*args).compile().as_text()
    compiled = [
        tuple(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", text)
    ]
    assert bool(copies) == bool(copies_in(compiled)) == ("gathered" in form)


def test_side_by_side_each_factor_is_in_one_product(form: str) -> None:
    """Of all examples: it has no batch axes."""
    args = (PARAMS, STACKED, jnp.asarray(INDEX), X)
    lines = jax.jit(mixed(LORA, form)).lower(*args).as_text().splitlines()
    batched = [s for s in lines if "dot_general" in s and "batching_dims" in s]
    assert bool(batched) == ("gathered" in form)


@pytest.mark.parametrize(("side", "value"), [("a", jnp.nan), ("b", jnp.inf)])
def test_a_broken_adapter_breaks_its_own_examples_alone(
    form: str, side: str, value: float
) -> None:
    """Nor are the gradients of others, or of the inputs of their examples, broken."""
    broken = dict(ADAPTERS_OF[3])
    factors = broken["v"]
    array = getattr(factors, side).at[0, 1].set(value)
    broken["v"] = jlora.LoraFactors(
        **{"a": factors.a, "b": factors.b, side: array},
        axes=factors.axes,
        scaling=factors.scaling,
    )
    stacked, index = jlora.put(STACKED, 3, broken), jnp.asarray(INDEX)
    found = jax.jit(mixed(LORA, form))(PARAMS, stacked, index, X)
    mine = np.array(INDEX) == 3
    expected = one_by_one(ADAPTERS_OF, PARAMS, X)
    others = functools.partial(jax.tree.map, lambda y: y[~mine])
    assert_close(others(found), others(expected), 1e-5)
    finite = jax.tree.leaves(jax.tree.map(jnp.isfinite, found))
    assert not any(ok[mine].reshape(mine.sum(), -1).all(1).any() for ok in finite)
    loss = lambda s, x: summed(
        jax.tree.map(
            lambda y: jnp.where(mine.reshape(-1, *[1] * (y.ndim - 1)), 0, y),
            mixed(LORA, form)(PARAMS, s, index, x),
        )
    )
    of_stack, of_x = jax.jit(jax.grad(loss, (0, 1)))(stacked, X)
    whole = [*jlora.unstack(of_stack)[:3], of_x[~mine]]
    assert all(jnp.isfinite(v).all() for v in jax.tree.leaves(whole))


def test_ranks_that_differ(form: str) -> None:
    other = jlora.lora(model, jlora.LoraConfig("q|out", rank=5, alpha=2.0))
    adapters = [*ADAPTERS_OF[:3], filled(other, 8, PARAMS, X[:1])]
    stacked = jlora.stack(adapters)
    found = jax.jit(mixed(LORA, form))(PARAMS, stacked, jnp.asarray(INDEX), X)
    assert_close(found, one_by_one(adapters, PARAMS, X), 1e-5)


def test_an_index_beyond_the_adapters_gives_nans_to_its_example_alone(
    form: str,
) -> None:
    index = jnp.asarray([ADAPTERS, *INDEX[1:-1], 99])
    found = jax.jit(mixed(LORA, form))(PARAMS, STACKED, index, X)
    expected = one_by_one(ADAPTERS_OF, PARAMS, X)
    for y, truth in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert jnp.isnan(y[0]).all() and jnp.isnan(y[-1]).all()
        assert_close(y[1:-1], truth[1:-1], 1e-5)


def test_one_program_for_other_adapters_and_indices(form: str) -> None:
    run = jax.jit(lambda *args: mixed(LORA, form)(PARAMS, *args, X))
    index = jnp.asarray(INDEX)
    outs = [
        run(s, i)
        for s in (STACKED, jlora.put(STACKED, 0, ADAPTERS_OF[1]))
        for i in (index, index[::-1])
    ]
    assert run._cache_size() == 1
    assert len({float(summed(out)) for out in outs}) == 4


def test_dropout(form: str) -> None:
    lora = jlora.lora(model, jlora.LoraConfig("q|v", rank=RANK, dropout=0.5))
    adapters = [filled(lora, i, PARAMS, X[:1]) for i in range(3)]
    index, key = jnp.asarray([2, 0, -1, 1, 1, 0, 2, 2]), jax.random.key(3)
    found = jax.jit(mixed(lora, form))(
        PARAMS, jlora.stack(adapters), index, X, lora_dropout_key=key
    )
    for i, own in enumerate(jax.random.split(key, EXAMPLES)):
        which = int(index[i])
        expected = model(PARAMS, X[i : i + 1])
        if which >= 0:
            one = adapters[which]
            expected = lora.apply(PARAMS, one, X[i : i + 1], lora_dropout_key=own)
        assert_close(jax.tree.map(lambda y, i=i: y[i : i + 1], found), expected, 1e-5)


def experts(params: Tree, x: jax.Array) -> jax.Array:
    """All experts densely, with factors of their own: no two matrices say it."""
    return jnp.einsum("btd,edf->btef", x, params["w"]).sum(2)


def mixed_queries(params: Tree, x: jax.Array) -> jax.Array:
    """The kernel is mixed over its heads before it is used, and chosen by a mask."""
    w = jnp.einsum("hdf,h->df", params["w"], jnp.arange(1.0, 4.0))
    other = jnp.where(jnp.arange(OUT) > 2, w, 2 * w)
    return x @ other


@pytest.mark.parametrize("fn", [experts, mixed_queries], ids=lambda fn: fn.__name__)
def test_factors_that_are_no_matrices(form: str, fn: Callable[..., Any]) -> None:
    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=RANK, alpha=5.0, batch=(0,)))
    params = {"w": numbers((3, IN, OUT), 0)}
    adapters = [filled(lora, i, params, X[:1]) for i in range(ADAPTERS)]
    run = lambda s, x: mixed(lora, form)(params, s, jnp.asarray(INDEX), x)
    by_merging = lambda adapters, x: truth(fn, adapters, params, x)
    assert_close(jax.jit(run)(jlora.stack(adapters), X), by_merging(adapters, X), 1e-5)
    loss = lambda run: jax.jit(jax.grad(lambda s, x: jnp.sum(run(s, x) ** 2), (0, 1)))
    found, of_x = loss(run)(jlora.stack(adapters), X)
    expected = loss(by_merging)(adapters, X)
    assert_close((jlora.unstack(found), of_x), expected, 1e-4)


# --- prepared once ---


def test_a_prepared_stack_is_not_laid_out_again(form: str) -> None:
    """No factor is looked through, moved or copied in the program of a token."""
    if form != "prepared":
        pytest.skip("of the one form")
    prepared = jax.jit(jlora.prepare)(STACKED)
    args = PARAMS, prepared, jnp.asarray(INDEX), X
    program = jax.make_jaxpr(LORA.apply_mixed)(*args)
    large = {v.size for v in jax.tree.leaves(prepared) if v.ndim > 1}
    made = [
        eqn.primitive.name
        for eqn in program.jaxpr.eqns
        if any(v.aval.size in large for v in eqn.outvars)
    ]
    assert "is_finite" not in str(program) and "select_n" not in made
    assert_close(LORA.apply_mixed(*args), one_by_one(ADAPTERS_OF, PARAMS, X), 1e-5)


def test_prepared_and_back() -> None:
    """The same numbers, in the dtype that they had; the leaves trained whole as is."""
    axes = jlora.KernelAxes(batch=(0,), in_=(1,), out=(2, 3))
    pair = numbers({"a": (4, 2, 5, 3), "b": (4, 2, 3, 6, 7)}, 0, jnp.bfloat16)
    stacked = {"w": jlora.LoraFactors(**pair, axes=axes, scaling=0.5), "v": X[:4]}
    found = jlora.prepare(stacked)
    one = found["w"]
    assert isinstance(one, jlora.PreparedFactors) and found["v"] is stacked["v"]
    assert (one.a.shape, one.b.shape) == ((2, 5, 12), (2, 12, 6, 7))
    assert (one.adapters, one.rank, one.a.dtype) == (4, 3, jnp.bfloat16)
    for i in range(4):
        columns = slice(3 * i, 3 * i + 3)
        np.testing.assert_array_equal(one.a[..., columns], pair["a"][i])
        np.testing.assert_array_equal(one.b[:, columns], pair["b"][i])


def test_numbers_of_adapters_that_differ_are_named() -> None:
    made = jlora.prepare(STACKED)
    other = jlora.prepare(jlora.stack(ADAPTERS_OF[:3]))
    mingled = {**made, "q": other["q"]}
    with pytest.raises(jlora.AdapterError, match="'q' has 3\n"):
        LORA.apply_mixed(PARAMS, mingled, jnp.asarray(INDEX), X)
    with pytest.raises(jlora.AdapterError, match="no stacked adapter"):
        jlora.prepare(ADAPTERS_OF[0])


@pytest.mark.parametrize(
    "use",
    [
        lambda made: jlora.take(made, 0),
        lambda made: jlora.put(made, 0, ADAPTERS_OF[0]),
        lambda made: jlora.merge(PARAMS, made),
        lambda made: LORA.apply(PARAMS, made, X),
    ],
)
def test_what_is_prepared_is_for_mixed_batches_alone(use: Callable[..., Any]) -> None:
    with pytest.raises((jlora.AdapterError, jlora.UnsupportedFeatureError)) as told:
        use(jlora.prepare(STACKED))
    assert "PreparedFactors" in str(told.value)


# --- which form ---


def is_gathered(
    examples: int, rows: int, adapters: int, *, prepared: bool = False
) -> bool:
    lora = jlora.lora(lambda p, x: x @ p["w"], CONFIG)
    params, x = {"w": jnp.ones((64, 48))}, jnp.ones((examples, rows, 64))
    one = lora.init(jax.random.key(0), params, x)
    stacked = jlora.stack([one] * adapters)
    stacked = jlora.prepare(stacked) if prepared else stacked
    index = jnp.arange(examples) % adapters
    text = jax.jit(lora.apply_mixed).lower(params, stacked, index, x).as_text()
    return "batching_dims" in text


def test_decoding_is_side_by_side_and_long_prompts_are_gathered() -> None:
    assert not is_gathered(examples=64, rows=1, adapters=8)
    assert is_gathered(examples=64, rows=1, adapters=64)
    assert not is_gathered(examples=64, rows=1, adapters=64, prepared=True)
    assert is_gathered(examples=8, rows=1, adapters=64)
    assert is_gathered(examples=8, rows=1, adapters=64, prepared=True)
    assert is_gathered(examples=8, rows=512, adapters=8)


def test_a_convolution_is_gathered(monkeypatch) -> None:
    """Another use than a product or a lookup would have a copy of all factors."""
    monkeypatch.setattr(mixed_entries, "joining_pays", lambda *_, **__: True)
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1,),
        padding="SAME",
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    lora = jlora.lora(lambda p, x: conv(x, p["w"]), CONFIG)
    params = {"w": numbers((3, IN, OUT), 0)}
    adapters = [filled(lora, i, params, X[:1]) for i in range(ADAPTERS)]
    args = params, jlora.stack(adapters), jnp.asarray(INDEX), X
    shapes = shapes_in(jax.make_jaxpr(lora.apply_mixed)(*args).jaxpr)
    assert not [shape for shape in shapes if ADAPTERS * RANK in shape]
    found = jax.jit(lora.apply_mixed)(*args)
    for i, which in enumerate(INDEX):
        own = params if which < 0 else jlora.merge(params, adapters[which])
        assert_close(found[i], conv(X[i : i + 1], own["w"])[0], 1e-5)


# --- on meshes ---


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh(form: str, kind: AxisType) -> None:
    """Examples, and the inputs of one kernel, over "data"; features over "model"."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), (kind,) * 2)
    on = lambda *spec: NamedSharding(mesh, P(*spec))
    places = {
        "q": on(None, "model"),
        "v": on(None, "model"),
        "layers": on(None, "model", None),
        "out": on("model"),
    }
    if kind == AxisType.Auto:
        places["v"] = on("data", "model")
    params, x = jax.device_put(PARAMS, places), jax.device_put(X, on("data"))
    placed = jlora.shardings(params, ADAPTERS_OF[0])
    stacked = jlora.stack([jax.device_put(one, placed) for one in ADAPTERS_OF])
    assert "model" in stacked["q"].b.sharding.spec
    index = jax.device_put(jnp.asarray(INDEX), on("data"))

    def model_on(params: Tree, x: jax.Array) -> Any:
        if kind == AxisType.Auto:
            return model(params, x)
        x = jnp.tanh(x @ params["q"]) * (x @ params["v"])
        layer = lambda x, w: jnp.einsum("btm,mn->btn", x, w, out_sharding=P())
        step = lambda x, w: (x + jnp.tanh(layer(x, w)), None)
        x, _ = jax.lax.scan(step, jax.sharding.reshard(x, P()), params["layers"])
        heads = jnp.einsum("btm,mhk->bthk", x, params["out"], out_sharding=P())
        return heads, jnp.einsum("btm,im->bti", x, params["v"], out_sharding=P())

    lora = jlora.lora(model_on, CONFIG)
    with jax.set_mesh(mesh):
        found = jax.jit(mixed(lora, form))(params, stacked, index, x)
    assert_close(jax.device_get(found), one_by_one(ADAPTERS_OF, PARAMS, X), 1e-5)


def test_in_a_shard_map(form: str) -> None:
    """Each device its own examples; the adapters are the same on all."""
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    run = jax.shard_map(
        mixed(LORA, form),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P("data"),
    )
    index = jnp.asarray(INDEX)
    found = jax.jit(run)(PARAMS, STACKED, index, X)
    assert_close(found, one_by_one(ADAPTERS_OF, PARAMS, X), 1e-5)
    loss = lambda s: summed(run(PARAMS, s, index, X))
    own = lambda s: summed(mixed(LORA, form)(PARAMS, s, index, X))
    expected = jax.jit(jax.grad(own))(STACKED)
    assert_close(jax.jit(jax.grad(loss))(STACKED), expected, 1e-4)


def test_apply_mapped_where_the_program_says_how_its_product_lies() -> None:
    """The same rule makes rows of examples: of `lora.apply` under `jax.vmap` too."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    contract = (((1,), (0,)), ((), ()))
    product = functools.partial(
        jax.lax.dot_general, dimension_numbers=contract, out_sharding=P(None, "model")
    )
    lora = jlora.lora(lambda p, x: product(x, p["w"]), CONFIG)
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(PARAMS["q"], P(None, "model"))}
        adapter = filled(lora, 3, params, X[0])
        x = jax.device_put(X, P("data"))
        found = jax.jit(jax.vmap(lora.apply, (None, None, 0)))(params, adapter, x)
    expected = X @ jlora.merge({"w": PARAMS["q"]}, adapter)["w"]
    assert_close(jax.device_get(found), expected, 1e-5)

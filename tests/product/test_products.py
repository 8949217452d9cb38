"""The forms of the low-rank product, the groups, and what each costs.

The reference is the materialized kernel; costs are read from the jaxpr and from XLA's
own count.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import adapt, check_gradients, check_values, make_case, randomized
from forms import bodies, choose
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxpr_checks import materialized as formed
from oracle import assert_close, random_like, reference, relative_error
from uses import USES

import jlora
from jlora._jax.platforms import Target
from jlora._product import choice
from jlora._product import fused as fused_form
from jlora._program.flops import step_flops

pytestmark = pytest.mark.usefixtures("fast_compile")

Tree = Any
BY_NAME = {use.name: use for use in USES}
NAMES = (
    "matmul_many_axes",
    "matmul_left",
    "matmul_vector",
    "dense_general_two_in_two_out",
    "dense_general_batch_in_the_middle",
    "einsum_out_between_in",
    "siblings",
    "chain",
    "twice_there_and_back",
    "scan_stack",
    "tied",
)
each_use = pytest.mark.parametrize("name", NAMES)
F32 = jnp.float32
HERE = Target.here()
N, D, K, R = 96, 40, 56, 4
SUMS = ("extended", "fused", "joined", "copied")


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chooses the extended form wherever it is possible, as on one GPU."""
    choose(monkeypatch, "extended")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chooses the fused form likewise; a plain product stands in for its kernel."""
    choose(monkeypatch, "fused")


def chosen(form: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Makes a form the one that is chosen, and returns what `jlora.lora` needs."""
    if form in SUMS:
        choose(request.getfixturevalue("monkeypatch"), form)
    return {"contraction": form} if form == "merged" else {}


each_product = pytest.mark.parametrize("form", SUMS)


def products(fn: Callable[..., Any], *args: Any) -> Counter[tuple[int, ...]]:
    """The shapes of the results of all products, in the forms that are chosen."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    names = (e for e in bodies(jaxpr, HERE) if e.primitive.name == "dot_general")
    return Counter(eqn.outvars[0].aval.shape for eqn in names)


def forms(lora: jlora.Lora, *args: Any) -> dict[str, set[tuple[Any, int]]]:
    """The form and the size of the group of each use, by path."""
    targets = lora.plan(*args).targets
    return {t.path: {(u.form, u.siblings) for u in t.uses} for t in targets}


# --- every form equals the materialized kernel ---


@each_product
@each_use
def test_one_product(name: str, form: str, getkey: Any, request: Any) -> None:
    case = make_case(BY_NAME[name], getkey, **chosen(form, request))
    check_values(case, case.lora.apply, reference(case.use))
    check_gradients(case, case.lora.apply, reference(case.use))


def test_siblings_in_several_sums(
    fused: None, getkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_form, "_SUMMED", 2)
    use = BY_NAME["siblings"]
    case = make_case(use, getkey)
    check_gradients(case, case.lora.apply, reference(use))


@each_use
def test_merged(name: str, getkey: Any) -> None:
    case = make_case(BY_NAME[name], getkey, contraction="merged")
    check_values(case, case.lora.apply, reference(case.use))
    check_gradients(case, case.lora.apply, reference(case.use), jaxpr=False)


@each_product
@pytest.mark.parametrize("name", ["siblings", "dense_general_two_in_two_out"])
def test_one_product_in_bfloat16(
    name: str, form: str, getkey: Any, request: Any
) -> None:
    half = {"x_dtype": jnp.bfloat16, "w_dtype": jnp.bfloat16}
    case = make_case(BY_NAME[name], getkey, **half, **chosen(form, request))
    check_gradients(case, case.lora.apply, reference(case.use))


@each_product
@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit])
def test_one_product_inside_of(wrap: Any, form: str, getkey: Any, request: Any) -> None:
    use = BY_NAME["siblings"]
    case = make_case(use, getkey, fn=wrap(use.model), **chosen(form, request))
    check_gradients(case, case.lora.apply, reference(use))


@each_product
def test_it_is_one_product_where_that_fits(
    form: str, getkey: Any, request: Any
) -> None:
    q, left = BY_NAME["siblings"], BY_NAME["matmul_left"]
    found, settings = {}, chosen(form, request)
    for use in (q, left):
        params, inputs = use.make_params(getkey(), F32), use.make_inputs(getkey(), F32)
        lora = dataclasses.replace(adapt(use, use.model), **settings)
        found |= forms(lora, *use.arguments(params, inputs))
    assert all(found[f"layer/{p}"] == {(form, 3)} for p in "qkv")
    assert found["layer/w"] == {("separate", 1)}


def test_by_default_nothing_is_extended_on_cpus_or_merged(getkey: Any) -> None:
    use = BY_NAME["siblings"]
    params, inputs = use.make_params(getkey(), F32), use.make_inputs(getkey(), F32)
    found = forms(adapt(use, use.model), *use.arguments(params, inputs))
    assert set().union(*found.values()) == {("separate", 3)}


@each_product
@pytest.mark.parametrize("inside", ["explicit", "shard_map"])
def test_one_product_where_types_have_meshes(
    inside: str, form: str, request: Any
) -> None:
    """On a mesh of one device arrays are whole, and so they are in a `shard_map`."""
    chosen(form, request)
    params, x = attention_like()
    fn = lambda p, x: [x @ p[n] for n in "qkv"]
    kind, many = (AxisType.Explicit, 1) if inside == "explicit" else (AxisType.Auto, 8)
    with jax.set_mesh(jax.make_mesh((many,), ("d",), axis_types=(kind,))):
        if inside == "shard_map":
            specs = P(), P("d")
            mapped = jax.shard_map(fn, in_specs=specs, out_specs=P("d"))
        else:
            mapped, (params, x) = fn, jax.device_put((params, x), P("d"))
        lora, adapter = adapted(mapped, params, x)
        expected = fn(jlora.merge(params, adapter), x)
        step = jax.jit(lora.apply).trace(params, adapter, x)
        shapes = (e.outvars[0].aval.shape for e in bodies(step.jaxpr.jaxpr, HERE))
        assert (D + 3 * R, 56) in shapes or form != "extended"
        assert_close(jax.jit(lora.apply)(params, adapter, x), expected, 1e-5)


@pytest.mark.parametrize("tokens", [64, 8192])
@pytest.mark.parametrize("features", [1024, 8192])
def test_extended_pays_for_many_tokens(tokens: int, features: int) -> None:
    assert choice._extended_pays(tokens, features, 4096) == (tokens > features)


@pytest.mark.parametrize("sizes", [(768, 3072), (3072, 768), (768, 768)])
def test_extended_does_not_pay_for_small_kernels(sizes: tuple[int, int]) -> None:
    assert not choice._extended_pays(12608, *sizes)


@pytest.mark.parametrize("replicate", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_merged_on_a_mesh(kind: AxisType, replicate: bool) -> None:
    params, x = attention_like()
    fn = lambda p, x: sum(jnp.sum(jnp.tanh(x @ p[n])) for n in "qkv")
    with jax.set_mesh(jax.make_mesh((2, 4), ("rows", "out"), axis_types=(kind,) * 2)):
        params = jax.device_put(params, P(None, "out"))
        x = jax.device_put(x, P("rows"))
        lora, adapter = adapted(fn, params, x, contraction="merged")
        places = jlora.shardings(params, adapter, replicate=replicate)
        adapter = jax.device_put(adapter, places)
        step = jax.jit(jax.value_and_grad(lora.apply, 1))
        found = step(params, adapter, x)
    whole = jax.tree.map(np.asarray, (params, adapter, x))
    expected = jax.value_and_grad(lambda a: fn(jlora.merge(whole[0], a), whole[2]))
    assert_close(*jax.tree.map(np.asarray, (found, expected(whole[1]))), 1e-4)


def test_merged_inside_of_shard_map() -> None:
    params, x = attention_like()
    local = lambda p, x: [x @ p[n] for n in "qkv"]
    with jax.set_mesh(jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))):
        specs = P(), P("rows")
        fn = jax.shard_map(local, in_specs=specs, out_specs=P("rows"))
        lora, adapter = adapted(fn, params, x, contraction="merged")
        loss = lambda a: sum(map(jnp.sum, map(jnp.tanh, lora.apply(params, a, x))))
        found = jax.jit(jax.grad(loss))(adapter)
    plain = lambda a: sum(map(jnp.sum, map(jnp.tanh, local(jlora.merge(params, a), x))))
    assert_close(found, jax.grad(plain)(adapter), 1e-4)


# --- contraction ---


@pytest.mark.parametrize(
    "dtype, rows, form",
    [
        (jnp.float32, 4 * D, "merged"),  # more than 2·D·K/(D + K) rows
        (jnp.float32, 4, "separate"),
        (jnp.bfloat16, 4 * D, "separate"),
    ],
)
def test_auto(dtype: Any, rows: int, form: str) -> None:
    params = {"w": jnp.ones((D, K), dtype)}
    config = jlora.LoraConfig("w", rank=R)
    lora = jlora.lora(lambda p, x: x @ p["w"], config, contraction="auto")
    assert forms(lora, params, jnp.ones((rows, D), dtype)) == {"w": {(form, 1)}}


def test_merging_in_bfloat16_loses_what_factors_keep() -> None:
    params = {"w": jnp.ones((D, K), jnp.bfloat16)}
    signs = (-1.0) ** jnp.arange(D)
    x = jnp.tile(signs, (8, 1)).astype(jnp.bfloat16)
    config = jlora.LoraConfig("w", rank=1, alpha=1.0)
    apply = {}
    for contraction in ("factored", "merged"):
        lora = jlora.lora(lambda p, x: x @ p["w"], config, contraction=contraction)
        adapter = lora.init(jax.random.key(0), params, x)
        # ΔW = ±2⁻⁹, a quarter of what bfloat16 resolves above 1.
        a, b = signs[:, None], jnp.full((1, K), 2.0**-9)
        adapter = {"w": dataclasses.replace(adapter["w"], a=a, b=b)}
        apply[contraction] = lora.apply(params, adapter, x)
    assert bool((apply["merged"] == 0).all())
    assert bool((apply["factored"] == D * 2.0**-9).all())


def test_unknown_contraction() -> None:
    with pytest.raises(ValueError, match=r"contraction=.*'factored', 'merged', 'auto'"):
        jlora.lora(lambda p: p, jlora.LoraConfig(), contraction="best")  # type: ignore


# --- siblings ---


def adapted(fn: Any, params: Tree, *args: Any, **settings: Any) -> Tree:
    """A function with all its kernels adapted, and an adapter with b ≠ 0."""
    config = jlora.LoraConfig(rank=R, alpha=3.0)
    lora = jlora.lora(fn, config, **settings)
    adapter = lora.init(jax.random.key(0), params, *args)
    return lora, randomized(adapter, jax.random.key(1))


def attention_like(dtype: Any = jnp.float32) -> tuple[Tree, jax.Array]:
    """Kernels of pairwise distinct sizes that read one value."""
    params = {
        n: jnp.zeros((D, k), dtype) for n, k in zip("qkv", (56, 24, 72), strict=True)
    }
    return random_like(params, 1), random_like(jnp.zeros((N, D), dtype), 2)


@pytest.mark.parametrize("form", ["separate", "singly"])
def test_siblings_cost_one_product_less_each(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs, where the form is singly, they cost as many as LoRA by hand."""
    choose(monkeypatch, form)
    joined = int(form == "separate")
    single = 3 * (1 - joined)
    params, x = attention_like()
    fn = lambda p, x: [x @ p[n] for n in "qkv"]
    lora, adapter = adapted(fn, params, x)
    forward = products(lora.apply, params, adapter, x)
    # Three bases, three expansions of h, and one h for all.
    h = Counter({(N, 3 * R): joined, (N, R): single})
    assert forward == +h + Counter({(N, 56): 2, (N, 24): 2, (N, 72): 2})
    total = lambda adapter, x: sum(map(jnp.sum, lora.apply(params, adapter, x)))
    both = products(jax.grad(total, (0, 1)), adapter, x)
    # Backward: h again, dx of each and of the delta, g of each, one da, db of each.
    backward = h + Counter({(N, D): 3 + joined + single, (N, R): 3})
    backward += Counter({(3 * R, D): joined, (R, D): single})
    backward += Counter({(R, 56): 1, (R, 24): 1, (R, 72): 1})
    # Whether the rank is first or last in da and db is up to the JAX release.
    sides = lambda shapes: Counter({tuple(sorted(s)): n for s, n in shapes.items()})
    assert sides(both - forward) == sides(backward)


def test_one_kernel_costs_eight_products() -> None:
    """Nine where x·a is not small enough to be kept."""
    x, params = jnp.ones((N, D)), {"w": jnp.ones((D, K))}
    lora, adapter = adapted(lambda p, x: x @ p["w"], params, x)
    assert products(lora.apply, params, adapter, x).total() == 3
    total = lambda adapter, x: jnp.sum(lora.apply(params, adapter, x))
    assert products(jax.grad(total, (0, 1)), adapter, x).total() == 3 + 5
    assert products(jax.grad(total), adapter, x).total() == 3 + 3  # no dx


@pytest.mark.parametrize(
    ("rank", "remat", "times"),
    [(4, False, 1), (4, True, 1), (16, False, 1), (16, True, 2), (64, False, 2)],
)
def test_a_small_h_is_kept(rank: int, remat: bool, times: int) -> None:
    """Up to 1/8 of the columns of x; under `jax.checkpoint`, up to 1/32."""
    x, params = jnp.ones((N, 256)), {"w": jnp.ones((256, 80))}
    fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))
    config = jlora.LoraConfig(rank=rank)
    lora = jlora.lora(jax.checkpoint(fn) if remat else fn, config)
    adapter = randomized(lora.init(jax.random.key(0), params, x), jax.random.key(1))
    grad = lambda adapter: jax.grad(lora.apply, 1)(params, adapter, x)
    g = 1  # dy·bᵀ has the shape of h
    assert products(grad, adapter)[N, rank] == times + g
    expected = jax.grad(lambda adapter: fn(jlora.merge(params, adapter), x))(adapter)
    assert_close(grad(adapter), expected, 1e-4)


@pytest.mark.parametrize("policy", ["nothing_saveable", "dots_saveable"])
def test_policies_of_checkpoint_keep_what_they_kept(policy: str) -> None:
    remat = getattr(jax.checkpoint_policies, policy)
    x, params = jnp.ones((N, 256)), {"v": jnp.ones((256, 256)), "w": jnp.ones((256, K))}
    layer = lambda p, x: jnp.sum(jnp.tanh(jnp.tanh(x @ p["v"]) @ p["w"]))
    fn = jax.checkpoint(layer, policy=remat)
    lora = jlora.lora(fn, jlora.LoraConfig("w", rank=4))
    adapter = lora.init(jax.random.key(0), params, x)
    grad = lambda adapter: jax.grad(lora.apply, 1)(params, adapter, x)
    again = policy == "nothing_saveable"
    assert products(grad, adapter)[N, 256] == 1 + again  # x·v, which is frozen


def test_extended_costs_two_products_forward(extended: None) -> None:
    params, x = attention_like()
    fn = lambda p, x: [x @ p[n] for n in "qkv"]
    lora, adapter = adapted(fn, params, x)
    forward = products(lora.apply, params, adapter, x)
    assert forward == Counter({(N, 56): 1, (N, 24): 1, (N, 72): 1, (N, 3 * R): 1})


def test_inputs_that_are_cast_apart_are_siblings() -> None:
    params, x = attention_like(jnp.bfloat16)
    fn = lambda p, x: [x.astype(jnp.bfloat16) @ p[n] for n in "qkv"]
    x = x.astype(jnp.float32)
    lora, adapter = adapted(fn, params, x)
    assert all(found == {("separate", 3)} for found in forms(lora, params, x).values())
    expected = fn(jlora.merge(params, adapter), x)
    assert_close(lora.apply(params, adapter, x), expected, 2e-2)


def test_a_kernel_that_is_prepared_later_is_a_sibling() -> None:
    params, x = attention_like()

    def fn(p: Tree, x: jax.Array) -> Any:
        q = jnp.tanh(x @ p["q"])
        return q, x @ (2.0 * p["k"]), q.sum()

    lora, adapter = adapted(fn, {n: params[n] for n in "qk"}, x)
    assert forms(lora, params, x)["k"] == {("separate", 2)}
    expected = fn(jlora.merge(params, adapter), x)
    assert_close(lora.apply(params, adapter, x), expected, 1e-5)


def test_a_kernel_that_needs_the_first_product_is_none() -> None:
    params, x = attention_like()

    def fn(p: Tree, x: jax.Array) -> Any:
        q = x @ p["q"]
        return q, x @ (jnp.mean(q) * p["k"])

    lora, adapter = adapted(fn, {n: params[n] for n in "qk"}, x)
    assert forms(lora, params, x)["k"] == {("separate", 1)}
    expected = fn(jlora.merge(params, adapter), x)
    assert_close(lora.apply(params, adapter, x), expected, 1e-5)


def test_siblings_of_other_dtype_rank_and_scaling() -> None:
    params, x = attention_like()
    configs = [
        jlora.LoraConfig("q", rank=2, alpha=3.0),
        jlora.LoraConfig("k", rank=5, alpha=2.0),
        jlora.LoraConfig("v", rank=3, alpha=4.0, dtype=jnp.bfloat16),
    ]
    fn = lambda p, x: [jnp.tanh(x @ p[n]) for n in "qkv"]
    lora = jlora.lora(fn, configs)
    adapter = randomized(lora.init(jax.random.key(0), params, x), jax.random.key(1))
    expected = fn(jlora.merge(params, adapter), x)
    assert_close(lora.apply(params, adapter, x), expected, 1e-5)


# --- many adapters on one base ---


@pytest.mark.parametrize("form", ["separate", *SUMS, "merged"])
def test_vmap_over_adapters_keeps_one_kernel(form: str, request: Any) -> None:
    settings = chosen(form, request)
    params, x = attention_like()
    fn = lambda p, x: sum(jnp.sum(jnp.tanh(x @ p[n])) for n in "qkv")
    lora, adapter = adapted(fn, params, x, **settings)
    many = 5
    adapters = random_like(jax.tree.map(lambda v: jnp.stack([v] * many), adapter), 7)
    xs = random_like(jnp.zeros((many, N, D)), 8)
    step = jax.vmap(jax.value_and_grad(lora.apply, 1), (None, 0, 0))
    jaxpr = jax.make_jaxpr(step)(params, adapters, xs)
    copies = {(many, *shape) for n in "qkv" for shape in [params[n].shape]}
    copies |= {(many, D + 3 * R, params[n].shape[1]) for n in "qkv"}
    seen = {v.aval.shape for eqn in bodies(jaxpr.jaxpr, HERE) for v in eqn.outvars}
    assert not seen & copies
    values, gradients = step(params, adapters, xs)
    for i in range(many):
        one = jax.tree.map(lambda v, i=i: v[i], adapters)
        value, gradient = jax.value_and_grad(
            lambda a, i=i: fn(jlora.merge(params, a), xs[i])
        )(one)
        assert relative_error(values[i], value) < 1e-4
        own = jax.tree.map(lambda v, i=i: v[i], gradients)
        assert_close(own, gradient, 1e-4)


def test_vmap_over_adapters_is_one_fused_sum(fused: None) -> None:
    """Rows of all adapters are rows of one sum, forward and backward.

    With the rows of one input for all, each adapter has products of its own.
    """
    params, x = attention_like()
    fn = lambda p, x: sum(jnp.sum(jnp.tanh(x @ p[n])) for n in "qkv")
    lora, adapter = adapted(fn, params, x)
    adapters = jax.tree.map(lambda v: jnp.stack([v, 2 * v, -v]), adapter)
    step = jax.grad(lora.apply, (1, 2))
    outputs = Counter(params[n].shape[1] for n in "qkv")
    xs = jnp.stack([x, x + 1, 2 * x])
    seen = products(jax.vmap(step, (None, 0, 0)), params, adapters, xs)
    assert {k: seen[3 * N, k] for k in outputs} == outputs
    assert seen[3 * N, D] == 3
    seen = products(jax.vmap(step, (None, 0, None)), params, adapters, x)
    assert not {(3 * N, k) for k in (*outputs, D)} & set(seen)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("form", ["separate", *SUMS, "merged"])
def test_second_derivatives(form: str, mapped: bool, request: Any) -> None:
    """Reverse over reverse, as of a penalty on gradients, beside the formed kernel."""
    settings = chosen(form, request)
    params, x = attention_like()
    fn = lambda p, x: sum(jnp.sum(jnp.tanh(x @ p[n])) for n in "qkv")
    lora, adapter = adapted(fn, params, x, **settings)

    def penalty(apply: Any, adapter: Any, x: jax.Array) -> jax.Array:
        grads = jax.grad(apply, argnums=(1, 2))(params, adapter, x)
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

    merged = lambda params, adapter, x: fn(jlora.merge(params, adapter), x)
    second = jax.grad(penalty, argnums=(1, 2))
    if mapped:
        adapter = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), adapter)
        second = jax.vmap(second, in_axes=(None, 0, None))
    found = jax.jit(lambda *args: second(lora.apply, *args))(adapter, x)
    expected = jax.jit(lambda *args: second(merged, *args))(adapter, x)
    assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("form", [*SUMS, "merged"])
def test_vmap_over_inputs_keeps_one_product(form: str, request: Any) -> None:
    settings = chosen(form, request)
    params, x = attention_like()
    fn = lambda p, x: [x @ p[n] for n in "qkv"]
    lora, adapter = adapted(fn, params, x, **settings)
    xs = jnp.stack([x, 2 * x])
    mapped = jax.vmap(lora.apply, (None, None, 0))
    # As many products as without vmap: the rows of all inputs are rows of one product.
    shapes = products(mapped, params, adapter, xs)
    assert shapes.total() == products(lora.apply, params, adapter, x).total()
    one = fn(jlora.merge(params, adapter), x)
    assert_close(mapped(params, adapter, xs)[0][1], 2 * one[0], 1e-5)
    # Mapped over adapters outside, it turns to the separate form.
    twice = jax.vmap(mapped, (None, 0, None))
    adapters = jax.tree.map(lambda v: jnp.stack([v] * 5), adapter)
    seen = products(twice, params, adapters, xs)
    assert (5, D, 56) not in seen and (5, D + 3 * R, 56) not in seen
    assert_close(twice(params, adapters, xs)[0][3, 1], 2 * one[0], 1e-5)


# --- FLOPs ---


def xla_flops(fn: Any, *args: Any) -> float:
    """XLA's own count."""
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_flops_of_a_linear_are_those_of_the_theory() -> None:
    n, m, k, r = 512, 384, 640, 16
    w, x = jnp.ones((m, k)), jnp.ones((n, m))
    lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=r))
    adapter = lora.init(jax.random.key(0), {"w": w}, x)

    def both(adapter: Tree, params: Tree, x: jax.Array, dy: jax.Array) -> Any:
        y, vjp = jax.vjp(lambda a, x: lora.apply(params, a, x), adapter, x)
        return y, vjp(dy)

    counted = xla_flops(both, adapter, {"w": w}, x, jnp.ones((n, k)))
    expected = 4 * n * m * k + 6 * n * r * (m + k)
    np.testing.assert_allclose(counted, expected, rtol=0.01)


def decoder_like(scanned: bool) -> Any:
    """Layers of two kernels with a product of activations between them."""

    def layer(x: jax.Array, w: Tree) -> tuple[jax.Array, None]:
        h = jnp.tanh(x @ w["v"])
        return x + (jax.nn.softmax(h @ h.T) @ h) @ w["w"], None

    def model(params: Tree, x: jax.Array) -> jax.Array:
        if scanned:
            x, _ = lax.scan(layer, x, params["layers"])
        else:
            for i in range(3):
                x, _ = layer(x, jax.tree.map(lambda v, i=i: v[i], params["layers"]))
        return jnp.sum(jnp.tanh(x @ params["head"]))

    return model


@pytest.mark.parametrize("scanned", [True, False])
def test_the_plan_counts_what_xla_counts(scanned: bool) -> None:
    shapes = {"layers": {"v": (3, 64, 96), "w": (3, 96, 64)}, "head": (64, 80)}
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda v: isinstance(v, tuple))
    x = jnp.ones((128, 64))
    lora = jlora.lora(decoder_like(scanned), jlora.LoraConfig("v|w", rank=4))
    flops = lora.plan(params, x).flops
    plain = decoder_like(False)  # XLA counts the body of a loop once
    full = xla_flops(jax.value_and_grad(plain, (0, 1)), params, x)
    frozen = xla_flops(jax.value_and_grad(plain, 1), params, x)
    np.testing.assert_allclose(flops.full, full, rtol=0.06)
    factors = 6 * 3 * 2 * 128 * 4 * (64 + 96)
    np.testing.assert_allclose(flops.step - factors, frozen, rtol=0.06)
    assert re.search(
        rf"a step: {flops.ratio:.3f} of full fine-tuning's FLOPs, gradients 15.4 kB "
        r"instead of 168 kB",
        str(lora.plan(params, x)),
    )


def test_flops_of_control_flow() -> None:
    w, x = jnp.ones((5, 5)), jnp.ones((3, 5))
    one = 2 * 3 * 5 * 5

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        x = lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w @ w, x)
        x = lax.fori_loop(0, x.shape[0], lambda i, x: x @ w, x)  # a scan of 3
        x = lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x)
        h, _ = lax.scan(lambda h, _: (h @ w, None), jnp.zeros_like(x), length=2)
        return jax.checkpoint(lambda x: jnp.tanh(x @ w))(x) + h

    jaxpr = jax.make_jaxpr(fn)(w, x)
    counted = step_flops(jaxpr, [True, False], factors=1)
    assert counted.full == 3 * one * (2 + 3 + 1 + 2 + 1)
    assert counted.step == 2 * one * (2 + 3 + 1 + 2 + 1) + 1


def test_backward_forms_no_kernel() -> None:
    params, x = attention_like()
    fn = lambda p, x: sum(jnp.sum(jnp.tanh(x @ p[n])) for n in "qkv")
    lora, adapter = adapted(fn, params, x)
    jaxpr = jax.make_jaxpr(jax.grad(lora.apply, (1, 2)))(params, adapter, x)
    assert not list(formed(jaxpr, range(3), [w.shape for w in params.values()]))

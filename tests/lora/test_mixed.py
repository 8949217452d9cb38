"""`Lora.apply_mixed`: a batch whose examples use different adapters, or none."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import adapt, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxpr_checks import assert_not_materialized
from oracle import assert_close, reference
from use import Use
from uses import USES

import jlora
from jlora._lora import mixed_entries

pytestmark = pytest.mark.usefixtures("fast_compile")
Tree = dict[str, Any]
BY_NAME = {use.name: use for use in USES}
CHOSEN = (
    "dense_general_two_in_two_out",
    "lookup",
    "tied",
    "conv_2d",
    "conv_2d_groups",
    "conv_2d_depthwise",
    "scan_stack",
    "experts_einsum",
    "experts_selected",
)
RAGGED = ("experts_ragged", "experts_routed")
# JAX turns a branch that an example decides into a choice between copies of the kernel.
BRANCHES = ("cond_both_branches", "cond_one_branch", "switch", "experts_switch")
IN_BATCHES = "experts_ragged_in_batches"
LEFT_OUT = (*CHOSEN, *RAGGED, *BRANCHES, IN_BATCHES)
REST = [use for use in USES if use.name not in LEFT_OUT]
NONE = -1


def batched(use: Use) -> Callable[..., Any]:
    """The model of a use for a batch of one: every input has an example axis first."""

    def fn(params: Any, *inputs: jax.Array) -> Any:
        assert all(len(x) == 1 for x in inputs)
        out = use.model(params, *(x[0] for x in inputs))
        return jax.tree.map(lambda y: y[None], out)

    return fn


def check_use(use: Use, getkey: Callable[[], jax.Array]) -> None:
    """Examples of three adapters and of none equal those of the formed kernels."""
    lora = adapt(dataclasses.replace(use, argnum=0), batched(use))
    params = use.make_params(getkey(), jnp.float32)
    index = [2, 0, NONE, 1, 2]
    each = [use.make_inputs(getkey(), jnp.float32) for _ in index]
    inputs = jax.tree.map(lambda *x: jnp.stack(x), *each)
    fresh = lora.init(getkey(), params, *(x[:1] for x in inputs))
    adapters = [randomized(fresh, getkey()) for _ in range(3)]
    stacked = jlora.stack(adapters)
    found = jax.jit(lora.apply_mixed)(params, stacked, jnp.asarray(index), *inputs)
    for i, which in enumerate(index):
        run = use.model if which == NONE else reference(use)
        args = (params,) if which == NONE else (params, adapters[which])
        own = jax.tree.map(lambda y, i=i: y[i], found)
        assert_close(own, jax.jit(run)(*args, *each[i]), 1e-2 if use.loose else 1e-5)


@pytest.mark.parametrize("joined", [True, False], ids=["side by side", "gathered"])
@pytest.mark.parametrize("name", CHOSEN)
def test_each_example_gets_its_own_kernel(
    name: str, joined: bool, getkey, monkeypatch
) -> None:
    monkeypatch.setattr(mixed_entries, "joining_pays", lambda *_, **__: joined)
    check_use(BY_NAME[name], getkey)


@pytest.mark.slow
@pytest.mark.parametrize("joined", [True, False], ids=["side by side", "gathered"])
@pytest.mark.parametrize("use", REST, ids=lambda use: use.name)
def test_each_example_gets_its_own_kernel_in_all_uses(
    use: Use, joined: bool, getkey, monkeypatch
) -> None:
    monkeypatch.setattr(mixed_entries, "joining_pays", lambda *_, **__: joined)
    check_use(use, getkey)


@pytest.mark.parametrize("name", RAGGED)
def test_experts_are_one_product_for_all_examples(name: str, getkey) -> None:
    check_use(BY_NAME[name], getkey)


def test_ragged_products_in_batches_cannot_be_mixed(getkey) -> None:
    told = r"ragged product of several batches, at .*uses.*jlora.take"
    with pytest.raises(jlora.UnsupportedFeatureError, match=told):
        check_use(BY_NAME[IN_BATCHES], getkey)


# --- a small decoder ---

VOCAB, DIM, MLP, LAYERS, TIME, EXAMPLES = 13, 6, 22, 4, 5, 7
INDEX = [2, NONE, 0, 1, 1, NONE, 2]


def decoder(
    params: Tree,
    tokens: jax.Array,
    shift: jax.Array | None = None,
    *,
    scale: jax.Array | float = 1.0,
    double: bool = False,
) -> jax.Array:
    """A tied table, scanned layers of two kernels, and a bias on the logits."""
    x = params["table"][tokens]
    if shift is not None:
        x = x + shift

    def layer(x: jax.Array, w: Tree) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    out = scale * (x @ params["table"].T) + params["bias"][None, None]
    return 2 * out if double else out


SHAPES = {
    "table": (VOCAB, DIM),
    "layers": {"up": (LAYERS, DIM, MLP), "down": (LAYERS, MLP, DIM)},
    "bias": (VOCAB,),
}
LORA = jlora.lora(
    decoder,
    [jlora.LoraConfig("bias", full=True), jlora.LoraConfig(".*", rank=3, alpha=5.0)],
)


def numbers(shapes: Any, seed: int) -> Any:
    random = np.random.default_rng(seed)
    number = lambda shape: jnp.asarray(0.5 * random.normal(size=shape), jnp.float32)
    return jax.tree.map(number, shapes, is_leaf=lambda v: isinstance(v, tuple))


def tokens_of(seed: int = 0, examples: int = EXAMPLES) -> jax.Array:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(0, VOCAB, (examples, TIME)), jnp.int32)


run_mixed = jax.jit(LORA.apply_mixed)
PARAMS = numbers(SHAPES, 0)


def adapters_of(seed: int, count: int = 3) -> list[Any]:
    shapes = jax.eval_shape(LORA.init, jax.random.key(0), PARAMS, tokens_of())
    fill = lambda i: jax.tree.map(lambda v: numbers(v.shape, seed + i), shapes)
    return [fill(i) for i in range(count)]


plain = jax.jit(decoder)


def one_by_one(adapters: list[Any], index: list[int], *args: Any, **kwargs: Any) -> Any:
    """The logits of each example by merged params: the truth."""
    params = [jlora.merge(PARAMS, adapter) for adapter in adapters] + [PARAMS]
    rows = [
        plain(params[which], *(x[i : i + 1] for x in args), **kwargs)
        for i, which in enumerate(index)
    ]
    return jnp.concatenate(rows)


def test_tables_stacks_and_whole_leaves() -> None:
    adapters = adapters_of(1)
    found = run_mixed(PARAMS, jlora.stack(adapters), jnp.asarray(INDEX), tokens_of())
    assert_close(found, one_by_one(adapters, INDEX, tokens_of()), 1e-5)


def test_paths_and_ranks_that_adapters_lack() -> None:
    adapters = adapters_of(1)
    del adapters[0]["table"], adapters[1]["layers/up"]
    found = LORA.apply_mixed(PARAMS, jlora.stack(adapters, rank=4), INDEX, tokens_of())
    assert_close(found, one_by_one(adapters, INDEX, tokens_of()), 1e-5)


@settings(max_examples=10, deadline=None)
@given(index=st.lists(st.integers(-2, 2), min_size=3, max_size=3))
def test_any_index(index: list[int]) -> None:
    adapters, tokens = adapters_of(2), tokens_of(examples=3)
    found = run_mixed(PARAMS, jlora.stack(adapters), jnp.asarray(index), tokens)
    expected = one_by_one(adapters, [max(i, NONE) for i in index], tokens)
    assert_close(found, expected, 1e-5)


def test_an_example_without_an_adapter_reads_none() -> None:
    """Neither the values of the nearest, which may be broken, nor their gradient."""
    adapters, tokens, index = adapters_of(1), tokens_of(examples=3), [0, NONE, 1]
    broken = jax.tree.map(lambda v: jnp.full_like(v, jnp.nan), adapters.pop())
    stacked = jlora.stack([*adapters, broken])
    found = run_mixed(PARAMS, stacked, jnp.asarray(index), tokens)
    assert_close(found, one_by_one(adapters, index, tokens), 1e-5)
    loss = lambda s: jnp.sum(LORA.apply_mixed(PARAMS, s, jnp.asarray(index), tokens))
    *whole, none = jlora.unstack(jax.jit(jax.grad(loss))(stacked))
    assert all(jnp.isfinite(v).all() for v in jax.tree.leaves(whole))
    assert not any(jnp.any(v) for v in jax.tree.leaves(none))


def test_other_adapters_and_indices_run_the_same_program() -> None:
    mixed = jax.jit(lambda *args: LORA.apply_mixed(*args))
    stacked = jlora.stack(adapters_of(3))
    swapped = jlora.put(stacked, 1, adapters_of(9, 1)[0])
    index = jnp.asarray(INDEX)
    outputs = [
        mixed(PARAMS, adapters, which, tokens_of())
        for adapters in (stacked, swapped, jlora.stack(adapters_of(5)))
        for which in (index, index[::-1])
    ]
    assert mixed._cache_size() == 1
    assert len({float(jnp.sum(out)) for out in outputs}) == len(outputs)


def test_gradients_are_those_of_each_adapter() -> None:
    """So tenants can be trained in one batch: each gets its own examples' gradient."""
    adapters, tokens = adapters_of(4), tokens_of()
    weights = numbers((EXAMPLES, TIME, VOCAB), 7)
    mixed = lambda s: jnp.sum(LORA.apply_mixed(PARAMS, s, INDEX, tokens) * weights)
    found = jlora.unstack(jax.jit(jax.grad(mixed))(jlora.stack(adapters)))
    for which, adapter in enumerate(adapters):
        own = np.flatnonzero(np.asarray(INDEX) == which)
        alone = lambda a, own=own: jnp.sum(
            decoder(jlora.merge(PARAMS, a), tokens[own]) * weights[own]
        )
        assert_close(found[which], jax.jit(jax.grad(alone))(adapter), 1e-4)


# --- out of range ---


def test_a_traced_index_out_of_range_gives_nans_for_its_example_alone() -> None:
    adapters, index = adapters_of(1), [0, 3, NONE, 100, 1, 2, -5]
    found = run_mixed(PARAMS, jlora.stack(adapters), jnp.asarray(index), tokens_of())
    wrong = [1, 3]
    assert jnp.isnan(found[jnp.asarray(wrong)]).all()
    expected = one_by_one(adapters, [0, 0, NONE, 0, 1, 2, NONE], tokens_of())
    right = [i for i in range(EXAMPLES) if i not in wrong]
    assert_close(found[jnp.asarray(right)], expected[jnp.asarray(right)], 1e-5)


@pytest.mark.parametrize("kind", [list, np.asarray, jnp.asarray])
def test_a_concrete_index_out_of_range_is_named(kind: Any) -> None:
    stacked, index = jlora.stack(adapters_of(1)), kind([0, 3, -1, 9, 1, 2, 0])
    words = r"there are 3 adapters.*got 3 for example 1, 9 for example 3$"
    with pytest.raises(IndexError, match=words):
        LORA.apply_mixed(PARAMS, stacked, index, tokens_of())


@pytest.mark.parametrize("index", [1, [[0]], [0.5] * EXAMPLES, [True] * EXAMPLES])
def test_what_is_no_index(index: Any) -> None:
    with pytest.raises(TypeError, match=r"a whole number for each example"):
        LORA.apply_mixed(PARAMS, jlora.stack(adapters_of(1)), index, tokens_of())


def test_a_plain_adapter_is_refused() -> None:
    with pytest.raises(jlora.AdapterError, match="no stacked adapter"):
        LORA.apply_mixed(PARAMS, adapters_of(1)[0], INDEX, tokens_of())


def test_a_stack_of_other_params_is_refused() -> None:
    stacked = jlora.stack(adapters_of(1))
    stacked["tabel"] = stacked.pop("table")
    with pytest.raises(jlora.AdapterError, match=r"'tabel' is no path .*'table'"):
        LORA.apply_mixed(PARAMS, stacked, INDEX, tokens_of())


# --- where the examples are ---


def test_axes_of_arguments() -> None:
    """Shared arguments, other axes, flags, and keyword arguments by name."""
    adapters, tokens = adapters_of(1), tokens_of()
    stacked, shift = jlora.stack(adapters), numbers((EXAMPLES, TIME, DIM), 3)
    mixed = lambda *args, **kwargs: LORA.apply_mixed(
        PARAMS, stacked, jnp.asarray(INDEX), *args, **kwargs
    )
    expected = one_by_one(adapters, INDEX, tokens, shift)
    assert_close(mixed(tokens, shift), expected, 1e-5)
    assert_close(mixed(tokens, shift, double=True), 2 * expected, 1e-5)
    assert_close(mixed(tokens, shift, in_axes=(0, -3)), expected, 1e-5)
    one = shift[:1]
    shared = one_by_one(adapters, INDEX, tokens, jnp.repeat(one, EXAMPLES, 0))
    for in_axes in ((0, None), {1: None}):
        assert_close(mixed(tokens, one, in_axes=in_axes), shared, 1e-5)
    scaled = mixed(tokens, shift, scale=jnp.float32(3.0), in_axes={"scale": None})
    assert_close(scaled, one_by_one(adapters, INDEX, tokens, shift, scale=3.0), 1e-5)
    scales = numbers((EXAMPLES, 1, 1), 5)
    bias = PARAMS["bias"][None]
    expected = scales[1] * (expected[1] - bias) + bias  # of example 1, which has none
    assert_close(mixed(tokens, shift, scale=scales)[1], expected, 1e-5)


def test_time_first() -> None:
    """Examples along the second axis, of arguments in a tree and of the outputs."""

    def fn(params: Tree, batch: Tree) -> Tree:
        out = decoder(params, jnp.swapaxes(batch["tokens"], 0, 1))
        kept = {"logits": jnp.swapaxes(out, 0, 1), "name": "kept", "none": None}
        return kept | {"loss": out.mean() * batch["weight"]}

    lora = jlora.lora(fn, LORA.configs)
    adapters, tokens = adapters_of(1), tokens_of()
    batch = {"tokens": tokens.T, "weight": jnp.float32(2)}
    axes = {"logits": -2, "name": 0, "none": None, "loss": None}
    found = lora.apply_mixed(
        PARAMS,
        jlora.stack(adapters),
        INDEX,
        batch,
        in_axes=({"tokens": 1, "weight": None},),
        out_axes=axes,
    )
    expected = one_by_one(adapters, INDEX, tokens)
    assert_close(found["logits"], jnp.swapaxes(expected, 0, 1), 1e-5)
    assert_close(found["loss"], 2 * expected.mean((1, 2)), 1e-5)
    assert (found["name"], found["none"]) == ("kept", None)


# --- keys ---


def noisy(params: Tree, x: jax.Array, key: jax.Array) -> jax.Array:
    """A layer with a dropout of its own, which takes one key."""
    assert key.ndim == 0
    return jax.random.bernoulli(key, 0.5, x.shape) * (x @ params["w"])


@pytest.mark.parametrize("kind", [jax.random.key, jax.random.PRNGKey])
def test_each_example_has_dropout_of_its_own(kind: Any) -> None:
    lora = jlora.lora(
        lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=2, dropout=0.5)
    )
    params = {"w": numbers((DIM, DIM), 0)}
    x = jnp.tile(numbers((1, TIME, DIM), 1), (4, 1, 1))
    shapes = jax.eval_shape(lora.init, jax.random.key(0), params, x)
    adapters = [
        jax.tree.map(lambda v, i=i: numbers(v.shape, i), shapes) for i in (2, 3)
    ]
    stacked, index, key = jlora.stack(adapters), jnp.array([1, 0, 1, NONE]), kind(7)
    found = jax.jit(lora.apply_mixed)(params, stacked, index, x, lora_dropout_key=key)
    assert_close(found[3], x[3] @ params["w"], 1e-5)
    for i, own in enumerate(jax.random.split(key, 4)[:3]):
        adapter = adapters[int(index[i])]
        alone = lora.apply(params, adapter, x[i : i + 1], lora_dropout_key=own)
        assert_close(found[i : i + 1], alone, 1e-5)
    assert not np.allclose(found[0], found[2])
    several = jax.random.split(key, 4)
    with pytest.raises(ValueError, match=r"is one PRNG key, .* an array of keys"):
        lora.apply_mixed(params, stacked, index, x, lora_dropout_key=several)


def test_keys_of_the_model() -> None:
    """One key is split; all may share it; several are an array like any other."""
    lora = jlora.lora(noisy, jlora.LoraConfig("w", rank=2))
    each = jlora.lora(lambda p, x, keys: noisy(p, x, keys[0]), lora.configs)
    params, x = {"w": jnp.ones((DIM, DIM))}, jnp.ones((3, TIME, DIM))
    key = jax.random.key(1)
    stacked = jlora.stack([lora.init(key, params, x, key)])
    call, keys = (params, stacked, jnp.zeros(3, int), x), jax.random.split(key, 3)
    found = lora.apply_mixed(*call, key)
    assert_close(found, lora.apply_mixed(*call, key=key), 0.0)
    assert_close(found, each.apply_mixed(*call, keys), 0.0)
    wanted = jnp.concatenate([noisy(params, x[:1], own) for own in keys])
    assert_close(found, wanted, 1e-5)
    shared = lora.apply_mixed(*call, key, in_axes={1: None})
    wanted = jnp.concatenate([noisy(params, x[:1], key)] * 3)
    assert_close(shared, wanted, 1e-5)


@pytest.mark.parametrize(
    ("in_axes", "words"),
    [
        (0, r"argument 0 of shape \(7, 5\): axis 0\n.* 1 of .* 0\n.* 'scale' of"),
        ((0,), r"positional argument after the index \(2 here\).*got \(0,\)"),
        ({2: None}, r"names \[2\], which are no arguments.*\[0, 1, 'scale'\]"),
        (("x", 0), "holds 'x'; an axis is an int or None"),
        (((0, 0), None), "is no prefix"),
    ],
)
def test_axes_that_do_not_fit(in_axes: Any, words: str) -> None:
    stacked, index = jlora.stack(adapters_of(1)), [0] * 3
    args = (tokens_of(), jnp.zeros((1, TIME, DIM)))
    with pytest.raises((ValueError, TypeError), match=words):
        LORA.apply_mixed(
            PARAMS, stacked, index, *args, in_axes=in_axes, scale=jnp.float32(1)
        )


def test_outputs_without_the_axis_are_named() -> None:
    lora = jlora.lora(lambda p, t: {"loss": decoder(p, t).mean()}, LORA.configs)
    with pytest.raises(ValueError, match=r"\['loss'\] of shape \(\): axis 0"):
        lora.apply_mixed(PARAMS, jlora.stack(adapters_of(1)), INDEX, tokens_of())


# --- the base is used once ---


def test_each_base_product_stays_one() -> None:
    stacked = jlora.stack(adapters_of(1))
    stacked.pop("bias")
    args = (stacked, PARAMS, jnp.asarray(INDEX), tokens_of())
    run = lambda stacked, params, *rest: LORA.apply_mixed(params, stacked, *rest)
    lines = jax.jit(run).lower(*args).as_text().splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line]
    for shape in ((DIM, MLP), (MLP, DIM), (DIM, VOCAB)):
        name = f"tensor<{'x'.join(map(str, shape))}xf32>"
        using = [line for line in products if name in line.partition(" -> ")[0]]
        assert len(using) == 1, (shape, using)
        assert "batching_dims" not in using[0]
    compiled = jax.jit(run).lower(*args).compile().as_text()
    for count in (EXAMPLES, 3):
        assert not re.search(rf"\[{count},({DIM},{MLP}|{MLP},{DIM})\]", compiled)


def test_no_kernel_is_formed() -> None:
    stacked = jlora.stack(adapters_of(1))
    program = jax.make_jaxpr(LORA.apply_mixed)(
        PARAMS, stacked, jnp.asarray(INDEX), tokens_of()
    )
    shapes = [(LAYERS, DIM, MLP), (DIM, MLP), (VOCAB, DIM)]
    shapes += [(EXAMPLES, *shape) for shape in shapes]
    assert_not_materialized(program, range(len(jax.tree.leaves(PARAMS))), shapes)


def test_on_a_mesh() -> None:
    """Examples over one axis, kernels and factors over another."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), (AxisType.Auto,) * 2)
    on = lambda *spec: NamedSharding(mesh, P(*spec))
    places = {
        "table": on(),
        "layers": {"up": on(None, None, "model"), "down": on(None, "model")},
        "bias": on(),
    }
    params = jax.device_put(PARAMS, places)
    adapters, tokens = adapters_of(1), tokens_of(examples=8)
    placed = jlora.shardings(params, adapters[0])
    stacked = jlora.stack([jax.device_put(one, placed) for one in adapters])
    assert "model" in stacked["layers/up"].b.sharding.spec
    index = [*INDEX, 0]
    found = jax.jit(LORA.apply_mixed)(
        params, stacked, jnp.asarray(index), jax.device_put(tokens, on("data"))
    )
    assert_close(found, one_by_one(adapters, index, tokens), 1e-5)

"""The NNX door against the model itself with kernels formed by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doors import (
    ALPHA,
    CONV,
    DENSE,
    JOIN,
    RANK,
    SPLIT,
    STACKED,
    config,
    values,
    with_random_b,
)
from flax import nnx
from oracle import assert_close, random_like, weighted_sum

import jlora
import jlora.nnx

pytestmark = pytest.mark.usefixtures("fast_compile")

WIDTH = 6
TABLE = "vr,rd->vd"


class ConvNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 5, (3, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.4, rngs=rngs)
        self.head = nnx.Linear(5, 7, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x.mean(axis=(1, 2))))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(WIDTH, 9, rngs=rngs)
        self.down = nnx.Linear(9, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(x)))


class Decoder(nnx.Module):
    """A list of layers between a table and its transpose."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embed.attend(self.encode(ids))

    def encode(self, ids: jax.Array, *, scale: float = 1.0) -> jax.Array:
        x = scale * self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


class Scanned(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        stack = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=(0,)))
        self.blocks = stack(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def run(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        return run(self.blocks, x)


class Experts(Scanned):
    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, 0))(self.blocks, x)


class Weight(nnx.Param):
    """A subclass of `nnx.Param`, as libraries define them."""


class Counter(nnx.Variable):
    """State of the model's own."""


class Own(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = Weight(rngs.params.normal((WIDTH, 5)))
        self.calls = Counter(jnp.zeros((), jnp.int32))
        self.offset = nnx.data(jnp.ones((1, 5)))  # an array that is no variable

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return x @ self.w[...] + self.offset * self.calls[...]


class Reader(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.GRUCell(WIDTH, 4, rngs=rngs), rngs=rngs)

    def __call__(self, x: jax.Array) -> Any:
        return self.rnn(x, return_carry=True)


def cached_attention(rngs: nnx.Rngs) -> nnx.Module:
    model = nnx.MultiHeadAttention(3, WIDTH, 12, decode=True, rngs=rngs)
    model.init_cache((2, 4, WIDTH))
    return model


@dataclass(frozen=True, eq=False)
class Case:
    """A model, a call of it, and the einsum of each kernel's delta."""

    name: str
    make: Callable[[nnx.Rngs], nnx.Module]
    x: jax.Array
    einsums: dict[str, str]
    kwargs: dict[str, Any] = field(default_factory=dict)
    target: str | None = None
    method: Any = "__call__"


IDS = jnp.array([[1, 8, 3], [10, 0, 8]])
BLOCK = ("up/kernel", "down/kernel")
DECODER = {f"blocks/{i}/{name}": DENSE for i in range(2) for name in BLOCK}
ATTENTION = {f"{name}/kernel": SPLIT for name in ("query", "key", "value")}

CASES = [
    Case(
        "batchnorm-dropout",
        ConvNet,
        values(2, 5, 6, 3),
        {"conv/kernel": CONV, "head/kernel": DENSE},
    ),
    Case(
        "list-tied-table",
        Decoder,
        IDS,
        {**DECODER, "embed/embedding": TABLE},
        target=".*",
    ),
    Case("method-name", Decoder, IDS, DECODER, {"scale": 0.5}, method="encode"),
    Case("method-function", Decoder, IDS, DECODER, method=Decoder.encode),
    Case(
        "scan-remat", Scanned, values(2, WIDTH), {f"blocks/{n}": STACKED for n in BLOCK}
    ),
    Case("vmap", Experts, values(3, 2, WIDTH), {f"blocks/{n}": STACKED for n in BLOCK}),
    Case("own-variables", Own, values(2, WIDTH), {"w": DENSE}),
    Case(
        "rnn",
        Reader,
        values(2, 3, WIDTH),
        {f"rnn/cell/dense_{kind}/kernel": DENSE for kind in "ih"},
    ),
    Case(
        "cache",
        cached_attention,
        values(2, 1, WIDTH),
        {**ATTENTION, "out/kernel": JOIN},
    ),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
BY_NAME = {case.name: case for case in CASES}


@cache
def built(case: Case) -> tuple[nnx.Module, jlora.nnx.Wrapped]:
    model = case.make(nnx.Rngs(0))
    settings = {"method": case.method, **case.kwargs}
    wrapped = jlora.nnx.wrap(model, config(case.target), case.x, **settings)
    return model, wrapped._replace(adapter=with_random_b(wrapped.adapter))


def formed(params: Any, adapter: Any, einsums: dict[str, str]) -> Any:
    """Params with W + ΔW; nothing of jlora is called but dataclass fields."""
    params = jax.tree.map(lambda leaf: leaf, params)  # new variables, same arrays
    for path, einsum in einsums.items():
        node = params
        for name in path.split("/"):
            node = node[int(name) if name.isdigit() else name]
        a, b = adapter[path].a, adapter[path].b
        delta = jnp.einsum(einsum, a, b, precision="highest")
        node[...] = node[...] + ALPHA / RANK * delta
    return params


def reference(case: Case) -> Callable[..., Any]:
    graphdef, _, _ = nnx.split(case.make(nnx.Rngs(0)), nnx.Param, ...)

    def run(params: Any, adapter: Any, rest: Any, x: jax.Array) -> Any:
        params = formed(params, adapter, case.einsums)
        model = nnx.merge(graphdef, params, rest, copy=True)
        named = isinstance(case.method, str)
        method = getattr(type(model), case.method) if named else case.method
        out = method(model, x, **case.kwargs)
        return out, nnx.state(model, nnx.Not(nnx.Param))

    return run


@cases
def test_apply_and_gradients_are_those_of_the_model_with_formed_kernels(
    case: Case,
) -> None:
    _, (lora, params, adapter, rest) = built(case)
    assert set(adapter) == set(case.einsums)
    adapted = lambda *args: lora.apply(*args, **case.kwargs)
    weights = random_like(jax.eval_shape(adapted, params, adapter, rest, case.x)[0], 3)

    def with_gradients(fn: Callable[..., Any]) -> Any:
        def loss(adapter: Any) -> Any:
            out, rest_ = fn(params, adapter, rest, case.x)
            return weighted_sum(out, weights), (out, rest_)

        return jax.jit(jax.grad(loss, has_aux=True))(adapter)

    fns = (adapted, reference(case))
    (grads, out), (expected_grads, expected) = map(with_gradients, fns)
    assert_close(out[0], expected[0], rtol=2e-5)
    assert_close(grads, expected_grads, rtol=1e-4)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    assert jax.tree.structure(out[1]) == jax.tree.structure(rest)
    assert_close(floats(out[1]), floats(expected[1]), rtol=2e-5)


def floats(state: Any) -> list[jax.Array]:
    """The arrays of a state; keys by their data."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    leaves = jax.tree.leaves(state)
    return [jax.random.key_data(x) if is_key(x) else x for x in leaves]


@cases
def test_merge_into_gives_a_new_model(case: Case) -> None:
    model, wrapped = built(case)
    before = floats(nnx.state(model))
    merged = jlora.nnx.merge_into(model, wrapped.adapter)
    assert type(merged) is type(model)
    expected = formed(wrapped.params, wrapped.adapter, case.einsums)
    assert_close(nnx.state(merged, nnx.Param), expected, rtol=1e-6)
    shared = lambda model: {id(v) for _, v in nnx.iter_graph(model) if is_variable(v)}
    assert not shared(model) & shared(merged)
    nnx.update(merged, jax.tree.map(jnp.zeros_like, nnx.state(merged, nnx.Param)))
    jax.tree.map(np.testing.assert_array_equal, floats(nnx.state(model)), before)


def is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def test_the_merged_model_computes_what_apply_computes() -> None:
    case = BY_NAME["batchnorm-dropout"]
    model, (_, params, adapter, rest) = built(case)
    model = nnx.clone(model)
    model.eval()
    evaluate = jlora.nnx.lora(model, config())
    out, after = jax.jit(evaluate.apply)(params, adapter, rest, case.x)
    merged = jlora.nnx.merge_into(model, adapter)
    assert_close(out, nnx.jit(lambda m, x: m(x))(merged, case.x), rtol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, floats(after), floats(rest))


def moved(case: Case, calls: int = 3) -> tuple[nnx.Module, Any, Any, Any]:
    """A model, its params, an adapter, and the rest after some calls of training."""
    model, (lora, params, adapter, rest) = built(case)
    for _ in range(calls):
        _, rest = jax.jit(lora.apply)(params, adapter, rest, case.x)
    return model, params, adapter, rest


@pytest.mark.parametrize("name", ["batchnorm-dropout", "own-variables", "cache"])
def test_merge_into_takes_the_rest_that_training_returned(name: str) -> None:
    case = BY_NAME[name]
    model, params, adapter, rest = moved(case)
    merged = jlora.nnx.merge_into(model, adapter, rest)
    of_merged = jlora.nnx.split(merged)
    jax.tree.map(np.testing.assert_array_equal, floats(of_merged[2]), floats(rest))
    differ = [
        not np.array_equal(new, old)
        for new, old in zip(floats(rest), floats(built(case)[1].rest), strict=True)
    ]
    assert any(differ)
    # The next call of the merged model is the next call of training.
    lora = jlora.nnx.lora(model, config(case.target), method=case.method)
    expected, after = jax.jit(lora.apply)(params, adapter, rest, case.x)
    before = floats(rest)
    assert_close(nnx.jit(lambda m, x: m(x))(merged, case.x), expected, rtol=1e-4)
    now = floats(jlora.nnx.split(merged)[2])
    assert_close(now, floats(after), rtol=1e-4)
    # And it moves the merged model alone.
    jax.tree.map(np.testing.assert_array_equal, floats(rest), before)


def test_merge_into_takes_params_that_an_initialiser_moved() -> None:
    model, x = nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(0)), values(2, WIDTH)
    lora, params, adapter, rest = jlora.nnx.wrap(model, config("kernel"), x)
    params, adapter = jlora.pissa(params, adapter)
    merged = jlora.nnx.merge_into(model, adapter, rest, params=params)
    assert_close(merged(x), model(x), rtol=1e-4)
    assert_close(merged(x), lora.apply(params, adapter, rest, x)[0], rtol=1e-4)


def test_merge_into_refuses_the_state_of_another_model() -> None:
    model, x = nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(0)), values(2, WIDTH)
    _, params, adapter, rest = jlora.nnx.wrap(model, config("kernel"), x)
    other = jlora.nnx.split(ConvNet(nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"`rest`.*'drop/rngs/count': \(\) for None"):
        jlora.nnx.merge_into(model, adapter, other[2])
    wide = jlora.nnx.split(nnx.Linear(WIDTH, 5, rngs=nnx.Rngs(0)))[1]
    with pytest.raises(ValueError, match=r"`params`.*'bias': \(5,\) for \(4,\)"):
        jlora.nnx.merge_into(model, adapter, rest, params=wide)
    with pytest.raises(ValueError, match=r"`params`"):
        jlora.nnx.merge_into(model, adapter, params=rest)
    assert jlora.nnx.merge_into(model, adapter, rest, params=params)(x).shape == (2, 4)


@cases
def test_params_are_the_frozen_params_and_rest_is_everything_else(case: Case) -> None:
    model, wrapped = built(case)
    variables = lambda state: jax.tree.leaves(state, is_leaf=is_variable)
    assert all(isinstance(v, nnx.Param) for v in variables(wrapped.params))
    assert not any(isinstance(v, nnx.Param) for v in variables(wrapped.rest))
    count = len(jax.tree.leaves(nnx.state(model)))
    assert count == len(jax.tree.leaves((wrapped.params, wrapped.rest)))


def test_wrapping_and_applying_leave_the_model_alone_and_it_them() -> None:
    case = BY_NAME["batchnorm-dropout"]
    model = case.make(nnx.Rngs(0))
    before = floats(nnx.state(model))
    lora, params, adapter, rest = jlora.nnx.wrap(model, config(), case.x)
    first, _ = lora.apply(params, adapter, rest, case.x)
    jax.tree.map(np.testing.assert_array_equal, floats(nnx.state(model)), before)
    model(case.x)
    model.head.kernel[...] = jnp.zeros((5, 7))
    second, _ = lora.apply(params, adapter, rest, case.x)
    np.testing.assert_array_equal(first, second)


def test_the_key_makes_the_factors() -> None:
    case = BY_NAME["own-variables"]
    model = case.make(nnx.Rngs(0))
    a_of = lambda key: jlora.nnx.wrap(model, config(), case.x, key=key).adapter["w"].a
    np.testing.assert_array_equal(a_of(None), a_of(jax.random.key(0)))
    assert not np.allclose(a_of(None), a_of(jax.random.key(1)))


def test_an_abstract_model_is_planned_and_gets_real_factors() -> None:
    model = nnx.eval_shape(lambda: ConvNet(nnx.Rngs(0)))
    x = values(2, 5, 6, 3)
    abstract = jax.ShapeDtypeStruct(x.shape, x.dtype)
    lora, params, adapter, rest = jlora.nnx.wrap(model, config(), abstract)
    leaves = jax.tree.leaves((params, rest))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(adapter))
    plan = lora.plan(params, rest, abstract)
    assert [target.path for target in plan.targets] == ["conv/kernel", "head/kernel"]
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == plan.trainable
    _, params, rest = jlora.nnx.split(ConvNet(nnx.Rngs(0)))
    out, _ = jax.jit(lora.apply)(params, adapter, rest, x)
    assert_close(out, ConvNet(nnx.Rngs(0))(x), rtol=2e-5)


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit], ids=["jax.jit", "nnx.jit"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(jit: Any) -> None:
    case, goal = BY_NAME["batchnorm-dropout"], values(2, 7)
    model = case.make(nnx.Rngs(0))
    lora, params, adapter, rest = jlora.nnx.wrap(model, config(), case.x)
    before = floats(params)

    def loss_of(adapter: Any, params: Any, rest: Any) -> Any:
        out, rest = lora.apply(params, adapter, rest, case.x)
        return ((out - goal) ** 2).mean(), rest

    @jit
    def step(adapter: Any, params: Any, rest: Any) -> Any:
        compiled.append(1)
        of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, rest), grads = of(adapter, params, rest)
        return jax.tree.map(lambda p, g: p - 0.3 * g, adapter, grads), rest, loss

    compiled: list[int] = []
    losses = []
    for _ in range(40):
        adapter, rest, loss = step(adapter, params, rest)
        losses.append(loss)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert len(compiled) == 1
    jax.tree.map(np.testing.assert_array_equal, floats(params), before)
    assert rest["drop"]["rngs"]["count"][...] == 40


def test_the_rest_is_a_carry_of_scan() -> None:
    case = BY_NAME["cache"]
    model, (lora, params, adapter, rest) = built(case)
    xs = values(4, 2, 1, WIDTH)

    @jax.jit
    def decode(params: Any, adapter: Any, rest: Any) -> Any:
        def step(rest: Any, x: jax.Array) -> Any:
            out, rest = lora.apply(params, adapter, rest, x)
            return rest, out

        return jax.lax.scan(step, rest, xs)

    after, outs = decode(params, adapter, rest)
    merged = jlora.nnx.merge_into(model, adapter)
    assert_close(outs, jnp.stack([merged(x) for x in xs]), rtol=2e-5)
    assert after["cache_index"][...] == 4


class Sower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(WIDTH, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.dense(x)
        self.sow(nnx.Intermediate, "hidden", h)
        return nnx.relu(h)


def sown(model: Sower, x: jax.Array) -> Any:
    return nnx.capture(model, nnx.Intermediate)(x)


def test_intermediates_are_output_of_a_function_that_captures_them() -> None:
    model, x = Sower(nnx.Rngs(0)), values(2, WIDTH)
    lora, params, adapter, rest = jlora.nnx.wrap(model, config(), x, method=sown)
    (out, captured), after = jax.jit(lora.apply)(params, adapter, rest, x)
    (hidden,) = jax.tree.leaves(captured)
    assert_close(nnx.relu(hidden), out, rtol=1e-6)
    assert not jax.tree.leaves((rest, after))


@pytest.mark.filterwarnings("ignore:Using 'Module.sow..' outside:DeprecationWarning")
def test_what_a_call_sows_is_dropped() -> None:
    model, x = Sower(nnx.Rngs(0)), values(2, WIDTH)
    model(x)  # leaves an intermediate in the model
    lora, params, adapter, rest = jlora.nnx.wrap(model, config(), x)
    _, after = lora.apply(params, adapter, rest, x)
    assert not jax.tree.leaves((rest, after))


def test_state_that_a_call_adds_is_an_error() -> None:
    class Late(Sower):
        def __call__(self, x: jax.Array) -> jax.Array:
            self.seen = Counter(x.mean())
            return self.dense(x)

    with pytest.raises(ValueError, match=r"added the state \['seen'\]"):
        jlora.nnx.wrap(Late(nnx.Rngs(0)), config(), values(2, WIDTH))


def test_what_is_no_model_or_no_method_is_an_error() -> None:
    model, x = nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(0)), values(2, WIDTH)
    with pytest.raises(TypeError, match="takes an NNX module first, got a function"):
        jlora.nnx.wrap(lambda x: x, config(), x)
    with pytest.raises(TypeError, match="Linear has no method 'encode'"):
        jlora.nnx.wrap(model, config(), x, method="encode")
    adapter = jlora.nnx.wrap(model, config(), x).adapter
    with pytest.raises(jlora.AdapterError, match="'kernel' is no path"):
        jlora.nnx.merge_into(Own(nnx.Rngs(0)), adapter)


def test_a_leaf_trained_whole_is_merged_too() -> None:
    model, x = nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(0)), values(2, WIDTH)
    configs = [config("kernel"), config("bias", full=True)]
    lora, params, adapter, rest = jlora.nnx.wrap(model, configs, x)
    adapter = {**adapter, "bias": jnp.full(4, 7.0)}
    merged = jlora.nnx.merge_into(model, adapter)
    np.testing.assert_array_equal(merged.bias[...], np.full(4, 7.0))
    assert_close(lora.apply(params, adapter, rest, x)[0], merged(x), rtol=1e-6)

"""Control flow as `jax.vmap`, `jax.grad` and meshes make it: nothing of it is lost."""

import functools
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import AxisType, PartitionSpec
from oracle import assert_close
from releases import varying

import jlora

X = (3, 5)


@pytest.fixture
def params(getkey):
    """Two kernels that are adapted, and a frozen one."""
    make = lambda *shape: 0.5 * jax.random.normal(getkey(), shape)
    return {"w": make(5, 7), "v": make(5, 7), "square": make(5, 5), "s": make(5, 7)}


@pytest.fixture
def x(getkey):
    """The activations."""
    return jax.random.normal(getkey(), X)


def merged(params: Any, adapter: Any) -> Any:
    """The params with W + s·a·b, formed here."""
    new = {path: params[path] + e.scaling * e.a @ e.b for path, e in adapter.items()}
    return {**params, **new}


def adapted(fn: Any, target: Any, params: Any, x: Any, key: Any, **how: Any) -> Any:
    """A `Lora` of `fn` and a random adapter."""
    lora = jlora.lora(fn, jlora.LoraConfig(target, rank=2, alpha=3.0), **how)
    adapter = lora.init(jax.random.key(0), params, x)
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(key, len(leaves))
    pairs = zip(keys, leaves, strict=True)
    random = [0.5 * jax.random.normal(k, v.shape) for k, v in pairs]
    return lora, treedef.unflatten(random)


def check(fn: Any, target: Any, params: Any, x: Any, key: Any, **how: Any) -> Any:
    """Values and gradients are those of the merged params. Returns the jaxpr."""
    lora, adapter = adapted(fn, target, params, x, key, **how)
    assert_close(lora.apply(params, adapter, x), fn(merged(params, adapter), x), 1e-5)
    ours = lambda adapter: jnp.sin(lora.apply(params, adapter, x)).sum()
    theirs = lambda adapter: jnp.sin(fn(merged(params, adapter), x)).sum()
    actual, expected = jax.grad(ours)(adapter), jax.grad(theirs)(adapter)
    assert_close(actual, expected, 1e-4)
    return jax.make_jaxpr(lora.apply)(params, adapter, x)


def equations(jaxpr: Any, name: str) -> list[Any]:
    """All equations of a primitive, at any depth."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    found = []
    for eqn in jaxpr.eqns:
        found += [eqn] if eqn.primitive.name == name else []
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    found += equations(inner, name)
    return found


# --- each parameter of each primitive is known ---

KNOWN = {
    "jit": {
        *("jaxpr", "in_shardings", "out_shardings", "in_layouts", "out_layouts"),
        *("donated_invars", "ctx_mesh", "name", "keep_unused", "inline"),
        "compiler_options_kvs",
    },
    "remat2": {"jaxpr", "prevent_cse", "differentiated", "policy"},
    "scan": {
        *("jaxpr", "length", "reverse", "unroll"),
        *("num_consts", "num_carry", "ft_in", "ft_out"),
        *("linear", "_split_transpose"),  # up to jax 0.9: hints, which change no value
    },
    "while": {"cond_jaxpr", "body_jaxpr", "cond_nconsts", "body_nconsts"},
    "cond": {"branches", "branches_platforms"},
    "shard_map": {
        *("jaxpr", "mesh", "in_specs", "out_specs", "check_vma"),
        *("newly_manual_axes", "manual_axes"),
    },
    "composite": {"jaxpr", "call_jaxpr", "name", "attributes", "version"},
}


def test_every_parameter_is_known():
    """A new one must be looked at: see the heads of the files in `_rules/`."""
    mesh = jax.make_mesh((1,), ("d",), (AxisType.Auto,))
    spec = PartitionSpec("d")

    def fn(x):
        y = jax.jit(jnp.sin)(x)
        y = jax.checkpoint(jnp.sin)(y)
        y = lax.scan(lambda c, r: (c + r, c), 0.0, y)[1]
        y = lax.while_loop(lambda c: c[0] < 3, lambda c: c + x, y)
        y = lax.cond(y[0] > 0, jnp.sin, jnp.cos, y)
        y = lax.platform_dependent(y, tpu=jnp.sin, default=jnp.cos)
        y = lax.composite(jnp.sin, "my.sin")(y)
        return jax.shard_map(jnp.sin, mesh=mesh, in_specs=spec, out_specs=spec)(y)

    jaxpr = jax.make_jaxpr(fn)(jnp.ones(3))
    for name, known in KNOWN.items():
        found = equations(jaxpr, name)
        assert found, name
        for eqn in found:
            assert set(eqn.params) <= known, name


# --- while ---


def until(step: Any) -> Any:
    """A loop whose number of steps is another one for each example."""

    def fn(params, x, limit):
        body = lambda c: (c[0] + 1, step(params, c[1]))
        return lax.while_loop(lambda c: c[0] < limit, body, (0, x))

    return fn


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_mapped_while(nested: bool, jit: bool, params, x, getkey):
    one = until(lambda p, x: jnp.tanh(x @ p["square"]))
    if nested:
        limits = jnp.array([[1, 4], [0, 2], [3, 3]])
        inner = lambda p, x, n: jax.vmap(one, (None, None, 0))(p, x, n)
    else:
        limits, inner = jnp.array([1, 4, 0]), one
    fn = lambda p, x: jax.vmap(inner, (None, 0, 0))(p, x, limits)
    lora, adapter = adapted(fn, "square", params, x, getkey())
    apply = jax.jit(lora.apply) if jit else lora.apply
    steps, y = apply(params, adapter, x)
    want_steps, want = fn(merged(params, adapter), x)
    assert (steps == want_steps).all()
    assert_close(y, want, 1e-5)


def test_mapped_while_over_keys_and_forward_mode(params, x, getkey):
    def one(p, x, key, limit):
        def body(c):
            n, x, key = c
            key, new = jax.random.split(key)
            noise = 0.1 * jax.random.normal(new, x.shape)
            return n + 1, jnp.tanh(x @ p["square"]) + noise, key

        return lax.while_loop(lambda c: c[0] < limit, body, (0, x, key))[1]

    keys, limits = jax.random.split(jax.random.key(1), 3), jnp.array([2, 0, 5])
    fn = lambda p, x: jax.vmap(one, (None, 0, 0, 0))(p, x, keys, limits)
    lora, adapter = adapted(fn, "square", params, x, getkey(), backward="autodiff")
    push = lambda f: jax.jvp(f, (adapter,), (adapter,))
    actual = push(lambda a: lora.apply(params, a, x))
    assert_close(actual, push(lambda a: fn(merged(params, a), x)), 1e-5)


def test_mapped_while_on_an_explicit_mesh(params, x, getkey):
    def one(p, x, limit):  # JAX needs a start that is mapped, on such a mesh
        body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["square"]))
        return lax.while_loop(lambda c: c[0] < limit, body, (0 * limit, x))[1]

    limits = lambda x: jnp.abs(3 * x[:, 0]).astype(int)
    fn = lambda p, x: jax.vmap(one, (None, 0, 0))(p, x, limits(x))
    mesh = jax.make_mesh((4,), ("d",), (AxisType.Explicit,), devices=jax.devices()[:4])
    x = jax.random.normal(getkey(), (8, 5))
    lora, adapter = adapted(fn, "square", params, x, getkey())
    want = fn(merged(params, adapter), x)
    with jax.set_mesh(mesh):
        got = jax.jit(lora.apply)(params, adapter, jax.device_put(x, jax.P("d")))
    assert_close(got, want, 1e-5)


def test_inputs_refuses_a_mapped_while(params, x, getkey):
    one = until(lambda p, x: jnp.tanh(x @ p["square"]))
    fn = lambda p, x: jax.vmap(one, (None, 0, 0))(p, x, jnp.array([1, 4, 2]))
    lora, _ = adapted(fn, "square", params, x, getkey())
    with pytest.raises(
        jlora.UnsupportedFeatureError, match=r"which examples still run"
    ):
        lora.inputs(params, x)


# --- platforms ---


def test_branches_keep_their_platforms(params, x, getkey):
    def fn(p, x):
        on_tpu = lambda x, w: x @ w * jnp.nan
        here = lambda x, w: jnp.tanh(x @ w)
        return lax.platform_dependent(x, p["w"], tpu=on_tpu, default=here)

    jaxpr = check(fn, "w", params, x, getkey())
    (cond,) = equations(jaxpr, "cond")
    assert cond.params["branches_platforms"] == (("tpu",), None)


# --- checkpoints ---

_same = Primitive("same")
_same.def_impl(lambda x, *, prim: x)
_same.def_abstract_eval(lambda x, *, prim: x)
ad.deflinear2(_same, lambda ct, x, *, prim: [_same.bind(ct, prim=prim)])
mlir.register_lowering(_same, lambda ctx, x, *, prim: [x])


@pytest.mark.parametrize("policy", [None, lambda p, /, *_, **__: p.name == "tanh"])
def test_a_primitive_may_name_its_parameters_as_it_likes(policy, params, x, getkey):
    inner = lambda w, x: _same.bind(jnp.tanh(x @ w), prim="tanh")
    fn = lambda p, x: jax.checkpoint(inner, policy=policy)(p["w"], x)
    check(fn, "w", params, x, getkey())


def test_policies_are_let_go(params, x, getkey):
    held = []

    def fn(p, x):
        policy = lambda *_, **__: False
        held.append(weakref.ref(policy))
        return jax.checkpoint(lambda w, x: jnp.tanh(x @ w), policy=policy)(p["w"], x)

    lora, adapter = adapted(fn, "w", params, x, getkey())
    loss = lambda adapter: lora.apply(params, adapter, x).sum()
    for _ in range(5):
        jax.make_jaxpr(jax.grad(loss))(adapter)
    jax.clear_caches()
    gc.collect()
    assert sum(ref() is not None for ref in held) <= 1


def test_policies_are_equal_where_theirs_are():
    from jlora._product.low_rank import keeping

    policy = lambda *_, **__: False
    assert keeping(policy) == keeping(policy) != keeping(lambda *_, **__: False)
    assert hash(keeping(policy)) == hash(keeping(policy))
    assert keeping(None) is keeping(None)


@pytest.mark.parametrize("prevent_cse", [True, False, (True, False)])
def test_a_checkpoint_keeps_what_prevents_cse(prevent_cse, params, x, getkey):
    inner = jax.checkpoint(lambda w, x: jnp.tanh(x @ w), prevent_cse=prevent_cse)
    jaxpr = check(lambda p, x: inner(p["w"], x), "w", params, x, getkey())
    (eqn,) = equations(jaxpr, "remat2")
    kept = eqn.params["prevent_cse"]
    if isinstance(prevent_cse, bool):
        assert kept is prevent_cse
    else:  # the kernel's, then its factors', then that of x
        assert sorted(set(kept)) == [False, True]
        assert kept[-1] is False


def test_a_checkpoint_of_a_backward_pass_stays_one(params, x, getkey):
    """Else XLA finds that it computes what was computed before, and keeps that."""
    inner = jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w)).sum())
    fn = lambda p, x: jax.grad(inner, argnums=1)(p["w"], x)
    plain = jax.make_jaxpr(fn)(params, x)
    jaxpr = check(fn, "w", params, x, getkey())
    told = lambda jaxpr: [
        e.params["differentiated"] for e in equations(jaxpr, "remat2")
    ]
    assert True in told(plain)
    assert told(jaxpr) == told(plain)


# --- jit, composite ---


def test_jit_keeps_its_parameters(params, x, getkey):
    inner = jax.jit(lambda w, x, y: x @ w, keep_unused=True, donate_argnums=(0, 1))
    fn = lambda p, x: inner(p["w"], x + 1.0, x)
    lora, adapter = adapted(fn, "w", params, x, getkey())
    jaxpr = jax.make_jaxpr(lora.apply)(params, adapter, x)
    (eqn,) = [e for e in equations(jaxpr, "jit") if e.params["keep_unused"]]
    # The kernel and its factors are the caller's; `x + 1` is not.
    assert eqn.params["donated_invars"] == (False, False, False, True, False)
    got = jax.jit(lora.apply)(params, adapter, x)
    assert_close(got, jax.jit(fn)(merged(params, adapter), x), 1e-5)


def test_a_composite_is_entered(params, x, getkey):
    inner = lax.composite(lambda x, w: jnp.tanh(x @ w), "my.dense")
    fn = lambda p, x: inner(x, p["w"])
    lora, adapter = adapted(fn, "w", params, x, getkey())
    got = lora.apply(params, adapter, x)
    assert_close(got, fn(merged(params, adapter), x), 1e-5)


# --- choices ---

FLAGS, PICKS = jnp.array([True, False, True]), jnp.array([2, 0, 1])


def mapped(one: Any, which: Any) -> Any:
    """Branches with a predicate for each example."""
    return lambda p, x: jax.vmap(one, (None, 0, 0))(p, x, which)


def nested(p, x):
    both = lambda x, i: lax.cond(i, lambda: x @ p["w"], lambda: -(x @ p["v"]))
    inner = lambda x, i: jax.vmap(both, (None, 0))(x, i)
    return jax.vmap(inner)(x, jnp.stack([FLAGS, ~FLAGS], 1))


def scanned(p, x):
    both = lambda x, i: lax.cond(i, lambda: x @ p["w"], lambda: x @ p["v"])
    step = lambda n, i: (n, jax.vmap(both)(x, i))
    return lax.scan(step, 0, jnp.stack([FLAGS, ~FLAGS]))[1]


CHOICES = {
    "cond": (
        mapped(
            lambda p, x, i: lax.cond(
                i, lambda: x @ p["w"], lambda: jnp.tanh(x) @ p["w"] + x @ p["v"]
            ),
            FLAGS,
        ),
        ["w", "v"],
    ),
    "switch_of_kernels": (
        mapped(
            lambda p, x, i: (
                x @ lax.switch(i, [lambda: p["w"], lambda: p["v"], lambda: 2 * p["w"]])
            ),
            PICKS,
        ),
        ["w", "v"],
    ),
    "switch_with_a_plain_one": (
        mapped(
            lambda p, x, i: (
                x @ lax.switch(i, [lambda: p["w"], lambda: p["s"], lambda: p["v"]])
            ),
            PICKS,
        ),
        ["w", "v"],
    ),
    "nested": (nested, ["w", "v"]),
    "in_a_scan": (scanned, ["w", "v"]),
    "lookup": (
        mapped(
            lambda p, x, i: lax.cond(
                i, lambda: p["w"][jnp.argmax(x)], lambda: p["v"][jnp.argmin(x)]
            ),
            FLAGS,
        ),
        ["w", "v"],
    ),
    "scalar": (lambda p, x: x @ jnp.where(x[0, 0] > 0, p["w"], p["v"]), ["w", "v"]),
    "scalar_or_zero": (lambda p, x: x @ jnp.where(x[0, 0] > -9, p["w"], 0), "w"),
    "rows": (
        lambda p, x: x @ jnp.where((jnp.arange(5) % 2 == 0)[:, None], p["w"], 0),
        "w",
    ),
    "columns": (
        lambda p, x: x @ jnp.where(x.sum() * jnp.arange(7) > 0, p["w"], p["v"]),
        ["w", "v"],
    ),
}


@pytest.mark.parametrize("backward", ["custom", "autodiff"])
@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str, backward: Any, params, x, getkey):
    fn, target = CHOICES[name]
    check(fn, target, params, x, getkey(), backward=backward)


@pytest.mark.parametrize("ranks", [(2, 3), (2, 2)])
@pytest.mark.parametrize("dora", [False, True])
def test_choices_of_other_ranks_and_dora(ranks, dora: bool, params, x, getkey):
    fn, _ = CHOICES["switch_of_kernels"]
    configs = [
        jlora.LoraConfig(path, rank=rank, alpha=3.0, dora=dora and path == "w")
        for path, rank in zip("wv", ranks, strict=True)
    ]
    lora = jlora.lora(fn, configs)
    adapter = lora.init(jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda v: jax.random.normal(getkey(), v.shape), adapter)

    def reference(adapter):
        new = merged(params, adapter)
        if dora:
            norm = jnp.linalg.norm(new["w"], axis=0, keepdims=True)
            scale = adapter["w"].magnitude[None] / lax.stop_gradient(norm)
            new["w"] = scale * new["w"]
        return fn(new, x)

    assert_close(lora.apply(params, adapter, x), reference(adapter), 1e-5)
    ours = jax.grad(lambda a: jnp.sin(lora.apply(params, a, x)).sum())(adapter)
    theirs = jax.grad(lambda a: jnp.sin(reference(a)).sum())(adapter)
    assert_close(ours, theirs, 1e-4)


def test_dropout_of_chosen_kernels_differs_from_example_to_example(params, getkey):
    """The keys are those of the kernel; each example has one of its own."""
    x = jnp.ones((3, 5))
    config = jlora.LoraConfig(["w", "v"], rank=2, dropout=0.5)
    lora = jlora.lora(mapped_alone, config)
    adapter = lora.init(jax.random.key(0), params, x)
    adapter = jax.tree.map(lambda v: jax.random.normal(getkey(), v.shape), adapter)
    drop = lambda key: lora.apply(params, adapter, x, lora_dropout_key=key)
    rows = np.asarray(jax.vmap(drop)(jax.random.split(jax.random.key(3), 8)))
    assert not np.allclose(rows[:, 0], rows[:, 2])


def mapped_alone(p, x):
    """Examples 0 and 2 take the same branch."""
    one = lambda x, i: lax.cond(i, lambda: x @ p["w"], lambda: x @ p["v"])
    return jax.vmap(one)(x, FLAGS)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ jnp.where(jnp.tril(jnp.ones((5, 7))) > 0, p["w"], 0),
        lambda p, x: x @ jnp.where(p["s"] > 0, p["w"], p["s"]),
    ],
)
def test_a_mask_of_both_sides_is_refused(fn, params, x, getkey):
    with pytest.raises(jlora.MaterializationError, match=r"reaches select_n at"):
        lora, adapter = adapted(fn, "w", params, x, getkey())
        lora.apply(params, adapter, x)
    check(fn, "w", params, x, getkey(), materialize="allow")


@pytest.mark.parametrize("what", ["choice", "scale"])
def test_new_axes_are_not_joined_with_those_of_the_kernel(what, params, x, getkey):
    """A mapped convolution joins the examples with the channels."""

    def one(p, x, i):
        w = jnp.where(i, p["w"], p["v"]) if what == "choice" else p["w"] * i
        window = w.T[:, :, None]
        return lax.conv_general_dilated(x[None, :, None], window, (1,), "SAME")

    target = ["w", "v"] if what == "choice" else "w"
    which = FLAGS if what == "choice" else jnp.arange(3.0)
    fn = mapped(one, which)
    with pytest.raises(jlora.MaterializationError, match=r"'w' .* reaches reshape"):
        lora, adapter = adapted(fn, target, params, x, getkey())
        lora.apply(params, adapter, x)
    check(fn, target, params, x, getkey(), materialize="allow")


# --- functions with a derivative of their own ---


@jax.custom_vjp
def halved(x, w):
    """A product whose gradients are halved."""
    return x @ w


halved.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda r, g: (0.5 * g @ r[1].T, 0.5 * r[0].T @ g)
)


@jax.custom_jvp
def doubled(x, w):
    """A product whose derivative is doubled."""
    return x @ w


@doubled.defjvp
def _doubled_jvp(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 2 * (dx @ w + x @ dw)


@pytest.mark.parametrize("inner", [halved, doubled], ids=["custom_vjp", "custom_jvp"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_a_derivative_of_its_own_is_kept(inner, wrap, params, x, getkey):
    """Its kernel is handed over as a whole, or refused by the function's name."""
    fn = lambda p, x: wrap(lambda x, w: jnp.tanh(inner(x, w)))(x, p["w"])
    name = inner.__name__
    with pytest.raises(jlora.MaterializationError, match=f"call of '{name}' at") as e:
        lora, adapter = adapted(fn, "w", params, x, getkey())
        lora.apply(params, adapter, x)
    assert "DirectAdjoint" in str(e.value)
    check(fn, "w", params, x, getkey(), materialize="allow")


# --- shard_map, traced and eager ---


def dense(p, x):
    """A product."""
    return jnp.tanh(x @ p["w"])


def convolved(p, x):
    """A convolution."""
    window = p["w"].T[:, :, None]
    return lax.conv_general_dilated(x[:, :, None], window, (1,), "SAME")


def looked_up(p, x):
    """Rows."""
    return p["w"][(jnp.abs(3 * x[:, 0])).astype(int) % 5]


def experts(p, x):
    """A ragged product."""
    both = jnp.stack([p["w"], 2 * p["w"]])
    return lax.ragged_dot(x, both, jnp.array([x.shape[0] - 1, 1]))


MODELS = [dense, convolved, looked_up, experts]
EAGER = pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
MESHES = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


def two_axes(kind: AxisType) -> Any:
    """A mesh of two axes."""
    return jax.make_mesh((2, 2), ("d", "m"), (kind, kind), devices=jax.devices()[:4])


@EAGER
@MESHES
@pytest.mark.parametrize("model", MODELS)
def test_shard_map_inside(model, kind, jit: bool, params, getkey):
    mesh = two_axes(kind)
    data, whole = PartitionSpec("d"), PartitionSpec()
    fn = lambda p, x: jax.shard_map(
        model, mesh=mesh, in_specs=(whole, data), out_specs=data
    )({"w": p["w"]}, x)
    x = jax.random.normal(getkey(), (8, 5))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, data)
        lora, adapter = adapted(fn, "w", params, x, getkey())
        loss = lambda a: jnp.sin(lora.apply(params, a, x)).sum()
        want = lambda a: jnp.sin(jax.jit(fn)(merged(params, a), x)).sum()
        run = jax.jit if jit else lambda f: f
        assert_close(run(loss)(adapter), want(adapter), 1e-5)
        assert_close(run(jax.grad(loss))(adapter), jax.grad(want)(adapter), 1e-4)


@EAGER
@MESHES
@pytest.mark.parametrize("cast", ["none", "varying", "unchecked"])
@pytest.mark.parametrize("model", MODELS)
def test_shard_map_around(model, kind, cast: str, jit: bool, params, getkey):
    mesh = two_axes(kind)
    data, whole = PartitionSpec("d"), PartitionSpec()
    x = jax.random.normal(getkey(), (8, 5))
    lora, adapter = adapted(model, "w", params, x, getkey())

    def local(apply, p, a, x):
        if cast == "varying":
            a = varying(a, "d")
        loss = lambda a: jnp.sin(apply(p, a, x)).sum()
        value, grads = jax.value_and_grad(loss)(a)
        if cast != "none":
            grads = jax.tree.map(lambda v: lax.psum(v, "d"), grads)
        return lax.psum(value, "d"), grads

    def run(apply, jit):
        fn = jax.shard_map(
            functools.partial(local, apply),
            mesh=mesh,
            in_specs=(whole, whole, data),
            out_specs=whole,
            check_vma=cast != "unchecked",
        )
        placed = jax.device_put(x, jax.NamedSharding(mesh, data))
        with jax.set_mesh(mesh):
            return (jax.jit(fn) if jit else fn)(params, adapter, placed)

    expected = run(lambda p, a, x: model(merged(p, a), x), True)
    assert_close(run(lora.apply, jit), expected, 1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("where", ["replicated", "host"])
def test_factors_enter_a_shard_map_laid_out_or_not(kind: Any, where: str) -> None:
    """As they come from a file: on the host, or whole on each device."""
    P = PartitionSpec
    mesh = jax.make_mesh((2, 2), ("data", "model"), (kind,) * 2)
    specs = (P("data", None), P(None, "model"))
    model = lambda p, x: jax.shard_map(
        lambda x, w: x @ w,
        mesh=mesh,
        in_specs=specs,
        out_specs=P("data", "model"),
    )(x, p["w"])
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(6, 8)), rng.normal(size=(4, 6))
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.asarray(w, jnp.float32), P(None, "model"))}
        rows = jax.device_put(jnp.asarray(x, jnp.float32), P("data", None))
        lora = jlora.lora(model, jlora.LoraConfig("w", rank=3, alpha=4.0))
        adapter = lora.init(jax.random.key(0), params, rows)
        adapter = jax.tree.map(lambda v: np.asarray(v) + 0.1, adapter)
        if where == "replicated":
            adapter = jax.tree.map(lambda v: jax.device_put(v, P()), adapter)
        found = jax.jit(lora.apply)(params, adapter, rows)
    a, b = np.asarray(adapter["w"].a), np.asarray(adapter["w"].b)
    expected = x @ (w + 4 / 3 * a @ b)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-4)

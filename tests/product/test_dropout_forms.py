"""Dropout in every form of a product: against autodiff with masks that were read off.

Two siblings share an operand and have masks of their own; a third kernel is alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forms import choose
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")
RATE, ROWS, INNER, WIDE, OUT, RANK, SCALING = 0.25, 8, 6, 10, 4, 3, 1.5
KEY = jax.random.key(5)
SHAPES = {"u": (INNER, WIDE), "v": (INNER, WIDE), "w": (WIDE, OUT)}
CONFIG = jlora.LoraConfig(rank=RANK, alpha=RANK * SCALING, dropout=RATE)
FORMS = ["separate", "extended", "joined", "copied", "fused"]


def model(params: Any, x: jax.Array, place: Any = None) -> jax.Array:
    inner = jnp.tanh(x @ params["u"]) * (x @ params["v"])
    return jnp.matmul(inner, params["w"], out_sharding=place)


def plain(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn


def scanned(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same rows twice, and so the same masks."""
    return lambda params, x: lax.scan(
        lambda n, x: (n + 1, fn(params, x)), 0, jnp.stack([x, 2 * x])
    )[1]


WRAPPERS = {
    "plain": plain,
    "remat": jax.checkpoint,
    "scan": scanned,
    "scan_of_remat": lambda fn: scanned(jax.checkpoint(fn)),
}


@pytest.fixture(scope="module")
def kept() -> dict[str, np.ndarray]:
    """The mask of each target: what its branch gives where all factors are eyes."""
    found = {}
    for name, (size, _) in SHAPES.items():
        config = jlora.LoraConfig(rank=size, alpha=float(size), dropout=RATE)
        lora = jlora.lora(lambda p, x, name=name: x @ p[name], config)
        params, x = {name: jnp.zeros((size, size))}, jnp.ones((ROWS, size))
        adapter = jax.tree.map(lambda v: jnp.eye(*v.shape), lora.init(KEY, params, x))
        y = np.asarray(lora.apply(params, adapter, x, lora_dropout_key=KEY))
        found[name] = np.isclose(y, 1 / (1 - RATE), rtol=1e-5)
        assert np.all(found[name] | (y == 0))
        assert 0 < found[name].mean() < 1
    assert not np.array_equal(found["u"], found["v"])
    return found


@pytest.fixture(scope="module")
def case() -> tuple[Any, Any, jax.Array]:
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {name: draw(*shape) for name, shape in SHAPES.items()}
    x = draw(ROWS, INNER)
    adapter = jlora.lora(model, CONFIG).init(KEY, params, x)
    return params, jax.tree.map(lambda v: draw(*v.shape), adapter), x


def masked(kept: dict[str, np.ndarray], params: Any, adapter: Any) -> Any:
    """The model with masks that are constants."""

    def product(name: str, x: jax.Array) -> jax.Array:
        factors = adapter[name]
        dropped = jnp.where(kept[name], x / (1 - RATE), 0)
        return x @ params[name] + SCALING * (dropped @ factors.a) @ factors.b

    def fn(_: Any, x: jax.Array) -> jax.Array:
        return product("w", jnp.tanh(product("u", x)) * product("v", x))

    return fn


def value_and_gradients(fn: Callable[..., Any], adapter: Any, x: jax.Array) -> Any:
    """Those of a loss that tells all outputs apart, in the adapter and in `x`."""

    def loss(adapter: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = fn(adapter, x)
        weights = jnp.linspace(0.5, 1.5, y.size).reshape(y.shape)
        return jnp.sum(weights * y**2), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(adapter, x)


def settings_of(form: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of `jlora.lora`; forms that no setting names are chosen."""
    if form == "merged":  # which a mask forbids
        return {"contraction": "merged"}
    if form == "autodiff":
        return {"backward": "autodiff"}
    choose(monkeypatch, form)
    return {}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("form", [*FORMS, "merged", "autodiff"])
def test_values_and_gradients(
    form: str, wrapper: str, kept: Any, case: Any, monkeypatch: pytest.MonkeyPatch
):
    params, adapter, x = case
    wrap, settings = WRAPPERS[wrapper], settings_of(form, monkeypatch)
    lora = jlora.lora(wrap(model), CONFIG, **settings)
    apply = lambda adapter, x: lora.apply(params, adapter, x, lora_dropout_key=KEY)
    wanted = lambda adapter, x: wrap(masked(kept, params, adapter))(params, x)
    got = value_and_gradients(apply, adapter, x)
    assert_close(got, value_and_gradients(wanted, adapter, x), 1e-5)


@pytest.mark.parametrize("form", [*FORMS, "merged", "autodiff"])
def test_an_example_that_is_mapped_has_the_masks_that_it_has_alone(
    form: str, kept: Any, case: Any, monkeypatch: pytest.MonkeyPatch
):
    params, adapter, x = case
    lora = jlora.lora(model, CONFIG, **settings_of(form, monkeypatch))
    apply = lambda adapter, x: lora.apply(params, adapter, x, lora_dropout_key=KEY)
    wanted = lambda adapter, x: masked(kept, params, adapter)(params, x)
    xs = jnp.stack([x, 2 * x])
    got, want = (
        value_and_gradients(jax.vmap(fn, (None, 0)), adapter, xs)
        for fn in (apply, wanted)
    )
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("form", ["separate", "fused", "ruled"])
def test_on_a_mesh(
    form: str, kind: AxisType, kept: Any, case: Any, monkeypatch: pytest.MonkeyPatch
):
    """Rows over one axis, kernels and their factors over the other."""
    choose(monkeypatch, form)
    params, adapter, x = case
    want = value_and_gradients(
        lambda adapter, x: masked(kept, params, adapter)(params, x), adapter, x
    )
    mesh = jax.make_mesh((4, 2), ("data", "model"), (kind, kind))
    place = P("data") if kind == AxisType.Explicit else None
    lora = jlora.lora(lambda params, x: model(params, x, place), CONFIG)
    put = lambda v, *names: jax.device_put(v, NamedSharding(mesh, P(*names)))
    with jax.set_mesh(mesh):
        params = {
            "u": put(params["u"], None, "model"),
            "v": put(params["v"], None, "model"),
            "w": put(params["w"], "model"),
        }
        adapter = jax.device_put(adapter, jlora.shardings(params, adapter))
        apply = lambda adapter, x: lora.apply(params, adapter, x, lora_dropout_key=KEY)
        got = value_and_gradients(apply, adapter, put(x, "data"))
    host = lambda tree: jax.tree.map(np.asarray, tree)
    assert_close(host(got), host(want), 1e-5)


def test_the_fused_form_takes_siblings_with_dropout_in_one_group(
    case: Any, monkeypatch: pytest.MonkeyPatch
):
    """One sum for each kernel forward, and no product besides that has all outputs."""
    choose(monkeypatch, "fused")
    params, adapter, x = case
    lora = jlora.lora(model, CONFIG)
    apply = lambda *args: lora.apply(*args, lora_dropout_key=KEY)
    text = str(jax.make_jaxpr(apply)(params, adapter, x))
    assert text.count("<opened_alone of 2 products>") == 1
    assert text.count("<opened_alone of 1 product>") == 1

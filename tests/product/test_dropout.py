"""Dropout on the input of the low-rank branch.

With `a` and `b` the identity (rank = in = out) the branch gives its own input, so that
a test sees the masks: they are zero or `x/(1 - rate)`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from case import make_case
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close
from use import Use
from uses import USES

import jlora
from jlora._plan import kernels
from jlora._product.dropout import Dropout, bits, drop, numbers

pytestmark = pytest.mark.usefixtures("fast_compile")
NAMED = {use.name: use for use in USES}
RATE, N = 0.25, 6
KEY = jax.random.key(5)
DROPOUT = {"dropout": RATE}


def adapted(model: Any, params: Any, *args: Any, rank: int = N) -> tuple[Any, Any]:
    """An adapter whose branch gives its own input, in `model`, and its apply."""
    config = jlora.LoraConfig(rank=rank, alpha=float(rank), **DROPOUT)
    lora = jlora.lora(model, config)
    fresh = lora.init(jax.random.key(0), params, *args)
    eye = lambda v: jnp.broadcast_to(jnp.eye(*v.shape[-2:]), v.shape)
    return lora, jax.tree.map(eye, fresh)


def masks(y: jax.Array, x: jax.Array) -> np.ndarray:
    """Which values of `x` a branch has kept, given that it gives its own input."""
    kept = np.isclose(y, x / (1 - RATE), rtol=1e-5)
    assert np.all(kept | (np.asarray(y) == 0))
    return kept


def test_a_share_is_zero_and_the_rest_scaled(getkey):
    model = lambda params, x: x @ params["w"]
    params, x = {"w": jnp.zeros((N, N))}, jax.random.normal(getkey(), (2000, N))
    lora, adapter = adapted(model, params, x)
    kept = masks(lora.apply(params, adapter, x, lora_dropout_key=KEY), x)
    assert abs(kept.mean() - (1 - RATE)) < 0.02
    again = lora.apply(params, adapter, x, lora_dropout_key=KEY)
    other = lora.apply(params, adapter, x, lora_dropout_key=jax.random.key(6))
    assert np.array_equal(masks(again, x), kept)
    assert not np.array_equal(masks(other, x), kept)


def test_without_a_key_nothing_is_dropped(getkey):
    case = make_case(NAMED["siblings"], getkey, variant=DROPOUT)
    plain = dataclasses.replace(
        case.lora,
        configs=tuple(dataclasses.replace(c, dropout=0.0) for c in case.lora.configs),
    )
    wanted = plain.apply(*case.args)
    assert_close(case.lora.apply(*case.args), wanted, 0.0)
    assert_close(plain.apply(*case.args, lora_dropout_key=KEY), wanted, 0.0)
    dropped = case.lora.apply(*case.args, lora_dropout_key=KEY)
    assert not np.allclose(jax.tree.leaves(dropped)[0], jax.tree.leaves(wanted)[0])


@pytest.mark.parametrize(
    "seed", [KEY, jax.random.PRNGKey(5), jax.random.key(5, impl="rbg")]
)
def test_any_kind_of_key(seed: Any, getkey):
    model = lambda params, x: x @ params["w"]
    params, x = {"w": jnp.zeros((N, N))}, jax.random.normal(getkey(), (40, N))
    lora, adapter = adapted(model, params, x)
    assert not masks(lora.apply(params, adapter, x, lora_dropout_key=seed), x).all()


def test_siblings_have_masks_of_their_own(getkey):
    model = lambda params, x: [x @ params[name] for name in "qkv"]
    params = {name: jnp.zeros((N, N)) for name in "qkv"}
    x = jax.random.normal(getkey(), (50, N))
    lora, adapter = adapted(model, params, x)
    found = [masks(y, x) for y in lora.apply(params, adapter, x, lora_dropout_key=KEY)]
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[1], found[2])
    # The mask of a target does not depend on what else is adapted.
    alone, own = {"k": params["k"]}, {"k": adapter["k"]}
    single = jlora.lora(lambda params, x: x @ params["k"], lora.configs)
    y = single.apply(alone, own, x, lora_dropout_key=KEY)
    assert np.array_equal(masks(y, x), found[1])


def _layers(checkpoint: bool) -> Any:
    def model(params: Any, x: jax.Array) -> jax.Array:
        step = lambda carry, w: (carry, x @ w)
        return lax.scan(jax.checkpoint(step) if checkpoint else step, 0, params["w"])[1]

    return model


def test_layers_of_a_scan_have_masks_of_their_own(getkey):
    params, x = {"w": jnp.zeros((3, N, N))}, jax.random.normal(getkey(), (50, N))
    lora, adapter = adapted(_layers(False), params, x)
    ys = lora.apply(params, adapter, x, lora_dropout_key=KEY)
    found = [masks(y, x) for y in ys]
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[1], found[2])


def test_experts_have_masks_of_their_own(getkey):
    model = lambda params, x: jnp.einsum("bei,eio->beo", x, params["w"])
    params, x = {"w": jnp.zeros((3, N, N))}, jax.random.normal(getkey(), (50, 1, N))
    x = jnp.repeat(x, 3, axis=1)
    lora, adapter = adapted(model, params, x)
    y = lora.apply(params, adapter, x, lora_dropout_key=KEY)
    kept = masks(y, x)
    assert not np.array_equal(kept[:, 0], kept[:, 1])
    assert abs(kept.mean() - (1 - RATE)) < 0.1


@pytest.mark.parametrize("derive", ["custom", "autodiff"])
def test_gradients_are_those_of_the_masked_product(derive: str, getkey):
    """The masks are read off once; the reference is plain autodiff with them."""
    model = lambda params, x: jnp.tanh(x @ params["v"]) @ params["w"]
    params = {"v": jnp.zeros((N, 5)), "w": jnp.zeros((5, 4))}
    x = jax.random.normal(getkey(), (7, N))
    config = jlora.LoraConfig(rank=2, alpha=3.0, **DROPOUT)
    lora = jlora.lora(model, config, backward=derive)
    adapter = lora.init(getkey(), params, x)
    draw = lambda v: jax.random.normal(getkey(), v.shape)
    adapter = jax.tree.map(draw, adapter)
    params = jax.tree.map(draw, params)
    kept = {}
    for name, size in (("v", N), ("w", 5)):
        shape = (7, size)
        probe = jlora.lora(lambda p, x, name=name: x @ p[name], config)
        eye = dataclasses.replace(
            adapter[name], a=jnp.eye(size), b=jnp.eye(size), scaling=1.0
        )
        zero = {name: jnp.zeros((size, size))}
        y = probe.apply(zero, {name: eye}, jnp.ones(shape), lora_dropout_key=KEY)
        kept[name] = masks(y, jnp.ones(shape))

    def product(x: jax.Array, w: jax.Array, factors: Any, name: str) -> jax.Array:
        masked = jnp.where(kept[name], x / (1 - RATE), 0)
        return x @ w + 1.5 * masked @ factors.a @ factors.b

    def wanted(adapter: Any, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(product(x, params["v"], adapter["v"], "v"))
        return jnp.sum(product(hidden, params["w"], adapter["w"], "w") ** 2)

    def actual(adapter: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(lora.apply(params, adapter, x, lora_dropout_key=KEY) ** 2)

    differentiate = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))(adapter, x)
    assert_close(differentiate(actual), differentiate(wanted), 1e-5)


def test_remat_makes_the_same_masks_again(getkey):
    params, x = {"w": jnp.zeros((3, N, N))}, jax.random.normal(getkey(), (50, N))

    def gradient(checkpoint: bool) -> Any:
        lora, adapter = adapted(_layers(checkpoint), params, x)
        apply = lambda a: lora.apply(params, a, x, lora_dropout_key=KEY)
        return jax.jit(jax.grad(lambda a: jnp.sum(apply(a) ** 2)))(adapter)

    assert_close(gradient(True), gradient(False), 1e-6)


def test_no_mask_is_kept_for_the_backward_pass(getkey):
    model = lambda params, x: x @ params["w"]
    params, x = {"w": jnp.zeros((N, N))}, jax.random.normal(getkey(), (40, N))
    lora, adapter = adapted(model, params, x)
    apply = lambda a: lora.apply(params, a, x, lora_dropout_key=KEY)
    _, backward = jax.vjp(apply, adapter)
    kept = [v for v in jax.tree.leaves(backward) if jnp.shape(v) == x.shape]
    assert not any(v.dtype == bool for v in jax.tree.leaves(backward))
    assert all(np.array_equal(v, x) for v in kept), "the masked input is a residual"


@pytest.mark.parametrize(
    "name", ["conv_2d_groups", "experts_ragged", "scan_stack", "tied", "dot_settings"]
)
def test_the_mean_over_keys_is_evaluation(name: str, getkey):
    """Dropout is unbiased where the function is linear in the branch."""
    use: Use = NAMED[name]
    case = make_case(use, getkey, variant=DROPOUT)
    zero = jax.tree.map(jnp.zeros_like, case.params)
    # One kernel deep: the others of the use are left at zero.
    small = jax.tree.map(lambda v: 0.05 * v, case.adapter)
    apply = lambda key: case.lora.apply(zero, small, *case.inputs, lora_dropout_key=key)
    ys = jax.jit(lambda keys: jax.lax.map(apply, keys))(
        jax.random.split(getkey(), 4000)
    )
    mean = jax.tree.map(lambda y: jnp.mean(y, 0), ys)
    wanted = case.lora.apply(zero, small, *case.inputs)
    assert_close(mean, wanted, 0.1)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind: AxisType, getkey):
    """The same masks as on one device."""
    model = lambda params, x: x @ params["w"]
    params, x = {"w": jnp.zeros((N, N))}, jax.random.normal(getkey(), (8, N))
    lora, adapter = adapted(model, params, x)
    wanted = lora.apply(params, adapter, x, lora_dropout_key=KEY)
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((2, 2), ("data", "model"), (kind, kind), devices=devices)
    put = lambda value, *names: jax.device_put(value, NamedSharding(mesh, P(*names)))
    with jax.set_mesh(mesh):
        params, x = {"w": put(params["w"], None, "model")}, put(x, "data")
        axes = adapter["w"].axes
        a, b = put(adapter["w"].a), put(adapter["w"].b, None, "model")
        adapter = {"w": jlora.LoraFactors(a, b, axes, 1.0)}
        step = jax.jit(lambda *args: lora.apply(*args, lora_dropout_key=KEY))
        actual = step(params, adapter, x)
        text = step.lower(params, adapter, x).compile().as_text()
    assert_close(np.asarray(actual), np.asarray(wanted), 1e-6)
    assert f"u32[4,{N}]" in text
    assert f"u32[8,{N}]" not in text, "each device draws for all of them"


@pytest.mark.parametrize("rate", [-0.1, 1.0, True, "0.1", float("nan")])
def test_bad_rates(rate: Any):
    with pytest.raises((TypeError, ValueError), match=r"LoraConfig.dropout"):
        jlora.LoraConfig(dropout=rate)


def test_targets_are_not_looked_for_again_to_know_the_rate(monkeypatch, getkey):
    """Where configs that match a leaf agree: else the first that can use it decides."""
    params = {"k": jnp.ones((5, 7)), "table": jnp.ones((11, 5))}
    model = lambda params, i: params["table"][i] @ params["k"]
    make = lambda target, rate: jlora.LoraConfig(target, rank=2, dropout=rate)
    agree = jlora.lora(model, [make("k", 0.5), make("table", 0.25)])
    differ = jlora.lora(model, [make("k", 0.5), make("k|table", 0.25)])
    key, index = getkey(), jnp.arange(3)
    adapter = agree.init(getkey(), params, index)
    fill = lambda x: jax.random.normal(getkey(), x.shape)
    adapter = jax.tree.map(fill, adapter)
    run = lambda lora: lora.apply(params, adapter, index, lora_dropout_key=key)
    wanted = run(differ)
    assert float(jnp.abs(wanted - agree.apply(params, adapter, index)).max()) > 0.1
    monkeypatch.setattr(kernels, "discover", lambda *args: pytest.fail("discovered"))
    np.testing.assert_array_equal(run(agree), wanted)


def hashed(number: int, first: int, last: int) -> int:
    """The bits of one place, in integers of Python."""
    mod = 1 << 32

    def mix(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B % mod
        h = (h ^ h >> 13) * 0xC2B2AE35 % mod
        return h ^ h >> 16

    return mix((mix(number ^ mix(first)) + mix(last)) % mod)


def test_the_bits_are_a_hash_of_place_and_key():
    words = jnp.array([[7, 11], [2**32 - 1, 3]], jnp.uint32)
    found = np.asarray(bits(jnp.ones((3, 2, 5)), words, batch=(1,)))
    for (i, j, k), value in np.ndenumerate(found):
        assert value == hashed(5 * i + k, *map(int, words[j]))
    more = words[:, None] + jnp.zeros((1, 3, 1), jnp.uint32)
    swapped = bits(jnp.ones((2, 5, 3)), more, (0, 2))
    assert np.array_equal(swapped[:, :, 2], found[0])


def test_places_beyond_the_limit_are_told_apart_by_a_second_number():
    low, high = numbers(jnp.ones((4, 3, 2, 5)), [0, 2, 3], limit=10)
    assert np.array_equal(low, np.arange(10).reshape(1, 1, 2, 5))
    assert np.array_equal(high, np.arange(4).reshape(4, 1, 1, 1))
    low, high = numbers(jnp.ones((4, 3, 5)), [0, 1, 2], limit=60)
    assert high is None
    assert np.array_equal(np.ravel(low), np.arange(60))
    # 2**33 places, of which none is made.
    many = jax.ShapeDtypeStruct((1 << 16, 1 << 17), jnp.float32)
    numbered = jax.eval_shape(lambda x: numbers(x, [0, 1]), many)
    assert [v.shape for v in numbered] == [(1, 1 << 17), (1 << 16, 1)]


@pytest.mark.parametrize("rate", [1e-12, 0.1, 0.5, 0.9, 1 - 1e-12])
def test_the_rate_is_exact_to_the_resolution(rate: float):
    kept = Dropout(rate, "threefry2x32").kept
    assert 0 < kept < 1 << 32
    assert abs(kept / 2**32 - (1 - rate)) <= 2**-33 + 2**-32 * (
        rate in (1e-12, 1 - 1e-12)
    )


# The words of keys that nobody has hashed: those of `key(0)` to `key(63)`.
RAW = np.stack([np.zeros(64), np.arange(64)], axis=-1).astype(np.uint32)
PLACES = 1 << 14


def kept_by(words: np.ndarray, rate: float) -> np.ndarray:
    draw = lambda w: drop(jnp.ones(PLACES), w, Dropout(rate, "threefry2x32"))
    return np.asarray(jax.vmap(draw)(jnp.asarray(words))) != 0


@pytest.mark.parametrize("words", [RAW, RAW[:, ::-1]], ids=["last", "first"])
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_masks_are_random_and_independent(words: np.ndarray, rate: float):
    """Shares, neighbours and pairs of keys, within 5.5 standard deviations."""
    kept = kept_by(words, rate) - (1 - rate)
    variance = rate * (1 - rate)
    shares = kept.mean(axis=1) / np.sqrt(variance / PLACES)
    assert np.abs(shares).max() < 5.5
    assert 0.7 < shares.std() < 1.3  # as much scatter as is due, no more and no less
    apart = [1, 2, 3, 64, 1000]
    neighbours = [(kept[:, d:] * kept[:, :-d]).mean(1) for d in apart]
    assert np.abs(neighbours).max() * np.sqrt(PLACES - 1000) / variance < 5.5
    pairs = (kept @ kept.T / PLACES)[np.triu_indices(len(words), 1)]
    pairs = pairs * np.sqrt(PLACES) / variance
    assert np.abs(pairs).max() < 5.5
    assert 0.9 < pairs.std() < 1.1


def test_each_bit_is_one_half_of_the_time_and_none_copies_another():
    found = np.asarray(bits(jnp.ones(PLACES), jnp.asarray(RAW[1])))
    ones = (found[:, None] >> np.arange(32)) & 1
    centred = 2.0 * ones - 1
    assert np.abs(centred.mean(0)).max() * np.sqrt(PLACES) < 5
    table = centred.T @ centred / np.sqrt(PLACES)
    assert np.abs(table[np.triu_indices(32, 1)]).max() < 5
    assert len(np.unique(found)) == PLACES


def test_no_block_of_a_generator_is_drawn_for_each_value():
    """What is drawn from a generator is the key of a target, not its mask."""
    model = lambda params, x: x @ params["w"]
    params, x = {"w": jnp.zeros((N, N))}, jnp.ones((500, N))
    lora, adapter = adapted(model, params, x)
    loss = lambda a, x: jnp.sum(lora.apply(params, a, x, lora_dropout_key=KEY) ** 2)
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(adapter, x))
    assert "random_wrap" in text or "random_fold_in" in text
    assert "random_bits" not in text

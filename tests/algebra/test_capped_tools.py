"""What else takes an adapter, with kernels in it that have less than the asked rank."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from case import randomized
from flax import linen as nn
from narrow import KINDS, NARROW, PARAMS, RANKS, X, encoder, leaf, make
from oracle import assert_close

import jlora
from jlora import adalora

pytestmark = pytest.mark.usefixtures("fast_compile")
Tree = dict[str, Any]


def several() -> tuple[jlora.Lora, Tree, Tree]:
    """Two adapters whose asked ranks differ: only wide kernels show it."""
    lora, one = make(rank=4, alpha=8.0)
    _, other = make(rank=8, alpha=16.0)
    keys = jax.random.split(jax.random.key(1))
    return lora, randomized(one, keys[0]), randomized(other, keys[1])


def ranks(adapter: Tree) -> dict[str, int]:
    return {path: entry.rank for path, entry in adapter.items()}


def total(adapter: Tree) -> dict[str, np.ndarray]:
    return {p: np.asarray(jlora.delta(e), np.float64) for p, e in adapter.items()}


def test_sums_and_their_truncation():
    _, one, other = several()
    x, y = total(one), total(other)
    sums = {
        "add": (jlora.add(one, other), 1, 1),
        "subtract": (jlora.subtract(one, other), 1, -1),
        "combine": (jlora.combine([one, other], [0.25, 2.0], method="sum"), 0.25, 2),
    }
    for found, s, t in sums.values():
        for path, change in total(found).items():
            np.testing.assert_allclose(change, s * x[path] + t * y[path], atol=1e-5)
    added, _, _ = sums["add"]
    small = jlora.truncate(added, 8)
    assert ranks(small) == RANKS
    for path in (p for p, rank in RANKS.items() if rank < 8):  # they lose nothing
        np.testing.assert_allclose(total(small)[path], total(added)[path], atol=1e-5)


def test_merging_methods_that_need_equal_ranks():
    """Those of capped kernels are equal, whatever was asked."""
    _, one, other = several()
    narrow = [p for p, rank in RANKS.items() if rank < 4]
    pair = [{p: x[p] for p in narrow} for x in (one, other)]
    found = jlora.combine(pair, [0.5, 0.5], method="linear")
    assert ranks(found) == {p: RANKS[p] for p in sorted(narrow)}


def test_stacks_and_mixed_batches():
    lora, one, other = several()
    stacked = jlora.stack([one, other])
    for path, rank in RANKS.items():
        assert stacked[path].a.shape[-1] == rank and stacked[path].scaling == 2.0
    index = jnp.array([1, 0, -1, 1])
    actual = lora.apply_mixed(PARAMS, stacked, index, X, KINDS)
    by_index = {i: lora.apply(PARAMS, e, X, KINDS) for i, e in enumerate((one, other))}
    by_index[-1] = encoder(PARAMS, X, KINDS)
    rows = [[out[i] for out in by_index[int(j)]] for i, j in enumerate(index)]
    expected = tuple(jnp.stack(row) for row in zip(*rows, strict=True))
    assert_close(actual, expected, 1e-5)
    again = jlora.put(stacked, 1, one)
    assert [ranks(e) for e in jlora.unstack(again, trim=True)] == [ranks(one)] * 2


def test_adalora_has_as_many_triplets():
    lora, one, _ = several()
    svd = adalora.init(jax.random.key(0), one)
    sizes = {path: entry.values.shape[-1] for path, entry in svd.items()}
    assert sizes == ranks(one)
    assert float(adalora.orthogonality_penalty(svd)) < 1e-8
    again = adalora.prune(adalora.from_factors(one))
    assert ranks(again) == ranks(one)
    actual = lora.apply(PARAMS, again, X, KINDS)
    assert_close(actual, lora.apply(PARAMS, one, X, KINDS), 2e-5)


# --- initialisers ---

GRADS = jax.grad(lambda p: sum((y**2).mean() for y in encoder(p, X, KINDS)))(PARAMS)
BY_PATH = {path: leaf(GRADS, path) for path in NARROW}
MOVING = {
    "pissa": lambda x, stats: jlora.pissa(PARAMS, x),
    "pissa fast": lambda x, stats: jlora.pissa(
        PARAMS, x, method="fast", key=jax.random.key(2)
    ),
    "milora": lambda x, stats: jlora.milora(PARAMS, x),
    "olora": lambda x, stats: jlora.olora(PARAMS, x),
    "corda": lambda x, stats: jlora.corda(PARAMS, x, stats),
    "corda new": lambda x, stats: jlora.corda(PARAMS, x, stats, mode="instruction"),
    "ArB2r": lambda x, stats: jlora.lora_ga(PARAMS, x, BY_PATH, direction="ArB2r"),
    "A2rBr": lambda x, stats: jlora.lora_ga(PARAMS, x, BY_PATH, direction="A2rBr"),
    "ArBr": lambda x, stats: jlora.lora_ga(PARAMS, x, BY_PATH, direction="ArBr"),
    "eva": lambda x, stats: (PARAMS, jlora.eva(x, stats, rho=1)),
}


@pytest.mark.parametrize("name", MOVING)
def test_initialisers_begin_at_the_base(name: str):
    lora, adapter = make()
    stats = lora.inputs(PARAMS, X, KINDS)
    rest, new = MOVING[name](adapter, stats)
    assert ranks(new) == RANKS
    assert {e.scaling for e in new.values()} == {2.0}
    actual = lora.apply(rest, new, X, KINDS)
    assert_close(actual, encoder(PARAMS, X, KINDS), 2e-5)


def test_loftq_and_eva_of_narrow_kernels():
    lora, adapter = make()
    halves = lambda w: jnp.round(2 * w) / 2
    rest, new = jlora.loftq(PARAMS, adapter, quantize=halves)
    merged = jlora.merge(rest, new)
    for path, rank in RANKS.items():
        if rank < 8:  # the whole error has this rank
            np.testing.assert_allclose(
                leaf(merged, path), leaf(PARAMS, path), atol=1e-5
            )
    shared = jlora.eva(adapter, lora.inputs(PARAMS, X, KINDS, lora_sketch=16))
    assert all(shared[path].rank <= RANKS[path] for path in shared if RANKS[path] < 8)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_lora_ga_shares_few_singular_vectors_out(rank: int, direction: Any):
    """The first step is along the best approximation of the gradient, and no column
    of `a` is zero together with its row of `b`, which no gradient would leave."""
    grad = jax.random.normal(jax.random.key(rank), (7, 5))
    params, x = {"w": jnp.ones((7, 5))}, jnp.ones((2, 7))
    lora = jlora.lora(lambda p, x: x @ p["w"], jlora.LoraConfig("w", rank=rank))
    adapter = lora.init(jax.random.key(0), params, x)
    rest, new = jlora.lora_ga(
        params, adapter, {"w": grad}, direction=direction, gamma=4.0
    )
    a, b = new["w"].a, new["w"].b
    assert (jnp.any(a != 0, axis=0) | jnp.any(b != 0, axis=1)).all()
    assert_close(jlora.merge(rest, new), params, 1e-5)
    u, s, vt = np.linalg.svd(grad, full_matrices=False)
    s[2 * rank :] = 0
    step = a @ a.T @ grad + grad @ b.T @ b
    assert_close(step, 5**0.5 / 4 * (u * s) @ vt, 1e-4)


# --- a Flax model, from the default config to a step ---


class Classifier(nn.Module):
    """BERT in small: words, positions and token types; two labels and a gate."""

    @nn.compact
    def __call__(self, ids: jax.Array, types: jax.Array) -> jax.Array:
        h = nn.Embed(19, 12, name="words")(ids) + nn.Embed(2, 12, name="types")(types)
        h = nn.LayerNorm()(h)
        h = h + nn.Dense(12, name="up")(h) * nn.sigmoid(nn.Dense(1, name="gate")(h))
        return nn.Dense(2, name="labels")(h.mean(axis=-2))


@pytest.mark.parametrize("bias", ["none", "adapted"])
@pytest.mark.parametrize("target", [None, ".*"])
def test_a_classifier_is_trained_by_the_default_config(target: Any, bias: str):
    model, ids = Classifier(), jax.random.randint(jax.random.key(0), (6, 5), 0, 19)
    types, labels = ids % 2, jnp.arange(6) % 2
    variables = model.init(jax.random.key(1), ids, types)
    lora = jlora.lora(model.apply, jlora.LoraConfig(target, bias=bias))
    adapter = lora.init(jax.random.key(2), variables, ids, types)
    tables = {"params/words/embedding": 8, "params/types/embedding": 2}
    wanted = {"params/up/kernel": 8, "params/gate/kernel": 1, "params/labels/kernel": 2}
    wanted |= tables if target else {}
    factors = {p: e for p, e in adapter.items() if not p.endswith("bias")}
    assert ranks(factors) == wanted
    assert (len(adapter) > len(factors)) == (bias != "none")
    tx = optax.adam(1e-2)

    def loss(adapter: Tree) -> jax.Array:
        logits = lora.apply(variables, adapter, ids, types)
        own = optax.softmax_cross_entropy_with_integer_labels
        return own(logits, labels).mean()

    @jax.jit
    def step(adapter: Tree, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(adapter)
        updates, state = tx.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state, first = tx.init(adapter), float(loss(adapter))
    for _ in range(30):
        adapter, state, last = step(adapter, state)
    assert last < 0.8 * first
    plan = lora.plan(variables, ids, types)
    size = lambda tree: sum(v.nbytes for v in jax.tree.leaves(tree))
    memory = plan.memory(optimizer=tx)
    assert (memory.factors, memory.optimizer) == (size(adapter), size(state))

"""The Llama of examples/ and the batches it is trained on."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import chat_data
import generation
import gguf_file
import llama
import pretrained
import training
from tiny_llama import (
    CONFIG,
    TALKS,
    pairs_from_halves,
    random_weights,
    write_gguf,
)

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", random_weights())


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> pretrained.Pretrained:
    """The tiny Llama, loaded."""
    return pretrained.load(str(tiny_path))


def some_tokens(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), shape, 0, CONFIG.vocab)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(found, expected, atol=tolerance * scale, rtol=0)


# The model.


def test_scanned_and_unrolled_models_agree(tiny: pretrained.Pretrained) -> None:
    unrolled = llama.Llama(dataclasses.replace(CONFIG, scan=False))
    params = llama.unstack_blocks(tiny.variables["params"])
    tokens = some_tokens(2, 7)
    assert_close(
        unrolled.apply({"params": params}, tokens),
        tiny.model.apply(tiny.variables, tokens),
    )


def test_loading_unrolled_is_loading_scanned_and_unstacking(
    tiny: pretrained.Pretrained, tiny_path: Path
) -> None:
    unrolled = pretrained.load(str(tiny_path), scan=False)
    chex.assert_trees_all_equal(
        unrolled.variables["params"], llama.unstack_blocks(tiny.variables["params"])
    )


def test_rotary_in_halves_equals_rotary_in_pairs() -> None:
    time, dim, heads, base = 5, 8, 3, 100.0
    random = np.random.default_rng(0)
    x = random.normal(size=(time, 11)).astype(np.float32)
    in_halves = [random.normal(size=(heads * dim, 11)) for _ in range(2)]
    scores = []
    for turn, ordered in ((turn_halves, lambda w: w), (turn_pairs, pairs_of(heads))):
        q, k = ((x @ ordered(w).T).reshape(time, heads, dim) for w in in_halves)
        q, k = turn(q.astype(np.float32), base), turn(k.astype(np.float32), base)
        scores.append(np.einsum("qhd,khd->hqk", q, k))
    assert_close(*scores)
    for w in in_halves:
        back = gguf_file.halves_from_pairs(pairs_from_halves(w, heads), heads)
        np.testing.assert_array_equal(back, w)


def pairs_of(heads: int) -> Any:
    return lambda weight: pairs_from_halves(weight, heads)


def turn_halves(x: np.ndarray, base: float) -> np.ndarray:
    return np.asarray(llama.rotate(jnp.asarray(x)[None], jnp.arange(len(x)), base)[0])


def turn_pairs(x: np.ndarray, base: float) -> np.ndarray:
    """The rotation written with complex numbers: features 2i and 2i + 1 are a pair."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def test_no_token_sees_a_later_one(tiny: pretrained.Pretrained) -> None:
    tokens = some_tokens(1, 9)
    changed = tokens.at[0, 6:].set(0)
    one, two = (tiny.model.apply(tiny.variables, t) for t in (tokens, changed))
    assert_close(one[:, :6], two[:, :6])
    assert float(jnp.abs(one[:, 6:] - two[:, 6:]).max()) > 0.01


def test_a_cache_gives_the_logits_of_the_whole_sequence(
    tiny: pretrained.Pretrained,
) -> None:
    tokens = some_tokens(2, 9)
    whole = tiny.model.apply(tiny.variables, tokens)
    cache, parts = llama.empty_cache(CONFIG, 2, 12), []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        logits, cache = tiny.model.apply(
            tiny.variables, tokens[:, begin:end], cache=cache
        )
        parts.append(logits)
    assert_close(jnp.concatenate(parts, axis=1), whole)
    assert int(cache.index) == 9


def test_logits_at_chosen_positions(tiny: pretrained.Pretrained) -> None:
    tokens, at = some_tokens(2, 9), jnp.array([[8, 0, 3], [1, 1, 7]])
    whole = tiny.model.apply(tiny.variables, tokens)
    some = tiny.model.apply(tiny.variables, tokens, at=at)
    assert_close(some, jnp.take_along_axis(whole, at[..., None], axis=1))


def test_replies_do_not_depend_on_the_other_prompts(
    tiny: pretrained.Pretrained,
) -> None:
    generate = generation.make_generate(tiny.model.apply, CONFIG, stop=2, length=6)
    prompts = ["hello", "a much longer prompt than the first"]
    answer = lambda some: generation.replies(
        generate, (tiny.variables,), tiny.tokenizer, some
    )
    together = answer(prompts)
    assert together == answer(prompts[:1]) + answer(prompts[1:])
    ids = tiny.tokenizer.encode(prompts[0]).ids
    begin, apply = len(ids), jax.jit(tiny.model.apply)
    while len(ids) < begin + 6 and ids[-1] != 2:  # the same by hand, without a cache
        padded = jnp.array([ids + [0] * (begin + 6 - len(ids))])
        ids.append(int(apply(tiny.variables, padded)[0, len(ids) - 1].argmax()))
    assert together[0] == tiny.tokenizer.decode(ids[begin:]).strip()


# The data.


def test_the_split_keeps_an_opening_on_one_side_and_depends_on_the_seed_alone() -> None:
    talks = [*TALKS, *([talk[0].upper(), "another reply"] for talk in TALKS)]
    train, held_out = chat_data.split(talks, seed=3)
    assert len(train) + len(held_out) == sum(len(talk) - 1 for talk in talks)
    openings = {talk[0].casefold() for talk in talks}
    sides = [
        {p.prompt.casefold() for p in side} & openings for side in (train, held_out)
    ]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 4
    assert (train, held_out) == chat_data.split(list(talks), seed=3)
    assert held_out != chat_data.split(talks, seed=4)[1]


def test_every_reply_token_is_a_target_once(tiny: pretrained.Pretrained) -> None:
    train, _ = chat_data.split(TALKS, seed=0)
    examples = chat_data.encode(tiny.tokenizer, train)
    found = []
    for batch in chat_data.all_batches(examples, rows=2):
        wanted = batch.targets != chat_data.IGNORED
        following = np.take_along_axis(batch.tokens, batch.at + 1, axis=1)
        np.testing.assert_array_equal(following[wanted], batch.targets[wanted])
        found.extend(batch.targets[wanted].tolist())
    expected = [token for e in examples for token in e.tokens[e.start :]]
    assert sorted(found) == sorted(expected)


def test_an_epoch_of_training_batches_is_the_same_for_the_same_seed(
    tiny: pretrained.Pretrained,
) -> None:
    examples = chat_data.encode(tiny.tokenizer, chat_data.split(TALKS, seed=0)[0])
    first = [next(chat_data.training_batches(examples, seed, 2)) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(first[0].tokens, first[1].tokens)
    assert (first[0].tokens != first[2].tokens).any()


def test_packed_pairs_have_the_loss_of_pairs_on_their_own(
    tiny: pretrained.Pretrained,
) -> None:
    examples = chat_data.encode(tiny.tokenizer, chat_data.split(TALKS, seed=0)[0])[:6]
    loss = jax.jit(
        training.make_loss(lambda v, _, *args, **kw: tiny.model.apply(v, *args, **kw))
    )
    (packed,) = chat_data.all_batches(examples, rows=4)
    alone = [chat_data.all_batches([e], rows=4)[0] for e in examples]
    value, count = loss(None, tiny.variables, packed)
    values, counts = zip(*(loss(None, tiny.variables, b) for b in alone), strict=True)
    assert int(count) == sum(map(int, counts))
    mean = sum(v * n for v, n in zip(values, counts, strict=True)) / count
    assert float(value) == pytest.approx(float(mean), rel=1e-5)

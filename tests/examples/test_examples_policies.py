"""examples/two_policies.py, on a Llama of a few thousand weights and on SmolLM2."""

import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from example_runs import needs_data, run_example
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import chat_data
import policy
import rollouts
import two_policies
from tiny_llama import TALKS, random_weights, write_gguf

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")
SIZES = ["--prompts", "4", "--samples", "8", "--width", "128", "--length", "6"]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", random_weights())


@pytest.fixture
def options(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options for the tiny model, which says bytes at random."""
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    return ["--model", str(tiny_path), *SIZES, "--wanted", "[a-z]"]


def figures(printed: str) -> tuple[list[float], list[int]]:
    """Returns the rewards before and after, and the bytes of a step and of the base."""
    (rewards,) = re.findall(r"reward before: ([\d.]+), after: ([\d.]+)", printed)
    (sizes,) = re.findall(r"step: ([\d,]+) bytes; the base: ([\d,]+) bytes", printed)
    return [*map(float, rewards)], [int(size.replace(",", "")) for size in sizes]


def test_the_reward_rises_and_the_base_is_taken_once(
    options: list[str], capsys: Any
) -> None:
    more = ["--steps", "25", "--lr", "2e-2", "--rank", "2", "--target", "(q|down)_proj"]
    assert two_policies.main([*options, *more, "--beta", "0.002"]) == 0
    printed = capsys.readouterr().out
    (before, after), (taken, held) = figures(printed)
    assert before < 0.3
    assert after > before + 0.3
    (divergence,) = re.findall(r"last step: ([\d.]+)", printed)
    assert float(divergence) > 0.01
    assert held < taken < 1.2 * held


def played(options: list[str]) -> tuple[rollouts.Game, Any, policy.Rollout]:
    """A game, an adapter that changes something, and a rollout of it."""
    game = rollouts.Game(two_policies.parse_args(options))
    example = jnp.zeros((1, 8), jnp.int32)
    adapter = game.lora.init(jax.random.key(0), game.base.variables, example)
    adapter = jax.tree.map(lambda v: v + 0.05, adapter)
    return game, adapter, game.play(adapter, game.judged, jax.random.key(1))[0]


def test_the_step_takes_the_base_once_and_nothing_else_of_its_size(
    options: list[str],
) -> None:
    """Its arguments are the base, the adapter, the optimizer and the rollout."""
    game, adapter, rollout = played(options)
    tx = optax.adam(1e-3)
    loss = policy.make_loss(game.lora.apply, game.base.model.apply, 0.1)
    inputs = adapter, tx.init(adapter), game.base.variables, rollout
    compiled = policy.make_step(loss, tx).lower(*inputs).compile()
    found = compiled.memory_analysis().argument_size_in_bytes
    expected = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(inputs))
    assert found == pytest.approx(expected, rel=1e-3)
    consts = jax.make_jaxpr(policy.make_step(loss, tx))(*inputs).consts
    assert sum(np.asarray(leaf).nbytes for leaf in consts) < 10_000


def test_the_divergence_is_that_of_the_merged_model(options: list[str]) -> None:
    game, adapter, rollout = played(options)
    apply, variables = game.base.model.apply, game.base.variables
    both = policy.make_loss(game.lora.apply, apply, 0.1)
    value, divergence = jax.jit(both)(adapter, variables, rollout)
    alone = jax.jit(policy.make_log_probabilities(apply))
    merged = jlora.merge(variables, adapter)
    new, old = (np.float64(alone((v,), rollout)) for v in (merged, variables))
    weights = rollout.replied / rollout.replied.sum()
    expected = ((np.exp(new) * (new - old)).sum(-1) * weights).sum()
    assert expected > 0.01
    np.testing.assert_allclose(divergence, expected, rtol=1e-3)
    chosen = np.take_along_axis(new, np.asarray(rollout.replies)[..., None], -1)[..., 0]
    gain = (rollout.advantages[:, None] * chosen * weights).sum()
    np.testing.assert_allclose(value, 0.1 * expected - gain, rtol=1e-3, atol=1e-4)


def test_a_reply_counts_up_to_where_it_ends() -> None:
    replies = np.array([[5, 2, 2, 2], [5, 6, 7, 8], [2, 2, 2, 2]])
    found = rollouts.sampled_tokens(replies, stop=2)
    assert found.sum(axis=1).tolist() == [2, 4, 1]


def test_advantages_are_those_among_replies_to_one_prompt() -> None:
    found = rollouts.advantages(np.array([0.0, 1.0, 5.0, 5.0]), 2)
    np.testing.assert_allclose(found, [-1, 1, 0, 0], atol=1e-3)


def test_keys_choose_the_replies(options: list[str]) -> None:
    """And without one each token is the likeliest."""
    game, adapter, rollout = played(options)
    weights = game.base.variables, adapter
    one = game.generate(weights, rollout.prompts, rollout.padding, jax.random.key(1))
    two = game.generate(weights, rollout.prompts, rollout.padding, jax.random.key(2))
    greedy = game.generate(weights, rollout.prompts, rollout.padding)
    np.testing.assert_array_equal(one, rollout.replies)
    assert (np.asarray(one) != np.asarray(two)).any()
    likeliest = policy.make_log_probabilities(game.lora.apply)(
        weights, rollout._replace(replies=greedy)
    )
    first = np.asarray(likeliest)[:, 0].argmax(axis=-1)
    np.testing.assert_array_equal(first, np.asarray(greedy)[:, 0])


@pytest.mark.parametrize(
    ("given", "words"),
    [(["--width", "9"], "too short"), (["--target", "querry"], "querry")],
)
def test_the_script_explains_what_it_cannot_do(
    given: list[str], words: str, options: list[str], capsys: Any
) -> None:
    assert two_policies.main([*options, *given]) == 2
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--steps", "--samples", "--length"])
def test_the_script_refuses_to_do_nothing(option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        two_policies.main([option, "0"])


@pytest.mark.examples
@needs_data("TWO POLICIES OF SMOLLM2 ARE")
@pytest.mark.timeout(900)
def test_smollm2_is_held_once(tmp_path: Path) -> None:
    """Which the exit code says."""
    small = ["--steps", "2", "--prompts", "2", "--samples", "2", "--length", "6"]
    printed = run_example("two_policies.py", *small, cwd=tmp_path)
    _, (taken, held) = figures(printed)
    assert held > 5e8
    assert taken < 1.1 * held

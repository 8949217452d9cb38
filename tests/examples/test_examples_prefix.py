"""examples/prefix_tuning.py: LoRA, a prefix and bottlenecks beside one frozen base."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import needs_data, run_example
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import chat_data
import llama
import prefix_tuning
import pretrained
import together
import training
from tiny_llama import CONFIG, TALKS, random_weights, write_gguf

import jlora

METHODS = prefix_tuning.METHODS
PREFIX = 5
TARGET = "(q|down)_proj"
SETTINGS: dict[str, Any] = {"rank": 3, "alpha": 5.0}
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", random_weights())


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> pretrained.Pretrained:
    """The tiny Llama, loaded."""
    return pretrained.load(str(tiny_path))


@pytest.fixture(scope="module")
def batch(tiny: pretrained.Pretrained) -> chat_data.Batch:
    """Eight pairs, some of them in the same row."""
    pairs = chat_data.split(TALKS, seed=0)[0][:8]
    return chat_data.all_batches(chat_data.encode(tiny.tokenizer, pairs), rows=4)[0]


def adapted(base: pretrained.Pretrained) -> jlora.Lora:
    fn = together.with_bottlenecks(base.model.apply)
    return jlora.lora(fn, jlora.LoraConfig(TARGET, **SETTINGS))


def started(base: pretrained.Pretrained) -> dict[str, Any]:
    """The new trees of all methods, as the script starts."""
    args = prefix_tuning.parse_args(["--prefix", str(PREFIX)])
    return prefix_tuning.start(adapted(base), base, args)


def moved(tree: Any, seed: int = 0) -> Any:
    """The tree with noise added to every leaf: nothing that starts at zero stays."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        v + 0.1 * jax.random.normal(k, v.shape)
        for v, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


def logits_of(
    base: pretrained.Pretrained, trained: dict[str, Any], batch: chat_data.Batch
) -> jax.Array:
    apply = together.make_apply(adapted(base), base.model.config)
    mask = training.packed_mask(jnp.asarray(batch.segments))
    jitted = jax.jit(apply)
    return jitted(base.variables, trained, batch.tokens, mask=mask, at=batch.at)


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(found, expected, atol=tolerance * scale, rtol=0)


# What each method computes.


@pytest.mark.parametrize("absent", [True, False])
def test_nothing_but_lora_acts_where_the_prompt_is_empty_and_up_is_zero(
    absent: bool, tiny: pretrained.Pretrained, batch: chat_data.Batch
) -> None:
    new = started(tiny)
    adapter = moved(new["lora"])
    trained = {"lora": adapter}
    if not absent:
        trained["bottleneck"] = new["bottleneck"]
        trained["prompt"] = together.new_prompt(tiny, "hello", 0)
    lora = jlora.lora(tiny.model.apply, jlora.LoraConfig(TARGET, **SETTINGS))
    mask = training.packed_mask(jnp.asarray(batch.segments))
    inputs = (batch.tokens, mask, batch.at)
    expected = jax.jit(
        lambda tokens, mask, at: lora.apply(
            tiny.variables, adapter, tokens, mask=mask, at=at
        )
    )(*inputs)
    plain = logits_of(tiny, {}, batch)
    assert_close(logits_of(tiny, trained, batch), expected)
    assert float(jnp.abs(expected - plain).max()) > 0.1


def test_a_new_prefix_is_the_text_read_before(
    tiny: pretrained.Pretrained, batch: chat_data.Batch
) -> None:
    prompt = together.new_prompt(tiny, "hello, you", PREFIX)
    ids = tiny.tokenizer.encode("hello, you").ids[:PREFIX]
    rows, time = batch.tokens.shape
    tokens = np.concatenate([np.tile(ids, (rows, 1)), batch.tokens], axis=1)
    mask = np.zeros((rows, PREFIX + time, PREFIX + time), bool)
    mask[:, :PREFIX, :PREFIX] = np.tril(np.ones((PREFIX, PREFIX), bool))
    mask[:, PREFIX:, :PREFIX] = True
    mask[:, PREFIX:, PREFIX:] = training.packed_mask(jnp.asarray(batch.segments))
    expected = jax.jit(tiny.model.apply)(
        tiny.variables, tokens, mask=jnp.asarray(mask), at=batch.at + PREFIX
    )
    assert_close(logits_of(tiny, {"prompt": prompt}, batch), expected)


def test_a_short_text_is_repeated(tiny: pretrained.Pretrained) -> None:
    prompt = together.new_prompt(tiny, "ab", 5)
    longer = together.new_prompt(tiny, "ababa", 5)
    jax.tree.map(np.testing.assert_array_equal, prompt, longer)


def by_hand(params: Any, trees: Any, tokens: jax.Array) -> jax.Array:
    """The logits of a Llama with bottlenecks, layer by layer."""
    c = CONFIG
    positions = jnp.arange(tokens.shape[1])
    mask = (positions[None] <= positions[:, None])[None]
    norm = lambda values, x: nn.RMSNorm(epsilon=c.norm_eps).apply({"params": values}, x)

    def through(values: Any, y: jax.Array) -> jax.Array:
        narrow = jax.nn.gelu(jnp.einsum("bth,hw->btw", y, values["down"]))
        return y + jnp.einsum("btw,wh->bth", narrow, values["up"])

    x = params["embed"]["embedding"][tokens]
    for i in range(c.layers):
        layer, tree = (
            jax.tree.map(lambda v, i=i: v[i], t) for t in (params["blocks"], trees)
        )
        attention = {"params": layer["attention"]}
        normed = norm(layer["attention_norm"], x)
        y, _ = llama.Attention(c).apply(attention, normed, None, mask, positions)
        x = x + through(tree["attention"], y)
        normed = norm(layer["mlp_norm"], x)
        y = llama.Mlp(c).apply({"params": layer["mlp"]}, normed)
        x = x + through(tree["mlp"], y)
    return norm(params["norm"], x) @ params["embed"]["embedding"].T


def test_bottlenecks_act_after_attention_and_feed_forward(
    tiny: pretrained.Pretrained,
) -> None:
    trees = moved(together.new_bottleneck(jax.random.key(0), CONFIG, 7))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.vocab)
    fn = jax.jit(together.with_bottlenecks(tiny.model.apply))
    found = fn(tiny.variables, trees, tokens)
    assert_close(found, jax.jit(by_hand)(tiny.variables["params"], trees, tokens))
    plain = fn(tiny.variables, {}, tokens)
    assert_close(plain, jax.jit(tiny.model.apply)(tiny.variables, tokens))
    assert float(jnp.abs(found - plain).max()) > 0.1


def test_each_layer_has_a_bottleneck_of_its_own(tiny: pretrained.Pretrained) -> None:
    trees = together.new_bottleneck(jax.random.key(0), CONFIG, 7)
    assert {v.shape[0] for v in jax.tree.leaves(trees)} == {CONFIG.layers}
    fn = jax.jit(together.with_bottlenecks(tiny.model.apply))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, CONFIG.vocab)
    plain, outputs = fn(tiny.variables, {}, tokens), []
    for layer in range(CONFIG.layers):
        up = trees["mlp"]["up"].at[layer].set(1.0)
        outputs.append(
            fn(tiny.variables, {"mlp": {**trees["mlp"], "up": up}}, tokens) - plain
        )
    for i, one in enumerate(outputs):
        for two in outputs[:i]:
            assert float(jnp.abs(one - two).max()) > 1e-3


# One gradient, one optimizer.


def test_one_gradient_reaches_every_leaf_of_all_three_trees(
    tiny: pretrained.Pretrained, batch: chat_data.Batch
) -> None:
    """And is that of finite differences along it, in each tree."""
    loss = training.make_loss(together.make_apply(adapted(tiny), CONFIG))
    trained = {name: moved(tree) for name, tree in started(tiny).items()}
    value = jax.jit(lambda t: loss(t, tiny.variables, batch)[0])
    grads = jax.jit(jax.grad(value))(trained)
    assert set(grads) == set(METHODS)
    assert jax.tree.structure(grads) == jax.tree.structure(trained)
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)
    for name in METHODS:
        size = float(np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads[name]))))
        step = jax.tree.map(lambda g, n=size: 1e-2 * g / n, grads[name])
        ahead, behind = (
            value({**trained, name: jax.tree.map(move, trained[name], step)})
            for move in (jnp.add, jnp.subtract)
        )
        assert float(ahead - behind) / 2e-2 == pytest.approx(size, rel=0.05), name


def test_every_tree_is_trained_and_the_base_does_not_move(
    tiny: pretrained.Pretrained,
) -> None:
    before = jax.tree.map(np.array, tiny.variables)
    new = started(tiny)
    pairs = chat_data.encode(tiny.tokenizer, chat_data.split(TALKS, seed=0)[0])
    args = prefix_tuning.parse_args(["--steps", "4", "--length", "128"])
    old, lower, trained = prefix_tuning.train(
        adapted(tiny), tiny, (pairs, pairs), new, args
    )
    assert lower < old
    jax.tree.map(np.testing.assert_array_equal, tiny.variables, before)
    assert jax.tree.structure(trained) == jax.tree.structure(new)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(trained), jax.tree.leaves(new), strict=True
    ):
        assert float(jnp.abs(x - y).max()) > 1e-4, jax.tree_util.keystr(path)


def test_only_the_base_is_targeted(tiny: pretrained.Pretrained) -> None:
    new = started(tiny)
    plain = jlora.lora(tiny.model.apply, jlora.LoraConfig(TARGET, **SETTINGS))
    alone = plain.init(jax.random.key(0), tiny.variables, jnp.zeros((1, 4), jnp.int32))
    assert set(new["lora"]) == set(alone)
    assert len(alone) == 2


# The script.


def run(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    options = ["--model", str(path), "--target", TARGET, "--rank", "3"]
    options += ["--length", "128", "--steps", "4", *words]
    assert prefix_tuning.main(options) == 0
    return capsys.readouterr().out


def rows_of(printed: str) -> dict[str, list[float]]:
    """The numbers in each row of the table: values, loss before, loss after."""
    rows = (line.strip("│ ").split("│") for line in printed.splitlines() if "│" in line)
    number = lambda cell: float(cell.replace(",", ""))
    return {
        first.strip(): [number(cell) for cell in rest if cell.strip()]
        for first, *rest in rows
    }


@pytest.mark.slow
def test_the_script_compares_each_method_alone_with_all(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    found = rows_of(run(tiny_path, capsys, "--alone", "--prefix", "3", "--width", "7"))
    *alone, everything = found
    assert alone == list(METHODS)
    assert everything == " + ".join(METHODS)
    for name, (_, before, after) in found.items():
        assert after < before, name
    assert found[everything][0] == sum(found[name][0] for name in alone)
    c = CONFIG
    assert found["prompt"][0] == 2 * c.layers * 3 * c.kv_heads * c.head_dim
    assert found["bottleneck"][0] == 2 * 2 * c.layers * c.hidden * 7
    assert found["lora"][1] == found["bottleneck"][1]  # both begin as the model


@pytest.mark.slow
def test_the_script_trains_all_together(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    found = rows_of(run(tiny_path, capsys))
    assert [len(found[name]) for name in METHODS] == [1, 1, 1]
    _, before, after = found[" + ".join(METHODS)]
    assert after < before


@pytest.mark.parametrize(
    ("option", "value"), [("--target", "querry"), ("--model", "no.gguf")]
)
def test_the_script_explains_what_it_cannot_do(
    option: str,
    value: str,
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    options = {"--model": str(tiny_path)} | {option: value}
    code = prefix_tuning.main([word for pair in options.items() for word in pair])
    assert code == 2
    assert value in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--steps", "--prefix", "--width", "--held-out"])
def test_the_script_refuses_to_do_nothing(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        prefix_tuning.parse_args([option, "0"])
    assert option in capsys.readouterr().err


def test_an_unrolled_model_is_refused(tiny: pretrained.Pretrained) -> None:
    unrolled = llama.Llama(dataclasses.replace(CONFIG, scan=False))
    params = llama.unstack_blocks(tiny.variables["params"])
    fn = together.with_bottlenecks(unrolled.apply)
    trees = together.new_bottleneck(jax.random.key(0), CONFIG, 7)
    with pytest.raises(ValueError, match=r"blocks.*scan=True"):
        fn({"params": params}, trees, jnp.zeros((1, 4), jnp.int32))


@pytest.mark.examples
@needs_data("PREFIXES BESIDE LORA ARE")
@pytest.mark.timeout(900)
def test_the_held_out_loss_of_smollm2_falls() -> None:
    printed = run_example("prefix_tuning.py", "--steps", "6")
    (before, after) = map(
        float,
        re.findall(r"bottleneck +│ [\d,]+ +│ ([\d.]+) +│ ([\d.]+)", printed)[-1],
    )
    assert after < before - 0.2

"""examples/serve_mixed.py, on a Llama of a few thousand weights and on SmolLM2."""

import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import needs_data, run_example
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import generation
import pretrained
import serve_mixed
from serve_mixed import BASE, Batch, Request
from tiny_llama import random_weights, write_gguf

import jlora

pytestmark = pytest.mark.usefixtures("fast_compile")
LIMIT, LENGTH, RANK, STOP = 5, 24, 4, 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pretrained.Pretrained:
    path = write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", random_weights())
    return pretrained.load(str(path))


def new_batch(base: pretrained.Pretrained, adapters: int = 4) -> Batch:
    return Batch(
        base,
        stop=STOP,
        places=5,
        adapters=adapters,
        rank=RANK,
        length=LENGTH,
        limit=LIMIT,
    )


def saved(batch: Batch, folder: Path, count: int) -> dict[str, tuple[Any, Path]]:
    """Adapters of several ranks, by name, in folders of PEFT and of Orbax in turn."""
    found = {}
    for i in range(count):
        config = jlora.LoraConfig(rank=1 + i % RANK, alpha=2.0 + i)
        lora = jlora.lora(batch.lora.fn, config)
        example = batch._first(batch.example)
        base = batch.base.variables
        shapes = jax.eval_shape(lora.init, jax.random.key(0), base, *example)
        random = np.random.default_rng(i)
        draw = lambda v, random=random: jnp.asarray(
            0.3 * random.normal(size=v.shape), v.dtype
        )
        adapter, path = jax.tree.map(draw, shapes), folder / f"adapter {i}"
        if i % 2:
            jlora.checkpoint.save(path, adapter, config=config, base=base)
        else:
            plan = lora.plan(base, *example)
            jlora.peft.save(path, plan, adapter, config, serve_mixed.NAMES)
        found[f"name {i}"] = adapter, path
    return found


def alone(base: pretrained.Pretrained, adapters: Any) -> Any:
    """Returns a function from a request to its answer by one adapter, or the base."""
    lora = jlora.lora(base.model.apply, jlora.LoraConfig())
    made = {
        fn: generation.make_generate(fn, base.model.config, stop=STOP, length=LIMIT)
        for fn in (lora.apply, base.model.apply)
    }

    def answer(request: Request) -> list[int]:
        none = request.adapter == BASE
        fn = base.model.apply if none else lora.apply
        own = () if none else (adapters[request.adapter][0],)
        # All prompts as wide as the longest, so that one program serves them.
        padding = LENGTH - LIMIT - len(request.prompt)
        tokens = jnp.asarray([[0] * padding + request.prompt], jnp.int32)
        row = made[fn]((base.variables, *own), tokens, jnp.asarray([padding]))
        found = np.asarray(row)[0].tolist()
        return found[: found.index(STOP)] if STOP in found else found

    return answer


def requests(names: list[str], count: int, vocab: int) -> list[Request]:
    random = np.random.default_rng(0)
    prompt = lambda: random.integers(3, vocab, random.integers(1, 9)).tolist()
    return [Request(i, names[i % len(names)], prompt()) for i in range(count)]


def test_forty_prompts_for_six_adapters_and_the_base(tiny, tmp_path: Path) -> None:
    """Adapters come and go while sequences run; a broken one is refused meanwhile."""
    batch = new_batch(tiny)
    adapters = saved(batch, tmp_path, 6)
    names = [*adapters]
    asked = requests([BASE, *names], 40, tiny.model.config.vocab)
    first = [r for r in asked if r.adapter in (BASE, *names[:4])]
    rest = [r for r in asked if r.adapter in names[4:]]
    for name in names[:4]:
        batch.load(name, adapters[name][1])
    with pytest.raises(ValueError, match="room for 4 adapters"):
        batch.load(names[4], adapters[names[4]][1])
    for request in first:
        batch.ask(request)
    with pytest.raises(
        ValueError, match=r"\d sequences still use the adapter 'name 0'"
    ):
        batch.remove(names[0])
    answers = [answer for _ in range(9) for answer in batch.step()]

    # In the midst of it: two leave as soon as nobody needs them, two others come.
    waiting, swapped = dict(zip(names[:2], names[4:], strict=True)), []
    broken = tmp_path / "broken"
    broken.mkdir()
    source = adapters[names[4]][1]
    config, tensors = "adapter_config.json", "adapter_model.safetensors"
    (broken / config).write_bytes((source / config).read_bytes())
    (broken / tensors).write_bytes((source / tensors).read_bytes()[:-100])
    while batch.waiting or any(batch.running) or waiting:
        for old, new in list(waiting.items()):
            try:
                batch.remove(old)
            except ValueError:
                continue
            with pytest.raises(jlora.AdapterError):
                batch.load("broken", broken)
            batch.load(new, adapters[new][1])
            del waiting[old]
            swapped.append(any(batch.running))
            for request in rest:
                if request.adapter == new:
                    batch.ask(request)
        answers += batch.step()
    assert all(swapped) and len(swapped) == 2
    assert "broken" not in batch.names
    assert batch._step._cache_size() == 1

    assert sorted(a.request.number for a in answers) == list(range(40))
    expected = alone(tiny, adapters)
    assert {a.request.number: a.tokens for a in answers} == {
        request.number: expected(request) for request in asked
    }
    assert len({tuple(a.tokens) for a in answers}) > 20
    lengths = {len(a.tokens) for a in answers}
    assert LIMIT in lengths


def test_what_is_refused(tiny) -> None:
    batch = new_batch(tiny)
    with pytest.raises(ValueError, match="there is no adapter 'x'"):
        batch.ask(Request(0, "x", [1]))
    with pytest.raises(ValueError, match="20 tokens asked; from 1 to 19 fit"):
        batch.ask(Request(0, BASE, [1] * 20))
    with pytest.raises(ValueError, match="there is no adapter 'x'"):
        batch.remove("x")
    one = jlora.take(batch.stacked, 0)
    batch.add("x", one)
    with pytest.raises(ValueError, match="an adapter 'x' already"):
        batch.add("x", one)
    wide = jlora.lora(batch.lora.fn, jlora.LoraConfig(rank=RANK + 1))
    example = batch._first(batch.example)
    shapes = jax.eval_shape(wide.init, jax.random.key(0), tiny.variables, *example)
    with pytest.raises(jlora.AdapterError, match=rf"rank {RANK + 1}, the stack {RANK}"):
        batch.add("y", jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes))
    assert batch.names == ["x", None, None, None]


@pytest.mark.examples
@needs_data("SMOLLM2 IS SERVED")
def test_on_smollm2() -> None:
    done = run_example("serve_mixed.py", "--length", "6")
    lines = re.findall(r"^\[(base|one|two)\] .* -> .*$", done, re.MULTILINE)
    assert sorted(lines) == ["base"] * 3 + ["one"] * 3 + ["two"] * 3


def test_help_says_what_it_does() -> None:
    done = run_example("serve_mixed.py", "--help")
    assert "--adapter NAME=" in done
    assert "not a server" in done
